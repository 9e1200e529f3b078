"""What a model reads before it answers: token ids, and their structure where it is read."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hylorada_jax.data.examples import Conversation
from hylorada_jax.errors import DataError
from hylorada_jax.structure.code import Domain

if TYPE_CHECKING:
    from hylorada_jax.models.tokenizer import Tokenizer


def prompt_of(
    text: str, tokenizer: "Tokenizer", structure: Domain | None
) -> tuple[list[int], list[int] | None]:
    """The token ids of a text to continue, and their structure where it is read."""
    ids, offsets = tokenizer.encode_prompt(text)
    if structure is None:
        return ids, None

    from hylorada_jax.structure.code import token_depths

    return ids, token_depths(text, offsets)[0].tolist()


def with_answer(text: str, tokenizer: "Tokenizer", prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """What is shown of an answer: the prompt as it goes on, or what an encoder-decoder has made of it.

    Args:
        text: the prompt.
        tokenizer: the model's.
        prompt: its token ids.
        tokens: those of the answer.
    """
    answer = tokenizer.decode_answer(prompt, tokens)
    return answer if tokenizer.encoder_decoder else text + answer


def chat_of(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: "Tokenizer",
    structure: Domain | None,
    variables: Mapping[str, Any] = MappingProxyType({}),
    tools: list[Any] | None = None,
) -> tuple[list[int], list[int] | None]:
    """The token ids that ask for an answer to a conversation, and their structure where it is read.

    Raises:
        DataError: the model's chat template refuses it.
    """
    from hylorada_jax.data.answers import request_of
    from hylorada_jax.models.chat_template import render

    asked = Conversation("", [{**message} for message in messages], [], tools, {**variables})
    text = render(tokenizer.chat_template, request_of(asked, tokenizer, opening=True))
    (ids,), depths = _encoded([text], tokenizer, structure)
    return ids, None if depths is None else depths[0]


def chats_of(
    chats: Sequence[Conversation], tokenizer: "Tokenizer", structure: Domain | None
) -> tuple[list[list[int]], list[list[int]] | None]:
    """As :func:`chat_of`, of many at once, which takes a fraction of the time.

    Raises:
        DataError: the model's chat template refuses one; it is named.
    """
    from hylorada_jax.data.answers import request_of
    from hylorada_jax.models.chat_template import render_each

    requests = [request_of(chat, tokenizer, opening=True) for chat in chats]
    texts = []
    for chat, rendered in zip(chats, render_each(tokenizer.chat_template, requests), strict=True):
        if isinstance(rendered, DataError):
            raise rendered.at(chat.name)
        texts.append(rendered.text)
    return _encoded(texts, tokenizer, structure)


def _encoded(
    texts: Sequence[str], tokenizer: "Tokenizer", structure: Domain | None
) -> tuple[list[list[int]], list[list[int]] | None]:
    """Of rendered conversations, which begin with their bos token."""
    encoded = tokenizer.encode_each(texts, offsets=structure is not None)
    ids = [each.ids for each in encoded]
    if structure is None:
        return ids, None

    from hylorada_jax.data.tokenization import conversation_depths

    return ids, [
        conversation_depths(text, *each, tokenizer)[0].tolist()
        for text, each in zip(texts, encoded, strict=True)
    ]
