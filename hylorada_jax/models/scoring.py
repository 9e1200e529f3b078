"""What a model gets of a batch, and how its tokens are scored: in training and in evaluation."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from hylorada_jax.math.loss import token_nll
from hylorada_jax.models.base_model import BaseModel
from hylorada_jax.models.batch import KEYS
from hylorada_jax.placement.axes import ROWS, TENSOR
from hylorada_jax.placement.shards import cut, row_groups


def model_inputs(base: BaseModel, rows: Mapping[str, Array]) -> dict[str, Any]:
    """The inputs that rows hold for a model: segments where it reads them, else a padding mask."""
    inputs = {name: rows[name] for name, key in KEYS.items() if key.reader == "model" and name in rows}
    if not base.supports_segments:
        inputs["attention_mask"] = (inputs.pop("segment_ids") > 0).astype(jnp.int32)
    return inputs


def score(hidden: Array, head: Array, targets: Array, soft_cap: float | None = None) -> Array:
    """Negative log-likelihoods [batch, seq] of the targets; 0 where a target is ignored.

    Args:
        hidden: the states that the head reads.
        head: output embedding.
        targets: token ids.
        soft_cap: the base model's ``logit_soft_cap``.
    """
    groups = row_groups(len(targets))
    hidden, grouped = (cut(x.reshape(groups, -1, *x.shape[2:]), ROWS) for x in (hidden, targets))
    # Its width is gathered once, not for every chunk; the vocabulary stays divided, and so do the logits.
    head = jax.tree.map(lambda leaf: cut(leaf, TENSOR), head)
    return token_nll(hidden, head, grouped, soft_cap=soft_cap).reshape(targets.shape)
