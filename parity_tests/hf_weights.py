"""Small random models of transformers (torch), and their weights as our parameter tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.stacks import layer_numbers

_LEAVES = {"embed_tokens": "embedding", "lm_head": "embedding", "norm": "scale", "layernorm": "scale"}


def random_torch_model(
    hf: dict[str, Any], *, attention: str = "eager", gain: float = 0.7, seed: int = 0
) -> Any:
    """A torch model with the weights of `randomise`."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**hf)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return randomise(kind.from_config(config, attn_implementation=attention).eval(), gain)


def randomise(model: Any, gain: float = 0.7) -> Any:
    """The model with weights of which none is zero, no norm is one, and every layer matters.

    At gain 0.7 rounding errors do not grow from layer to layer; at 1.5 they do, and texts do not repeat.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
            elif "norm" in name or ".ln_" in name or name.endswith("scale"):
                parameter.normal_(parameter.mean().item(), 0.3)  # about 1, or the 0 that Gemma adds to 1
            elif "embed" in name:
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, gain * parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # a number of the checkpoint's that does not train
                buffer.uniform_(0.5, 1.5)
    return model


def params_of(model: Any) -> dict[str, Any]:
    """The parameter tree of our decoder with a torch model's weights, in their dtype."""
    tree: dict[str, Any] = {}
    stacks = layer_numbers(DecoderConfig.from_hf(model.config.to_dict()))
    stack_of = {number: stack for stack, numbers in stacks.items() for number in numbers}
    layers: dict[tuple[str, ...], list[np.ndarray]] = {}
    for name, tensor in model.state_dict().items():
        *path, kind = name.split(".")
        if path == ["lm_head"] and model.config.tie_word_embeddings:
            continue
        leaf = (
            "bias"
            if kind == "bias"
            else _LEAVES.get(path[-1].split("_")[-1], _LEAVES.get(path[-1], "kernel"))
        )
        if kind not in ("weight", "bias"):  # a parameter that is no module's weight, such as of all experts
            leaf = kind
        array = tensor.numpy().T if leaf == "kernel" else tensor.numpy()
        if path[:2] == ["model", "layers"]:
            own = [part for part in path[3:] if not part.isdigit()]
            where = (*stack_of[int(path[2])], *own, leaf)
            layers.setdefault(where, []).append(array)  # in the order of layers, and of experts
        else:
            _put(tree, (*path, leaf), array)
    for where, arrays in layers.items():
        count = next(len(numbers) for stack, numbers in stacks.items() if where[: len(stack)] == stack)
        depth = (count, -1) if "experts" in where[:-2] else (count,)
        _put(tree, where, np.stack(arrays).reshape(*depth, *arrays[0].shape))
    return tree


def _put(tree: dict[str, Any], path: tuple[str, ...], array: np.ndarray) -> None:
    """Sets a leaf of a nested dict."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = jnp.asarray(array)


def padded(rows: Sequence[np.ndarray], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens as one array, and its mask; what fills the left or the right is 0."""
    width = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), width), np.int32)
    for row, text in enumerate(rows):
        where = slice(width - len(text), None) if side == "left" else slice(len(text))
        ids[row, where], mask[row, where] = text, 1
    return ids, mask
