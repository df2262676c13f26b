"""Conversations as people write them: which message is wrong, which key of it, and what a template then sees."""

import pytest

from jaxpaged.api.messages import read_conversation, read_messages

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "messages, said",
    [
        (None, "messages must be a list of objects with a role and a content, got None"),
        ("hi", "messages must be a list of objects with a role and a content, got 'hi'"),
        ([], "messages is empty: there is nothing to answer"),
        ([USER, "hi"], "message 1 must be an object with a role and a content, got 'hi'"),
        ([{"content": "hi"}], "message 0 has no role: a role is a text, such as system, user or assistant"),
        ([{"role": 3, "content": "hi"}], "message 0 has the role 3: a role is a text"),
        ([USER, {"role": "user"}], "message 1 has no content, and no tool_calls, which alone can do without"),
        ([{"role": "user", "content": None}], "message 0 has no content"),
        ([{"role": "user", "content": 7}], "message 0: content must be a text or a list of parts, got 7"),
        ([{"role": "user", "content": ["hi"]}], "message 0: part 0 of its content must be an object such as"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
            "message 0: part 1 of its content is of type 'image_url': only \"text\" is possible, since jaxpaged runs",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 0: part 0 of its content has no text, but None"),
        ([{"role": "user", "content": "\ud800"}], "message 0: content has a character that is not Unicode text"),
        ([{"role": "assistant", "tool_calls": 1}], "message 0: tool_calls must be a list, got 1"),
        ([{"role": "assistant", "tool_calls": [1]}], "message 0: tool call 0 must be an object, got 1"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "message 0: tool call 0: its arguments are no JSON: '{'",
        ),
        ([{**USER, "name": {1, 2}}], "message 0 must be of plain values, as JSON has them"),
    ],
)
def test_what_is_wrong_is_named_by_message_and_key(messages, said):
    with pytest.raises(ValueError) as error:
        read_messages(messages)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"prompt": "x"}, "'prompt' does not go with messages, only tools, documents, chat_template"),
        ({"tools": {}}, "tools must be a list, got {}"),
        ({"tools": ["f"]}, "tools: number 0 must be an object, a JSON schema, got 'f'"),
        ({"documents": [1]}, "documents: number 0 must be an object, its title and text, got 1"),
        ({"chat_template": 1}, "chat_template must be the text of a template or a name, got 1"),
        ({"add_generation_prompt": 1}, "add_generation_prompt must be True or False, got 1"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be an object of names and values, got [1]"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs has tools, which is an argument of its own"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt begins a new message"),
    ],
)
def test_what_stands_beside_messages_is_checked(given, said):
    with pytest.raises(ValueError) as error:
        read_conversation({"messages": [USER], **given})
    assert str(error.value).startswith(said)


def test_arguments_of_calls_that_are_text_become_the_object_that_templates_expect():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    (message,) = read_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message == {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
    }


def test_what_was_given_is_copied_and_none_is_left_out():
    given = [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]
    read = read_messages(given)
    given[0]["content"][0]["text"] = "b"
    assert read == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
