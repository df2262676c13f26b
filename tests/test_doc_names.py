"""The pages for who comes from elsewhere name what there is: each name in a column "here" exists, or is a flag."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator

import pytest
from paths import ROOT

import jaxpaged
from jaxpaged.api.names import VLLM_CHAT, VLLM_OPTIONS, VLLM_REQUESTS
from jaxpaged.cli.errors import UsageError
from jaxpaged.cli.main import COMMANDS, make_parser
from jaxpaged.config.options import OPTION_NAMES
from jaxpaged.host.account.accounting import RunStats

PAGES = ("docs/from_vllm.md", "docs/from_transformers.md")
#: What names in expressions stand for.
KINDS = {
    "llm": jaxpaged.LLM, "output": jaxpaged.RequestOutput, "sample": jaxpaged.CompletionOutput,
    **{name: getattr(jaxpaged, name) for name in jaxpaged.__all__ if name != "__version__"},
}  # fmt: skip
CALLS = ("generate", "generate_iter", "chat", "stream", "beam_search", "watch_beams")
PROPERTIES = {(jaxpaged.LLM, "last_run"): RunStats}


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def here(page: str) -> Iterator[str]:
    """The code of the second column of all tables whose second column is headed "here"."""
    is_ours = False
    for line in (ROOT / page).read_text().splitlines():
        cells = [cell.strip() for cell in line.split(" | ")]
        if not line.startswith("|"):
            is_ours = False
        elif len(cells) > 1 and cells[1].rstrip(" |") == "here":
            is_ours = True
        elif is_ours:
            yield from spans(cells[1])


def parameters(call: object) -> set[str]:
    names = set(inspect.signature(call).parameters)  # pyright: ignore[reportArgumentType]
    return names | set(OPTION_NAMES) if call in (jaxpaged.LLM, jaxpaged.LLM.rebuild) else names


def words() -> set[str]:
    """What may stand alone: options, parameters of requests, arguments of calls."""
    calls = [getattr(jaxpaged.LLM, name) for name in CALLS]
    kinds = [jaxpaged.LLM, jaxpaged.SamplingParams, jaxpaged.BeamSearchParams, *calls]
    return set().union(*map(parameters, kinds)) - {"self", "options"}


def check_expression(node: ast.expr) -> object:
    """The kind of what it is, None where it does not matter; AssertionError for a name that there is not."""
    if isinstance(node, ast.Name):
        assert node.id in KINDS, node.id
        return KINDS[node.id]
    if isinstance(node, ast.Attribute):
        kind = check_expression(node.value)
        if dataclasses.is_dataclass(kind):
            fields = typing.get_type_hints(kind)
            assert node.attr in fields or hasattr(kind, node.attr), node.attr
            return fields.get(node.attr)
        assert hasattr(kind, node.attr), node.attr
        return PROPERTIES.get((kind, node.attr), getattr(kind, node.attr))  # pyright: ignore[reportArgumentType]
    assert isinstance(node, ast.Call), ast.dump(node)
    call = check_expression(node.func)
    assert {keyword.arg for keyword in node.keywords} <= parameters(call), ast.unparse(node)
    return None


def check_command(text: str) -> None:
    command, *rest = text.split()[1:]
    assert command in COMMANDS, text
    make_parser().parse_args([command, *rest])


def check_span(text: str) -> None:
    if text.startswith("jaxpaged "):
        check_command(text)
    elif re.fullmatch(r"\w+(=.*)?", text):
        assert text.partition("=")[0] in words(), text
    else:
        check_expression(ast.parse(text, mode="eval").body)


@pytest.mark.parametrize("page", PAGES)
def test_every_name_of_ours_is_there(page):
    named = list(here(page))
    assert len(named) > 50
    for text in named:
        check_span(text)


@pytest.mark.parametrize(
    "text",
    [
        "gpu_memory_utilization", "LLM(block_size=16)", "llm.enqueue", "llm.generate(prompts, use_tqdm=True)",
        "output.kv.blocks", "llm.last_run.gone", "sample.score.gone", "jaxpaged serve M",
        "jaxpaged generate M --inputs a",
    ],
)  # fmt: skip
def test_a_name_that_there_is_not_is_found(text):
    with pytest.raises((AssertionError, UsageError)):
        check_span(text)


def test_every_name_of_vllm_that_a_call_answers_is_on_the_page():
    named = set(re.findall(r"\w+", (ROOT / "docs" / "from_vllm.md").read_text()))
    slips = {"max_seq_len", "max_num_batched_seqs"}  # nobody's names, but often meant
    of_the_guide = {"tensor_parallel_size", "revision", "tokenizer_revision", "download_dir", "hf_token"}
    answered = {*VLLM_OPTIONS, *VLLM_REQUESTS, *VLLM_CHAT} - slips - of_the_guide
    assert answered - named == set()


def test_what_the_page_says_is_refused_is_refused_with_a_remedy():
    text = (ROOT / "docs" / "from_vllm.md").read_text()
    refused = spans(text.partition("These arguments are refused by name")[2])
    assert len(refused) > 20
    assert [name for name in refused if name not in {**VLLM_OPTIONS, **VLLM_REQUESTS, **VLLM_CHAT}] == []
