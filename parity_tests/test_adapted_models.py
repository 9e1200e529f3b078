"""Whole adapted models in JAX against the reference: names, logits, and the gradient of every adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import hylorada_torch
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.surgery import layout
from parity_tests.conftest import VOCAB
from parity_tests.tolerances import MODEL, relative_error

CONFIGS = {
    "lora": HyLoRADAConfig(method="lora", lora_rank=3, lora_alpha=5.0, target_modules=("all-linear",)),
    "lora, rslora, its own targets": HyLoRADAConfig(method="lora", use_rslora=True),
    "dora": HyLoRADAConfig(method="dora", lora_rank=3, target_modules=("all-linear",)),
    "dora, norm not detached": HyLoRADAConfig(method="dora", detach_norm=False),
    "hylorada_v1": HyLoRADAConfig(lora_rank=3, target_modules=("all-linear",)),
    "hylorada_v1, ranks by depth": HyLoRADAConfig(
        lora_rank=6, rank_strategy="decreasing", use_rslora=True, detach_norm=True
    ),
    "hylorada_v1, one layer, bias scaled": HyLoRADAConfig(
        target_modules=(r".*\.1\..*(c_attn|q_proj)",), magnitude_scales_bias=True
    ),
    "lorada": HyLoRADAConfig(method="lorada", lora_rank=3),
    "lorada, one scale a layer": HyLoRADAConfig(
        method="lorada", lora_rank=3, daa_per_head=False, daa_position_bias=True
    ),
    # Groups of 4 and a shift of 1: rows of 9 tokens have whole groups, parts in front, and parts behind.
    "longlora": HyLoRADAConfig(method="longlora", lora_rank=3, s2_group_size=4, s2_shift_ratio=0.25),
    "sparse": HyLoRADAConfig(method="sparse", sparse_adapter_dim=7, sparse_topk_ratio=0.5),
    "hylorada_v2": HyLoRADAConfig(method="hylorada_v2", lora_rank=3, structure_dim=5, structure_seq_len=12),
    "hylorada_v2, temporal": HyLoRADAConfig(
        method="hylorada_v2", lora_rank=3, structure_dim=5, structure_encoder_type="temporal"
    ),
    "hylorada, both ways": HyLoRADAConfig(
        method="hylorada", lora_rank=3, sparse_enabled=True, sparse_adapter_dim=7, train_norms=True
    ),
    "hylorada, all on": HyLoRADAConfig(
        method="hylorada",
        lora_rank=3,
        target_modules=("all-linear",),
        sparse_enabled=True,
        sparse_adapter_dim=7,
        sparse_temperature=0.5,
        s2_attn_enabled=True,
        s2_group_size=4,
        train_embeddings=True,
        train_norms=True,
    ),
}
# What concerns biases, names or ranks is compared on the families that differ in it.
CASES = [
    *(("gpt2", name) for name in ("lora", "dora", "hylorada_v1")),
    *(("qwen2", name) for name in ("lora", "dora", "hylorada_v1")),
    ("llama", "hylorada_v1"),
    ("qwen3", "hylorada_v1"),
    ("gpt2", "hylorada_v1, one layer, bias scaled"),
    ("qwen2", "hylorada_v1, one layer, bias scaled"),
    ("qwen2", "hylorada_v1, ranks by depth"),
    ("qwen2", "dora, norm not detached"),
    ("gpt2", "lora, rslora, its own targets"),
    *(
        (family, name)
        for family in ("gpt2", "llama", "qwen2")
        for name in ("lorada", "longlora", "sparse", "hylorada_v2", "hylorada, all on")
    ),
    ("qwen2", "lorada, one scale a layer"),
    ("qwen2", "hylorada_v2, temporal"),
    ("qwen3", "hylorada, all on"),
    ("mistral", "hylorada, all on"),
    ("bert", "lorada"),
    ("bert", "hylorada, both ways"),
    ("bert", "hylorada_v2"),
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_float64(base_models, family, name):
    with jax.enable_x64(True):
        got, expected = logits_and_gradients(base_models, family, "float64", CONFIGS[name])
    largest = max(np.abs(expected[name]).max() for name in expected if name != "logits")
    errors = {}
    for name in expected:
        if name.endswith(".beta"):  # its gradient is zero: the softmax does not see it
            errors[name] = np.abs(got[name] - expected[name]).max() / largest
        else:
            errors[name] = relative_error(got[name], expected[name])
    assert max(errors.values()) <= MODEL["float64"], errors


@pytest.mark.parametrize("name", ["hylorada_v1", "hylorada, all on"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_float32(base_models, family, name):
    got, expected = logits_and_gradients(base_models, family, "float32", CONFIGS[name])
    # The gradients as one vector: that of a scalar gate is a sum of many terms that all but cancel.
    errors = [relative_error(got.pop("logits"), expected.pop("logits"))]
    vectors = (
        np.concatenate([gradients[name].ravel() for name in expected]) for gradients in (got, expected)
    )
    errors.append(relative_error(*vectors))
    assert max(errors) <= MODEL["float32"], errors


def test_t5_in_float32(base_models):
    """An encoder-decoder: linear adapters, DAA with its position bias in both stacks, sparse adapters."""
    config = HyLoRADAConfig(
        method="lorada", lora_rank=3, daa_position_bias=True, sparse_enabled=True, sparse_adapter_dim=7
    )
    reference, model, adapters = adapted_models(base_models, "t5", "float32", config)
    rng = np.random.default_rng(2)
    given = {
        "input_ids": rng.integers(1, VOCAB, size=(2, 9)),
        "attention_mask": np.array([[1] * 9, [1] * 6 + [0] * 3]),
        "decoder_input_ids": rng.integers(1, VOCAB, size=(2, 5)),
    }
    expected = reference(**{name: torch.tensor(value) for name, value in given.items()}).logits
    got = jax.jit(model.apply)(adapters, **{name: jnp.asarray(value) for name, value in given.items()}).logits
    assert relative_error(got, expected.detach()) <= MODEL["float32"]
    cross = [name for name in layout.tensor_shapes(model.sites) if "EncDecAttention" in name]
    assert cross
    assert not any(name.endswith("alpha") for name in cross)  # DAA adapts self-attention


def adapted_models(base_models, family, dtype, config):
    """The reference and the JAX model with the same random adapters, far from their initial values."""
    torch_base, jax_base = base_models(family, dtype)
    reference = hylorada_torch.HyLoRADAModel(torch_base, config)
    model = HyLoRADAModel(jax_base, config)
    rng = np.random.default_rng(1)
    tensors = {
        name: (value.detach().numpy() + 0.2 * rng.normal(size=value.shape)).astype(dtype)
        for name, value in reference.adapters().items()
    }
    assert layout.tensor_shapes(model.sites) == {name: value.shape for name, value in tensors.items()}
    reference.load_adapters({name: torch.tensor(value) for name, value in tensors.items()})
    return reference, model, layout.unflatten(model.sites, tensors)


def logits_and_gradients(base_models, family, dtype, config):
    """(those of JAX, those of the reference): the logits and the gradient of every adapter, by name."""
    reference, model, adapters = adapted_models(base_models, family, dtype, config)
    rng = np.random.default_rng(2)
    input_ids = rng.integers(VOCAB, size=(2, 9))
    attention_mask = np.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    cotangent = rng.normal(size=(2, 9, VOCAB)).astype(dtype) * attention_mask[..., None]
    given = {"attention_mask": attention_mask}
    if config.use_hylorada_v2:
        given["structure_ids"] = rng.integers(70, size=(2, 9))  # beyond 63 they are clipped
    if config.structure_encoder_type == "temporal":
        given["structure_positions"] = np.sort(rng.uniform(0, 500, size=(2, 9))).astype(dtype)
    train = bool(config.s2_attn_enabled)

    reference.train(train)
    told = {name: torch.tensor(value) for name, value in given.items()}
    expected = reference(torch.tensor(input_ids), **told).logits
    expected.backward(torch.tensor(cotangent, dtype=expected.dtype))

    @jax.jit
    def run(adapters, frozen, cotangent):
        def forward(adapters):
            inputs = {name: jnp.asarray(value) for name, value in given.items()}
            return model.apply(adapters, jnp.asarray(input_ids), frozen=frozen, train=train, **inputs).logits

        logits, pull_back = jax.vjp(forward, adapters)
        return logits, pull_back(cotangent.astype(logits.dtype))[0]

    got, gradients = run(adapters, model.frozen, cotangent)
    assert got.dtype == dtype
    tokens = attention_mask.astype(bool)  # the output at padding means nothing
    results = {"logits": np.asarray(got)[tokens], **layout.flatten(model.sites, gradients)}
    adapter_gradients = {name: parameter.grad.numpy() for name, parameter in reference.adapters().items()}
    return results, {"logits": expected.detach().numpy()[tokens], **adapter_gradients}
