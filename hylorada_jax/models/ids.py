"""Ids that a model has no embedding for are refused before anything is computed."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hylorada_jax.errors import DataError

INT32 = 2**31
"""Ids are int32 on a device: a larger one would become another, in silence."""


def outside(ids: Any, count: int) -> str:
    """What of some ids is not an integer of 0 … count − 1.

    Args:
        ids: an array or nested lists.
        count: how many ids there are.

    Returns:
        The fault in words; "" where there is none that can be known: under ``jax.jit`` and its like only the
        dtype is.

    Example:
        >>> outside([[3, 12]], 10), outside(np.array([True]), 10), outside([[3, 9]], 10)
        ('3 … 12', 'bool of shape (1,)', '')
    """
    known = not isinstance(ids, jax.core.Tracer)
    try:
        values = np.asarray(ids) if known else ids
    except jax.errors.TracerArrayConversionError:  # a list of traced numbers
        return ""
    except ValueError:
        return "rows of several lengths"
    if not np.issubdtype(values.dtype, np.integer):
        return f"{values.dtype} of shape {values.shape}"
    if known and values.size and not 0 <= values.min() <= values.max() < count:
        return f"{values.min()} … {values.max()}"
    return ""


def check_tokens(ids: Any, limit: int | None, what: str = "input_ids") -> None:
    """Refuse token ids that are not in a model's vocabulary.

    Args:
        ids: an array or nested lists. Values are read where they are known, outside of a compiled program.
        limit: rows of the model's embedding; None for a model whose input is not tokens.
        what: how the error calls them.

    Raises:
        DataError: an id is negative, beyond the embedding, or not an integer.

    Example:
        >>> check_tokens(np.array([[0, 31]]), 32)
    """
    if limit is not None and (wrong := outside(ids, limit)):
        raise DataError(
            f"Every token id must be an integer of the model's vocabulary, 0 … {limit - 1}.",
            f"{what}: {wrong}",
            "Use the model's own tokenizer.",
        )


def check_batch(ids: Any, limit: int | None, most: int = 3) -> None:
    """Refuse input_ids that are not rows of a model's token ids.

    Args:
        ids: as of :func:`check_tokens`.
        limit: as there.
        most: axes that they may have; three are [batch, choices, seq], of HF's models for multiple choice.

    Raises:
        DataError: they have another number of axes, or as of :func:`check_tokens`.

    Example:
        >>> check_batch(np.array([[0, 31]]), 32)
    """
    check_tokens(ids, limit)
    shape = ids.shape if hasattr(ids, "shape") else jnp.asarray(ids).shape
    if limit is not None and not 2 <= len(shape) <= most:
        raise DataError("input_ids are [batch, seq].", f"of shape {shape}", "Give one text as [ids].")


def check_prompts(prompts: Sequence[Sequence[int]], limit: int | None) -> None:
    """Refuse prompts that are not lists of token ids, or have one outside the vocabulary.

    Args:
        prompts: to be continued.
        limit: rows of the model's embedding.

    Raises:
        DataError: saying which prompt.

    Example:
        >>> check_prompts([[1, 2, 3], [4]], 32)
    """
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not np.iterable(prompt):
            raise DataError(
                "Prompts are lists of token ids, a list for each.",
                f"prompt {number}: {prompt!r}",
                "Encode each text first: [tokenizer.encode(text)].",
            )
        if length_of(prompt) is None:
            raise DataError(
                "A prompt is one list of token ids.",
                f"prompt {number}: a list of lists, or an array of more than one axis",
                "Give the ids of each text as a prompt of its own.",
            )
        if len(prompt):
            check_tokens(prompt, limit, f"prompt {number}")


def length_of(ids: Any) -> int | None:
    """The length of one list of ids; None for what is not one, as a number or a list of lists.

    Args:
        ids: a list or an array; its values are not read.

    Example:
        >>> length_of([3, 12]), length_of([[3, 12]]), length_of(3)
        (2, None, None)
    """
    axes = getattr(ids, "ndim", None)
    if axes is None:
        axes = 0 if not np.iterable(ids) else 2 if any(np.iterable(each) for each in ids) else 1
    return len(ids) if axes == 1 else None


def check_structure_ids(ids: Any) -> None:
    """Refuse structure ids that are not integers ≥ 0.

    Args:
        ids: an array or nested lists, or None. Values are read where they are known, as token ids are.

    Raises:
        DataError: saying what they are instead.
    """
    if ids is not None and (wrong := outside(ids, INT32)):
        raise DataError(
            "Structure ids must be integers ≥ 0.", wrong, 'Give those of tokenize(…, structure="code").'
        )
