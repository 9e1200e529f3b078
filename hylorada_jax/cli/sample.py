"""What a model writes before and after it is trained."""

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from hylorada_jax.cli.prompts import chat_of, prompt_of, with_answer
from hylorada_jax.cli.sampling import PROMPT_TOKENS
from hylorada_jax.data.examples import Conversation
from hylorada_jax.errors import DataError
from hylorada_jax.structure.code import Domain

if TYPE_CHECKING:
    from hylorada_jax.models.tokenizer import Tokenizer


class Sample(NamedTuple):
    """What a model is to continue or to answer.

    Attributes:
        text: as a user gave it, and what stands between it and an answer.
        ids: its tokens, with those of the template around it in a chat.
        structure_ids: what an adapter reads beside them, or None.
        ends: the tokens at which a continuation or an answer ends.
    """

    text: str
    ids: list[int]
    structure_ids: list[int] | None
    ends: tuple[int, ...]


def sample_of(
    prompt: str, tokenizer: "Tokenizer", structure: Domain | None, like: Conversation | None = None
) -> Sample:
    """A text to continue, or a user's message to answer as in a conversation of the training data.

    Args:
        prompt: some text.
        tokenizer: the model's.
        structure: whose ids the model reads beside the tokens.
        like: the conversation whose system message, tools and template variables it has; None for a text to
            continue.

    Raises:
        DataError: the chat template refuses it.
    """
    if like is None:
        return Sample(prompt, *prompt_of(prompt, tokenizer, structure), tokenizer.end_token_ids)
    begun = itertools.takewhile(lambda message: message["role"] in ("system", "developer"), like.messages)
    asks = [*begun, {"role": "user", "content": prompt}]
    try:
        ids, structure_ids = chat_of(asks, tokenizer, structure, like.variables, like.tools)
    except DataError as error:
        remedy = f'{error.remedy} Or leave the sample out: --prompt "".'
        raise DataError(error.rule, error.received, remedy) from error
    ends = tokenizer.chat_ends(asks, like.tools, like.variables)
    return Sample(f"{prompt}\n\n", ids, structure_ids, ends)


def samples(model: Any, start: Any, sample: Sample, tokenizer: "Tokenizer") -> tuple[str, str]:
    """The sample as a model continues or answers it with the adapters of before training, and with its own.

    Where a model's positions end, a sample ends too; of a prompt that alone is longer, the end is continued.

    Args:
        model: a HyLoRADAModel, trained.
        start: its adapters before.
        sample: from :func:`sample_of`.
        tokenizer: the model's.
    """
    prompt, ids, structure_ids, ends = sample
    kept, new = room(len(ids), model.base.position_limit)
    if kept < len(ids):
        begin = ids[: ids[0] == tokenizer.bos_token_id and kept > 1]
        cut = slice(len(ids) - kept + len(begin), None)
        ids, prompt = begin + ids[cut], "…" + tokenizer.decode(ids[cut])
        structure_ids = structure_ids and structure_ids[: len(begin)] + structure_ids[cut]
    if not ids:
        return prompt, prompt
    inputs = {} if structure_ids is None else {"structure_ids": [structure_ids]}

    def written(adapters: Any) -> str:
        model.adapters = adapters
        rows = model.generate([ids], max_new_tokens=new, eos_token_id=ends or None, **inputs)
        return with_answer(prompt, tokenizer, ids, rows[0])

    trained = model.adapters
    return written(start), written(trained)


def room(length: int, limit: int | None) -> tuple[int, int]:
    """How many tokens of a prompt to keep, and how many to add, so that a model has a position for each.

    Args:
        length: of the prompt.
        limit: the model's positions; None: no end of them.

    Example:
        >>> room(8, None), room(8, 40), room(100, 40), room(40, 40)
        ((8, 64), (8, 32), (20, 20), (20, 20))
    """
    if limit is None or length + PROMPT_TOKENS <= limit:
        return length, PROMPT_TOKENS
    if length < limit:
        return length, limit - length
    new = min(PROMPT_TOKENS, -(-limit // 2))
    return limit - new, new
