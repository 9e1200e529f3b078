"""The command that folds an adapter into its base model's weights."""

from pathlib import Path
from typing import Literal

from hylorada_jax.cli.shared import base_of, puts_offline
from hylorada_jax.terminal import one_line


@puts_offline
def merge(
    *,
    output: Path,
    adapter: Path,
    model: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    check_weights: bool = False,
    offline: bool = False,
) -> None:
    """Merge an adapter into its base model, as an ordinary checkpoint that transformers loads.

    Works tensor by tensor: the whole model is never in memory. Components that weights cannot express (a
    position bias, a structure prior, DAA, a sparse adapter) are refused by name.

    Args:
        output: directory of the checkpoint, new or empty.
        adapter: directory of a trained adapter.
        model: smollm2-135m, a directory, a .gguf file, or a Hub name [the adapter's own].
        dtype: dtype of the written weights [each tensor's own; float32 from a .gguf file].
        check_weights: refuse a model whose weights are not, to the bit, those of the adapter's training.
        offline: take Hugging Face Hub files from the local cache, without contacting the Hub.
    """
    from hylorada_jax.exchange.merged import write_merged
    from hylorada_jax.exchange.shards import refuse_taken
    from hylorada_jax.io.files import user_path

    refuse_taken(user_path(output))
    name = base_of(adapter, model)
    write_merged(name, adapter, output, dtype, check_weights=check_weights, progress=True)
    print(f"merged  {one_line(output)}")
