"""What transformers' Flax models compute wrongly, by config.

Source: transformers 4.57.6, ``modeling_flax_*.py`` read against ``modeling_*.py``; each case is shown
numerically in ``parity_tests/test_hf_flax_faults.py`` or ``parity_tests/test_loading.py``.
"""

from typing import Any

from hylorada_jax.errors import ModelError
from hylorada_jax.models.families import DECODERS, FLAX

_ACTIVATIONS = ("gelu", "relu", "silu", "swish", "gelu_new", "quick_gelu", "gelu_pytorch_tanh", "tanh")
# Families with T5's own attribute last: it is what `feed_forward_proj` becomes.
_ACTIVATION_KEYS = ("hidden_act", "activation_function", "activation", "dense_act_fn")


def check_hf_flax(config: Any) -> None:
    """Refuse a Flax model of transformers that computes wrongly for its config, silently.

    Args:
        config: its transformers ``PretrainedConfig``.

    Raises:
        ModelError: naming what is wrong and what to use instead.
    """
    check_family(config.model_type)
    if faults := _faults(config):
        raise _refusal(config.model_type, faults)


def check_family(family: str) -> None:
    """Refuses a family whose Flax models were not held to their torch models, whatever the config.

    Of these, ELECTRA and RoFormer are off, BigBird attends at random; most read no text.
    """
    if family not in FLAX:
        raise _refusal(family, ["it is off, or was not compared with its torch model"])


def _refusal(family: str, faults: list[str]) -> ModelError:
    return ModelError(
        f"The Flax {family} model of transformers must compute what its config says.",
        "; ".join(faults),
        "Load it with hylorada_jax.load_model(name), which uses our decoder."
        if family in DECODERS
        else "Choose another model: no Flax model here computes this one.",
    )


def _faults(config: Any) -> list[str]:
    """What transformers' Flax class gets wrong for this config."""
    faults = {}
    for key in _ACTIVATION_KEYS:
        name = getattr(config, key, "gelu")
        faults[f"it does not have the activation {key}={name!r}"] = name not in _ACTIVATIONS
    faults |= FLAX[config.model_type].faults(config)
    return [fault for fault, present in faults.items() if present]
