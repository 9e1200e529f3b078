"""Shapes that the arrays of a call must have, of jax or of torch."""

from typing import Any

import numpy as np

from hylorada_jax.errors import ConfigError, DataError


def check_rows(shape: tuple[int, ...], **inputs: Any) -> None:
    """Refuse inputs that have not one value for every token.

    Args:
        shape: (batch, seq) of the tokens.
        inputs: by their names; None is none.

    Raises:
        DataError: naming the input.

    Example:
        >>> check_rows((1, 2), attention_mask=np.ones((1, 2)), segment_ids=None)
    """
    for name, given in inputs.items():
        if given is not None and np.shape(given) != shape:
            raise DataError(
                f"{name} must have one value for each token, [batch, seq].",
                f"{tuple(np.shape(given))} for tokens {tuple(shape)}",
                "Give one for every token.",
            )


def check_attention(query: Any, key: Any, value: Any, **inputs: Any) -> None:
    """Refuse queries, keys and values of whole rows that do not fit each other.

    Args:
        query: [batch, seq, heads, head_dim].
        key, value: [batch, seq, kv_heads, head_dim].
        inputs: of their tokens, as of :func:`check_rows`.

    Raises:
        DataError: an array has another shape.
        ConfigError: heads is no multiple of kv_heads.

    Example:
        >>> query, key = np.ones((1, 3, 4, 2)), np.ones((1, 3, 2, 2))
        >>> check_attention(query, key, key)
    """
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    expected = (*query.shape[:2], *key.shape[2:3], *query.shape[3:])
    if query.ndim != 4 or not key.shape == value.shape == expected:
        raise DataError(
            "query is [batch, seq, heads, head_dim], key and value [batch, seq, kv_heads, head_dim].",
            shapes,
            "Split the heads before the call.",
        )
    if query.shape[2] % key.shape[2]:
        raise ConfigError("The query heads are a multiple of the key-value heads.", shapes, "Repeat none.")
    check_rows(query.shape[:2], **inputs)
