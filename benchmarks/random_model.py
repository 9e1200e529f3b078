"""A model of a published shape with random weights, for benchmarks whose figures do not depend on them.

    python -m benchmarks.random_model llama-3-8b --output runs/llama-3-8b

It is saved as Hugging Face saves one: config.json and safetensors in bfloat16, 16 GB of the largest, drawn a
tensor at a time.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.command import run
from hylorada_jax.io.files import refuse_unusable
from hylorada_jax.planning.shapes import SHAPES as LLAMA_SHAPES

_ROWS = 4096  # that are drawn at a time
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

    from hylorada_jax.exchange.shards import DTYPES, Tensor, new_directory, write_shards

    shrunk = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    sizes = {name: -(-value // shrink) if name in shrunk else value for name, value in SHAPES[shape].items()}
    config = transformers.AutoConfig.for_model(**sizes, max_position_embeddings=8192, dtype="bfloat16")
    with torch.device("meta"):  # names and shapes
        state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    tensors = [
        Tensor(name, tuple(leaf.shape), DTYPES["BF16"], partial(_drawn, number, name, tuple(leaf.shape)))
        for number, (name, leaf) in enumerate(state.items())
    ]
    with new_directory(output) as directory:
        config.save_pretrained(directory)
        write_shards(directory, tensors)
    print(output)


def _drawn(seed: int, name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A tensor as transformers starts it, some rows at a time."""
    rng, (rows, *rest) = np.random.default_rng(seed), shape
    for start in range(0, rows, _ROWS):
        part = (min(_ROWS, rows - start), *rest)
        if rest:
            values = 0.02 * rng.standard_normal(part, np.float32)
        else:
            values = np.full(part, not name.endswith("bias"), np.float32)
        yield values.astype(jnp.bfloat16)


if __name__ == "__main__":
    run(main)
