"""A model of a published shape with random weights, for benchmarks whose figures do not depend on them.

    python -m benchmarks.random_model llama-3-8b --output runs/llama-3-8b

It is saved as Hugging Face saves one: config.json and safetensors in bfloat16, 16 GB of the largest.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.command import run
from hylorada_jax.io.files import refuse_unusable
from hylorada_jax.planning.shapes import SHAPES as LLAMA_SHAPES

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": LLAMA_SHAPES["llama-8b"] | {"rope_theta": 500000.0},
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_theta": 1000000.0,
    },
}


def main(
    shape: Annotated[Literal["llama-3-8b", "qwen2.5-7b"], tyro.conf.Positional],
    /,
    *,
    output: Path,
    shrink: int = 1,
) -> None:
    """Draw the weights and save the model.

    Args:
        shape: a key of ``SHAPES``.
        output: the directory that it is saved in.
        shrink: divides the widths, layers and vocabulary, for a trial at a small size.
    """
    refuse_unusable(output)
    import torch
    import transformers

    shrunk = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    sizes = {name: -(-value // shrink) if name in shrunk else value for name, value in SHAPES[shape].items()}
    config = transformers.AutoConfig.for_model(**sizes, max_position_embeddings=8192)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(output)
    print(output)


if __name__ == "__main__":
    run(main)
