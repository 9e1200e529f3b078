"""What a model has answered in a conversation, as a text and as a message."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from hylorada_jax.data.columns import with_arguments

if TYPE_CHECKING:
    from hylorada_jax.models.tokenizer import Tokenizer

# Of harmony, in which gpt-oss answers: a message's recipient and channel, in either order, and what it says.
# The prompt ends with the first one's <|start|>assistant.
_SAID = re.compile(
    r"(?:\A|(?<=<\|end\|>)|<\|start\|>assistant\b)(?P<header>(?:(?!<\|(?:start|end|message)\|>).)*)"
    r"<\|message\|>(?P<text>.*?)(?=<\|(?:end|return|call|start)\|>|\Z)",
    re.DOTALL,
)
_CHANNEL = re.compile(r"<\|channel\|>(\w+)")
_CALLED = re.compile(r"\bto=functions\.(\S+?)(?=[\s<]|\Z)")


def answer_text(
    tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], ends: Collection[int]
) -> str:
    """The text of an answer: without the token that ends it, with all others, as those around a call.

    Args:
        tokenizer: the model's.
        prompt: the token ids that asked for it.
        ids: those that the model gave.
        ends: the tokens at which it ends, from :meth:`Tokenizer.chat_ends`.
    """
    said = ids[:-1] if ids and ids[-1] in ends else ids
    return tokenizer.decode_answer(prompt, said, skip_special_tokens=False)


def as_message(text: str) -> dict[str, Any]:
    """An answer as a message of the assistant, which a chat template can render in a later prompt.

    Args:
        text: of the answer; what gpt-oss says in the channel "analysis" is the reasoning, and what it says to
            a function is a call, beside which a preamble joins the reasoning.

    Example:
        >>> as_message("Ho")
        {'role': 'assistant', 'content': 'Ho'}
        >>> as_message("<|channel|>analysis<|message|>Hm<|end|>")
        {'role': 'assistant', 'content': '', 'reasoning_content': 'Hm'}

    Source: OpenAI, harmony response format; the template of gpt-oss refuses its tokens in a message, and
    beside a call it takes either reasoning or a content, which it writes alike.
    """
    thought: list[str] = []
    said: list[str] = []
    calls = []
    for part in _SAID.finditer(text):
        if not (channel := _CHANNEL.search(part["header"])):
            continue
        if called := _CALLED.search(part["header"]):
            function = {"name": called[1], "arguments": part["text"]}
            calls.append({"type": "function", "function": with_arguments(function)})
        elif part["text"]:
            (thought if channel[1] == "analysis" else said).append(part["text"])
    if thought and calls:
        thought, said = thought + said, []
    if not (thought or said or calls):
        return {"role": "assistant", "content": text}
    message: dict[str, Any] = {"role": "assistant", "content": "\n\n".join(said)}
    message |= {"reasoning_content": "\n\n".join(thought)} if thought else {}
    return message | ({"tool_calls": calls} if calls else {})
