"""`jaxpaged chat`: lines in, answers out, what is remembered, what Control-C stops, what is refused at once."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from paths import ROOT
from toy import save_toy_checkpoint

from jaxpaged import LLM, SamplingParams
from jaxpaged.cli.chat import shown
from jaxpaged.cli.main import main

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and no_system %}"
    "{{ raise_exception('no system message') }}{% endif %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
FLAGS = ("--max-tokens", "6", "--temperature", "0")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = save_toy_checkpoint(tmp_path_factory.mktemp("model") / "toy")
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="module")
def llm(model):
    return LLM(model, page_size=4, num_pages=200, max_num_seqs=16, max_model_len=64)


@pytest.fixture
def chat(model, llm, monkeypatch, capsys):
    """Exit code, standard output and error of the command with these lines as its input."""

    def chat(*lines, flags=FLAGS):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = main(["chat", str(model), *flags], make_llm=lambda **_: llm)
        return code, *capsys.readouterr()

    return chat


def answer_to(llm, *messages):
    """The answer to a user's message, an answer, a user's message, ..."""
    conversation = [{"role": "au"[i % 2 == 0], "content": text} for i, text in enumerate(messages)]
    (output,) = llm.chat(conversation, SamplingParams(temperature=0, max_tokens=6))
    return output.outputs[0].text


def test_each_line_is_answered_with_all_that_was_said_before(llm, chat):
    code, out, err = chat("hi", "", "go on")
    first = answer_to(llm, "hi")
    assert (code, err) == (0, "")
    assert out == first + "\n" + answer_to(llm, "hi", first, "go on") + "\n"


def test_reset_forgets_and_exit_ends(llm, chat):
    code, out, _ = chat("hi", "/reset", "go on", "/exit", "never")
    assert (code, out) == (0, answer_to(llm, "hi") + "\n" + answer_to(llm, "go on") + "\n")


def test_a_system_message_stays_when_the_conversation_is_forgotten(llm, chat):
    code, out, _ = chat("hi", "/reset", "hi", flags=(*FLAGS, "--system", "be brief"))
    conversation = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    (output,) = llm.chat(conversation, SamplingParams(temperature=0, max_tokens=6))
    assert (code, out) == (0, (output.outputs[0].text + "\n") * 2)


def test_a_command_that_there_is_not_is_said_and_not_asked(chat):
    assert chat("/rest") == (
        0, "", "jaxpaged: there is no /rest: /reset forgets the conversation, /exit ends it\n",
    )  # fmt: skip


def test_a_conversation_that_became_too_long_is_one_line(chat):
    code, out, err = chat("x" * 70)
    assert (code, out) == (2, "") and err.startswith("jaxpaged: line 1: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "flags, said",
    [
        (
            ["--system", "x", "--chat-template-kwargs", '{"no_system": true}'],
            "jaxpaged: the chat template says: no system message",
        ),
        (["--chat-template-kwargs", "{"], "jaxpaged: --chat-template-kwargs is not JSON: "),
        (["--chat-template-kwargs", "[1]"], "jaxpaged: chat_template_kwargs must be an object of names and values"),
        (["--chat-template", "/nowhere"], "jaxpaged: --chat-template: /nowhere: No such file or directory"),
        (["--temperature", "-1"], "jaxpaged: temperature must be"),
        (["--n", "2"], "jaxpaged: unrecognized arguments: --n 2"),
    ],
)
def test_what_is_wrong_is_one_line_before_the_model_is_loaded(model, capfd, flags, said):
    def make_llm(**_):
        raise AssertionError("loaded")

    assert main(["chat", str(model), *flags], make_llm=make_llm) == 2
    err = capfd.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1


def test_a_model_without_a_template_is_refused_with_what_to_do(tmp_path, capfd):
    assert main(["chat", str(tmp_path)], make_llm=None) == 2
    assert (
        "has no chat template, neither chat_template.jinja nor one in tokenizer_config.json" in capfd.readouterr().err
    )


def test_a_terminal_gets_no_characters_that_command_it():
    assert shown("a\x1b[2Jb\r\n\tü\x9b") == "a\ufffd[2Jb\ufffd\n\tü\ufffd"


def read_until(master, text, seconds=120):
    seen, deadline = b"", time.monotonic() + seconds
    while text.encode() not in seen:
        assert time.monotonic() < deadline, seen
        seen += os.read(master, 4096)
    return seen.decode()


def test_control_c_on_a_terminal_stops_the_answer_alone(model):
    """The fake's answers never end by themselves."""
    program = (
        "import sys, time\n"
        "from jaxpaged.cli.main import main\n"
        "class Endless:\n"
        "    def __init__(self, **_): pass\n"
        "    def stream(self, prompt, params):\n"
        "        yield f'{len(prompt[\"messages\"])} messages: '\n"
        "        while True:\n"
        "            time.sleep(0.01)\n"
        "            yield '.'\n"
        f"sys.exit(main(['chat', {str(model)!r}], make_llm=Endless))"
    )
    master, slave = pty.openpty()
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    try:
        read_until(master, "> ")
        for number in (1, 3):
            os.write(master, b"hi\n")
            read_until(master, f"{number} messages: ..")
            process.send_signal(signal.SIGINT)
            read_until(master, "(stopped)\r\n> ")
        process.send_signal(signal.SIGINT)  # of a line that is being written
        read_until(master, "> ")
        os.write(master, b"/exit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
