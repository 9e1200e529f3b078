"""A base model on a mesh."""

from typing import Any

import jax

from hylorada_jax.math.quantized import bits_of
from hylorada_jax.models.base_model import BaseModel
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.wrapped import as_base
from hylorada_jax.placement.axes import FSDP, leaves_room
from hylorada_jax.placement.placement import Placement


def fitted(placement: Placement, model: Any) -> Placement:
    """A placement that cuts no attention head of a model.

    Args:
        placement: of any model.
        model: perhaps without its weights. The heads of Hugging Face's Flax models are not known.

    Raises:
        ConfigError: the mesh's axis tensor does not divide the heads.
    """
    if not isinstance(model, CausalLM):
        return placement.for_unknown_heads()
    return placement.for_heads(model.config.num_attention_heads, model.config.kv_heads_in_common)


def default_mesh(model: BaseModel, memory: int | None) -> tuple[str, str]:
    """The mesh where a user names none, and why it is that.

    Args:
        model: perhaps without its weights.
        memory: bytes of each device; None where they do not say.

    Returns:
        One that cuts the weights over all devices, where a copy on each would leave no room to train; else
        "", which copies them. And a sentence to print; "" where there is one device.
    """
    if (count := jax.device_count()) == 1:
        return "", ""
    held = sum(leaf.size * bits_of(leaf.dtype) for leaf in jax.tree.leaves(model.params)) // 8
    if memory is None:
        return "", f"data={count}: each device has the weights, for none states its memory"
    of = f"{held / 2**30:.1f} of the {memory / 2**30:.1f} GiB of each device"
    if leaves_room(held, memory):
        return "", f"data={count}: each device has the weights, {of}"
    return (mesh := f"{FSDP}={count}"), f"{mesh}: the weights are cut, for a copy would take {of}"


def placed(base: BaseModel, placement: Placement) -> BaseModel:
    """The base model with its parameters where a placement puts them; as :func:`fitted` raises."""
    return as_base(base.with_params(fitted(placement, base).put(base.params)))
