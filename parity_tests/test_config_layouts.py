"""config.json as transformers 4 and 5 write it, and with keys of both, against torch's logits.

The tests run under either version. Under 5 the tables of doubled keys are held to transformers' own reading.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder import DecoderLM
from hylorada_jax.models.decoder_config import DecoderConfig
from parity_tests.families import all_in_float64
from parity_tests.hf_weights import params_of, random_torch_model
from parity_tests.tolerances import MODEL

IS_5 = int(transformers.__version__.split(".")[0]) >= 5
SHAPE: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 12, "rope_theta": 500.0,
    "rms_norm_eps": 1e-3, "bos_token_id": None, "eos_token_id": 3,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "head_dim": 10, "attention_bias": True, "mlp_bias": True},
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True, "head_dim": None},
    "mistral": {"model_type": "mistral", "head_dim": 10, "sliding_window": 5},
    "mistral, no window": {"model_type": "mistral", "sliding_window": None, "head_dim": 8},
    "qwen2": {"model_type": "qwen2", **WINDOW, "max_window_layers": 1},
    "qwen2, no window": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 10, **WINDOW, "attention_bias": True,
              "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 6.0, "beta_slow": 0.5}
ORIGINAL = {"original_max_position_embeddings": 20}
ROPES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": LLAMA3 | ORIGINAL,
    "yarn": YARN,
    "yarn, mscales": YARN | ORIGINAL | {"mscale": 0.7, "mscale_all_dim": 0.2, "truncate": False},
    "yarn, attention_factor": YARN | ORIGINAL | {"attention_factor": 0.8},
}
IDS = np.random.default_rng(0).integers(1, 61, (2, 24))  # longer than the context


def transformers_4(hf: dict[str, Any]) -> dict[str, Any]:
    """A config as transformers 4 writes it."""
    return hf | {"torch_dtype": "float32", "transformers_version": "4.57.6"}


def transformers_5(hf: dict[str, Any]) -> dict[str, Any]:
    """The same as transformers 5 writes it."""
    rest = {key: value for key, value in hf.items() if key not in ("rope_theta", "rope_scaling")}
    parameters = {"rope_type": "default", "rope_theta": hf["rope_theta"], **(hf["rope_scaling"] or {})}
    return rest | {"rope_parameters": parameters, "dtype": "float32", "transformers_version": "5.24.0"}


def nulls_beside(hf: dict[str, Any]) -> dict[str, Any]:
    """The layout of 5, beside null keys of 4's and others."""
    nulls = dict.fromkeys(("rope_theta", "rope_scaling", "partial_rotary_factor", "attention_dropout"))
    return transformers_5(hf) | nulls | {"torch_dtype": None, "quantization_config": None}


def as_written(hf: dict[str, Any]) -> dict[str, Any]:
    """What the installed transformers itself writes."""
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(hf)))
    return json.loads(config.to_json_string())


@contextlib.contextmanager
def default_float64() -> Iterator[None]:
    """Within it, torch's integers times Python's floats are float64; dynamic NTK's base is such a product."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def ours(config: DecoderConfig, model: Any) -> np.ndarray:
    decoder = CausalLM(DecoderLM(config), params_of(model), config, "random")
    return np.asarray(decoder(jnp.asarray(IDS, jnp.int32)).logits)


def theirs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS), use_cache=False).logits.numpy()


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_gives_torchs_logits(family, rope):
    hf = SHAPE | FAMILIES[family] | {"rope_scaling": ROPES[rope]}
    configs = {DecoderConfig.from_hf(write(hf)) for write in (transformers_4, transformers_5, nulls_beside)}
    configs.add(DecoderConfig.from_hf(as_written(hf)))
    (config,) = configs
    model = random_torch_model(hf)
    np.testing.assert_allclose(ours(config, model), theirs(model), rtol=0, atol=MODEL["float32"])
    with all_in_float64(), default_float64(), jax.enable_x64(True):
        model = random_torch_model(hf).double()
        np.testing.assert_allclose(ours(config, model), theirs(model), rtol=0, atol=MODEL["float64"])


# Keys that say the same twice, or nothing, and the plain config that transformers 5 makes of them.
LINEAR = {"rope_type": "linear", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 70.0}
Written = dict[str, Any]
DOUBLED: dict[str, tuple[Written, Written]] = {
    "the base twice": (
        {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 70.0}},
        {"rope_theta": 70.0, "rope_scaling": None},
    ),
    "the base inside rope_scaling": (
        {"rope_theta": 500.0, "rope_scaling": LINEAR | {"rope_theta": 70.0}},
        {"rope_theta": 70.0, "rope_scaling": LINEAR},
    ),
    "the base outside rope_parameters": (
        {"rope_theta": 70.0, "rope_parameters": LINEAR},
        {"rope_theta": 70.0, "rope_scaling": LINEAR},
    ),
    "no type": ({"rope_parameters": {"rope_theta": 70.0}}, {"rope_theta": 70.0, "rope_scaling": None}),
    "no base": ({"rope_parameters": LINEAR}, {"rope_theta": 10000.0, "rope_scaling": LINEAR}),
    "both layouts": (
        {"rope_theta": 500.0, "rope_scaling": LINEAR, "rope_parameters": DYNAMIC},
        {"rope_theta": 500.0, "rope_scaling": LINEAR},
    ),
    "both layouts, the base in the one that loses": (
        {"rope_scaling": LINEAR, "rope_parameters": DYNAMIC},
        {"rope_theta": 10000.0, "rope_scaling": LINEAR},
    ),
    "both layouts, the old one empty": (
        {"rope_theta": 500.0, "rope_scaling": {}, "rope_parameters": DYNAMIC},
        {"rope_theta": 70.0, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
    ),
    "both layouts, the old one null": (
        {"rope_theta": 500.0, "rope_scaling": None, "rope_parameters": DYNAMIC},
        {"rope_theta": 70.0, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
    ),
    "the type twice": (
        {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 3.0}},
        {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
    ),
    "llama3 without its original context": (
        {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 12}},
    ),
    "the original context outside": (
        {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, **ORIGINAL},
        {"rope_theta": 500.0, "rope_scaling": LLAMA3 | ORIGINAL},
    ),
    "the original context twice": (
        {"rope_theta": 500.0, "rope_scaling": YARN | {"original_max_position_embeddings": 7}, **ORIGINAL},
        {"rope_theta": 500.0, "rope_scaling": YARN | ORIGINAL},
    ),
    "an original context that is not asked for": (
        {"rope_theta": 500.0, "rope_scaling": LINEAR, **ORIGINAL},
        {"rope_theta": 500.0, "rope_scaling": LINEAR},
    ),
    "yarn with nulls": (
        {"rope_theta": 500.0, "rope_scaling": YARN | {"mscale": None, "beta_fast": 6.0, "beta_slow": None}},
        {"rope_theta": 500.0, "rope_scaling": YARN | {"beta_slow": 1.0}},
    ),
    "yarn of factor null": (
        {"rope_theta": 500.0, "rope_scaling": YARN | {"factor": None, "original_max_position_embeddings": 3}},
        {"rope_theta": 500.0, "rope_scaling": YARN | {"factor": 4.0, "original_max_position_embeddings": 3}},
    ),
    "yarn of truncate null": (
        {"rope_theta": 500.0, "rope_scaling": YARN | ORIGINAL | {"truncate": None}},
        {"rope_theta": 500.0, "rope_scaling": YARN | ORIGINAL | {"truncate": False}},
    ),
    "the default, of which nothing is scaled": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 70.0, "factor": 4.0}},
        {"rope_theta": 70.0, "rope_scaling": None},
    ),
}  # fmt: skip
SMALL = {key: value for key, value in SHAPE.items() if key != "rope_theta"} | {"model_type": "llama"}


# The same of families that have a layout of their own.
GEMMA3 = SMALL | {
    "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 8,
}  # fmt: skip
LAYERED = {
    "full_attention": {"rope_type": "default", "rope_theta": 70.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
}
BASES = {"rope_theta": 70.0, "rope_local_base_freq": 30.0}
PHI3 = SMALL | {"model_type": "phi3", "pad_token_id": 0, "max_position_embeddings": 8192, "rope_theta": 500.0}
FACTORS = {"short_factor": [1.5, 2.0, 2.5, 3.0], "long_factor": [3.0, 4.0, 5.0, 6.0]}
LONG = {"type": "longrope", **FACTORS}
OWN: dict[str, tuple[Written, Written]] = {
    "gemma3: the bases of both types of layer": (
        GEMMA3 | {"rope_parameters": LAYERED},
        GEMMA3 | BASES | {"rope_scaling": None},
    ),
    "gemma3: rope_scaling beside them": (
        GEMMA3 | {"rope_parameters": LAYERED, "rope_scaling": {"factor": 4.0, "rope_type": "linear"}},
        GEMMA3 | BASES | {"rope_scaling": {"factor": 4.0, "rope_type": "linear"}},
    ),
    "gemma3: rope_scaling over them": (
        GEMMA3 | {"rope_parameters": LAYERED | {"full_attention": DYNAMIC}, "rope_scaling": LINEAR},
        GEMMA3 | BASES | {"rope_scaling": LINEAR},
    ),
    "gemma3: rope_scaling with a base": (
        GEMMA3 | {"rope_parameters": LAYERED, "rope_scaling": LINEAR | {"rope_theta": 500.0}},
        GEMMA3 | BASES | {"rope_theta": 500.0, "rope_scaling": LINEAR},
    ),
    "phi3: the original context outside": (
        PHI3 | {"rope_scaling": LONG, "original_max_position_embeddings": 20},
        PHI3 | {"rope_scaling": LONG, "original_max_position_embeddings": 20},
    ),
    "phi3: the original context inside, which is passed over": (
        PHI3 | {"rope_scaling": LONG | ORIGINAL},
        PHI3 | {"rope_scaling": LONG, "original_max_position_embeddings": 4096},
    ),
    "phi3: the original context inside and outside": (
        PHI3 | {"rope_scaling": LONG | {"original_max_position_embeddings": 7}, **ORIGINAL},
        PHI3 | {"rope_scaling": LONG, **ORIGINAL},
    ),
    "phi3: yarn, a former name of longrope": (
        PHI3 | {"rope_scaling": {"type": "yarn", **FACTORS}, **ORIGINAL},
        PHI3 | {"rope_scaling": LONG, **ORIGINAL},
    ),
    "phi3: yarn in the layout of 5": (
        PHI3 | {"rope_parameters": {"rope_type": "yarn", **FACTORS}, **ORIGINAL},
        PHI3 | {"rope_scaling": LONG, **ORIGINAL},
    ),
    "phi3: su": (
        PHI3 | {"rope_scaling": {"type": "su", **FACTORS, **ORIGINAL}, **ORIGINAL},
        PHI3 | {"rope_scaling": LONG, **ORIGINAL},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", [*DOUBLED, *OWN])
def test_of_doubled_keys_we_take_what_transformers_5_takes(case):
    written, plain = OWN[case] if case in OWN else [SMALL | part for part in DOUBLED[case]]
    config = DecoderConfig.from_hf(written)
    assert config == DecoderConfig.from_hf(plain)
    model = random_torch_model(copy.deepcopy(plain))  # transformers changes what it is given
    np.testing.assert_allclose(ours(config, model), theirs(model), rtol=0, atol=MODEL["float32"])
    if IS_5:
        np.testing.assert_array_equal(theirs(random_torch_model(copy.deepcopy(written))), theirs(model))
