"""Gemma 1, in Flax."""

from typing import Any

from hylorada_jax.models.families.family import Family, Flax
from hylorada_jax.models.families.llama import rope_faults


def _faults(config: Any) -> dict[str, bool]:
    used = config.hidden_activation or "gelu_pytorch_tanh"
    both_ways = bool(getattr(config, "use_bidirectional_attention", False))
    return rope_faults(config) | {
        f"it uses the activation {used} instead of hidden_act={config.hidden_act}": used != config.hidden_act,
        "it ignores use_bidirectional_attention": both_ways,
    }


FAMILIES = [
    Family(
        model_type="gemma",
        tokenizer="GemmaTokenizer",
        flax=Flax(can=("loss",), faults=_faults, divisors=()),
    )
]
