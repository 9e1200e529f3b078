"""What transformers' Flax decoders compute wrongly, by config.

Source: transformers 4.57.6, ``modeling_flax_*.py`` read against ``modeling_*.py``; each case is shown
numerically in ``parity_tests/test_loading.py``.
"""

from typing import Any

from hylorada_jax.errors import ModelError


def check_hf_flax(config: Any) -> None:
    """Refuse a Flax model of transformers that computes wrongly for its config, silently.

    Args:
        config: its transformers ``PretrainedConfig``.

    Raises:
        ModelError: naming what is wrong and what to use instead.
    """
    family, faults = config.model_type, _faults(config)
    if faults:
        ours = family in ("llama", "mistral")
        raise ModelError(
            f"transformers' Flax {family} model must compute what its config says.",
            "; ".join(faults),
            "Load it with hylorada_jax.load_model(name), which uses our decoder."
            if ours
            else "Choose another model: no Flax model here computes this one.",
        )


def _faults(config: Any) -> list[str]:
    """What transformers' Flax class gets wrong for this config."""
    faults = {}
    if config.model_type in ("llama", "mistral", "gemma"):
        faults[f"it fixes the rope base at 10000 and ignores rope_theta={config.rope_theta}"] = (
            config.rope_theta != 10000
        )
        scaling = getattr(config, "rope_scaling", None)
        faults[f"it ignores rope_scaling={scaling}"] = scaling is not None
    if config.model_type in ("llama", "mistral"):
        head_dim = getattr(config, "head_dim", None)
        faults[f"it ignores head_dim={head_dim} and splits hidden_size evenly"] = (
            head_dim is not None and head_dim * config.num_attention_heads != config.hidden_size
        )
        faults["it ignores tie_word_embeddings and reads the logits from a separate matrix"] = (
            config.tie_word_embeddings
        )
    if config.model_type == "llama":
        faults["it ignores mlp_bias"] = config.mlp_bias
    if config.model_type == "mistral":
        window = config.sliding_window
        faults["with sliding_window=None each token sees only itself"] = window is None
        faults[f"with sliding_window={window} each token sees one token too many"] = (
            window is not None and window < config.max_position_embeddings
        )
    if config.model_type == "gemma":
        used = config.hidden_activation or "gelu_pytorch_tanh"
        faults[f"it uses the activation {used} instead of hidden_act={config.hidden_act}"] = (
            used != config.hidden_act
        )
    if config.model_type == "longt5":
        faults["it calls jnp.clip(a_max=…), which jax no longer has"] = True
    if config.model_type == "gpt2":
        faults["it ignores scale_attn_weights=False"] = not config.scale_attn_weights
        faults["it ignores scale_attn_by_inverse_layer_idx"] = config.scale_attn_by_inverse_layer_idx
    return [fault for fault, present in faults.items() if present]
