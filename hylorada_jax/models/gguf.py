"""Read our decoder's models from GGUF files: metadata to HF's config, tensors to HF's names.

Reference: llama.cpp's ``convert_hf_to_gguf.py``, which this inverts.
"""

from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from msgspec import Meta

from hylorada_jax.errors import ModelError
from hylorada_jax.io.reading import checked
from hylorada_jax.math.rope import default_frequencies, llama3_frequencies
from hylorada_jax.models.families import DECODERS
from hylorada_jax.models.families.family import GGUF
from hylorada_jax.models.gguf_header import REMEDY, GGUFFile
from hylorada_jax.models.weights import Part

# llama.cpp's name of an architecture → the family's model_type, and what it is there.
_ARCHITECTURES: dict[str, tuple[str, GGUF]] = {
    decoder.gguf.architecture: (model_type, decoder.gguf)
    for model_type, decoder in DECODERS.items()
    if decoder.gguf
}

# The tensors bound the widths and the depth more tightly.
_Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Factor = Annotated[float, Meta(gt=0, le=1e12)]


class _Architecture(
    msgspec.Struct,
    rename={
        "head_count": "attention.head_count",
        "head_count_kv": "attention.head_count_kv",
        "key_length": "attention.key_length",
        "value_length": "attention.value_length",
        "epsilon": "attention.layer_norm_rms_epsilon",
        "rotated": "rope.dimension_count",
        "theta": "rope.freq_base",
        "scaling": "rope.scaling.type",
        "factor": "rope.scaling.factor",
        "original_context": "rope.scaling.original_context_length",
        "finetuned": "rope.scaling.finetuned",
        "attention_factor": "rope.scaling.attn_factor",
    },
    kw_only=True,
):
    """Each architecture key that this reader understands or may ignore; any other could change the result."""

    block_count: _Size
    context_length: _Size
    embedding_length: _Size
    feed_forward_length: _Size
    head_count: _Size
    head_count_kv: _Size | None = None
    key_length: _Size | None = None
    value_length: _Size | None = None
    epsilon: Annotated[float, Meta(gt=0, lt=1)]
    rotated: _Size | None = None
    theta: _Factor = 10000.0
    scaling: str = "none"
    factor: _Factor | None = None
    original_context: _Size | None = None
    vocab_size: _Size | None = None
    tensor_data_layout: str | None = None
    finetuned: bool | None = None
    attention_factor: _Factor | None = None


# The roles of special tokens, by their keys: eot and eom end a turn, and a message that calls a tool.
_SPECIAL = ("bos", "eos", "eot", "eom", "padding", "unknown")

# Factors of the rotary wavelengths, which go by pairs: Llama 3's, and LongRoPE's two.
_FREQUENCIES, _SHORT, _LONG = _FACTORS = (
    "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight",
)  # fmt: skip
_QKV = "attn_qkv"  # of a family whose gate and up are one tensor too

_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def gguf_config(gguf: GGUFFile) -> dict[str, Any]:
    """Translate the metadata of a GGUF file into a Hugging Face config.

    Args:
        gguf: a file of an architecture that a family of ``families.DECODERS`` has there.

    Returns:
        What config.json would hold, as a dictionary; its depth and widths are those of the tensors.

    Raises:
        ModelError: the architecture, one of its keys, or its rope scaling is unknown to this reader, is of
            another type or size than it must be, or does not fit the tensors.
    """
    model_type, family = _family(gguf)
    keys, own = _architecture(gguf, family)
    head_dim = keys.embedding_length // keys.head_count if keys.key_length is None else keys.key_length
    kv_heads = keys.head_count if keys.head_count_kv is None else keys.head_count_kv
    if keys.value_length not in (None, head_dim):
        raise ModelError(
            "Keys and values must have one width.",
            f"{gguf.path}: head_dim {head_dim}, and values of {keys.value_length}",
            "Choose another model.",
        )
    _check_tensors(gguf, family, keys, head_dim, kv_heads)
    ids = special_ids(gguf)
    config = {
        "model_type": model_type,
        "architectures": [DECODERS[model_type].causal_lm],
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "hidden_size": keys.embedding_length,
        "intermediate_size": keys.feed_forward_length,
        "num_hidden_layers": keys.block_count,
        "num_attention_heads": keys.head_count,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": keys.context_length,
        "rms_norm_eps": keys.epsilon,
        "rope_theta": keys.theta,
        "rope_scaling": _rope_scaling(gguf, keys, head_dim),
        "partial_rotary_factor": (keys.rotated or head_dim) / head_dim,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ids.get("eos"),
        **{key: f"blk.0.{tensor}.bias" in gguf.tensors for key, tensor in family.biases.items()},
        **own,
    }
    return config | family.settings(config)


def special_ids(gguf: GGUFFile) -> dict[str, int]:
    """The special tokens that a GGUF file names.

    Args:
        gguf: its header.

    Returns:
        Their ids by role: bos, eos, eot (end of a turn), eom (of a message), padding, unknown.

    Raises:
        ModelError: one is not among the tokens.
    """
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else gguf.tensors["token_embd.weight"].shape[0]
    keys = {role: f"tokenizer.ggml.{role}_token_id" for role in _SPECIAL}
    ids = {role: gguf.metadata[key] for role, key in keys.items() if key in gguf.metadata}
    if wrong := {keys[role]: i for role, i in ids.items() if type(i) is not int or not 0 <= i < count}:
        raise ModelError(
            "The special tokens of a GGUF file must be among its tokens.",
            f"{gguf.path}: {wrong}, of {count} tokens",
            REMEDY,
        )
    return ids


def _family(gguf: GGUFFile) -> tuple[str, GGUF]:
    architecture = gguf.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise ModelError(
            f"A GGUF model must be of the architecture {', '.join(_ARCHITECTURES)}.",
            f"{gguf.path}: {architecture}",
            "Load the original Hugging Face directory instead.",
        )
    return _ARCHITECTURES[architecture]


def _architecture(gguf: GGUFFile, family: GGUF) -> tuple[_Architecture, dict[str, Any]]:
    """The keys of all architectures, and those of this one under config.json's names."""
    prefix = family.architecture + "."
    keys = {k.removeprefix(prefix): v for k, v in gguf.metadata.items() if k.startswith(prefix)}
    own = {key: keys.pop(key) for key in family.keys if key in keys}
    known = {field.encode_name for field in msgspec.structs.fields(_Architecture)}
    if unknown := sorted(keys.keys() - known):
        raise ModelError(
            "Every architecture key of a GGUF file must be understood, for it may change the result.",
            f"{gguf.path}: {', '.join(prefix + key for key in unknown)}",
            "Load the original Hugging Face directory instead.",
        )
    rule = f"A GGUF model must have every key of its architecture, each of its type: {gguf.path}, {prefix}*."
    checked(own, _numbers(family), rule, ModelError, REMEDY)
    read = {theirs: own[key] for key, theirs in family.keys.items() if key in own}
    return checked(keys, _Architecture, rule, ModelError, REMEDY), read


def _numbers(family: GGUF) -> type[msgspec.Struct]:
    """A family's own keys, each a number; its bounds are those of config.json's key."""
    fields = [(theirs, int | float, 0) for theirs in family.keys.values()]
    names = {theirs: key for key, theirs in family.keys.items()}
    return msgspec.defstruct("Numbers", fields, rename=names)


def _check_tensors(gguf: GGUFFile, family: GGUF, keys: _Architecture, head_dim: int, kv_heads: int) -> None:
    """Compares depth and widths with the tensors, before anything of these sizes is made."""
    layers = {name.split(".")[1] for name in gguf.tensors if name.startswith("blk.")}
    if len(layers) != keys.block_count:
        raise ModelError(
            "The block_count of a GGUF model must be the number of its layers.",
            f"{gguf.path}: block_count {keys.block_count}, and tensors of {len(layers)} layers",
            REMEDY,
        )
    width, inner = keys.embedding_length, keys.feed_forward_length
    heads = {"attn_q": keys.head_count, "attn_k": kv_heads}
    if _QKV in family.tensors:
        heads, inner = {_QKV: keys.head_count + 2 * kv_heads}, 2 * inner
    shapes: dict[str, tuple[int | None, ...]] = {
        "token_embd.weight": (None, width),
        **{f"blk.0.{tensor}.weight": (count * head_dim, width) for tensor, count in heads.items()},
        "blk.0.ffn_up.weight": (inner, width),
    }
    pairs = ((keys.rotated or head_dim) // 2,)
    for together in ({_FREQUENCIES}, {_SHORT, _LONG}):
        if together & gguf.tensors.keys():
            shapes |= dict.fromkeys(together, pairs)
    for name, shape in shapes.items():
        found = gguf.tensors[name].shape if name in gguf.tensors else ()
        if len(found) != len(shape) or any(n not in (None, m) for n, m in zip(shape, found, strict=True)):
            raise ModelError(
                "The tensors of a GGUF model must be there, in the shapes that its keys give.",
                f"{gguf.path}: {name} of shape {found}" if found else f"{gguf.path}: {name} is missing",
                REMEDY,
            )


def _rope_scaling(gguf: GGUFFile, keys: _Architecture, head_dim: int) -> dict[str, Any] | None:
    if _FREQUENCIES in gguf.tensors:
        return _llama3_scaling(gguf, keys.theta, head_dim)
    if _LONG in gguf.tensors:
        short, long = (GGUFWeights(gguf).read(name).tolist() for name in (_SHORT, _LONG))
        return {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": keys.original_context or keys.context_length,
            "attention_factor": keys.attention_factor,
        }
    if keys.attention_factor is not None:
        raise ModelError(
            "The factor of attention of a GGUF model belongs to LongRoPE, whose factors must be there.",
            f"{gguf.path}: rope.scaling.attn_factor {keys.attention_factor}, and no {_LONG}",
            "Load the original Hugging Face directory instead.",
        )
    if keys.scaling == "none":
        return None
    scaling = {"rope_type": keys.scaling, "factor": keys.factor}
    if keys.scaling == "yarn":
        scaling["original_max_position_embeddings"] = keys.original_context
    if keys.scaling not in ("linear", "yarn") or None in scaling.values():
        raise ModelError(
            "The rope scaling of a GGUF model must be linear, yarn or llama3, with all of its keys.",
            f"{gguf.path}: {scaling}",
            "Load the original Hugging Face directory instead.",
        )
    return scaling


def _llama3_scaling(gguf: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling; a GGUF keeps only the factor per frequency: guess its four numbers, then check."""
    factors = GGUFWeights(gguf).read(_FREQUENCIES).astype(np.float64)
    factor = float(factors.max())
    original, own = 8192, {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    with np.errstate(all="ignore"):  # of factors that are not numbers
        expected = default_frequencies(head_dim, theta, np.float64) / llama3_frequencies(
            head_dim, theta, np.float64, original=original, **own
        )
    # The tensor is float32; the converter computes it in float32 from a wavelength with 7 digits.
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ModelError(
            "The frequency factors of a GGUF model must be those of Llama 3 (low 1, high 4, context 8192).",
            f"{gguf.path}: rope_freqs.weight = {np.array2string(factors, precision=4, threshold=8)}",
            "Load the original Hugging Face directory instead.",
        )
    return {"rope_type": "llama3", **own, "original_max_position_embeddings": original}


class GGUFWeights:
    """The tensors of a GGUF file under their Hugging Face names, dequantised to float32 one at a time.

    Args:
        gguf: the header, from `read_gguf`.

    Raises:
        ModelError: the architecture is unknown to this reader, or a tensor is of a type that cannot be
            dequantised.
    """

    def __init__(self, gguf: GGUFFile) -> None:
        self._gguf = gguf
        _, self._family = _family(gguf)
        for kind in {entry.kind for entry in gguf.tensors.values()}:
            _check_kind(gguf, kind)
        self._names = {_hf_name(name, self._family): name for name in gguf.tensors}
        # The rotary frequency factors are no weights: `gguf_config` reads them into rope_scaling.
        self.shapes = {
            hf_name: gguf.tensors[name].shape for hf_name, name in self._names.items() if name not in _FACTORS
        }
        self.dtypes = dict.fromkeys(self.shapes, "F32")

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._gguf.path

    def read(self, name: str, part: Part = ()) -> np.ndarray:
        """One tensor by its Hugging Face name, float32, in PyTorch's orientation; all of it is read."""
        own_name = self._names[name]
        entry = self._gguf.tensors[own_name]
        # Mapped anew for each tensor: closing the map gives the pages back, so that they never add up.
        raw = np.memmap(self._gguf.path, np.uint8, "r", entry.offset, (entry.size,))
        rows = raw.reshape(-1, entry.size // int(np.prod(entry.shape[:-1], dtype=np.int64)))
        tensor = np.empty((len(rows), entry.shape[-1]), np.float32)
        step = max(
            1, (1 << 20) // entry.shape[-1]
        )  # dequantisation needs several copies: a million values at once
        for start in range(0, len(rows), step):
            with np.errstate(all="ignore"):  # what is not finite is reported by who loads it
                tensor[start : start + step] = dequantize(rows[start : start + step], entry.kind)
        if "norm" in own_name:
            tensor -= self._family.norm_offset
        return self._unpermuted(own_name, tensor).reshape(entry.shape)[part]

    def _unpermuted(self, own_name: str, tensor: np.ndarray) -> np.ndarray:
        """Undo the interleaving of each head's rotary halves that llama.cpp's converter does."""
        part = own_name.split(".")[-2]
        if not self._family.interleaved or part not in ("attn_q", "attn_k"):
            return tensor
        key = f"{self._family.architecture}.attention.head_count"
        heads = self._gguf.metadata[key]
        if part == "attn_k":
            heads = self._gguf.metadata.get(key + "_kv", heads)
        columns = tensor.shape[1] if own_name.endswith(".weight") else 1  # a bias came as one row
        return tensor.reshape(heads, -1, 2, columns).swapaxes(1, 2).reshape(tensor.shape)


def _check_kind(gguf: GGUFFile, kind: GGMLQuantizationType) -> None:
    try:
        with np.errstate(all="ignore"):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError as error:
        names = [name for name, entry in gguf.tensors.items() if entry.kind == kind]
        raise ModelError(
            "The tensors of a GGUF model must be of types that the gguf package dequantises.",
            f"{gguf.path}: {names[0]} and {len(names) - 1} more are {kind.name}",
            "Take a version of the model in another type, as Q8_0, Q4_K or F16.",
        ) from error


def _hf_name(name: str, family: GGUF) -> str:
    """Hugging Face's name of a tensor; a tensor that it does not know keeps its own and is reported later."""
    own = {**_LAYER_TENSORS, **family.tensors}
    match name.split("."):
        case ["blk", layer, part, suffix] if part in own:
            return f"model.layers.{layer}.{own[part]}.{suffix}"
        case [part, suffix] if part in _TENSORS:
            return f"{_TENSORS[part]}.{suffix}"
    return name
