"""An adapter merged into a checkpoint, tensor by tensor: the model itself is never built."""

import dataclasses
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from tqdm import tqdm

from hylorada_jax.errors import ModelError
from hylorada_jax.exchange.merged_tensors import cast, changed_tensors, copies_of_changed
from hylorada_jax.exchange.shards import (
    DTYPES,
    MAX_SHARD_BYTES,
    Tensor,
    new_directory,
    refuse_taken,
    write_shards,
)
from hylorada_jax.io.files import user_path, write_json
from hylorada_jax.math.quantized import BASE_DTYPES, float_dtype, split_name
from hylorada_jax.models.chat_template import TEMPLATE_NAME
from hylorada_jax.models.generation_config import (
    FILE,
    as_generation_config,
    generation_defaults,
    read_generation_config,
)
from hylorada_jax.models.inside import files_inside
from hylorada_jax.models.loading import empty_model, weights_layout
from hylorada_jax.models.rounded_weights import RoundedWeights
from hylorada_jax.models.source import SMALL_FILES, TEMPLATE_FILES, Source, find_source
from hylorada_jax.models.tokenizer import load_tokenizer
from hylorada_jax.models.tokenizer_files import write_tokenizer
from hylorada_jax.models.weights import CONSTANTS, Weights, pieces_of
from hylorada_jax.models.weights_digest import files_digest
from hylorada_jax.models.wrapped import as_base
from hylorada_jax.saved import adapter_files
from hylorada_jax.saved.opening import open_on
from hylorada_jax.saved.saved_adapter import SavedAdapter, open_adapter
from hylorada_jax.surgery.merge import live_parts, refuse_live
from hylorada_jax.terminal import bar_options

_NAMES = {dtype.name for dtype in DTYPES.values()}


def write_merged(
    model: str | Path,
    adapter: str | Path,
    output: str | Path,
    dtype: DTypeLike | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    check_weights: bool = False,
    progress: bool = False,
) -> None:
    """Writes the checkpoint of an ordinary model that computes what the adapted one does.

        W' = c ⊙ (W + s·B A)          (and bias' = c ⊙ bias when the magnitude scales the bias)

    Memory holds the adapter and a part of one tensor at a time (of a GGUF file, one tensor). Adapted weights
    are computed in float64 and rounded once; all other tensors are copied. If the base was quantised in
    training, W is its quantised weight, in all linear layers. With an adapter's chat
    template, generation_config.json also names the token that ends a turn in it; of a GGUF file, it has the
    settings of sampling too.

    Args:
        model: what the adapter was trained on, as for :func:`hylorada_jax.load_model`.
        adapter: the directory that ``save_pretrained`` wrote.
        output: a new or an empty directory; what transformers loads stands there at the end, or nothing.
        dtype: of the written tensors; by default each keeps its own, and those of a GGUF file are float32.
        max_shard_bytes: of one weights file.
        check_weights: first read all weights, and refuse others than those the adapter was trained on.
        progress: show it on stderr.

    Raises:
        CheckpointError: the adapter is damaged or of another model, the output is taken, or the disk is full.
        ModelError: a component has an effect that no weights can express; the model is not found, or its
            weights do not fit its config; a weight is not finite in ``dtype``; a file lies outside its
            directory.

    Example:
        write_merged("smollm2-135m", "runs/finetune/adapter", "merged", "bfloat16")

    Source: method.md §1, Merging.
    """
    output = user_path(output)
    refuse_taken(output)
    target = None if dtype is None else float_dtype(dtype)
    saved = open_adapter(adapter)  # before the model is looked for
    empty = empty_model(model)
    base = as_base(empty)
    sites, leaves = open_on(base, saved).sites, saved.tensors()
    refuse_live(live_parts(sites, leaves))

    source, trained = find_source(model), saved.base.get("dtype", "")
    if check_weights:
        adapter_files.check_weights(saved.base, {})  # whether it says
        if not known_dtype(trained):
            raise ModelError("Weights on disk are checked in one dtype.", trained, "Leave the check out.")
        adapter_files.check_weights(saved.base, {"weights_sha256": files_digest(source, trained)})
    template = saved.chat_template
    tokenizer = load_tokenizer(model) if source.gguf or template is not None else None
    own = as_generation_config(generation_defaults(model)) if source.gguf else {}
    generation: dict[str, Any] = {}  # transformers does not look for the ends of turns in a template
    if tokenizer is not None and template is not None:
        ends = dataclasses.replace(tokenizer, chat_template=template).chat_end_ids
        said = own or read_generation_config(source)
        generation = said | {"eos_token_id": [*ends]} if ends else {}
    # An adapter's template replaces all of the base's, of which some would win over it: that for tools.
    small = [name for name in SMALL_FILES if template is None or name not in TEMPLATE_FILES]
    beside = [] if source.gguf else files_inside(source.path, *small)
    layout = weights_layout(source, empty)
    weights = RoundedWeights(layout, trained) if is_in_codes(trained) else layout.weights
    changed = changed_tensors(sites, leaves, weights, layout.slots, saved.config)
    copies = copies_of_changed(changed, layout.weights, layout.slots)
    names = [n for n in weights.shapes if n in changed or not (n in copies or _is_constant(n, weights))]
    with tqdm(total=len(names), desc="merging", unit="tensor", **bar_options(shown=progress)) as bar:
        tensors = []
        for name in names:
            kept = _dtype_of(weights, name) if target is None else target
            pieces = changed.get(name) or partial(pieces_of, weights, name)
            rounded = partial(cast, pieces, kept, name, bar.update)
            tensors.append(Tensor(name, weights.shapes[name], kept, rounded))
        with new_directory(output) as place:
            write_shards(place, tensors, max_shard_bytes=max_shard_bytes)
            write_json(place / "config.json", _config(source, target))
            if tokenizer is not None and source.gguf:
                write_tokenizer(tokenizer, place, own)
            else:
                _copy(beside, source.path, place)
            if template is not None:
                (place / TEMPLATE_NAME).write_text(template, "utf-8")
            if generation:
                write_json(place / FILE, generation)


def dtypes_of(saved: SavedAdapter) -> tuple[Any, str | None]:
    """The dtype and base_dtype in which a base has the weights that an adapter was trained on."""
    trained = saved.base.get("dtype", "")
    return split_name(trained if known_dtype(trained) else "float32")


def is_in_codes(dtype: str) -> bool:
    """Whether an adapter's record of its base's dtype is one of a quantised base that can be loaded."""
    return "+" in dtype and known_dtype(dtype)


def known_dtype(dtype: str) -> bool:
    """Whether an adapter's record of its base's dtype is one that a base can be loaded in."""
    name, plus, base_dtype = dtype.partition("+")
    return name in _NAMES and (not plus or base_dtype in BASE_DTYPES)


def _config(source: Source, dtype: np.dtype | None) -> dict[str, Any]:
    """The content of config.json; the dtype under the name that every version of transformers reads.

    What was in codes is numbers now, and code of the model's own, to which auto_map leads, is not copied:
    transformers has the class.
    """
    left = ("quantization_config", "auto_map")
    said = {key: value for key, value in source.config.items() if key not in left}
    if dtype is None and source.gguf is None:
        return said
    dtype = dtype or np.dtype(np.float32)
    rest = {key: value for key, value in said.items() if key not in ("dtype", "torch_dtype")}
    return rest | {"torch_dtype": dtype.name}


def _copy(files: Iterable[Path], source: Path, place: Path) -> None:
    for file in files:
        copy = place / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _is_constant(name: str, weights: Weights) -> bool:
    # A vector called bias is one; masks have four axes or none.
    vector = len(weights.shapes[name]) == 1 and name.endswith(".bias")
    return bool(CONSTANTS.search(name)) and not vector


def _dtype_of(weights: Weights, name: str) -> np.dtype:
    code = weights.dtypes[name]
    if code not in DTYPES:
        weights.read(name)  # refuses it
    return DTYPES[code]
