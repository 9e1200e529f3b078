"""What transformers' Flax models compute wrongly, by config.

Source: transformers 4.57.6, ``modeling_flax_*.py`` read against ``modeling_*.py``; each case is shown
numerically in ``parity_tests/test_hf_flax_faults.py`` or ``parity_tests/test_loading.py``.
"""

from typing import Any

from hylorada_jax.errors import ModelError
from hylorada_jax.models.rope_config import RopeScaling, read_rope

# The families whose Flax models were held to their torch models with every option away from its default. Of
# the others, ELECTRA and RoFormer are off, BigBird attends at random; most read no text.
CHECKED = (
    "gpt2", "gpt_neo", "gptj", "opt", "bloom", "xglm", "llama", "mistral", "gemma",
    "bert", "roberta", "xlm-roberta", "albert", "distilbert",
    "t5", "mt5", "longt5", "bart", "mbart", "pegasus", "marian", "blenderbot", "blenderbot-small",
)  # fmt: skip
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
    """Refuses a family whose Flax models were not held to their torch models, whatever the config."""
    if family not in CHECKED:
        raise _refusal(family, ["it is off, or was not compared with its torch model"])


def _refusal(family: str, faults: list[str]) -> ModelError:
    ours = family in ("llama", "mistral")
    return ModelError(
        f"transformers' Flax {family} model must compute what its config says.",
        "; ".join(faults),
        "Load it with hylorada_jax.load_model(name), which uses our decoder."
        if ours
        else "Choose another model: no Flax model here computes this one.",
    )


def _faults(config: Any) -> list[str]:
    """What transformers' Flax class gets wrong for this config."""
    faults = {}
    for key in _ACTIVATION_KEYS:
        name = getattr(config, key, "gelu")
        faults[f"it does not have the activation {key}={name!r}"] = name not in _ACTIVATIONS
    if config.model_type in ("llama", "mistral", "gemma"):
        theta, scaling = read_rope(config.to_dict(), config.max_position_embeddings)
        faults[f"it fixes the rope base at 10000 and ignores rope_theta={theta:g}"] = theta != 10000
        faults[f"it ignores rope_scaling of type {scaling.rope_type}"] = scaling != RopeScaling()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        positions = config.max_position_embeddings
        faults[f"its table of {positions} positions is too narrow for heads of {width}"] = positions < width
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
        faults["it ignores use_bidirectional_attention"] = bool(
            getattr(config, "use_bidirectional_attention", False)
        )
    if config.model_type in ("bert", "roberta", "xlm-roberta", "albert"):
        kind = getattr(config, "position_embedding_type", "absolute")
        faults[f"it ignores position_embedding_type={kind}"] = kind != "absolute"
    if config.model_type == "opt":
        faults["it ignores enable_bias=False"] = not config.enable_bias
        faults["it ignores layer_norm_elementwise_affine=False"] = not config.layer_norm_elementwise_affine
    if config.model_type == "bloom":
        faults["it ignores slow_but_exact"] = config.slow_but_exact and config.pretraining_tp > 1
        heads = config.n_head
        faults[f"for {heads} heads, no power of two, it calls jnp.cat, which jax does not have"] = bool(
            heads & (heads - 1)
        )
    if config.model_type == "gptj":
        faults["it cannot tie its head, which has a bias"] = config.tie_word_embeddings
    if config.model_type in ("marian", "pegasus"):
        apart = not getattr(config, "share_encoder_decoder_embeddings", True)
        faults["it ignores share_encoder_decoder_embeddings=False"] = apart
    if config.model_type == "longt5":
        faults["it calls jnp.clip(a_max=…), which jax no longer has"] = True
    if config.model_type == "gpt2":
        faults["it ignores scale_attn_weights=False"] = not config.scale_attn_weights
        faults["it ignores scale_attn_by_inverse_layer_idx"] = config.scale_attn_by_inverse_layer_idx
    return [fault for fault, present in faults.items() if present]
