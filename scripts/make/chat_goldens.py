"""Makes tests/goldens/chat.json: what transformers makes of conversations by the templates of tests/chat_templates.

    python scripts/make/chat_goldens.py [--output tests/goldens/chat.json]

Needs transformers and jinja2, nothing else (no torch). The templates are our own, each in the manner of a family that
people use: its constructs, not its words. Every template gets every conversation; where it raises, that is the golden.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import tokenizers
import transformers

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "tests" / "chat_templates"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The "weather" of a place, in °C & words <now>.',
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "a town"},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["place"],
        },
    },
}
SYSTEM = {"role": "system", "content": " Answer in one word. "}
HELLO = {"role": "user", "content": "Hello,\nwie heißt du? <b>&amp;</b> "}
ANSWER = {"role": "assistant", "content": "Ada  "}
AGAIN = {"role": "user", "content": "And 日本語?"}
CALL = {
    "role": "assistant",
    "tool_calls": [
        {
            "id": "abcdef123",
            "type": "function",
            "function": {"name": "weather", "arguments": {"place": "Zürich", "days": [1, 2]}},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "abcdef123", "name": "weather", "content": '{"sky": "blue"}'}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nAda"}
REASONED = {"role": "assistant", "content": "Ada", "reasoning_content": "a name, then"}
DATE = {"date_string": "29 Nov 2026"}

#: Name -> what `LLM.chat` is given; the date is given to every template.
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one question": {"messages": [HELLO]},
    "a system message": {"messages": [SYSTEM, HELLO]},
    "turns": {"messages": [SYSTEM, HELLO, ANSWER, AGAIN]},
    "without the beginning of an answer": {"messages": [HELLO, ANSWER], "add_generation_prompt": False},
    "a message to go on with": {"messages": [HELLO, ANSWER], "continue_final_message": True},
    "two questions in turn": {"messages": [HELLO, AGAIN]},
    "tools": {"messages": [SYSTEM, HELLO], "tools": [WEATHER, WEATHER]},
    "a call and its result": {"messages": [SYSTEM, HELLO, CALL, RESULT], "tools": [WEATHER]},
    "a call of no known tools": {"messages": [HELLO, CALL, RESULT]},
    "thoughts in the text": {"messages": [HELLO, THOUGHT, AGAIN]},
    "thoughts of their own": {"messages": [HELLO, REASONED], "add_generation_prompt": False},
    "no thinking": {"messages": [HELLO], "chat_template_kwargs": {"enable_thinking": False}},
    "documents": {
        "messages": [SYSTEM, HELLO],
        "documents": [{"title": "One", "text": "first"}, {"title": "Two", "text": "second"}],
    },
    "variables": {
        "messages": [SYSTEM, HELLO],
        "tools": [WEATHER],
        "chat_template_kwargs": {"tools_in_user_message": False, "bos_token": "<begin>"},
    },
}
#: For templates that read them; in others parts are joined, which transformers does not do.
PARTS = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}]}]
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "tests" / "goldens" / "chat.json")
    args = parser.parse_args(argv)
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **SPECIAL)
    goldens = []
    for path in sorted(TEMPLATES.glob("*.jinja")):
        given = dict(CONVERSATIONS)
        if path.stem == "turns":
            given["parts"] = PARTS
        for name, conversation in given.items():
            goldens.append({"template": path.stem, "name": name, **rendered(tokenizer, path.read_text(), conversation)})
    content = {
        "transformers": transformers.__version__,
        "special_tokens": SPECIAL,
        "conversations": {
            name: {**one, "chat_template_kwargs": {**DATE, **one.get("chat_template_kwargs", {})}}
            for name, one in {**CONVERSATIONS, "parts": PARTS}.items()
        },
        "goldens": goldens,
    }
    args.output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(goldens)} goldens, of which {sum('error' in golden for golden in goldens)} are errors")
    return 0


def rendered(tokenizer: Any, template: str, conversation: dict[str, Any]) -> dict[str, str]:
    given = {name: value for name, value in conversation.items() if name not in ("messages", "chat_template_kwargs")}
    given.setdefault("add_generation_prompt", not given.get("continue_final_message", False))
    given |= {**DATE, **conversation.get("chat_template_kwargs", {})}
    try:
        text = tokenizer.apply_chat_template(conversation["messages"], chat_template=template, tokenize=False, **given)
    except Exception as error:  # noqa: BLE001 - whatever comes of a template
        return {"error": f"{type(error).__name__}: {error}".partition("Final message")[0]}
    return {"text": text}


if __name__ == "__main__":
    raise SystemExit(main())
