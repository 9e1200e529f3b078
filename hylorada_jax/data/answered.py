"""What a model has answered in a conversation, as a text and as a message."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hylorada_jax.data.columns import with_arguments

if TYPE_CHECKING:
    from hylorada_jax.models.tokenizer import Tokenizer

# Of harmony, in which gpt-oss answers: a channel, whom it is addressed to, and what is said in it.
_SAID = re.compile(
    r"<\|channel\|>(?P<channel>\w+)(?P<header>.*?)<\|message\|>(?P<text>.*?)"
    r"(?=<\|(?:end|return|call|start)\|>|\Z)",
    re.DOTALL,
)
_CALLED = re.compile(r"\bto=functions\.(\S+?)(?=[\s<]|\Z)")


def answer_text(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """The text of an answer: without the token that ends it, with all others, as those around a call.

    Args:
        tokenizer: the model's.
        prompt: the token ids that asked for it.
        ids: those that the model gave.
    """
    said = ids[:-1] if ids and ids[-1] in tokenizer.chat_end_ids else ids
    return tokenizer.decode_continuation(prompt, said, skip_special_tokens=False)


def as_message(text: str) -> dict[str, Any]:
    """An answer as a message of the assistant, which a chat template can render in a later prompt.

    Args:
        text: of the answer; what gpt-oss says in the channel "analysis" is the reasoning, and what it says to
            a function is a call.

    Example:
        >>> as_message("Ho")
        {'role': 'assistant', 'content': 'Ho'}
        >>> as_message("<|channel|>analysis<|message|>Hm<|end|>")
        {'role': 'assistant', 'content': '', 'reasoning_content': 'Hm'}

    Source: OpenAI, harmony response format; the template of gpt-oss refuses its tokens in a message.
    """
    thought, said, calls = "", "", []
    for part in _SAID.finditer(text):
        if called := _CALLED.search(part["header"]):
            function = {"name": called[1], "arguments": part["text"]}
            calls.append({"type": "function", "function": with_arguments(function)})
        elif part["channel"] == "analysis":
            thought += part["text"]
        else:
            said += part["text"]
    if not (thought or said or calls):
        return {"role": "assistant", "content": text}
    message: dict[str, Any] = {"role": "assistant", "content": said}
    message |= {"reasoning_content": thought} if thought else {}
    return message | ({"tool_calls": calls} if calls else {})
