"""Whether a saved adapter fits a base model, as shapes can tell: before any weight is read."""

from typing import Any

from hylorada_jax.models.base_model import BaseModel
from hylorada_jax.saved.adapter_files import check_base
from hylorada_jax.saved.base_identity import base_identity
from hylorada_jax.saved.saved_adapter import SavedAdapter
from hylorada_jax.surgery.layout import check_keys, tensor_shapes
from hylorada_jax.surgery.modules import Modules, find_modules
from hylorada_jax.surgery.plan import Site, plan


def identity(base: BaseModel, modules: Modules) -> dict[str, Any]:
    """What an adapter file says of the base model, which may be without its weights."""
    linears = ((name, m.d_out, m.d_in) for m in modules.linears for name in m.names)
    return base_identity(base.name, base.config, linears)


def check_fits(saved: SavedAdapter, base: BaseModel) -> tuple[Site, ...]:
    """Compares a saved adapter with a base model: identity, then names and shapes of all tensors.

    Args:
        saved: from :func:`hylorada_jax.saved.saved_adapter.open_adapter`; its tensors are not read.
        base: as for :func:`fit`.

    Returns:
        What the adapter's config adapts in the base model.

    Raises:
        CheckpointError: it was trained on another model, or has other tensors than its config calls for.
        TargetError: as :func:`fit`.
        ModelError: as :func:`fit`.
    """
    modules = find_modules(base.init_params)
    check_base(saved.base, identity(base, modules))
    sites = plan(modules, saved.config)
    check_keys(saved.shapes, tensor_shapes(sites))
    return sites
