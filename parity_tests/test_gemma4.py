"""What Gemma 4 alone has, against transformers' torch models of it, which version 5 brought."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from hylorada_jax.errors import ModelError
from hylorada_jax.math.quantized import as_array
from hylorada_jax.models.causal_lm import DecodeStep
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.loading import load_model, weights_layout
from hylorada_jax.models.mixture import EXPERTS
from hylorada_jax.models.quantize import quantize
from hylorada_jax.models.rounded_weights import RoundedWeights
from hylorada_jax.models.source import find_source
from hylorada_jax.models.stacks import parts_of
from parity_tests.families import FAMILIES, VOCAB, all_in_float64, jax_base, measuring, saved, torch_base
from parity_tests.hf_weights import padded
from parity_tests.tolerances import MODEL, relative_error

FAMILY = "gemma4_text"
needs_oracle = pytest.mark.skipif(
    not hasattr(transformers, "Gemma4ForCausalLM"), reason="transformers 4.57 has no Gemma 4"
)
DENSE: dict[str, Any] = {"model_type": FAMILY, "hidden_size_per_layer_input": 0}
ROPE: dict[str, Any] = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}
TEXTS = [np.random.default_rng(3).integers(1, VOCAB, length) for length in (17, 9, 13)]  # the window is 4


def torch_logits(model: Any, ids: Any, **inputs: Any) -> np.ndarray:
    given = {name: torch.tensor(np.asarray(value)) for name, value in inputs.items()}
    with all_in_float64(), torch.no_grad():
        return model(torch.tensor(np.asarray(ids)), use_cache=False, **given).logits.numpy()


@needs_oracle
def test_padded_and_packed_rows_longer_than_the_window():
    with all_in_float64():
        theirs = torch_base(FAMILY, "float64")
    with measuring("float64"):
        ours = jax_base(FAMILY, "float64")
        for side in ("left", "right"):
            ids, mask = padded(TEXTS, side)
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
            expected = torch_logits(theirs, ids, attention_mask=mask, position_ids=positions)
            got = np.asarray(ours(jnp.asarray(ids), attention_mask=jnp.asarray(mask)).logits)
            assert relative_error(got[mask > 0], expected[mask > 0]) <= MODEL["float64"]
        segments = np.concatenate([np.full(len(text), n + 1) for n, text in enumerate(TEXTS)])[None]
        packed = ours(jnp.asarray(np.concatenate(TEXTS))[None], segment_ids=jnp.asarray(segments)).logits
    alone = np.concatenate([torch_logits(theirs, text[None])[0] for text in TEXTS])
    assert relative_error(np.asarray(packed[0]), alone) <= MODEL["float64"]


@needs_oracle
def test_a_cache_of_layers_with_unequal_heads_continues_as_torch_does():
    with all_in_float64():
        theirs = torch_base(FAMILY, "float64")
    text, found = TEXTS[0][None], []
    with measuring("float64"):
        ours = jax_base(FAMILY, "float64")
        cache, decode = ours.init_cache(1, text.shape[1]), jax.jit(DecodeStep(ours.module))
        ends = [len(text[0]) - 3, *range(len(text[0]) - 2, len(text[0]) + 1)]  # a prompt, and single tokens
        for start, end in pairwise([0, *ends]):
            logits, cache = decode(
                {"params": ours.params},
                jnp.asarray(text[:, start:end]),
                position_ids=jnp.arange(start, end)[None],
                cache=cache,
            )
            found.append(np.asarray(logits[0]))
    expected = torch_logits(theirs, text)[0, np.array(ends) - 1]
    assert relative_error(np.stack(found), expected) <= MODEL["float64"]


def shapes_of(layer: Any) -> tuple[int | None, ...]:
    """The widths of queries, keys, values and the MLP in a layer of transformers'; None: not its own."""
    parts = [getattr(layer.self_attn, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    return tuple(part and part.out_features for part in (*parts, layer.mlp.up_proj))


@needs_oracle
@pytest.mark.parametrize(
    "changes",
    [
        {"per_layer_config": {}},
        {"per_layer_config": {str(number): {"head_dim": 10} for number in (1, 3, 5, 7)}},
        {"attention_k_eq_v": False, "num_global_key_value_heads": 3},
        {"layer_types": ["sliding_attention"] * 8, "num_kv_shared_layers": 0},
        {"layer_types": None, "num_hidden_layers": 14, "num_kv_shared_layers": 5},
        {"hidden_size_per_layer_input": 0, "use_double_wide_mlp": False},
    ],
    ids=["alike", "other heads", "values of their own", "the last is forced", "five to one", "as wide"],
)
def test_layouts_of_heads(changes):
    said = FAMILIES[FAMILY]().config.to_dict() | {"global_head_dim": 8, "num_global_key_value_heads": 3}
    said = {key: value for key, value in said.items() if key != "per_layer_config"} | changes
    theirs = transformers.Gemma4TextConfig(**{k: v for k, v in said.items() if v is not None})
    ours = DecoderConfig.from_hf(said)
    # As a person wrote it, and as transformers writes it.
    assert ours == DecoderConfig.from_hf(theirs.to_dict())
    with torch.device("meta"):
        layers = transformers.Gemma4TextModel(theirs).layers
    assert ours.sliding_layers == tuple(layer.self_attn.is_sliding for layer in layers)
    for number, layer in enumerate(layers):
        c = ours.kind(number)
        queries, keys = (n * c.head_dim for n in (c.num_attention_heads, c.num_key_value_heads))
        own = None if c.shared_kv_layers else keys
        assert shapes_of(layer) == (queries, own, None if c.keys_as_values else own, c.intermediate_size)


@needs_oracle
def test_defaults_are_those_of_transformers():
    for said in ({"model_type": FAMILY}, DENSE, {"model_type": "gemma4_unified_text"}):
        written = transformers.AutoConfig.for_model(**said).to_dict()
        assert DecoderConfig.from_hf(written) == DecoderConfig.from_hf(said)


VISION: dict[str, dict[str, int]] = {
    "Gemma4": {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 4, "patch_size": 4, "position_embedding_size": 16,
    },
    "Gemma4Unified": {
        "patch_size": 4, "pooling_kernel_size": 1, "mm_embed_dim": 8, "mm_posemb_size": 8,
        "output_proj_dims": 8,
    },
}  # fmt: skip


@needs_oracle
@pytest.mark.parametrize(("family", "named"), [(FAMILY, "Gemma4"), ("gemma4_unified_text", "Gemma4Unified")])
def test_the_text_part_of_a_multimodal_model_is_the_text_model_with_its_soft_cap(family, named, tmp_path):
    """Its numbers are those of the text model, which are compared above."""
    with all_in_float64():
        text = torch_base(family, "float64")
        parts = {"text_config": text.config, "vision_config": VISION[named], "audio_config": None}
        config = getattr(transformers, f"{named}Config")(**parts)
        whole = getattr(transformers, f"{named}ForConditionalGeneration")(config).eval()
        whole.set_experts_implementation("eager")  # its own choice has no float64
        whole.model.language_model.load_state_dict(text.model.state_dict())
        logits = (torch_logits(model, TEXTS[:1]) for model in (whole, text))
        assert relative_error(*logits) <= MODEL["float64"]
    with measuring("float64"):
        expected = jax_base(family, "float64")
        for original in (True, False):
            directory = tmp_path / str(original)
            whole.save_pretrained(directory, save_original_format=original)
            part = load_model(directory, dtype="float64")
            assert part.config == expected.config
            jax.tree.map(np.testing.assert_array_equal, part.params, expected.params)


@needs_oracle
def test_a_checkpoint_may_have_keys_and_values_of_layers_that_take_others(tmp_path):
    """Google's have them, and transformers leaves them out."""
    directory = Path(saved(FAMILY, "float32").name)
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    expected, file = load_model(directory), tmp_path / "model.safetensors"
    tensors = load_file(file)
    for layer, loads in ((7, True), (3, False)):
        more = {f"model.layers.{layer}.self_attn.v_proj.weight": np.zeros((2, 2), np.float32)}
        save_file(tensors | more, file)
        if loads:
            jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path).params, expected.params)
        else:
            with pytest.raises(ModelError, match=r"layers\.3\.self_attn\.v_proj"):
                load_model(tmp_path)


@needs_oracle
def test_experts_are_rounded_as_their_tensors_turned_over_and_the_router_is_not():
    """Oracle: the experts that are read as numbers, quantised as a whole."""
    pytest.importorskip("qwix")
    source = find_source(saved(FAMILY, "float32").name)
    layer = load_model(source.path).params["model"]["layers"]["0"]["1"]  # of layers 1 and 3
    down = quantize({EXPERTS: {"down_proj": layer[EXPERTS]["down_proj"]}}, "int8")[EXPERTS]["down_proj"]
    rounded = RoundedWeights(weights_layout(source), "float32+int8")
    got = rounded.read("model.layers.3.experts.down_proj", (slice(1, 3),))
    np.testing.assert_array_equal(got, as_array(down)[1, 1:3].swapaxes(1, 2))
    router = rounded.read("model.layers.3.router.proj.weight")
    np.testing.assert_array_equal(router, layer["router"]["proj"]["kernel"][1].T)


def test_sixty_layers_are_a_pattern_repeated_ten_times():
    shape = {"num_hidden_layers": 60, "attention_k_eq_v": True, "num_key_value_heads": 8,
             "num_global_key_value_heads": 2}  # fmt: skip
    config = DecoderConfig.from_hf(DENSE | shape)
    (part,) = parts_of(config)
    assert (part.repeats, [stack.together for stack in part.stacks]) == (10, [5, 1])
    sliding, full = (stack.config for stack in part.stacks)
    assert (sliding.head_dim, sliding.num_key_value_heads, sliding.keys_as_values) == (256, 8, False)
    assert (full.head_dim, full.num_key_value_heads, full.keys_as_values) == (512, 2, True)
    assert config.kv_heads_in_common == 2


def test_a_null_of_per_layer_config_is_no_absent_one():
    absent, null = (DecoderConfig.from_hf(DENSE | more) for more in ({}, {"per_layer_config": None}))
    assert [kind.head_dim for kind in absent.kinds()] == [256, 512]
    assert [kind.head_dim for kind in null.kinds()] == [256]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 9}, "vocab_size_per_layer_input=9"),
    ({"num_kv_shared_layers": 30}, "num_kv_shared_layers=30"),
    ({"num_kv_shared_layers": 25}, "25 of 30 layers, 0 of the others without a window"),
    ({"enable_moe_block": True}, "num_experts=None, top_k_experts=None, moe_intermediate_size=None"),
    (
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5, "moe_intermediate_size": 8},
        "top_k_experts=5 of 4",
    ),
    ({"enable_moe_block": True, "num_experts": 0}, "num_experts"),
    ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    ({"rope_theta": 3.0}, "rope_theta=3.0"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}, "rope_parameters"),
    (
        {"rope_parameters": ROPE | {"sliding_attention": {"rope_type": "linear", "rope_theta": 50.0}}},
        "sliding_attention.rope_type",
    ),
    ({"rope_parameters": {"full_attention": ROPE["full_attention"]}}, "sliding_attention"),
    ({"rope_parameters": 3}, "rope_parameters"),
    ({"per_layer_config": {"5": {"intermediate_size": 3}}}, "intermediate_size"),
    ({"per_layer_config": {"5": {"head_dim": 512}}}, "per_layer_config"),  # not in layer 11
    ({"per_layer_config": {"0": {"head_dim": 512}}}, "per_layer_config"),  # has a window
    ({"per_layer_config": {"40": {"head_dim": 512}}}, "per_layer_config"),
    ({"global_head_dim": 7}, "head_dim=7"),
    ({"num_global_key_value_heads": 3, "attention_k_eq_v": True}, "num_key_value_heads=3"),
    ({"layer_types": ["full_attention"]}, "layer_types"),
]


@pytest.mark.parametrize(("changes", "named"), REFUSED, ids=lambda part: json.dumps(part)[:50])
def test_what_it_has_beside_is_refused_by_name(changes, named):
    with pytest.raises(ModelError) as caught:
        DecoderConfig.from_hf(DENSE | changes)
    assert named in str(caught.value)
