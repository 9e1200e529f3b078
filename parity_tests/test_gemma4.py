"""What Gemma 4 alone has, against transformers' torch models of it, which version 5 brought."""

import json
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from hylorada_jax.errors import ModelError
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.loading import load_model
from hylorada_jax.models.stacks import parts_of
from parity_tests.families import FAMILIES, VOCAB, all_in_float64, jax_base, measuring, torch_base
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
        cache, decode = ours.init_cache(1, text.shape[1]), jax.jit(ours.decode)
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


def shapes_of(attention: Any) -> tuple[int, int, bool]:
    """(all queries, all keys, values of their own) of a layer of transformers'."""
    widths = (getattr(attention, name).out_features for name in ("q_proj", "k_proj"))
    return (*widths, attention.v_proj is not None)


@needs_oracle
@pytest.mark.parametrize(
    "changes",
    [
        {"per_layer_config": {}},
        {"per_layer_config": {"1": {"head_dim": 10}, "3": {"head_dim": 10}}},
        {"attention_k_eq_v": False, "num_global_key_value_heads": 3},
        {"layer_types": ["sliding_attention"] * 4},
        {"layer_types": None, "num_hidden_layers": 7},
    ],
    ids=["alike", "other heads", "values of their own", "the last is forced", "five to one"],
)
def test_layouts_of_heads(changes):
    said = FAMILIES[FAMILY]().config.to_dict() | {"global_head_dim": 8, "num_global_key_value_heads": 3}
    said = {key: value for key, value in said.items() if key != "per_layer_config"} | changes
    theirs = transformers.Gemma4TextConfig(**{k: v for k, v in said.items() if v is not None})
    ours = DecoderConfig.from_hf(said)
    # As a person wrote it, and as transformers writes it.
    assert ours == DecoderConfig.from_hf(theirs.to_dict())
    with torch.device("meta"):
        attentions = [layer.self_attn for layer in transformers.Gemma4TextModel(theirs).layers]
    assert ours.sliding_layers == tuple(attention.is_sliding for attention in attentions)
    for number, attention in enumerate(attentions):
        c = ours.kind(number)
        heads = (c.num_attention_heads, c.num_key_value_heads)
        assert (*(n * c.head_dim for n in heads), not c.keys_as_values) == shapes_of(attention)


@needs_oracle
def test_defaults_are_those_of_transformers():
    written = transformers.AutoConfig.for_model(**DENSE).to_dict()
    assert DecoderConfig.from_hf(written) == DecoderConfig.from_hf(DENSE)


@needs_oracle
def test_the_text_part_of_a_multimodal_model_is_the_text_model_with_its_soft_cap(tmp_path):
    """Its numbers are those of the text model, which are compared above."""
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 4, "patch_size": 4, "position_embedding_size": 16,
    }  # fmt: skip
    with all_in_float64():
        text = torch_base(FAMILY, "float64")
        config = transformers.Gemma4Config(text_config=text.config, vision_config=vision, audio_config=None)
        whole = transformers.Gemma4ForConditionalGeneration(config).eval()
        whole.model.language_model.load_state_dict(text.model.state_dict())
        logits = (torch_logits(model, TEXTS[:1]) for model in (whole, text))
        assert relative_error(*logits) <= MODEL["float64"]
    with measuring("float64"):
        expected = jax_base(FAMILY, "float64")
        for original in (True, False):
            directory = tmp_path / str(original)
            whole.save_pretrained(directory, save_original_format=original)
            part = load_model(directory, dtype="float64")
            assert part.config == expected.config
            jax.tree.map(np.testing.assert_array_equal, part.params, expected.params)


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
    ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input=256"),
    ({"num_kv_shared_layers": 3}, "num_kv_shared_layers=3"),
    ({"enable_moe_block": True}, "enable_moe_block=True"),
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
