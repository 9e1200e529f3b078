"""What a model writes before and after it is trained."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hylorada_jax.cli.shared import prompt_of, with_answer
from hylorada_jax.structure.code import Domain

if TYPE_CHECKING:
    from hylorada_jax.models.tokenizer import Tokenizer

_NEW_TOKENS = 64


def samples(
    model: Any,
    start: Any,
    prompt: str,
    tokenizer: "Tokenizer",
    structure: Domain | None,
    *,
    chat: Mapping[str, Any] | None = None,
) -> tuple[str, str]:
    """The prompt as a model continues or answers it with the adapters of before training, and with its own.

    Where a model's positions end, a sample ends too; of a prompt that alone is longer, the end is continued.

    Args:
        model: a HyLoRADAModel, trained.
        start: its adapters before.
        prompt: some text.
        tokenizer: the model's.
        structure: whose ids the model reads beside the tokens.
        chat: the prompt is a user's message, and this what the model's chat template is given beside it; None
            for a text to continue.
    """
    ids, structure_ids = prompt_of(prompt, tokenizer, structure, chat)
    ends = tokenizer.end_token_ids
    if chat is not None:
        ends = tokenizer.chat_ends([{"role": "user", "content": prompt}], variables=chat)
        prompt += "\n\n"
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
    if limit is None or length + _NEW_TOKENS <= limit:
        return length, _NEW_TOKENS
    if length < limit:
        return length, limit - length
    new = min(_NEW_TOKENS, -(-limit // 2))
    return limit - new, new
