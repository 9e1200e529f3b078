"""The output head of transformers' Flax models: where it lies, and its logits, unrounded."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from transformers import FlaxPreTrainedModel

from hylorada_jax.errors import ModelError
from hylorada_jax.math.loss import logits
from hylorada_jax.models.families import family_of, flax_of, that_can
from hylorada_jax.trees import COLLECTION, TreePath


def embedding_path(model: FlaxPreTrainedModel) -> TreePath:
    """Where the embedding lies that a causal language model's head is tied to.

    Raises:
        ModelError: the model has another head, or none.
    """
    family, kind = family_of(model.config.model_type), type(model).__name__
    if "loss" not in flax_of(family.model_type).can or not kind.endswith(("LMHeadModel", "ForCausalLM")):
        raise ModelError(
            "The built-in loss needs a causal language model whose logits are hidden states times an "
            f"embedding: one of type {that_can('loss')}.",
            kind,
            "Call the adapted model and compute your own loss from its output.",
        )
    return tuple(family.embedding.split("."))


def float32_logits() -> Any:
    """A context in which a language model's head gives the logits that the loss is computed from.

    In a model of bfloat16 Hugging Face's head rounds them: tokens whose logits differ by less than 0.4 % are
    then equally likely, and greedy generation takes the first of them.
    """
    return nn.intercept_methods(_head)


def _head(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module = context.module
    is_head = isinstance(module, nn.Dense) and module.name == "lm_head" and context.method_name == "__call__"
    if not is_head or module.has_variable(COLLECTION, "lora_A"):
        return next_fun(*args, **kwargs)
    hidden, kernel = nn.dtypes.promote_dtype(
        args[0], module.get_variable("params", "kernel"), dtype=module.dtype
    )
    scores = logits(hidden, kernel.T)
    return scores + module.get_variable("params", "bias") if module.use_bias else scores
