"""Rows of every format become what a chat template takes; a malformed one names its row and its column."""

import json
from typing import Any

import pytest

from hylorada_jax.data.columns import OtherNames
from hylorada_jax.data.examples import Completion, Conversation, Document
from hylorada_jax.data.formats import read_row, recognise
from hylorada_jax.errors import DataError

USER, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": "x"}}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CHAT = Conversation("row", [USER, SAID], [False, True])
LAST = Conversation("row", [USER, SAID, USER, SAID], [False, False, False, True])
CALLED: list[dict[str, Any]] = [USER, {"role": "assistant", "tool_calls": [CALL]}]
CALLING = Conversation("row", CALLED, [False, True], TOOLS, {"enable_thinking": False})
# (format, columns, row): what it says.
ROWS: dict[str, Any] = {
    "text": ({"text": "a", "id": 3}, "text", Document("row", "a")),
    "blank": ({"text": " \n"}, "text", None),
    "null": ({"text": None}, "text", None),
    "prompt": ({"prompt": "a ", "completion": "b"}, "prompt-completion", Completion("row", "a ", "b")),
    "prompt beside what says nothing": (
        {"prompt": "a ", "completion": "b", "system": "", "tools": "[]", "chat_template_kwargs": None},
        "prompt-completion",
        Completion("row", "a ", "b"),
    ),
    "prompt of messages": (
        {"prompt": [USER, SAID, USER], "completion": [SAID]},
        "prompt-completion",
        LAST,
    ),
    "messages": ({"messages": [USER, SAID], "text": "no"}, "messages", CHAT),
    "messages in JSON": ({"messages": json.dumps([USER, SAID]), "tools": ""}, "messages", CHAT),
    "untrained": (
        {"messages": [USER, SAID | {"train": False}, USER, SAID | {"train": True}]},
        "messages",
        LAST,
    ),
    "of no weight": (
        {"messages": [USER, SAID | {"weight": 0, "train": None}, USER, SAID | {"weight": 1}]},
        "messages",
        LAST,
    ),
    "parts": ({"messages": [USER | {"content": [{"type": "text", "text": "Hi"}]}, SAID]}, "messages", CHAT),
    "tools": (
        {
            "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
            "tools": TOOLS,
            "chat_template_kwargs": {"enable_thinking": False},
        },
        "messages",
        CALLING,
    ),
    "tools in JSON": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "tool_calls": json.dumps(
                        [{"type": "function", "function": {"name": "f", "arguments": '{"a": 1, "b": "x"}'}}]
                    ),
                },
            ],
            "tools": json.dumps(TOOLS),
            "chat_template_kwargs": '{"enable_thinking": false}',
        },
        "messages",
        CALLING,
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1", "output": "Ho", "system": "s", "history": [["Hi", "Ho"]]},
        "alpaca",
        Conversation(
            "row",
            [{"role": "system", "content": "s"}, USER, SAID, {"role": "user", "content": "Add.\n\n1"}, SAID],
            [False, False, True, False, True],
        ),
    ),
    "alpaca, bare": ({"instruction": "Hi", "input": None, "output": "Ho"}, "alpaca", CHAT),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": ""},
        "sharegpt",
        CHAT,
    ),
    "sharegpt of roles": ({"conversations": [USER, SAID]}, "sharegpt", CHAT),
    "sharegpt of roles, calling": (
        {
            "conversations": [
                USER,
                {"role": "assistant", "content": "", "reasoning_content": "?", "tool_calls": [CALL]},
                {"role": "tool", "name": "f", "tool_call_id": "1", "content": "2", "from": None},
                {"from": "gpt", "value": "Ho", "reasoning_content": "!"},
            ],
        },
        "sharegpt",
        Conversation(
            "row",
            [
                USER,
                {"role": "assistant", "content": "", "reasoning_content": "?", "tool_calls": [CALL]},
                {"role": "tool", "name": "f", "tool_call_id": "1", "content": "2"},
                SAID | {"reasoning_content": "!"},
            ],
            [False, True, False, True],
        ),
    ),
    "a column of the system": (
        {"messages": [USER, SAID], "system": "s"},
        "messages",
        Conversation("row", [{"role": "system", "content": "s"}, USER, SAID], [False, False, True]),
    ),
    "a system twice": (
        {"conversations": [{"from": "system", "value": "s"}, USER, SAID], "system": "s"},
        "sharegpt",
        Conversation("row", [{"role": "system", "content": "s"}, USER, SAID], [False, False, True]),
    ),
    "a system before prompt and completion": (
        {"prompt": [USER], "completion": [SAID], "system": "s"},
        "prompt-completion",
        Conversation("row", [{"role": "system", "content": "s"}, USER, SAID], [False, False, True]),
    ),
    "sharegpt, untrained": (
        {"conversations": [USER | {"train": None}, SAID | {"weight": 0}, USER, SAID | {"weight": None}]},
        "sharegpt",
        LAST,
    ),
    "sharegpt, tools": (
        {
            "conversations": [
                {"from": "user", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1, "b": "x"}}'},
                {"from": "observation", "value": "2"},
                {"from": "chatgpt", "value": "Ho"},
            ],
            "tools": json.dumps(TOOLS),
        },
        "sharegpt",
        Conversation(
            "row",
            [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}, SAID],
            [False, True, False, True],
            TOOLS,
        ),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_say_what_their_format_says(name):
    row, form, expected = ROWS[name]
    before = json.dumps(row)
    assert recognise(row.keys(), "row") == form
    assert read_row(row, "row", form) == expected
    assert json.dumps(row) == before


def test_columns_may_have_other_names():
    body, says = OtherNames({"text": "body"}), OtherNames({"role": "speaker", "content": "says"})
    for row in ({"body": "a"}, {"text": "b", "body": "a"}, {"text": "a"}):
        assert read_row(row, "row", "text", body) == Document("row", "a")
    asked, said = {"speaker": "user", "says": "Hi"}, {"speaker": "assistant", "says": "Ho"}
    for answer in (said, {"role": "assistant", "content": "Ho"}):
        assert read_row({"messages": [asked, answer]}, "row", "messages", says) == CHAT
    # What a column is called does not rename what a message has, nor the other way round.
    texts, answers = OtherNames({"text": "content"}), OtherNames({"content": "text"})
    assert read_row({"messages": CHAT.messages}, "row", "messages", texts) == CHAT
    assert texts.columns({"content": "a"}) == {"text": "a"}
    assert answers.columns({"text": "a"}) == {"text": "a"}
    with pytest.raises(DataError, match=r"column body\.[\s\S]*row: columns txt"):
        read_row({"txt": "a"}, "row", "text", body)


WRONG: dict[str, Any] = {
    "no column": ("text", {"body": "a"}, "the column text[\\s\\S]*row: columns body"),
    "a number": ("text", {"text": 5}, "column text must hold text[\\s\\S]*row: 5 of type int"),
    "half of it": ("prompt-completion", {"prompt": "a", "completion": None}, "completion must[\\s\\S]*null"),
    "a text and a system": (
        "prompt-completion", {"prompt": "a", "completion": "b", "system": "s"},
        r"no system message[\s\S]*row: system\n[\s\S]*lists of messages",
    ),
    "a text, tools and a template": (
        "prompt-completion",
        {"prompt": "a", "completion": "b", "tools": json.dumps(TOOLS), "chat_template_kwargs": {"a": 1}},
        r"no system message[\s\S]*row: tools, chat_template_kwargs\n",
    ),
    "mixed": ("prompt-completion", {"prompt": [USER], "completion": "a"}, "completion must[\\s\\S]*row"),
    "not JSON": ("messages", {"messages": "a"}, "messages must[\\s\\S]*row: messages: Expecting value"),
    "no messages": ("messages", {"messages": []}, "a list of messages[\\s\\S]*row: \\[\\]"),
    "of text": ("messages", {"messages": ["a"]}, "a list of messages[\\s\\S]*row: \\['a'\\]"),
    "no role": ("messages", {"messages": [USER, {"content": "a"}]}, r"role[\s\S]*row: messages\[1\]: keys"),
    "a role": ("messages", {"messages": [{"role": 3}]}, r"role[\s\S]*row: messages\[0\]: 3 of type int"),
    "nothing said": (
        "messages", {"messages": [{"role": "user"}]}, r"content or tool_calls[\s\S]*messages\[0\]: a message",
    ),
    "an image": (
        "messages",
        {"messages": [USER | {"content": [{"type": "image"}]}]},
        r"messages of text[\s\S]*row: messages\[0\]\.content",
    ),
    "train": ("messages", {"messages": [USER | {"train": 0}]}, r"train must[\s\S]*row: message 0: 0"),
    "weight": ("messages", {"messages": [SAID | {"weight": 0.5}]}, r"weight must[\s\S]*row: message 0: 0\.5"),
    "calls": (
        "messages", {"messages": [{"role": "assistant", "tool_calls": "f(1)"}]}, "tool_calls as a list",
    ),
    "tools": ("messages", {"messages": [USER], "tools": 3}, "column tools must[\\s\\S]*row: 3 of type int"),
    "history": (
        "alpaca", {"instruction": "a", "output": "b", "history": [["a"]]}, r"pairs[\s\S]*row: \['a'\]",
    ),
    "a speaker": (
        "sharegpt",
        {"conversations": [{"from": "me", "value": "a"}]},
        r"human[\s\S]*row: conversations\[0\]: 'me'",
    ),
    "no value": (
        "sharegpt", {"conversations": [{"from": "gpt"}]}, r"value is text[\s\S]*conversations\[0\]: null",
    ),
    "a call": (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "[]"}]},
        r"as JSON[\s\S]*conversations\[0\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_malformed_row_names_itself_its_column_and_what_was_expected(name):
    form, row, said = WRONG[name]
    with pytest.raises(DataError, match=said) as error:
        read_row(row, "row", form)
    assert error.value.remedy


def test_columns_of_no_format_are_refused_with_those_that_there_are():
    with pytest.raises(DataError, match=r"messages \(messages\)[\s\S]*data\.csv: columns id, body"):
        recognise(["id", "body"], "data.csv")
