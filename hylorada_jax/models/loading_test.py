import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hylorada_jax.errors import ModelError
from hylorada_jax.models.loading import load_model

CONFIG = {
    "model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip


# Of which each token has two, as in every Mixtral.
MIXTURE: dict[str, Any] = {"model_type": "mixtral", "num_local_experts": 3}


def save_model(path: Path, dtype: type = np.float32, **config: Any) -> Path:
    """A model directory written by hand from the shapes that transformers gives a Llama, or a Mixtral."""
    config = CONFIG | config
    inner: Any = config["intermediate_size"]
    rng = np.random.default_rng(0)
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8),
        "self_attn.o_proj": (8, 8), "input_layernorm": (8,), "post_attention_layernorm": (8,),
    }  # fmt: skip
    experts: Any = config.get("num_local_experts")
    if experts is None:
        layer |= {"mlp.gate_proj": (inner, 8), "mlp.up_proj": (inner, 8), "mlp.down_proj": (8, inner)}
    else:
        layer["block_sparse_moe.gate"] = (experts, 8)
        own = {"w1": (inner, 8), "w2": (8, inner), "w3": (inner, 8)}
        layer |= {f"block_sparse_moe.experts.{n}.{w}": own[w] for n in range(experts) for w in own}
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (11, 8)
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    tensors: dict[str, np.ndarray] = {
        name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()
    }
    save_file(tensors, path / "model.safetensors")
    return path


def edit(path: Path, **changes: np.ndarray | None) -> None:
    """Replace, add or (None) remove tensors of a saved model."""
    tensors = load_file(path / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, path / "model.safetensors")


def test_the_loaded_model_runs_and_keeps_its_name(tmp_path):
    model = load_model(save_model(tmp_path / "m", tie_word_embeddings=False), remat="full")
    assert model.name == str(tmp_path / "m")
    assert model.module.remat == "full"
    assert model(jnp.array([[1, 2, 3]])).logits.shape == (1, 3, 11)
    head = load_file(tmp_path / "m" / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(model.params["lm_head"]["embedding"], head)


def test_every_leaf_has_the_dtype_that_was_asked_for(tmp_path):
    path = save_model(tmp_path / "m")
    for dtype in ("float32", "bfloat16", jnp.float16):
        assert {leaf.dtype for leaf in jax.tree.leaves(load_model(path, dtype=dtype).params)} == {
            jnp.dtype(dtype)
        }
    with jax.enable_x64(True):
        leaves = jax.tree.leaves(load_model(path, dtype=jnp.float64).params)
        assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float64)}
    with pytest.raises(ModelError, match="jax_enable_x64"):
        load_model(path, dtype=jnp.float64)
    wrong: Any
    for wrong in (jnp.int8, "bf16", object()):
        with pytest.raises(ModelError, match="floating-point"):
            load_model(path, dtype=wrong)


def test_harmless_extras_pass(tmp_path):
    path = save_model(tmp_path / "m")
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    edit(path, **{"lm_head.weight": embedding, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2)})
    assert "lm_head" not in load_model(path).params


def test_a_tied_head_that_differs_is_an_error(tmp_path):
    path = save_model(tmp_path / "m")
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    edit(path, **{"lm_head.weight": embedding + 1})
    with pytest.raises(ModelError, match=r"differs from model\.embed_tokens\.weight"):
        load_model(path)


def test_a_mismatch_shows_both_sides(tmp_path):
    path = save_model(tmp_path / "m")
    missing = "model.layers.1.mlp.up_proj.weight"
    edit(path, **{missing: None, "model.layers.1.mlp.upp.weight": np.ones((12, 8), np.float32)})
    with pytest.raises(ModelError, match=rf"missing \(1\): {missing}\s+unexpected \(1\): .*upp"):
        load_model(path)
    path = save_model(tmp_path / "more")
    config = CONFIG | {"num_hidden_layers": 3, "intermediate_size": 16}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"missing \(9\)[\s\S]*wrong shape \(6\)[\s\S]*\(12, 8\) instead of \(16, 8\)"
    ):
        load_model(path)


def test_damaged_weights_are_named(tmp_path):
    path = save_model(tmp_path / "m")
    edit(path, **{"model.norm.weight": np.full(8, np.nan, np.float32)})
    with pytest.raises(ModelError, match=r"model\.norm\.weight in .*model\.safetensors"):
        load_model(path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ModelError, match=r"model\.safetensors: .*"):
        load_model(path)


def test_without_hugging_faces_flax_classes_the_error_says_which_version_has_them(tmp_path, monkeypatch):
    # As under transformers 5, whose import this file does not survive.
    monkeypatch.setitem(sys.modules, "hylorada_jax.models.hf", None)
    path = save_model(tmp_path / "m", model_type="gpt2")
    with pytest.raises(ModelError, match=r"transformers 4\.57") as caught:
        load_model(path)
    assert "model_type 'gpt2'" in str(caught.value.received)
    assert caught.value.remedy == 'Install it: `pip install "hylorada[hf]"`.'


def test_what_no_class_computes_is_refused(tmp_path):
    pytest.importorskip("hylorada_jax.models.hf.loading", exc_type=ImportError)
    with pytest.raises(ModelError, match="model_type 'mamba'"):
        load_model(save_model(tmp_path / "m", model_type="mamba", architectures=["MambaForCausalLM"]))
    with pytest.raises(ModelError, match="model_type 'no-such'"):
        load_model(save_model(tmp_path / "m", model_type="no-such"))
    with pytest.raises(ModelError, match="feature of our decoder"):
        load_model(save_model(tmp_path / "m", model_type="gpt2"), remat="full")
