import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from hylorada_jax.errors import ModelError
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.gguf import GGUFWeights, gguf_config
from hylorada_jax.models.gguf_header import GGUFFile, TensorEntry, read_gguf

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


def tensors(hidden: int = 32, head_dim: int = 8, /, **more: np.ndarray) -> dict[str, np.ndarray]:
    """Those that bound what KEYS says, for other widths too."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (96, hidden), "blk.0.attn_q.weight": (4 * head_dim, hidden)}
    shapes |= {"blk.0.attn_k.weight": (2 * head_dim, hidden), "blk.0.ffn_up.weight": (64, hidden)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} | more


def test_the_header_is_what_the_gguf_package_reads(tmp_path):
    extra = {"general.name": "größe", "a.list": ["x", "yz"], "a.numbers": [1, 2, 3], "a.flag": True}
    q4 = gguf.GGMLQuantizationType.Q4_1
    path = write_gguf(tmp_path / "m.gguf", "llama", KEYS, tensors(), {"token_embd.weight": q4}, extra)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    epsilon = "llama.attention.layer_norm_rms_epsilon"
    assert fields.pop(epsilon) == np.float32(1e-5)
    metadata = {key: v.tolist() if isinstance(v, np.ndarray) else v for key, v in ours.metadata.items()}
    assert metadata == fields | {epsilon: 1e-5}  # the decimal, not 9.99999975e-06
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
    more = tensors(32, 16, **{"output.weight": np.ones((96, 32), np.float32)})
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
    with pytest.raises(ModelError, match="attn_factor"):
        scaling(yarn | {"rope.scaling.attn_factor": 1.2})
    with pytest.raises(ModelError, match=r"rope_factors_short\.weight is missing"):
        scaling({}, **{"rope_factors_long.weight": np.ones(4, np.float32)})


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
    more = tensors(256, 64, **{"rope_freqs.weight": factors})
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

    with pytest.raises(ModelError, match="falcon"):
        config("falcon", KEYS)
    with pytest.raises(ModelError, match=r"llama\.expert_count, llama\.logit_scale"):
        config("llama", KEYS | {"expert_count": 8, "logit_scale": 0.5})
    with pytest.raises(ModelError, match="one width"):
        config("llama", KEYS | {"attention.value_length": 4})
    with pytest.raises(ModelError, match="rotates whole heads"):
        DecoderConfig.from_hf(config("llama", KEYS | {"rope.dimension_count": 4}))
    with pytest.raises(ModelError, match="missing required field `embedding_length`"):
        config("llama", {k: v for k, v in KEYS.items() if k != "embedding_length"})
    with pytest.raises(ModelError, match="llama-gguf-split"):
        config("llama", KEYS, {"split.count": 3})


@pytest.fixture(scope="module")
def header(tmp_path_factory) -> GGUFFile:
    return read_gguf(write_gguf(tmp_path_factory.mktemp("g") / "m.gguf", "llama", KEYS, tensors()))


LINEAR, YARN = {"rope.scaling.type": "linear"}, {"rope.scaling.type": "yarn"}
SIZES = [
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "rope.dimension_count", "rope.scaling.original_context_length",
]  # fmt: skip
NUMBERS = ["attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor"]
NO_SIZES = [0, -1, 2**31, 2**64 - 1, 4.0, True, "4", [4], np.array([4, 4])]
NO_NUMBERS = [0.0, -1e-5, math.nan, math.inf, True, "1", np.array([1.0])]


@pytest.mark.parametrize("key", [*SIZES, *NUMBERS, "rope.scaling.type", "rope.scaling.finetuned"])
def test_a_key_of_another_type_or_out_of_its_bounds_is_refused_by_name(key, header):
    wrong = NO_SIZES if key in SIZES else NO_NUMBERS if key in NUMBERS else [1, ["none"], np.arange(2)]
    for value in wrong:
        with pytest.raises(ModelError, match=rf"llama\.\*[\s\S]*received: {key}: "):
            gguf_config(replace(header, metadata={**header.metadata, f"llama.{key}": value}))


OWN_KEYS = [
    *((name, "attention.sliding_window") for name in ("phi3", "gemma3")),
    *(("gemma3", key) for key in ("rope.freq_base_swa", "final_logit_softcapping")),
    *(("granite", key) for key in ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")),
]


@pytest.mark.parametrize(("architecture", "key"), OWN_KEYS)
def test_a_familys_own_key_is_a_number_within_its_bounds(architecture, key, tmp_path):
    fused = {"blk.0.attn_qkv.weight": np.ones((64, 32), np.float32)}
    fused["blk.0.ffn_up.weight"] = np.ones((128, 32), np.float32)
    weights = tensors(**fused) if architecture == "phi3" else tensors()
    header = read_gguf(write_gguf(tmp_path / "m.gguf", architecture, KEYS, weights))
    name = f"{architecture}.{key}"
    value: Any
    for value in (True, "4", [4], np.array([]), np.array([4.0]), np.arange(2)):
        with pytest.raises(ModelError, match=rf"{architecture}\.\*[\s\S]*received: {key}: "):
            gguf_config(replace(header, metadata={**header.metadata, name: value}))
    for value in (-1, math.nan, math.inf, 1e300):
        with pytest.raises(ModelError):
            DecoderConfig.from_hf(gguf_config(replace(header, metadata={**header.metadata, name: value})))
    for value in (0, 8) if architecture == "phi3" else (8,):
        config = gguf_config(replace(header, metadata={**header.metadata, name: value}))
        window = DecoderConfig.from_hf(config).sliding_window
        assert architecture != "phi3" or window == (value or None)


# What does not fit the tensors, which have one layer, a width of 32, 4 heads and 2 of 8, and 64 inside.
MISFITS: dict[str, dict[str, Any]] = {
    "block_count 100000000, and tensors of 1": {"block_count": 10**8},
    r"token_embd.weight of shape \(96, 32\)": {"embedding_length": 2**30},
    r"attn_q.weight of shape \(32, 32\)": {"attention.head_count": 2**20},
    r"attn_q.weight of shape \(32, 32\) ": {"attention.key_length": 2**30},
    r"attn_k.weight of shape \(16, 32\)": {"attention.head_count_kv": 2**20},
    r"ffn_up.weight of shape \(64, 32\)": {"feed_forward_length": 2**31 - 1},
    "{'rope_type': 'linear', 'factor': None}": LINEAR,
    "'original_max_position_embeddings': None": YARN | {"rope.scaling.factor": 4.0},
}


@pytest.mark.parametrize("said", MISFITS)
def test_sizes_are_those_of_the_tensors(said, header):
    keys = {f"llama.{key}": value for key, value in MISFITS[said].items()}
    with pytest.raises(ModelError, match=said.rstrip()):
        gguf_config(replace(header, metadata={**header.metadata, **keys}))


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("token_embd.weight", None, "token_embd.weight is missing"),
        ("token_embd.weight", (96 * 32,), r"of shape \(3072,\)"),
        ("token_embd.weight", (96, 32, 1), r"of shape \(96, 32, 1\)"),
        ("blk.0.ffn_up.weight", None, "ffn_up.weight is missing"),
        ("blk.1.attn_q.weight", (32, 32), "tensors of 2 layers"),
        ("rope_freqs.weight", (2**40,), r"rope_freqs.weight of shape \(1099511627776,\)"),
    ],
)
def test_tensors_are_those_of_the_keys(name, shape, said, header):
    entry = None if shape is None else TensorEntry(shape, gguf.GGMLQuantizationType.F32, 0, 0)
    changed = {k: v for k, v in {**header.tensors, name: entry}.items() if v is not None}
    with pytest.raises(ModelError, match=said):
        gguf_config(replace(header, tensors=changed))


@pytest.mark.parametrize("value", [-1, 96, 1.0, True, "1", [1], np.arange(2)])
@pytest.mark.parametrize("role", ["bos", "eos", "eot", "eom", "padding", "unknown"])
def test_a_special_token_is_a_row_of_the_embedding(role, value, header):
    key = f"tokenizer.ggml.{role}_token_id"
    with pytest.raises(ModelError, match=rf"among its tokens[\s\S]*{key}"):
        gguf_config(replace(header, metadata={**header.metadata, key: value}))


@pytest.mark.parametrize("architecture", [None, 1, ["llama"], np.arange(2), "gpt2"])
def test_another_architecture_is_refused(architecture, header):
    with pytest.raises(ModelError, match=r"must be of the architecture .*llama"):
        gguf_config(replace(header, metadata={**header.metadata, "general.architecture": architecture}))


def test_factors_that_are_no_numbers_are_refused(tmp_path):
    for value in (0.0, -1.0, math.nan, math.inf):
        more = tensors(**{"rope_freqs.weight": np.full(4, value, np.float32)})
        with pytest.raises(ModelError, match="those of Llama 3"):
            gguf_config(read_gguf(write_gguf(tmp_path / "m.gguf", "llama", KEYS, more)))


def test_types_that_are_not_dequantised_are_refused_before_a_weight_is_read(header):
    for kind in gguf.GGMLQuantizationType:
        entry = TensorEntry((1, 256), kind, 0, gguf.GGML_QUANT_SIZES[kind][1])
        changed = replace(header, tensors={**header.tensors, "output.weight": entry})
        try:
            gguf.quants.dequantize(np.zeros((1, entry.size), np.uint8), kind)
        except NotImplementedError:
            with pytest.raises(ModelError, match=rf"output\.weight and 0 more are {kind.name}"):
                GGUFWeights(changed)
        else:
            assert GGUFWeights(changed).shapes["lm_head.weight"] == (1, 256)
