"""Opening a saved adapter on a base model: what config and shapes can tell, before anything is made of it."""

import dataclasses
from pathlib import Path
from typing import Any

from hylorada_jax.models.base_model import BaseModel
from hylorada_jax.saved.adapter_files import check_base
from hylorada_jax.saved.base_identity import base_identity
from hylorada_jax.saved.saved_adapter import SavedAdapter, open_adapter
from hylorada_jax.surgery.fit import fit
from hylorada_jax.surgery.layout import check_keys, tensor_shapes
from hylorada_jax.surgery.modules import Modules, modules_of
from hylorada_jax.surgery.plan import Site


@dataclasses.dataclass(frozen=True)
class Opened:
    """A saved adapter that fits a base model.

    Attributes:
        saved: the adapter on that model, its tensors not yet read.
        modules: the base model's.
        sites: what the adapter's config adapts there.
    """

    saved: SavedAdapter
    modules: Modules
    sites: tuple[Site, ...]


def identity(base: BaseModel, modules: Modules) -> dict[str, Any]:
    """What an adapter file says of the base model, which may be without its weights."""
    linears = ((name, m.d_out, m.d_in) for m in modules.linears for name in m.names)
    return base_identity(base.name, base.config, linears)


def open_on(base: BaseModel, adapter: str | Path | SavedAdapter, modules: Modules | None = None) -> Opened:
    """Reads an adapter as far as its shapes, and compares it with a base model.

    In this order: the adapter's two files, what it was trained on, its config, its tensors' names and shapes.

    Args:
        base: the base model, which may be without its weights.
        adapter: a directory, or what :func:`open_adapter` gave of it.
        modules: the base model's, where they are known.

    Returns:
        The adapter, and what it adapts in the base model.

    Raises:
        CheckpointError: it is damaged, was trained on another model, or has other tensors than its config
            calls for.
        ConfigError, TargetError, ModelError: its config is refused, or cannot be had in that model: as
            :func:`hylorada_jax.surgery.fit.fit`.
    """
    saved = adapter if isinstance(adapter, SavedAdapter) else open_adapter(adapter)
    modules = modules_of(base) if modules is None else modules
    check_base(saved.base, identity(base, modules))
    saved = saved.on(modules.linear_names)
    sites = fit(base, saved.config, modules)[1]
    check_keys(saved.shapes, tensor_shapes(sites))
    return Opened(saved, modules, sites)
