"""Our decoder against transformers' torch models, every option away from its default."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MinPLogitsWarper,
    Phi3Config,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.math import rope
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.causal_lm import CausalLM, DecodeStep
from hylorada_jax.models.decoder import DecoderLM
from hylorada_jax.models.decoder_config import ACTIVATIONS, DecoderConfig
from hylorada_jax.models.decoder_layer import activation
from hylorada_jax.models.dense import scaled
from hylorada_jax.models.families import DECODERS
from hylorada_jax.models.rotation import frequencies as frequencies_of
from hylorada_jax.models.sampling import filter_logits
from parity_tests.families import NEW, all_in_float64
from parity_tests.hf_weights import padded, params_of, random_torch_model
from parity_tests.tolerances import DECODER

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not 48 / 6
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 16,  # shorter than the texts
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA = {
    **SHAPE,
    "model_type": "llama",
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "gelu_pytorch_tanh",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "beta_fast": 6.0,
    "beta_slow": 0.5,
    "mscale": 0.7,
    "mscale_all_dim": 0.2,
    "truncate": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-llama3": {**LLAMA, "rope_scaling": LLAMA3},
    "llama-linear-tied": {
        **LLAMA,
        "rope_scaling": {"type": "linear", "factor": 3.0},
        "tie_word_embeddings": True,
    },
    "llama-dynamic": {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "hidden_act": "gelu"},
    "mistral": {**SHAPE, "model_type": "mistral", "sliding_window": 7, "rope_scaling": YARN},
    "qwen2": {
        **SHAPE,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
        "rope_scaling": YARN,
        "hidden_act": "relu",
    },
    "qwen3": {
        **SHAPE,
        "model_type": "qwen3",
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        **SHAPE,
        "model_type": "qwen3_moe",
        "num_hidden_layers": 2,
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "moe_intermediate_size": 40,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {
        **SHAPE,
        "model_type": "gpt_oss",
        "num_hidden_layers": 2,
        "sliding_window": 5,
        "num_local_experts": 5,
        "num_experts_per_tok": 3,
        "rope_scaling": {key: YARN[key] for key in YARN if not key.startswith("mscale")},
    },
    "phi3": {
        **SHAPE,
        "model_type": "phi3",
        "head_dim": 8,
        "sliding_window": 7,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 12,
        "rope_scaling": {"type": "longrope", "short_factor": [1.2, 1.7], "long_factor": [1.5, 4.0]},
    },
    "granite": {
        **LLAMA,
        "model_type": "granite",
        "embedding_multiplier": 2.5,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": 3.0,
        "attention_dropout": 0.1,  # as Granite 3.0: without effect where nothing of the base trains
        "rope_scaling": LLAMA3,
    },
    "olmo2": {
        **SHAPE,
        "model_type": "olmo2",
        "head_dim": 8,
        "attention_bias": True,
        "rope_scaling": {"type": "linear", "factor": 3.0},
    },
    "smollm3": {
        **SHAPE,
        "model_type": "smollm3",
        "attention_bias": True,
        "mlp_bias": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "no_rope_layer_interval": 3,
        "rope_scaling": YARN,
    },
    "gemma": {
        **SHAPE,
        "model_type": "gemma",
        "attention_bias": True,
        "hidden_act": "silu",
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    "gemma2": {
        **SHAPE,
        "model_type": "gemma2",
        "tie_word_embeddings": False,  # scaled embeddings that are also the head repeat themselves
        "query_pre_attn_scalar": 10,
        "sliding_window": 6,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 4.0,
    },
    "gemma3": {
        **SHAPE,
        "model_type": "gemma3_text",
        "tie_word_embeddings": False,
        "attention_bias": True,
        "hidden_activation": "gelu",
        "query_pre_attn_scalar": 10,
        "sliding_window": 6,
        "sliding_window_pattern": 3,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
}
# Beyond their context, dynamic NTK and LongRoPE depend on the longest text of the call.
STABLE = [name for name in MODELS if name not in ("llama-dynamic", "phi3")]
LENGTHS = (40, 23, 31)


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def ours(hf: dict[str, Any], model: torch.nn.Module) -> CausalLM:
    config = DecoderConfig.from_hf(hf)
    return CausalLM(DecoderLM(config), params_of(model), config, "random")


@functools.cache
def random_model(name: str, gain: float = 0.7) -> CausalLM:
    return ours(MODELS[name], random_torch_model(MODELS[name], gain=gain))


def logits_of(model: CausalLM, ids, mask=None, segments=None) -> np.ndarray:
    mask, segments = (None if array is None else jnp.asarray(array, jnp.int32) for array in (mask, segments))
    output = model(jnp.asarray(ids, jnp.int32), attention_mask=mask, segment_ids=segments)
    return np.asarray(output.logits)


def texts(seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 97, length).astype(np.int32) for length in LENGTHS]


def torch_logits(model, ids, mask=None, positions=None) -> np.ndarray:
    def tensor(array):
        return None if array is None else torch.tensor(np.asarray(array), dtype=torch.long)

    with torch.no_grad():
        out = model(tensor(ids), attention_mask=tensor(mask), position_ids=tensor(positions), use_cache=False)
    return out.logits.numpy()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, side):
    hf = MODELS[name]
    model = random_torch_model(hf)
    ids, mask = padded(texts(), side)
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    theirs = torch_logits(model, ids, mask, positions)
    mine = logits_of(ours(hf, model), ids, mask)
    assert np.isfinite(mine).all()
    np.testing.assert_allclose(mine[mask > 0], theirs[mask > 0], rtol=0, atol=DECODER["float32"])


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_in_float64(name):
    hf = MODELS[name]
    ids = texts()[0][None]
    with all_in_float64():
        model = random_torch_model(hf).double()
        theirs = torch_logits(model, ids)
    with jax.enable_x64(True):
        logits = logits_of(ours(hf, model), ids)
    assert logits.dtype == theirs.dtype == np.float64
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=DECODER["float64"])


def test_phi3_stretches_4096_tokens_where_nothing_says_how_many():
    hf = {key: value for key, value in MODELS["phi3"].items() if key != "original_max_position_embeddings"}
    hf["max_position_embeddings"] = 131072
    theirs = ROPE_INIT_FUNCTIONS["longrope"](Phi3Config(**hf), "cpu")
    ours = DecoderConfig.from_hf(hf).rope_scaling
    assert ours.original_max_position_embeddings == 4096
    assert ours.attention_factor == pytest.approx(theirs[1], rel=1e-12)


OFF = [
    ("llama-llama3", {"rope_scaling": None}),
    ("llama-llama3", {"rope_theta": 10000.0}),
    ("llama-llama3", {"rms_norm_eps": 1e-6}),
    ("llama-llama3", {"hidden_act": "silu"}),
    ("llama-llama3", {"attention_bias": False}),
    ("llama-llama3", {"mlp_bias": False}),
    ("llama-linear-tied", {"rope_scaling": None}),
    ("llama-dynamic", {"rope_scaling": None}),
    ("llama-dynamic", {"hidden_act": "gelu_new"}),
    ("mistral", {"sliding_window": 8}),
    ("mistral", {"rope_scaling": {**YARN, "truncate": True}}),
    ("mistral", {"rope_scaling": {**YARN, "mscale": 1.0}}),
    ("qwen2", {"sliding_window": 7}),
    ("qwen2", {"max_window_layers": 1}),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    ("qwen3", {"sliding_window": 6}),
    ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("gpt_oss", {"num_experts_per_tok": 2}),
    ("phi3", {"sliding_window": 8}),
    ("phi3", {"original_max_position_embeddings": 64}),
    ("granite", {"embedding_multiplier": 1.0}),
    ("granite", {"attention_multiplier": 1.0}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"logits_scaling": 1.0}),
    ("smollm3", {"no_rope_layer_interval": 2}),
    ("smollm3", {"use_sliding_window": False}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma3", {"query_pre_attn_scalar": 16}),
    ("gemma3", {"sliding_window_pattern": 2}),
    ("gemma3", {"rope_local_base_freq": 500.0}),
]


@pytest.mark.apart
@pytest.mark.parametrize(("name", "change"), OFF)
def test_every_option_is_seen_by_these_tests(name, change):
    """If an option were dropped, the comparisons above would fail by far more than their tolerance."""
    base = random_model(name)
    config = DecoderConfig.from_hf({**MODELS[name], **change})
    changed = CausalLM(DecoderLM(config), base.params, config, "changed")  # leaves without a use are left
    inputs = padded(texts(), "right")
    difference = np.abs(logits_of(base, *inputs) - logits_of(changed, *inputs))[inputs[1] > 0]
    assert difference.max() > 10 * DECODER["float32"]


@pytest.mark.parametrize("name", STABLE)
def test_packed_documents_equal_the_separate_ones(name):
    model, rows = random_model(name), texts()
    ids = np.concatenate([*rows, [0, 0]])[None]
    segments = np.concatenate([np.full(len(row), i + 1) for i, row in enumerate(rows)] + [[0, 0]])[None]
    packed = logits_of(model, ids, segments=segments)[0]
    assert np.isfinite(packed).all()
    alone = logits_of(model, *padded(rows, "right"))
    for i, row in enumerate(rows):
        np.testing.assert_allclose(
            packed[segments[0] == i + 1], alone[i, : len(row)], rtol=0, atol=DECODER["float32"]
        )


def test_a_text_that_outgrows_longropes_short_factors_is_computed_anew():
    """As transformers 5 does; 4.57 keeps keys that the short factors have turned."""
    model, original = random_model("phi3", gain=1.5), MODELS["phi3"]["original_max_position_embeddings"]
    rows = [text[: original - short].tolist() for text, short in zip(texts(), (3, 5, 4), strict=True)]
    prompts, count = [[*row] for row in rows], 10
    for _ in range(count):
        ids, mask = padded([np.array(row, np.int32) for row in rows], "left")
        for row, token in zip(rows, logits_of(model, ids, mask)[:, -1].argmax(-1).tolist(), strict=True):
            row.append(token)
    expected = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    assert model.generate(prompts, max_new_tokens=count, eos_token_id=()) == expected
    cached = dataclasses.replace(model.config.rope_scaling, original_max_position_embeddings=10**6)
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, rope_scaling=cached))
    kept = other.generate(prompts, max_new_tokens=count, eos_token_id=())
    assert [new[:4] for new in kept] == [new[:4] for new in expected]
    assert kept != expected  # what this test can tell apart
    streamed = model.stream(prompts[0], max_new_tokens=count, eos_token_id=())
    (alone,) = model.generate(prompts[:1], max_new_tokens=count, eos_token_id=())
    assert [token for some in streamed for token in some] == alone


def test_a_text_that_outgrows_them_keeps_its_prompts_structure():
    settings: dict[str, Any] = {"lora_rank": 2, "lora_A_init": "kaiming", "target_modules": "all-linear"}
    model = HyLoRADAModel(random_model("phi3", gain=1.5), HyLoRADAConfig(method="hylorada_v2", **settings))
    keys = iter(jax.random.split(jax.random.key(2), 99))
    model.adapters = jax.tree.map(
        lambda leaf: leaf + 0.5 * jax.random.normal(next(keys), leaf.shape), model.adapters
    )
    prompts = [text[:length].tolist() for text, length in zip(texts(), (9, 7), strict=False)]
    depths = [[n % 3 + 1 for n in range(len(prompt))] for prompt in prompts]
    rows, levels = [[*row] for row in prompts], [[*row] for row in depths]
    for _ in range(8):
        (ids, mask), (structure, _) = (
            padded([np.array(row, np.int32) for row in each], "left") for each in (rows, levels)
        )
        found = model(
            jnp.asarray(ids), attention_mask=jnp.asarray(mask), structure_ids=jnp.asarray(structure)
        )
        for row, level, token in zip(rows, levels, found.logits[:, -1].argmax(-1).tolist(), strict=True):
            row.append(token)
            level.append(level[-1])
    expected = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    assert model.generate(prompts, structure_ids=depths, max_new_tokens=8, eos_token_id=()) == expected
    flat = [[1] * len(row) for row in depths]
    assert model.generate(prompts, structure_ids=flat, max_new_tokens=8, eos_token_id=()) != expected


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation_equals_transformers(name):
    mine = random_model(name, gain=1.5)
    prompts = [text.tolist() for text in texts()]
    free = mine.generate(prompts, max_new_tokens=24, eos_token_id=-1)
    # A token of the middle of one row becomes the end token, so that rows end at different times.
    eos = next(token for token in free[1][6:] if token not in free[1][:6])
    ids, mask = padded(texts(), "left")
    out = random_torch_model(MODELS[name], gain=1.5).generate(
        torch.tensor(ids, dtype=torch.long),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=eos,
    )
    theirs = []
    for row in out[:, ids.shape[1] :].tolist():
        theirs.append(row[: row.index(eos) + 1] if eos in row else row)
    assert mine.generate(prompts, max_new_tokens=24, eos_token_id=eos) == theirs
    assert len(theirs[1]) < 24


@pytest.mark.parametrize(("penalty", "x64"), [(0.8, False), (1.3, True)])
def test_a_repetition_penalty_is_that_of_transformers(penalty, x64):
    mine, theirs = random_model("qwen2", gain=1.5), random_torch_model(MODELS["qwen2"], gain=1.5)
    prompts = [text.tolist() for text in texts()]
    settings: dict[str, Any] = {"max_new_tokens": 24, "repetition_penalty": penalty, "do_sample": False}
    # Row by row: transformers penalises the padding of a batch too.
    expected = [theirs.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :] for prompt in prompts]
    with jax.enable_x64(x64):
        found = mine.generate(prompts, max_new_tokens=24, repetition_penalty=penalty, eos_token_id=())
    assert found == [row.tolist() for row in expected]


@pytest.mark.parametrize("name", STABLE)
def test_generation_takes_the_argmax_of_the_full_forward_pass(name):
    mine, prompts = random_model(name, gain=1.5), [text.tolist() for text in texts()]
    new = mine.generate(prompts, max_new_tokens=24, eos_token_id=-1)
    whole = [np.array(prompt + more, np.int32) for prompt, more in zip(prompts, new, strict=True)]
    logits = logits_of(mine, *padded(whole, "right"))
    for row, prompt in enumerate(prompts):
        predicted = logits[row, len(prompt) - 1 : len(prompt) + 23].argmax(-1)
        assert predicted.tolist() == new[row]


@pytest.mark.parametrize("name", STABLE)
def test_cached_logits_equal_full_logits(name):
    mine = random_model(name)
    ids, mask = padded(texts(), "left")
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    full = logits_of(mine, ids, mask)
    cache = mine.init_cache(len(ids), ids.shape[1] + 5)
    start, decode = 0, jax.jit(DecodeStep(mine.module))
    for end in (20, 21, 22, 40):  # a prompt, single tokens, a chunk
        logits, cache = decode(
            {"params": mine.params},
            jnp.asarray(ids[:, start:end]),
            position_ids=jnp.asarray(positions[:, start:end]),
            key_valid=jnp.asarray(mask[:, start:end] > 0),
            cache=cache,
        )
        np.testing.assert_allclose(np.asarray(logits), full[:, end - 1], rtol=0, atol=DECODER["float32"])
        start = end


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    LLAMA3,
    {**LLAMA3, "factor": 32.0, "low_freq_factor": 2.0, "original_max_position_embeddings": 8192},
    {key: value for key, value in YARN.items() if "mscale" not in key},
    YARN,
    {"rope_type": "yarn", "factor": 16.0},
    {"rope_type": "yarn", "factor": 0.5, "truncate": True},
    {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.9, "mscale": 2.0, "mscale_all_dim": 1.0},
]


@pytest.mark.parametrize("scaling", ROPES, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize(("head_dim", "theta"), [(16, 500.0), (64, 10000.0), (128, 1e6)])
def test_frequencies_equal_transformers(scaling, head_dim, theta):
    hf = {**LLAMA, "rope_scaling": dict(scaling), "head_dim": head_dim, "rope_theta": theta}
    hf["max_position_embeddings"] = 4096
    theirs = AutoConfig.for_model(**json.loads(json.dumps(hf)))
    kind = scaling.get("rope_type", scaling.get("type"))
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    config = DecoderConfig.from_hf(hf)
    mine = frequencies_of(config, jnp.zeros((1, 1), jnp.int32), np.float32)
    # The same float32 operations; torch writes 2π/ω as 2π·(1/ω), and llama3 subtracts after that.
    np.testing.assert_allclose(mine, frequencies.numpy(), rtol=1e-6 if kind == "llama3" else 1.2e-7)
    if kind in ("default", "linear"):
        assert (mine == frequencies.numpy()).mean() > 0.95  # torch's powers are now and then one unit off
    assert config.rope_scaling.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("longest", [5, 64, 65, 300])
def test_dynamic_frequencies_equal_transformers(longest):
    hf = {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 64}
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](AutoConfig.for_model(**hf), "cpu", torch.tensor(longest))
    positions = jnp.arange(longest)[None]
    mine = rope.dynamic_frequencies(16, 500.0, jnp.float32, factor=3.0, max_positions=64, positions=positions)
    # float32 powers on both sides; exponents up to 7/8 of ln(base) enlarge the base's rounding.
    np.testing.assert_allclose(np.asarray(mine), theirs.numpy(), rtol=5e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_transformers(name):
    x = np.linspace(-8, 8, 400, dtype=np.float32)
    # One float32 evaluation of erf, tanh or exp on values up to 8.
    np.testing.assert_allclose(
        activation(name, jnp.asarray(x)), ACT2FN[name](torch.tensor(x)).numpy(), rtol=1e-6, atol=2e-6
    )


@pytest.mark.parametrize("factor", [0.22, 1 / 6, 1536**-0.5])
def test_a_number_scales_bfloat16_as_torch_does(factor):
    x = torch.linspace(-3, 3, 1001, dtype=torch.bfloat16)
    ours = scaled(jnp.asarray(x.float().numpy(), jnp.bfloat16), factor)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), (x * factor).float().numpy())


@pytest.mark.parametrize("top_k", [None, 1, 5, 50, 200])
@pytest.mark.parametrize("top_p", [None, 1e-3, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("min_p", [None, 1e-3, 0.1, 1.0])
def test_sampling_filters_equal_transformers(top_k, top_p, min_p):
    scores = torch.tensor(np.random.default_rng(0).normal(0, 3, (64, 97)), dtype=torch.float32)
    theirs = scores
    for value, warper in ((top_k, TopKLogitsWarper), (top_p, TopPLogitsWarper), (min_p, MinPLogitsWarper)):
        if value is not None:
            theirs = warper(value)(None, theirs)
    mine = filter_logits(
        jnp.asarray(scores.numpy()),
        top_k=None if top_k is None else jnp.int32(top_k),
        top_p=None if top_p is None else jnp.float32(top_p),
        min_p=None if min_p is None else jnp.float32(min_p),
    )
    np.testing.assert_array_equal(np.asarray(mine), theirs.numpy())


DICTS: list[dict[str, Any]] = [
    *MODELS.values(),
    *({"model_type": family} for family in DECODERS if family not in ("ministral", *NEW)),
    {"model_type": "ministral", "head_dim": 64},  # without one its class fails
    {**SHAPE, "model_type": "mistral", "sliding_window": None, "head_dim": None},
    {"model_type": "gpt_oss", "rope_scaling": None},
    {"model_type": "llama", "num_key_value_heads": None, "hidden_size": 576, "num_attention_heads": 9},
    {"model_type": "qwen2", "use_sliding_window": True},
    {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 128, "max_window_layers": 31},
    {"model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 0},
]


@pytest.mark.parametrize("hf", DICTS, ids=str)
def test_config_reads_what_transformers_reads(hf):
    theirs = AutoConfig.for_model(**json.loads(json.dumps(hf)))
    config = DecoderConfig.from_hf(hf)
    assert config == DecoderConfig.from_hf(json.loads(theirs.to_json_string(use_diff=False)))
    theirs.num_hidden_layers = 1
    with torch.device("meta"):
        layer = AutoModelForCausalLM.from_config(theirs).model.layers[0]
    assert config.num_key_value_heads == theirs.num_key_value_heads
    assert layer.self_attn.head_dim == config.head_dim
    biases = {
        "self_attn.qkv_proj" if config.fused else "self_attn.q_proj": config.qkv_bias,
        "self_attn.o_proj": config.o_bias,
        "mlp.down_proj": config.mlp_bias,
    }
    if mixture := config.mixture:
        block = layer.get_submodule(mixture.name)
        of_mlp = biases.pop("mlp.down_proj")
        if config.swiglu_limit is not None:
            experts, chosen = block.experts, block.router.top_k
            assert (mixture.experts, mixture.chosen) == (experts.num_experts, chosen)
            assert (mixture.width, config.swiglu_limit) == (experts.expert_dim, experts.limit)
        else:
            assert (mixture.experts, mixture.chosen) == (len(block.experts), block.top_k)
            assert mixture.normalised == getattr(block, "norm_topk_prob", True)
            gate, up, down = (block.experts[0].get_submodule(name) for name in mixture.layers)
            assert gate.out_features == up.out_features == down.in_features == mixture.width
            biases[f"{mixture.name}.experts.0.{mixture.layers[2]}"] = of_mlp
    assert {name: layer.get_submodule(name).bias is not None for name in biases} == biases
    assert hasattr(layer.self_attn, "q_norm") == config.qk_norm
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.rope_theta == theirs.rope_theta
    assert config.rms_norm_eps == theirs.rms_norm_eps
    if hf["model_type"] in ("mistral", "mixtral", "phi3", "qwen3_moe"):
        assert config.sliding_window == theirs.sliding_window
    elif hasattr(theirs, "layer_types"):
        kinds = tuple(kind == "sliding_attention" for kind in theirs.layer_types)
        assert config.sliding_layers == kinds
        assert config.sliding_window == (theirs.sliding_window if any(kinds) else None)
