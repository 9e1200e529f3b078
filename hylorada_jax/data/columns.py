"""The values of a row by its columns, each of the kind that a format expects or an error that names it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

from hylorada_jax.data.examples import Conversation
from hylorada_jax.errors import DataError
from hylorada_jax.models.chat_template import OF_THE_CONVERSATION, not_beside
from hylorada_jax.text import cut, parse_json, shown, well_formed

Format = Literal["text", "prompt-completion", "messages", "alpaca", "sharegpt"]

# The columns by which a format is recognised, the most telling first.
TELLING: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
COLUMNS = frozenset(
    {column for telling in TELLING.values() for column in telling}
    | {"tools", "chat_template_kwargs", "system", "input", "history"}
)
"""All that a format reads."""


def names(columns: Collection[str]) -> str:
    """The names of columns, as many and as much of each as a message has room for."""
    short = [cut(well_formed(str(name)), 40) for name in columns]
    return ", ".join(short[:12]) + (f", … ({len(short)})" if len(short) > 12 else "")


class OtherNames:
    """Other names of columns and of messages' keys.

    Each is read where it is there, and else the format's own, which a second source may have.

    Args:
        theirs: the other names by the format's own.

    Attributes:
        theirs: the same.
        met: those of the format's own names under whose other name something was there.
    """

    def __init__(self, theirs: Mapping[str, str]) -> None:
        self.theirs = theirs
        self.met: set[str] = set()

    def called(self, name: str, row: Mapping[str, Any]) -> str:
        """What a row or a message calls a column or a key."""
        if (other := self.theirs.get(name)) is None or other not in row:
            return name
        self.met.add(name)
        return other

    def columns(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row by the format's own names."""
        return self._renamed(row, self.theirs.keys() & COLUMNS)

    def message(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A message by its own names; the text of another source may be called ``content``."""
        return self._renamed(given, self.theirs.keys() - COLUMNS)

    def _renamed(self, given: Mapping[str, Any], which: Collection[str]) -> dict[str, Any]:
        others = {name: other for name in which if (other := self.called(name, given)) != name}
        kept = {name: value for name, value in given.items() if name not in {*others, *others.values()}}
        return kept | {name: given[other] for name, other in others.items()}


class RowReader(NamedTuple):
    """A row, how its errors call it, and other names of its columns."""

    row: Mapping[str, Any]
    place: str
    others: OtherNames

    def called(self, column: str) -> str:
        """The column's name in this row."""
        return self.others.called(column, self.row)

    def error(self, column: str, expected: str, found: object) -> DataError:
        """The error that names the row, the column, what it must hold, and what it holds."""
        return DataError(
            f"The column {self.called(column)} must hold {expected}.",
            f"{self.place}: {found}",
            "Correct the row.",
        )

    def value(self, column: str) -> Any:
        """What a column holds; an error where the row does not have it."""
        called = self.called(column)
        if called not in self.row:
            other = self.others.theirs.get(column)
            raise DataError(
                f"A row must have the column {other or column}.",
                f"{self.place}: columns {names(self.row)}",
                f"Correct or remove the row; --columns {column}=NAME reads a column of another name.",
            )
        return self.row[called]

    def text(self, column: str, *, null: bool = False) -> str | None:
        """The text of a column, which may be null where that is said."""
        value = self.value(column)
        if value is None and null:
            return None
        if not isinstance(value, str):
            raise self.error(column, "text", kind_of(value))
        return well_formed(value)

    def optional(self, column: str) -> str:
        """The text of a column that may be absent or null; then it is empty."""
        return (self.text(column, null=True) or "") if self.called(column) in self.row else ""

    def json(self, column: str, kind: type, expected: str) -> Any:
        """A list or mapping, or JSON of one; None where the row has none."""
        value = self.row.get(self.called(column))
        if isinstance(value, str) and value.strip():
            try:
                value = parse_json(value)
            except ValueError as error:
                raise self.error(column, expected, f"{column}: {error}") from error
        if value is None or value == "":
            return None
        if not isinstance(value, kind):
            raise self.error(column, expected, kind_of(value))
        return value

    def listed(self, column: str) -> list[dict[str, Any]]:
        """The mappings of a column that lists them."""
        expected = "a list of messages"
        given = self.value(column)
        values = self.json(column, list, expected)
        if not values or not all(isinstance(value, Mapping) for value in values):
            raise self.error(column, expected, shown(values) if values else kind_of(given))
        return [self.others.message(value) for value in values]

    def are_messages(self, column: str) -> bool:
        """Whether a text is JSON of messages, as in a CSV file, and no words behind a bracket."""
        value = self.value(column)
        if not (isinstance(value, str) and value.lstrip().startswith("[")):
            return False
        try:
            listed: Any = parse_json(value)
        except ValueError:
            return False
        roles = {"role", self.others.theirs.get("role")}
        return bool(listed) and all(isinstance(each, dict) and roles & each.keys() for each in listed)

    def messages(self, column: str) -> list[dict[str, Any]]:
        """The messages of a column, each with a role, and with a content or calls of tools."""
        return [self.message(given, f"{column}[{n}]") for n, given in enumerate(self.listed(column))]

    def message(self, given: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A message of which the role, the content and the calls are checked; its other keys stay."""
        message = {key: value for key, value in given.items() if value is not None}
        role = message.get("role")
        if not isinstance(role, str) or not role:
            found = f"{where}: {kind_of(role) if 'role' in message else f'keys {names(message)}'}"
            raise self.error(where.partition("[")[0], "messages with a role", found)
        if "content" in message:
            message["content"] = self._content(message["content"], where)
        if "tool_calls" in message:
            message["tool_calls"] = self._calls(message["tool_calls"], where)
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
            if "content" not in message:
                found = f"{where}: a message of {role} with neither"
                raise self.error(where.partition("[")[0], "messages with a content or tool_calls", found)
        return message

    def _content(self, content: Any, where: str) -> str:
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        given = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
        texts = [text for text in given if isinstance(text, str)]
        if len(texts) != len(parts):
            found = f"{where}.content: {shown(content)}"
            raise self.error(where.partition("[")[0], "messages of text", found)
        return well_formed("".join(texts))

    def _calls(self, calls: Any, where: str) -> list[Any]:
        """The calls, with mappings for arguments: a template would quote OpenAI's JSON once more."""
        expected = "tool_calls as a list of mappings, or JSON of it"
        column = where.partition("[")[0]
        calls = RowReader({column: calls}, self.place, OtherNames({})).json(column, list, expected) or []
        for call in calls:
            function = call.get("function", call) if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping):
                raise self.error(column, expected, f"{where}.tool_calls: {shown(call)}")
        return [with_arguments(call) for call in calls]

    def refuse_of_messages(self) -> None:
        """Raises a DataError where a text comes with what only messages can have, and would be lost."""
        given = {
            "system": self.optional("system"),
            "tools": self.tools(),
            "chat_template_kwargs": self.variables(),
        }
        if own := [name for name, value in given.items() if value]:
            raise DataError(
                "A prompt and a completion that are text have no system message, tools or template.",
                f"{self.place}: {names([*map(self.called, own)])}",
                "Write prompt and completion as lists of messages, or take the column away.",
            )

    def conversation(self, messages: list[dict[str, Any]], first: int = 0) -> Conversation:
        """The conversation; its answers are the assistant's from a message on that are not left out.

        A message is left out by ``train: false``, or by ``weight: 0``, as OpenAI's files have it. That of the
        column ``system`` comes first, unless they begin with the same.
        """
        system = {"role": "system", "content": self.optional("system")}
        if system["content"] and messages[0] != system:
            messages, first = [system, *messages], first + 1
        weights = [message.pop("weight", 1) for message in messages]
        for number, weight in enumerate(weights):
            if weight not in (0, 1):
                raise self.error("weight", "0 or 1 in a message", f"message {number}: {shown(weight)}")
        trains = [
            message.pop("train", bool(weight)) for message, weight in zip(messages, weights, strict=True)
        ]
        for number, train in enumerate(trains):
            if not isinstance(train, bool):
                raise self.error("train", "true or false in a message", f"message {number}: {shown(train)}")
        answers = [
            message["role"] == "assistant" and train and number >= first
            for number, (message, train) in enumerate(zip(messages, trains, strict=True))
        ]
        variables = self.variables()
        if names_taken := not_beside(variables):
            called = self.called("chat_template_kwargs")
            raise DataError(
                f"The column {called} must not name {', '.join(OF_THE_CONVERSATION)}, which the row has.",
                f"{self.place}: {called} with {names_taken}",
                f"Give tools as the row's column {self.called('tools')}, and leave the other names out.",
            )
        return Conversation(self.place, messages, answers, self.tools(), variables)

    def tools(self) -> list[Any] | None:
        """The row's tools; None where it has none."""
        return self.json("tools", list, "a list of tools, or JSON of it") or None

    def variables(self) -> dict[str, Any]:
        """What the row has for its template."""
        return self.json("chat_template_kwargs", dict, "a mapping, or JSON of it") or {}


def with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call of a tool; its arguments are a mapping also where they were written as JSON."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # what is not JSON is the model's own text
            parsed = parse_json(arguments)
            arguments = parsed if isinstance(parsed, dict) else arguments
        function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else {**function}


def kind_of(value: object) -> str:
    """A value as an error shows it, with its type."""
    return "null" if value is None else f"{shown(value)} of type {type(value).__name__}"
