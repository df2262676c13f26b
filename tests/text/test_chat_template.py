"""Chat templates: what transformers makes of conversations, where templates are found, and those that misbehave."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from paths import GOLDENS, ROOT

from jaxpaged.api.messages import read_conversation
from jaxpaged.text.chat_template import ChatTemplates, find_chat_templates

GOLDEN = json.loads((GOLDENS / "chat.json").read_text())
HELLO = [{"role": "user", "content": "hello"}]
NAMES = "{% for m in messages %}{{ m.role }} {{ m.content }};{% endfor %}"


@pytest.fixture(scope="module")
def golden_templates(tmp_path_factory):
    """The templates of the goldens by name, in one directory."""
    directory = tmp_path_factory.mktemp("model")
    (directory / "tokenizer_config.json").write_text(json.dumps(GOLDEN["special_tokens"]))
    (directory / "additional_chat_templates").symlink_to(ROOT / "tests" / "chat_templates")
    return ChatTemplates(directory)


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    return ChatTemplates(tmp_path_factory.mktemp("empty"), seconds=0.3)


def render(templates, messages=HELLO, **given):
    return templates.render(read_conversation({"messages": messages, **given}))


@pytest.mark.parametrize("template", sorted({golden["template"] for golden in GOLDEN["goldens"]}))
def test_a_conversation_becomes_the_text_of_transformers(golden_templates, template):
    of_template = [golden for golden in GOLDEN["goldens"] if golden["template"] == template]
    assert len(of_template) >= 14
    for golden in of_template:
        conversation = read_conversation({**GOLDEN["conversations"][golden["name"]], "chat_template": template})
        if "text" in golden:
            assert golden_templates.render(conversation) == golden["text"], golden["name"]
        else:
            with pytest.raises(ValueError, match="^the chat template (says|fails): ") as error:
                golden_templates.render(conversation)
            assert golden["error"].partition(": ")[2] in str(error.value)


def test_the_goldens_are_of_ten_families():
    assert len({golden["template"] for golden in GOLDEN["goldens"]}) == 10
    assert sum("text" in golden for golden in GOLDEN["goldens"]) > 120


def write_config(directory, **values):
    (directory / "tokenizer_config.json").write_text(json.dumps(values))


def test_special_tokens_are_variables_however_they_are_spelt(tmp_path):
    template = "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}"
    write_config(tmp_path, bos_token={"content": "<s>", "special": True}, pad_token=None, chat_template=template)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert render(ChatTemplates(tmp_path)) == "<s></s>False"


def test_named_templates_are_chosen_by_name_and_by_tools(tmp_path):
    named = [{"name": name, "template": name.upper()} for name in ("default", "tool_use", "rag")]
    write_config(tmp_path, chat_template=named)
    templates = ChatTemplates(tmp_path)
    assert render(templates) == "DEFAULT"
    assert render(templates, tools=[{"type": "function"}]) == "TOOL_USE"
    assert render(templates, chat_template="rag") == "RAG"
    assert render(templates, chat_template="{{ messages[0].content }}") == "hello"


def test_files_of_templates_go_before_the_configuration(tmp_path):
    write_config(tmp_path, chat_template="of the configuration")
    (tmp_path / "chat_template.jinja").write_text("of the file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "other.jinja").write_text("another")
    assert render(ChatTemplates(tmp_path)) == "of the file"
    assert render(ChatTemplates(tmp_path), chat_template="other") == "another"


def test_a_tokenizer_that_was_given_brings_its_own_template(tmp_path):
    model, tokenizer, bare = (tmp_path / name for name in ("model", "tokenizer", "bare"))
    for directory in (model, tokenizer, bare):
        directory.mkdir()
    write_config(model, chat_template="of the model")
    write_config(tokenizer, chat_template="of the tokenizer")
    assert render(find_chat_templates(tokenizer, model)) == "of the tokenizer"
    for other in (bare, None, tokenizer / "tokenizer.json", object()):
        assert render(find_chat_templates(other, model)) == "of the model"


def test_what_is_missing_or_wrong_in_a_directory_is_said(tmp_path, templates):
    with pytest.raises(ValueError, match="has no chat template, neither chat_template.jinja nor one in tokenizer_conf"):
        render(templates)
    write_config(tmp_path, chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(ValueError, match="there is no default chat template: choose one of rag"):
        render(ChatTemplates(tmp_path))
    write_config(tmp_path, chat_template=3)
    with pytest.raises(ValueError, match="chat_template must be a template or a list of objects with name and temp"):
        render(ChatTemplates(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not valid JSON"):
        render(ChatTemplates(tmp_path))
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat_template.jinja is not UTF-8: invalid start byte at byte 0"):
        render(ChatTemplates(tmp_path))


@pytest.mark.parametrize(
    "template, said",
    [
        ("{{ raise_exception('no system here') }}", "the chat template says: no system here"),
        ("a\n{% if %}", "the chat template has a mistake in line 2: Expected an expression"),
        ("{{ nobody.name }}", "the chat template fails: 'nobody' is undefined"),
        ("{{ 1 / 0 }}", "the chat template fails: division by zero"),
        (
            "{{ messages.append(1) }}",
            "the chat template fails: access to attribute 'append' of 'list' object is unsafe",
        ),
        (
            "{{ ''.__class__.__mro__ }}",
            "the chat template fails: access to attribute '__class__' of 'str' object is unsafe",
        ),
        ("{% set n = namespace() %}{% set n.__init__ = 1 %}", "the chat template fails: a name of a namespace cannot"),
        ("{% include 'x' %}", "the chat template fails: no loader for this environment specified"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template calls itself without end"),
        ("{{ range(10**6) }}", "the chat template fails: Range too big"),
        ("{{ 'a' * 10**11 }}", "the chat template takes more than 2 GiB of memory"),
        ("{% for i in range(9999) %}{{ 'a' * 99999 }}{% endfor %}", "it writes more than 16777216 characters"),
        ("", "the chat template makes an empty text of these messages"),
    ],
)
def test_a_template_that_fails_is_one_clear_error(templates, template, said):
    with pytest.raises(ValueError) as error:
        render(templates, chat_template=template or "{{ '' }}")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "endless",
    ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ 9 ** (9 ** 9) }}"],
    ids=["loops", "one long instruction"],
)
def test_a_template_without_end_is_ended_in_any_thread_and_the_next_one_renders(templates, endless):
    said = []

    def ask():
        try:
            render(templates, chat_template=endless)
        except ValueError as error:
            said.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(60)
    assert said == ["the chat template takes more than 0.3 s: it may loop for ever"]
    assert render(templates, chat_template=NAMES) == "user hello;"


def test_threads_get_their_own_texts(templates):
    texts = {}

    def ask(name):
        texts[name] = [render(templates, [{"role": name, "content": "x"}], chat_template=NAMES) for _ in range(20)]

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {name: [f"{name} x;"] * 20 for name in ("a", "b", "c")}


def test_a_process_that_was_killed_is_said_and_replaced(templates):
    render(templates, chat_template=NAMES)
    os.kill(templates._process._process.pid, 9)
    with pytest.raises(ValueError, match="the process that does it ended with code -9"):
        render(templates, chat_template=NAMES)
    assert render(templates, chat_template=NAMES) == "user hello;"


def test_the_process_ends_with_ours_however_that_ends():
    program = (
        "from jaxpaged.text.template_process import TemplateProcess\n"
        "import os\n"
        "process = TemplateProcess()\n"
        "process.render('x', {'messages': []})\n"
        "print(process._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -9
    deadline = time.monotonic() + 30
    while is_running(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(done.stdout))


def test_a_process_that_was_forked_off_leaves_ours_its_process():
    program = (
        "from jaxpaged.text.template_process import TemplateProcess\n"
        "import os, sys\n"
        "process = TemplateProcess()\n"
        "process.render('x', {'messages': []})\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait()\n"
        "print(process.render('still here', {'messages': []}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.stdout == "still here\n"


def is_running(pid):
    """Whether a process is there that is no zombie: nobody may be left who waits for it."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_parts_become_one_text_for_a_template_that_knows_none(templates):
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    assert render(templates, parts, chat_template=NAMES) == "user one\ntwo;"
    loops = "{% for m in messages %}{% for part in m['content'] %}[{{ part.text }}]{% endfor %}{% endfor %}"
    assert render(templates, parts, chat_template=loops) == "[one][two]"


def test_a_message_that_is_to_go_on_stays_open(templates):
    messages = [*HELLO, {"role": "assistant", "content": "Sure, "}]
    assert render(templates, messages, chat_template=NAMES, continue_final_message=True) == (
        "user hello;assistant Sure, "
    )
    trims = "{% for m in messages %}{{ m.content | trim }}|{% endfor %}"
    assert render(templates, messages, chat_template=trims, continue_final_message=True) == "hello|Sure,"
    with pytest.raises(ValueError, match="continue_final_message: the chat template leaves out the end of the last"):
        render(templates, messages, chat_template="{{ messages[0].content }}", continue_final_message=True)
