"""Oracles: products that are formed, in float64; fresh adapters, which have learned nothing; known ranks."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.saved.adapter_files import write_adapter
from hylorada_jax.saved.inspection import effective_rank, inspect_adapter, singular_values
from hylorada_jax.saved.saved_adapter import open_adapter
from hylorada_jax.surgery import layout

SHAPE = {"model_type": "llama", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 11}
SHAPE |= {"num_attention_heads": 2, "intermediate_size": 6}
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def base():
    return CausalLM.from_config(DecoderConfig.from_hf(SHAPE), jax.random.key(0))


def saved(model, directory, tensors=None):
    """The adapter as a file, with other tensors where they are given."""
    if tensors is not None:
        model.adapters = layout.unflatten(model.sites, tensors)
    model.save_pretrained(directory)
    return open_adapter(directory)


def weights(model):
    """W of each linear layer, by name."""
    places = {name: (m, i) for m in model.modules.linears for i, name in enumerate(m.names)}
    return lambda name: places[name][0].weight(model.base.params, places[name][1])


@pytest.mark.parametrize("weight", [[1, 1, 1, 1], [1, 0, 0, 0], [8, 4, 2, 1], [0, 0, 0, 0]], ids=str)
def test_the_effective_rank_is_that_of_the_singular_values(weight):
    left, right = (np.linalg.qr(RNG.normal(size=(n, 4)))[0] for n in (9, 7))
    parts = np.array(weight) / max(sum(weight), 1)
    entropy = -sum(p * np.log(p) for p in parts if p)
    expected = np.exp(entropy) if sum(weight) else 0
    # float64, and what rounds to no singular value weighs little.
    weighted = right.T * np.array(weight)[:, None]
    for factors in ((left * weight, right.T), (1e-3 * left, weighted), (left * weight,), (weighted,)):
        assert effective_rank(singular_values(*factors)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "lora"},
        {"method": "hylorada", "sparse_enabled": True, "sparse_adapter_dim": 4},
        {"method": "hylorada_v2", "structure_encoder_type": "temporal"},
        {"method": "longlora"},
        {"method": "sparse", "sparse_adapter_dim": 4, "sparse_topk_ratio": 0.5},
    ],
    ids=lambda settings: settings["method"],
)
def test_a_fresh_adapter_has_learned_nothing(base, settings, tmp_path):
    model = HyLoRADAModel(base, HyLoRADAConfig(lora_rank=3, **settings))
    found = inspect_adapter(saved(model, tmp_path), weights(model))
    for layer in found["linear"]:
        assert (layer["rank"], layer["update_norm"], layer["relative_norm"]) == (3, 0, 0)
        assert layer["effective_rank"] == 0
        if settings["method"].startswith("hylorada"):  # whose A starts orthogonal
            assert layer["effective_rank_A"] == pytest.approx(3, rel=1e-6)  # float32
            assert layer["column_scale"] == pytest.approx([1, 1], rel=1e-6)
            assert (layer["g"], layer["beta"]) == pytest.approx((0.5, 1 / (1 + np.exp(-0.1))))
    for layer in found.get("attention", ()):
        assert set(layer["alpha"]) == {1}
        assert not np.any(layer.get("bias", 0))
    assert not np.any(found.get("position_factor", 0))
    for layer in found.get("sparse", ()):
        assert (layer["up_norm"], len(layer["units"])) == (0, 2 if settings["method"] == "sparse" else 1)
    if "structure" in found:
        assert found["structure"]["periods"] == [24, 168, 720, 8760]
        assert found["structure"]["frequencies"][:2] == pytest.approx([1, 10000 ** (-1 / 16)])
        negated = {  # of which only the modulus counts
            name: -leaf if name.endswith(("periods", "freq_scale")) else leaf
            for name, leaf in layout.flatten(model.sites, model.adapters).items()
        }
        again = inspect_adapter(saved(model, tmp_path / "negated", negated), weights(model))
        assert again["structure"] == found["structure"]
    assert ("structure" in found, "sparse" in found) == (
        settings["method"] == "hylorada_v2",
        "sparse_adapter_dim" in settings,
    )


def test_a_trained_adapter_is_measured_as_its_products_are(base, tmp_path):
    config = HyLoRADAConfig(
        method="hylorada", lora_rank=3, lora_alpha=5, alpha_pattern={"v_proj": 7.0, "down_proj": 2.0}
    )
    model = HyLoRADAModel(base, config)
    tensors = {
        name: RNG.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in layout.flatten(model.sites, model.adapters).items()
    }
    found = inspect_adapter(saved(model, tmp_path, tensors), weights(model))
    names = [layer["name"] for layer in found["linear"]]
    assert names == sorted(names, key=lambda name: int(name.split(".")[2]))
    assert len(names) == 4 * 11
    for layer in found["linear"]:
        A, B, m, gate, residual = (
            tensors[f"{layer['name']}.{leaf}"].astype(float)
            for leaf in ("lora_A", "lora_B", "magnitude", "magnitude_gate", "residual_weight")
        )
        W = np.asarray(weights(model)(layer["name"]), float)
        update = (7 if layer["name"].endswith("v_proj") else 5) / 3 * B @ A
        g, beta = 1 / (1 + np.exp(-gate)), 1 / (1 + np.exp(-residual))
        initial, norm = (np.linalg.norm(matrix, axis=1) for matrix in (W, W + update))
        c = (1 - beta) * (g * m + (1 - g) * initial) / norm + beta
        expected = {
            "update_norm": np.linalg.norm(update),
            "relative_norm": np.linalg.norm(update) / np.linalg.norm(W),
            "g": g,
            "beta": beta,
            "column_scale": [c.min(), c.max()],
        }
        for key, value in expected.items():
            assert layer[key] == pytest.approx(value, rel=1e-4), key  # float32
        values = np.linalg.svd(update, compute_uv=False)[:3]
        parts = values / values.sum()
        assert layer["effective_rank"] == pytest.approx(np.exp(-(parts * np.log(parts)).sum()), rel=1e-6)
    # Bias and position factor at a few distances, from the tables that the layers index.
    bias = tensors["model.layers.10.self_attn.position_bias"]
    assert found["attention"][10]["bias"][:3] == bias[:3].tolist()
    assert (found["distances"][:3], found["positions"][:3]) == ([0, 1, 2], [0, 1, 2])
    assert found["position_factor"][:3] == pytest.approx(np.tanh(tensors["position_bias"][:3]).tolist())


def test_a_rank_far_beyond_the_widths_forms_no_matrix_of_rank_by_rank(base, tmp_path):
    """Of one byte for each number it would take 4 MB; A and B have 8 KB."""
    rank = 2**11
    A, B = (RNG.normal(size=shape) for shape in ((rank, 1), (1, rank)))
    config = HyLoRADAConfig(method="lora", lora_rank=rank, lora_alpha=rank)
    tensors = {"x.lora_A": A.astype(np.float32), "x.lora_B": B.astype(np.float32)}
    write_adapter(tmp_path, tensors, config, HyLoRADAModel(base, HyLoRADAConfig(method="lora")).identity())
    adapter = open_adapter(tmp_path)
    tracemalloc.start()
    try:
        (layer,) = inspect_adapter(adapter)["linear"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert layer["rank"] == rank
    assert layer["update_norm"] == pytest.approx(abs((B @ A).item()), rel=1e-4)  # float32
    assert (layer["effective_rank"], layer["effective_rank_A"]) == pytest.approx((1, 1))
    assert peak < rank * rank


@pytest.mark.parametrize(
    "change",
    [
        {"model.layers.0.self_attn.q_proj.lora_B": np.zeros((8, 2), np.float32)},
        {"model.layers.0.self_attn.q_proj.lora_A": np.zeros((0, 8), np.float32)},
        {"model.layers.0.self_attn.q_proj.lora_A": np.zeros(3, np.float32)},
        {"model.layers.0.self_attn.q_proj.magnitude_gate": np.zeros(2, np.float32)},
        {"model.layers.0.self_attn.alpha": np.zeros((), np.float32)},
        {"position_bias": np.zeros(0, np.float32)},
        {"elsewhere": np.zeros(2, np.float32)},
    ],
    ids=lambda change: f"{next(iter(change))} {next(iter(change.values())).shape}",
)
def test_tensors_that_the_config_does_not_call_for_are_refused(base, change, tmp_path):
    model = HyLoRADAModel(base, HyLoRADAConfig(method="hylorada", lora_rank=3))
    tensors = layout.flatten(model.sites, model.adapters) | change
    write_adapter(tmp_path, tensors, model.config, model.identity())
    with pytest.raises(CheckpointError, match="must be those"):
        inspect_adapter(open_adapter(tmp_path))


def test_the_units_that_are_on_are_those_of_the_gate(base, tmp_path):
    model = HyLoRADAModel(base, HyLoRADAConfig(method="sparse", sparse_adapter_dim=8, sparse_topk_ratio=0.25))
    tensors = layout.flatten(model.sites, model.adapters)
    found = inspect_adapter(saved(model, tmp_path))
    for layer in found["sparse"]:
        scores = jnp.asarray(tensors[f"{layer['name']}.gate_scores"])
        assert layer["units"] == sorted(jax.lax.top_k(scores, 2)[1].tolist())
