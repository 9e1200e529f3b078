"""The modules that a PEFT adapter holds whole: embeddings, norms and the output head.

PEFT saves those of ``modules_to_save``, and both embeddings by itself where they were resized or adapted.
What equals the base model's own says nothing, and need not be trained here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.exchange.peft_files import NEW_BASE, tied_head
from hylorada_jax.leaves import KINDS
from hylorada_jax.math.quantized import as_array
from hylorada_jax.models.base_model import BaseModel
from hylorada_jax.models.families import TOKEN_EMBEDDINGS
from hylorada_jax.surgery.layout import tensor_name
from hylorada_jax.surgery.modules import Holder, Modules, subtree
from hylorada_jax.text import short
from hylorada_jax.trees import Params

Tensors = dict[str, np.ndarray]
_RULE = "modules_to_save can be all embeddings, all norms, both or none."


def is_whole(tensor: str) -> bool:
    """Whether a tensor, by our name of it, is a module's own and not of a layer's adapter."""
    return tensor.rsplit(".", 1)[1] not in KINDS["dora"]


def check_whole(shapes: Mapping[str, tuple[int, ...]], base: BaseModel, modules: Modules) -> None:
    """Compares the modules that an adapter holds whole with the base model's, by name and shape.

    Args:
        shapes: of the adapter's whole tensors, under our names.
        base: the model it is read for, which may be without its weights.
        modules: the base model's.

    Raises:
        ConfigError: the model has no such module, or its vocabulary was resized for the adapter.
    """
    own = {
        tensor_name(name, leaf): shape
        for holder in (*modules.embeddings, *modules.norms)
        for leaf, shape in holder.shapes
        for name in holder.names
    }
    head = tied_head(base.config.model_type)
    if alien := sorted(shapes.keys() - own.keys() - {head}):
        raise ConfigError(_RULE, f"{short(alien)}, which this library does not train", NEW_BASE)
    for name, shape in shapes.items():
        # A head's is that of an embedding.
        known = [own[name]] if name in own else [size for size in own.values() if len(size) == 2]
        if shape not in known:
            raise ConfigError(
                "A module that an adapter holds whole must have the base model's shape.",
                f"{name} {shape} for {' or '.join(map(str, known))}",
                f"Resize the base as for training, base.resize_token_embeddings({sum(shape[:1])}). "
                + NEW_BASE,
            )


def settle_whole(
    tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any], base: BaseModel, modules: Modules
) -> tuple[Tensors, tuple[bool, bool]]:
    """Leaves out the whole modules that say nothing, and finds what of the base model an adapter trains.

    Args:
        tensors: an adapter's, under our names, which :func:`check_whole` has seen.
        settings: of PEFT's LoraConfig.
        base: the model it is read for.
        modules: the base model's.

    Returns:
        The other tensors, and whether embeddings and norms are trained.

    Raises:
        ConfigError: the adapter trains what this library does not train, or only a part of a kind.
    """
    tensors = _without_tied_head(dict(tensors), base.config)
    whole = {name for name in tensors if is_whole(name)}
    if not whole:
        return tensors, (False, False)
    groups = [_values(holders, base.params) for holders in (modules.embeddings, modules.norms)]
    head = tied_head(base.config.model_type)
    own = groups[0] | groups[1] | ({head: _head(base)} if head in whole else {})
    same = {
        name
        for name in whole & own.keys()
        if np.array_equal(tensors[name].astype(own[name].dtype), own[name])
    }
    # What modules_to_save names is to be trained on, also from where it was; the head cannot be.
    idle = {name for name in same if name == head or not _is_named(name, settings["modules_to_save"])}
    idle |= {name for group in groups if not group.keys() <= whole - idle for name in group.keys() & same}
    whole -= idle
    if head in whole:
        raise ConfigError(
            "An output head is not trained here.", f"{head}, which differs from the base model's", NEW_BASE
        )
    embeddings, norms = (bool(group.keys() & whole) for group in groups)
    if odd := whole ^ ({*groups[0]} if embeddings else set()) ^ ({*groups[1]} if norms else set()):
        raise ConfigError(
            _RULE,
            f"{short(sorted(whole))}; this model's that differ: {short(sorted(odd))}",
            NEW_BASE,
        )
    return {name: tensor for name, tensor in tensors.items() if name not in idle}, (embeddings, norms)


def _without_tied_head(tensors: Tensors, config: Any) -> Tensors:
    """A tied head is the embedding again. PEFT unties the two where one of them alone is trained."""
    head = tied_head(config.model_type)
    rest = {name: tensor for name, tensor in tensors.items() if name != head}
    embeddings = {name: tensor for name, tensor in rest.items() if name.split(".")[-2] in TOKEN_EMBEDDINGS}
    if not config.tie_word_embeddings or (head not in tensors and not embeddings):
        return tensors
    twin = tensors.get(head)
    if twin is None or not any(np.array_equal(tensor, twin) for tensor in embeddings.values()):
        untouched = f"{head} is {'another' if head in tensors else 'untouched'}"
        raise ConfigError(
            "The head of this model is its embedding: both are trained, or none.",
            f"{', '.join(embeddings) or 'no embedding'}; {untouched}",
            "Train both with the same numbers, or untie them: model.config.tie_word_embeddings = False. "
            + NEW_BASE,
        )
    return rest


def _values(holders: Iterable[Holder], params: Params) -> dict[str, np.ndarray]:
    """The base model's own embeddings or norms, by the names that a file has for them."""
    values = {}
    for holder in holders:
        node = subtree(params, holder.path)
        for leaf, _ in holder.shapes:
            for layer, name in enumerate(holder.names):
                value = node[leaf][layer] if holder.stacked else node[leaf]
                values[tensor_name(name, leaf)] = np.asarray(value)
    return values


def _head(base: BaseModel) -> np.ndarray:
    """The output embedding; empty, and so equal to none, where the model's head is more than that."""
    try:
        return np.asarray(as_array(base.head({"params": base.params})))
    except ModelError:
        return np.empty((0, 0))


def _is_named(tensor: str, named: Any) -> bool:
    """Whether PEFT wraps a tensor's module: "norm" also names all that ends so, as input_layernorm."""
    return tensor.rsplit(".", 1)[0].endswith(tuple(named))
