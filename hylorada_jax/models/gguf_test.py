from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from hylorada_jax.errors import ModelError
from hylorada_jax.models.gguf import GGUFWeights, gguf_config
from hylorada_jax.models.gguf_header import read_gguf

KEYS: dict[str, Any] = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 64,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 50000.0,
}


def write_gguf(
    path: Path,
    architecture: str,
    keys: dict[str, Any],
    tensors: dict[str, np.ndarray],
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """A GGUF file by the gguf package's own writer; `kinds` says which tensors are quantised, and how."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in ({f"{architecture}.{k}": v for k, v in keys.items()} | (extra or {})).items():
        method = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}[type(value)]
        getattr(writer, f"add_{method}")(key, value)
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name)
        data = tensor if kind is None else gguf.quants.quantize(tensor, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(**more: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (96, 32), "blk.0.attn_q.weight": (32, 32), "blk.0.attn_k.weight": (16, 32)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} | more


def test_the_header_is_what_the_gguf_package_reads(tmp_path):
    extra = {"general.name": "größe", "a.list": ["x", "yz"], "a.numbers": [1, 2, 3], "a.flag": True}
    q4 = gguf.GGMLQuantizationType.Q4_1
    path = write_gguf(tmp_path / "m.gguf", "llama", KEYS, tensors(), {"token_embd.weight": q4}, extra)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    epsilon = "llama.attention.layer_norm_rms_epsilon"
    assert fields.pop(epsilon) == np.float32(1e-5)
    assert ours.metadata == fields | {epsilon: 1e-5}  # the decimal, not 9.99999975e-06
    places = {t.name: (t.tensor_type, t.data_offset, t.n_bytes) for t in theirs.tensors}
    assert {name: (e.kind, e.offset, e.size) for name, e in ours.tensors.items()} == places
    assert {name: e.shape for name, e in ours.tensors.items()} == {n: t.shape for n, t in tensors().items()}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16"])
def test_dequantisation_in_pieces_is_dequantisation(tmp_path, kind):
    # 1.3 million values, so that there are two pieces.
    large = np.random.default_rng(0).standard_normal((5000, 256)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[kind]
    name = "output.weight"
    path = write_gguf(tmp_path / "m.gguf", "qwen2", KEYS, {name: large}, {name: kind})
    (entry,) = gguf.GGUFReader(path).tensors
    expected = gguf.quants.dequantize(entry.data, kind)
    np.testing.assert_array_equal(GGUFWeights(read_gguf(path)).read("lm_head.weight"), expected)


def test_config_of_each_architecture(tmp_path):
    for architecture in ("llama", "qwen2", "qwen3"):
        path = write_gguf(tmp_path / f"{architecture}.gguf", architecture, KEYS, tensors())
        config = gguf_config(read_gguf(path))
        assert config["model_type"] == architecture
        assert (config["vocab_size"], config["head_dim"], config["num_key_value_heads"]) == (96, 8, 2)
        assert (config["rope_theta"], config["rope_scaling"]) == (50000.0, None)
        assert config["tie_word_embeddings"]
    more = tensors(**{"output.weight": np.ones((96, 32), np.float32)})
    more["blk.0.attn_q.bias"] = np.ones(32, np.float32)
    keys = KEYS | {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16}
    config = gguf_config(read_gguf(write_gguf(tmp_path / "more.gguf", "llama", keys, more)))
    assert (config["head_dim"], config["tie_word_embeddings"], config["attention_bias"]) == (16, False, True)


def test_rope_scaling(tmp_path):
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}
    yarn["rope.scaling.original_context_length"] = 16

    def scaling(keys, **more):
        path = write_gguf(tmp_path / "m.gguf", "llama", KEYS | keys, tensors(**more))
        return gguf_config(read_gguf(path))["rope_scaling"]

    assert scaling(linear) == {"rope_type": "linear", "factor": 4.0}
    expected = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
    assert scaling(yarn) == expected
    with pytest.raises(ModelError, match="longrope"):
        scaling({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0})


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    llama3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 8192
    shape = {"hidden_size": 256, "num_attention_heads": 4, "rope_theta": 500000.0}
    stretched = llama3 | {"rope_theta": 500000.0}  # where transformers 5 looks for it
    scaled = transformers.LlamaConfig(**shape, rope_scaling=stretched, max_position_embeddings=131072)
    # transformers' frequencies are the oracle; a GGUF holds by how much each is divided.
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    factors = (plain / ROPE_INIT_FUNCTIONS["llama3"](scaled, "cpu")[0].numpy()).astype(np.float32)
    keys = KEYS | {"embedding_length": 256, "rope.freq_base": 500000.0}
    more = tensors(**{"rope_freqs.weight": factors})
    header = read_gguf(write_gguf(tmp_path / "m.gguf", "llama", keys, more))
    assert gguf_config(header)["rope_scaling"] == llama3
    assert "rope_freqs.weight" not in GGUFWeights(header).shapes
    more["rope_freqs.weight"] = more["rope_freqs.weight"] ** 0.5
    with pytest.raises(ModelError, match="those of Llama 3"):
        gguf_config(read_gguf(write_gguf(tmp_path / "m.gguf", "llama", keys, more)))


def test_what_is_not_understood_is_refused(tmp_path):
    def config(architecture, keys, extra=None):
        path = write_gguf(tmp_path / "m.gguf", architecture, keys, tensors(), extra=extra)
        return gguf_config(read_gguf(path))

    with pytest.raises(ModelError, match="gemma2"):
        config("gemma2", KEYS)
    with pytest.raises(ModelError, match=r"llama\.expert_count, llama\.logit_scale"):
        config("llama", KEYS | {"expert_count": 8, "logit_scale": 0.5})
    with pytest.raises(ModelError, match="one width"):
        config("llama", KEYS | {"rope.dimension_count": 4})
    with pytest.raises(ModelError, match=r"embedding_length' is missing"):
        config("llama", {k: v for k, v in KEYS.items() if k != "embedding_length"})
    with pytest.raises(ModelError, match="llama-gguf-split"):
        config("llama", KEYS, {"split.count": 3})


def test_truncated_and_foreign_files(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", KEYS, tensors())
    whole = path.read_bytes()
    for length in (len(whole) // 2, 300, 30, 5):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"m\.gguf .*bytes[\s\S]*truncated or damaged"):
            read_gguf(path)
    path.write_bytes(b"PK\x03\x04" + whole)
    with pytest.raises(ModelError, match="start with the bytes GGUF"):
        read_gguf(path)
    path.write_bytes(whole[:4] + b"\x01" + whole[5:])
    with pytest.raises(ModelError, match="version 1"):
        read_gguf(path)
