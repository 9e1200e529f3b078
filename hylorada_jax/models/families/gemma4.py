"""Gemma 4, its text part: layers with a window and those without differ in heads and rotation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, structs

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked
from hylorada_jax.models.bounds import (
    REMEDY,
    RULE,
    Experts,
    Heads,
    Layers,
    Multiplier,
    Positions,
    Theta,
    Vocabulary,
    Width,
)
from hylorada_jax.models.families import gemma
from hylorada_jax.models.families.family import Decoder, Family, Mixture, Options, check_mixture, sliding

_Number = Annotated[str, Meta(pattern=r"^[0-9]{1,4}$")]


class _OwnHeads(Struct, forbid_unknown_fields=True, frozen=True):
    """What per_layer_config says of one layer."""

    head_dim: Width | None = None
    num_key_value_heads: Heads | None = None


class Gemma4Keys(gemma.GemmaKeys, frozen=True, kw_only=True, rename={"hidden_act": "hidden_activation"}):
    """With transformers' defaults for Gemma 4."""

    vocab_size: Vocabulary = 262144
    hidden_size: Width = 2304
    intermediate_size: Width = 9216
    num_hidden_layers: Layers = 30
    num_attention_heads: Heads = 8
    num_key_value_heads: Heads | None = 4
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: Positions = 131072
    sliding_window: Positions | None = 512
    final_logit_softcapping: Multiplier | None = None
    global_head_dim: Width = 512
    num_global_key_value_heads: Heads | None = None
    # By the layers' numbers. Its null is a value, that no layer has heads of its own: transformers derives
    # it from the two keys above only where it is absent.
    per_layer_config: dict[_Number, _OwnHeads] | UnsetType | None = UNSET
    attention_k_eq_v: bool = False
    # "vision" concerns the tokens of images; those of text see what is before them.
    use_bidirectional_attention: Literal["vision"] | None = None
    sliding_rope_theta: Theta  # from rope_parameters, by `settings`
    hidden_size_per_layer_input: Annotated[int, Meta(ge=0, le=2**20)] = 256
    vocab_size_per_layer_input: Vocabulary = 262144
    num_kv_shared_layers: Annotated[int, Meta(ge=0)] = 0
    use_double_wide_mlp: bool = False
    enable_moe_block: bool = False
    num_experts: Experts | None = None
    top_k_experts: Experts | None = None
    moe_intermediate_size: Width | None = None


class UnifiedKeys(Gemma4Keys, frozen=True, kw_only=True):
    """Of 12B, which has no experts, no embeddings for each layer, and no encoder of images and sounds."""

    max_position_embeddings: Positions = 262144
    sliding_window: Positions | None = 1024
    hidden_size_per_layer_input: Literal[0] = 0
    enable_moe_block: Literal[False] = False


class _Full(Struct, forbid_unknown_fields=True):
    rope_type: Literal["default", "proportional"]
    rope_theta: Theta
    partial_rotary_factor: Annotated[float, Meta(ge=0, le=1)] = 1.0
    factor: Multiplier = 1.0


class _Sliding(Struct, forbid_unknown_fields=True):
    rope_type: Literal["default"]
    rope_theta: Theta


class _Rope(Struct, forbid_unknown_fields=True):
    full_attention: _Full
    sliding_attention: _Sliding


_ROPE = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def settings(said: dict[str, Any]) -> dict[str, Any]:
    """With the rope parameters, which are of each type of layer, in two; and a last layer without a window.

    Raises:
        ModelError: the rope parameters are not of each type, or of another kind than these models have.
    """
    for key in ("rope_theta", "rope_scaling"):
        if said.get(key) is not None:
            raise ModelError(
                "Gemma 4 has its rope_parameters for each type of layer (transformers ignores others).",
                f"{key}={said[key]!r}",
                f"Write it into rope_parameters, and remove {key}.",
            )
    where = "rope_parameters"
    rope = checked(said.get(where, _ROPE), _Rope, RULE, ModelError, REMEDY, where)
    full = structs.asdict(rope.full_attention)
    if full["rope_type"] == "default":  # which reads no more
        full = {key: full[key] for key in ("rope_type", "rope_theta")}
    said = {**said, where: full, "sliding_rope_theta": rope.sliding_attention.rope_theta}
    types = said.get("layer_types")
    if isinstance(types, list) and types and types[-1] == "sliding_attention":
        said["layer_types"] = [*types[:-1], "full_attention"]  # as transformers does, with a warning
    return said


def options(keys: Gemma4Keys) -> Options:
    """Five layers with a window to one without, norms everywhere, and a number that scales each layer."""
    _refuse(keys)
    depth = keys.num_hidden_layers
    implied = [bool((n + 1) % 6) and n + 1 < depth for n in range(depth)]
    window, layers = sliding(keys, keys.sliding_window, implied)
    per_layer, shared = keys.hidden_size_per_layer_input, _sharing(keys, layers)
    full, of_all = _full_heads(keys, layers), (keys.head_dim, keys.num_key_value_heads)
    # What is as in all layers has one form, however it was written: files know their base by it.
    head_dim, kv_heads = (own if own != each else None for own, each in zip(full, of_all, strict=True))
    return Options(
        qkv_bias=keys.attention_bias,
        o_bias=keys.attention_bias,
        mixture=_experts(keys),
        mixture_beside=keys.enable_moe_block,
        qk_norm=True,
        value_norm=True,
        keys_as_values=keys.attention_k_eq_v,
        full_head_dim=head_dim,
        full_kv_heads=kv_heads,
        norms="both",
        norm_rounded_last=True,
        layer_scalar=True,
        per_layer_width=per_layer or None,
        per_layer_vocab=keys.vocab_size_per_layer_input if per_layer else None,
        shared_kv_layers=shared,
        shared_kv_mlp=2 * keys.intermediate_size if shared and keys.use_double_wide_mlp else None,
        embedding_scale=keys.hidden_size**0.5,
        embedding_scale_rounded=True,
        attention_scale=1.0,
        logit_soft_cap=keys.final_logit_softcapping,
        sliding_window=window,
        sliding_layers=layers,
        sliding_rope_theta=keys.sliding_rope_theta,
    )


def _full_heads(keys: Gemma4Keys, slides: tuple[bool, ...]) -> tuple[int | None, int | None]:
    """head_dim and key-value heads of the layers without a window."""
    if keys.per_layer_config is UNSET:
        shared = keys.num_global_key_value_heads if keys.attention_k_eq_v else None
        return keys.global_head_dim, shared or keys.num_key_value_heads
    written = keys.per_layer_config or {}
    own = {int(number): heads for number, heads in written.items()}  # transformers writes "05" of 30 layers
    of_all = _OwnHeads(keys.head_dim, keys.num_key_value_heads)

    def heads(number: int) -> _OwnHeads:
        said = own.get(number, _OwnHeads())
        return _OwnHeads(
            said.head_dim or of_all.head_dim, said.num_key_value_heads or of_all.num_key_value_heads
        )

    full = {heads(number) for number, with_window in enumerate(slides) if not with_window}
    others = {heads(number) for number, with_window in enumerate(slides) if with_window}
    unknown = len(own) < len(written) or own.keys() - {*range(len(slides))}
    if unknown or len(full) > 1 or others - {of_all}:
        raise ModelError(
            "per_layer_config gives heads to the layers without a window, to all of them the same.",
            f"per_layer_config for the layers {', '.join(written)} of {len(slides)}, "
            f"{len(slides) - sum(slides)} of them without a window",
            "Check per_layer_config and layer_types in config.json.",
        )
    (found,) = full  # the last layer has no window
    return found.head_dim, found.num_key_value_heads


def _experts(keys: Gemma4Keys) -> Mixture | None:
    """The mixture beside each layer's MLP."""
    if not keys.enable_moe_block:
        return None
    experts, chosen, width = keys.num_experts, keys.top_k_experts, keys.moe_intermediate_size
    if experts is None or chosen is None or width is None:
        raise ModelError(
            "With enable_moe_block a config has the number, the choice and the width of experts.",
            f"num_experts={experts}, top_k_experts={chosen}, moe_intermediate_size={width}",
            REMEDY,
        )
    mixture = Mixture(experts=experts, chosen=chosen, width=width, router="router")
    return check_mixture(mixture, "top_k_experts")


def _refuse(keys: Gemma4Keys) -> None:
    """Raises on a table that is too short."""
    vocabulary, rows = keys.vocab_size, keys.vocab_size_per_layer_input
    if keys.hidden_size_per_layer_input and rows < vocabulary:
        raise ModelError(
            "The embedding that is given to each layer has a row for every token.",
            f"vocab_size_per_layer_input={rows}, vocab_size={vocabulary}",
            "Check config.json.",
        )


def _sharing(keys: Gemma4Keys, slides: tuple[bool, ...]) -> int:
    """How many layers, the last ones, take keys and values of those before."""
    shared = keys.num_kv_shared_layers
    own = slides[: max(0, len(slides) - shared)]
    if {*own} != {*slides}:
        raise ModelError(
            "Layers share keys and values with one before them, which has a window or none as they have.",
            f"num_kv_shared_layers={shared} of {len(slides)} layers, {len(own) - sum(own)} of the others "
            f"without a window and {sum(own)} with one",
            "Check num_kv_shared_layers and layer_types in config.json.",
        )
    return shared


FAMILIES = [
    Family(
        model_type=f"{whole}_text",
        router=router,
        tokenizer="GemmaTokenizer",
        decoder=Decoder(
            causal_lm=causal_lm,
            keys=keys,
            options=options,
            settings=settings,
            text_of=(whole,),
            whole_caps_logits=True,
            experts_out_in=True,
        ),
    )
    for whole, causal_lm, keys, router in (
        ("gemma4", "Gemma4ForCausalLM", Gemma4Keys, "router.proj"),
        ("gemma4_unified", "Gemma4UnifiedForCausalLM", UnifiedKeys, None),
    )
]
