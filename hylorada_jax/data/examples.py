"""What a row of data says: a text, a prompt and its completion, or a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Document(NamedTuple):
    """One text and where it came from: a file, ``file:line``, or ``file[row]`` where rows are not lines."""

    name: str
    text: str


class Completion(NamedTuple):
    """A prompt and the text that continues it, without anything between them.

    Attributes:
        name: where it came from.
        prompt: what is given.
        completion: what shall follow.
    """

    name: str
    prompt: str
    completion: str


class Conversation(NamedTuple):
    """Messages as a chat template takes them.

    Attributes:
        name: where it came from.
        messages: mappings with a role and a content, or tool_calls, or both.
        answers: for each message, whether it is a turn of the assistant to learn from.
        tools: JSON schemas of what the assistant may call, or None.
        variables: what else the template is given, such as enable_thinking.
    """

    name: str
    messages: list[dict[str, Any]]
    answers: list[bool]
    tools: list[Any] | None = None
    variables: Mapping[str, Any] = {}


Example = Document | Completion | Conversation
