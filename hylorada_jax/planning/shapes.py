"""Shapes of Llama's kind by size, for who has no model at hand yet."""

from typing import Any


def _llama(
    vocab: int, width: int, layers: int, heads: int, kv_heads: int, mlp: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "llama-1b": _llama(128256, 2048, 16, 32, 8, 8192, True),  # Llama 3.2
    "llama-8b": _llama(128256, 4096, 32, 32, 8, 14336, False),  # Llama 3.1
    "llama-32b": _llama(151936, 5120, 64, 40, 8, 27648, False),  # the widths of Qwen 2.5
    "llama-70b": _llama(128256, 8192, 80, 64, 8, 28672, False),  # Llama 3.1
}
"""config.json's content by name."""
