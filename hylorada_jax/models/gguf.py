"""Read Llama-family models from GGUF files: metadata to HF's config, tensors to HF's names.

Reference: llama.cpp's ``convert_hf_to_gguf.py``, which this inverts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize

from hylorada_jax.errors import ModelError
from hylorada_jax.models.gguf_header import GGUFFile

_FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Every architecture key that this reader understands or may ignore. Any other could change the computation.
_KNOWN_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "tensor_data_layout", "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
}  # fmt: skip

_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def gguf_config(gguf: GGUFFile) -> dict[str, Any]:
    """Translate the metadata of a GGUF file into a Hugging Face config.

    Args:
        gguf: a file whose architecture is llama (Mistral and SmolLM2 are that too), qwen2 or qwen3.

    Returns:
        What config.json would hold, as a dictionary.

    Raises:
        ModelError: the architecture, one of its keys, or its rope scaling is unknown to this reader.
    """
    architecture = gguf.metadata.get("general.architecture")
    if architecture not in _FAMILIES:
        raise ModelError(
            f"A GGUF model must be of the architecture {', '.join(_FAMILIES)}.",
            f"{gguf.path}: {architecture}",
            "Load the original Hugging Face directory instead.",
        )
    prefix = architecture + "."
    keys = {k.removeprefix(prefix): v for k, v in gguf.metadata.items() if k.startswith(prefix)}
    if unknown := sorted(keys.keys() - _KNOWN_KEYS):
        raise ModelError(
            "Every architecture key of a GGUF file must be understood, for it may change the result.",
            f"{gguf.path}: {', '.join(prefix + key for key in unknown)}",
            "Load the original Hugging Face directory instead.",
        )
    try:
        heads, hidden = keys["attention.head_count"], keys["embedding_length"]
        head_dim = keys.get("attention.key_length", hidden // heads)
        config = {
            "model_type": architecture,
            "architectures": [_FAMILIES[architecture]],
            "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": keys["feed_forward_length"],
            "num_hidden_layers": keys["block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": keys.get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": keys["context_length"],
            "rms_norm_eps": keys["attention.layer_norm_rms_epsilon"],
            "rope_theta": keys.get("rope.freq_base", 10000.0),
            "rope_scaling": _rope_scaling(gguf, keys, head_dim),
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in gguf.tensors,
            "bos_token_id": gguf.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": gguf.metadata.get("tokenizer.ggml.eos_token_id"),
        }
    except KeyError as error:
        raise ModelError(
            "A GGUF model must have every key and tensor of its architecture.",
            f"{gguf.path}: {error} is missing",
            "Convert or download it again.",
        ) from error
    if {
        head_dim,
        keys.get("attention.value_length", head_dim),
        keys.get("rope.dimension_count", head_dim),
    } != {head_dim}:
        raise ModelError(
            "Keys, values and rotated dimensions must have one width.",
            f"{gguf.path}: head_dim {head_dim}, {keys}",
            "Partial rotary embeddings are not supported: choose another model.",
        )
    if architecture == "llama":  # the others have their biases by definition
        config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in gguf.tensors
    return config


def _rope_scaling(gguf: GGUFFile, keys: Mapping[str, Any], head_dim: int) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in gguf.tensors:
        return _llama3_scaling(gguf, keys, head_dim)
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": keys["rope.scaling.factor"]}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = keys["rope.scaling.original_context_length"]
    elif kind != "linear":
        raise ModelError(
            "The rope scaling of a GGUF model must be linear, yarn or llama3.",
            f"{gguf.path}: {kind}",
            "Load the original Hugging Face directory instead.",
        )
    return scaling


def _llama3_scaling(gguf: GGUFFile, keys: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling; a GGUF keeps only the factor per frequency: guess its four numbers, then check."""
    factors = GGUFWeights(gguf).read("rope_freqs.weight").astype(np.float64)
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wavelength = 2 * np.pi * keys.get("rope.freq_base", 10000.0) ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((8192 / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    # The tensor is float32; the converter computes it in float32 from a wavelength with 7 digits.
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise ModelError(
            "The frequency factors of a GGUF model must be those of Llama 3 (low 1, high 4, context 8192).",
            f"{gguf.path}: rope_freqs.weight = {np.array2string(factors, precision=4, threshold=8)}",
            "Load the original Hugging Face directory instead.",
        )
    return scaling


class GGUFWeights:
    """The tensors of a GGUF file under their Hugging Face names, dequantised to float32 one at a time.

    Args:
        gguf: the header, from `read_gguf`.
    """

    def __init__(self, gguf: GGUFFile) -> None:
        self._gguf = gguf
        self._names = {_hf_name(name): name for name in gguf.tensors}
        # The rotary frequency factors are no weight: `gguf_config` reads them into rope_scaling.
        self.shapes = {
            hf_name: gguf.tensors[name].shape
            for hf_name, name in self._names.items()
            if name != "rope_freqs.weight"
        }

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._gguf.path

    def read(self, name: str) -> np.ndarray:
        """One tensor by its Hugging Face name, float32, in PyTorch's orientation."""
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
            tensor[start : start + step] = dequantize(rows[start : start + step], entry.kind)
        return self._unpermuted(own_name, tensor).reshape(entry.shape)

    def _unpermuted(self, own_name: str, tensor: np.ndarray) -> np.ndarray:
        """Undo the interleaving of each head's rotary halves that llama.cpp's converter does for llama."""
        if self._gguf.metadata["general.architecture"] != "llama":
            return tensor
        key = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
        part = own_name.split(".")[-2]
        if part not in key:
            return tensor
        heads = self._gguf.metadata.get(key[part], self._gguf.metadata["llama.attention.head_count"])
        columns = tensor.shape[1] if own_name.endswith(".weight") else 1  # a bias came as one row
        return tensor.reshape(heads, -1, 2, columns).swapaxes(1, 2).reshape(tensor.shape)


def _hf_name(name: str) -> str:
    """Hugging Face's name of a tensor; a tensor that it does not know keeps its own and is reported later."""
    match name.split("."):
        case ["blk", layer, part, suffix] if part in _LAYER_TENSORS:
            return f"model.layers.{layer}.{_LAYER_TENSORS[part]}.{suffix}"
        case [part, suffix] if part in _TENSORS:
            return f"{_TENSORS[part]}.{suffix}"
    return name
