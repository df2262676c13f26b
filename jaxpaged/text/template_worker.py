"""The process that renders chat templates, run as a script: a line of JSON in, a line of JSON out.

A template is a stranger's program. jinja2's sandbox keeps it from Python's insides, but not from looping for ever or
from filling memory, and no thread can be stopped from outside. So it runs in a process, with limits that the system
keeps: of processor time, whose end is a signal that kills the process, and of memory. It imports nothing of jaxpaged,
since it starts while somebody waits.

Everything is set up as transformers sets it up: blocks trimmed, `break` and `continue`, `{% generation %}` around what
an assistant says (no matter here), `raise_exception`, `strftime_now`, and a `tojson` that escapes nothing.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

MAX_CHARACTERS = 2**24
MAX_BYTES = 2**31
#: All that code in a sandbox can raise.
FAILURES = (
    jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


class GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` is what stands between."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> str:
        return caller()


class SafeNamespace(jinja2.utils.Namespace):
    """A namespace without names of Python's insides."""

    def __init__(*args: Any, **values: Any):  # as jinja2's own, which may have a value of the name self
        self, rest = args[0], args[1:]
        given = dict(*rest, **values)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a name of a namespace cannot begin with an underscore: {name!r}")


def _make_dict(*args: Any, **values: Any) -> dict[Any, Any]:
    return dict(*args, **values)


class Raised(jinja2.TemplateError):
    """What a template itself raised."""


def _raise(message: object) -> None:
    raise Raised(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise, strftime_now=_now, dict=_make_dict, namespace=SafeNamespace)
    return environment


ENVIRONMENT = make_environment()


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> tuple[jinja2.Template, bool]:
    """The template, and whether it reads the parts of a content that is a list."""
    return ENVIRONMENT.from_string(source), any(map(_is_content, _looped_over(source)))


def _looped_over(source: str) -> Iterable[Any]:
    return (loop.iter for loop in ENVIRONMENT.parse(source).find_all(jinja2.nodes.For))


def _is_content(node: Any) -> bool:
    """message.content, message["content"], or a variable that is called so."""
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    return isinstance(node, jinja2.nodes.Name) and "content" in node.name


def render(source: str, variables: dict[str, Any]) -> str:
    template, reads_parts = compiled(source)
    if not reads_parts:
        variables = {**variables, "messages": [_joined(message) for message in variables["messages"]]}
    pieces, length = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise ValueError(f"it writes more than {MAX_CHARACTERS} characters")
    return "".join(pieces)


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its parts of text in lines of one text, for templates that know no parts."""
    content = message.get("content")
    return {**message, "content": "\n".join(part["text"] for part in content)} if isinstance(content, list) else message


def answer(request: dict[str, Any]) -> dict[str, str]:
    """{"text": ...}, or {"error": ...} in words."""
    try:
        return {"text": render(request["source"], request["variables"])}
    except Raised as error:
        return {"error": f"says: {error}"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"has a mistake in line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"error": f"takes more than {MAX_BYTES >> 30} GiB of memory"}
    except RecursionError:
        return {"error": "calls itself without end"}
    except FAILURES as error:
        return {"error": f"fails: {error or type(error).__name__}"}


def main() -> None:
    seconds = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to all: this one ends with its input
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MAX_BYTES if most == resource.RLIM_INFINITY else min(MAX_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reply = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
