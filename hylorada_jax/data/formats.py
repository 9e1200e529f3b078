"""The formats of data, by the columns of their rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hylorada_jax.data.columns import TELLING, Format, OtherNames, RowReader, kind_of, names, with_arguments
from hylorada_jax.data.examples import Completion, Document, Example
from hylorada_jax.errors import DataError
from hylorada_jax.text import parse_json, shown, well_formed

# Of sharegpt's "from".
_SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "bot": "assistant", "function_call": "assistant", "observation": "tool",
    "tool": "tool",
}  # fmt: skip


def recognise(columns: Collection[str], place: str) -> Format:
    """The format of a table, by the names of its columns.

    Args:
        columns: their names.
        place: where the table is, for the error.

    Returns:
        "messages" for a column ``messages``; "sharegpt" for ``conversations``; "prompt-completion" for
        ``prompt`` and ``completion``; "alpaca" for ``instruction`` and ``output``; "text" for ``text``.

    Raises:
        DataError: the columns are none of these.

    Example:
        >>> recognise(["id", "prompt", "completion"], "data.jsonl")
        'prompt-completion'
    """
    for form, telling in TELLING.items():
        if set(telling) <= set(columns):
            return form
    known = "; ".join(f"{' and '.join(telling)} ({form})" for form, telling in TELLING.items())
    raise DataError(
        f"Data must have the columns of a format: {known}.",
        f"{place}: columns {names(columns)}",
        "Rename the columns, or say which they are, as in --columns text=body.",
    )


def read_row(
    row: Mapping[str, Any], place: str, form: Format, others: OtherNames | None = None
) -> Example | None:
    """What a row says.

    Args:
        row: its values by column; where JSON is meant, a string of JSON serves as well.
        place: where the row is: its name, and what an error calls it.
        form: the format.
        others: other names of the format's columns and of a message's keys.

    Returns:
        A text, a completion or a conversation; None for a text that is null or blank.

    Raises:
        DataError: a column is missing or holds something else; it names the row, the column, and what was
            expected.

    Example:
        >>> row = {"instruction": "Add.", "input": "1 2", "output": "3"}
        >>> [message["content"] for message in read_row(row, "data.json[0]", "alpaca").messages]
        ['Add.\\n\\n1 2', '3']
    """
    read = RowReader(row, place, others or OtherNames({}))
    match form:
        case "text":
            text = read.text("text", null=True)
            return Document(place, text) if text and text.strip() else None
        case "prompt-completion":
            if isinstance(read.value("prompt"), str) and not (
                read.are_messages("prompt") and read.are_messages("completion")
            ):
                read.refuse_of_messages()
                return Completion(place, read.text("prompt") or "", read.text("completion") or "")
            prompt, completion = (read.messages(column) for column in ("prompt", "completion"))
            return read.conversation(prompt + completion, first=len(prompt))
        case "messages":
            return read.conversation(read.messages("messages"))
        case "alpaca":
            return read.conversation(_alpaca(read))
        case "sharegpt":
            return read.conversation(_sharegpt(read))


def _alpaca(row: RowReader) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for pair in row.json("history", list, "a list of pairs, or JSON of it") or []:
        if not isinstance(pair, Sequence) or [type(part) for part in pair] != [str, str]:
            raise row.error("history", "pairs of an instruction and its answer", shown(pair))
        messages += _exchange(*map(well_formed, pair))
    asked = "\n\n".join(filter(None, (row.text("instruction"), row.optional("input"))))
    return messages + _exchange(asked, row.text("output") or "")


def _exchange(user: str, assistant: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _sharegpt(row: RowReader) -> list[dict[str, Any]]:
    messages = []
    for number, given in enumerate(row.listed("conversations")):
        where = f"conversations[{number}]"
        message = {key: value for key, value in given.items() if value is not None}
        speaker = message.pop("from", message.get("role"))
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise row.error(
                "conversations", f"messages from {', '.join(_SPEAKERS)}", f"{where}: {shown(speaker)}"
            )
        message["role"] = _SPEAKERS[speaker]
        said = message.pop("value", message.get("content"))
        if said is None and "tool_calls" not in message:
            raise row.error("conversations", "messages whose value is text", f"{where}: null")
        if speaker == "function_call":
            message.pop("content", None)
            message["tool_calls"] = _called(row, said, where)
        elif said is not None:
            message["content"] = said
        messages.append(row.message(message, where))
    return messages


def _called(row: RowReader, value: Any, where: str) -> list[dict[str, Any]]:
    expected = "a function_call as JSON with a name and arguments"
    if not isinstance(value, str):
        raise row.error("conversations", expected, f"{where}: {kind_of(value)}")
    try:
        parsed = parse_json(value)
    except ValueError as error:
        raise row.error("conversations", expected, f"{where}: {error}") from error
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise row.error("conversations", expected, f"{where}: {shown(value)}")
    return [{"type": "function", "function": with_arguments(call)} for call in calls]
