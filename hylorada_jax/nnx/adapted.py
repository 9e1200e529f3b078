"""The forward pass of adapted modules: subclasses of the modules' own classes.

A module keeps its place, its variables and its identity; its class becomes a subclass whose ``__call__``
reads the leaves beside the kernel. So paths, shared modules, nnx.split, nnx.jit, nnx.scan and nnx.remat are
as before.
"""

import functools
from typing import Any, NamedTuple

from flax import nnx
from jax import Array

from hylorada_jax.leaves import KINDS, Kind
from hylorada_jax.math import linear_adapter, sparse
from hylorada_jax.nnx.kinds import Contraction, contraction, kind_of


class Settings(NamedTuple):
    """What of a config a linear module's call reads.

    Attributes:
        kind: of its linear adapter; None: it has none.
        scale: s.
        detach_norm: no gradient through ‖W + s·B A‖.
        scales_bias: c acts on the bias too.
        units_on: of its sparse adapter; 0: it has none.
        temperature: of the gate's gradient.
    """

    kind: Kind | None = None
    scale: float = 1.0
    detach_norm: bool = False
    scales_bias: bool = False
    units_on: int = 0
    temperature: float = 1.0


class Adapted(nnx.Module):
    """What all adapted modules are, beside what they were."""

    plain: type


class AdaptedLinear(Adapted):
    """A linear module with an adapter, and perhaps a sparse one behind it.

    y = (x Wᵀ + δ)·c + bias          (the bias inside the bracket with ``magnitude_scales_bias``)
    y = y + up(gelu(down(y) ⊙ mask))
    """

    def __call__(self, inputs: Array, *arguments: Any, **options: Any) -> Array:
        """The adapted output, in the dtype and shape of the module's own."""
        settings: Settings = self.adapter_settings
        kind = kind_of(self.plain)
        assert kind is not None
        given = [option for option in (*arguments, *options.values()) if isinstance(option, str)]
        form = Contraction.of(given[0], inputs.ndim) if given else contraction(self, kind, inputs.ndim)
        bias = getattr(self, "bias", None) if settings.kind and not settings.scales_bias else None
        layer = self if bias is None else _changed(self, bias=None, use_bias=False)
        y = self.plain.__call__(layer, inputs, *arguments, **options)
        rows = form.rows_of_y(y)
        if settings.kind:
            leaves = {name: getattr(self, name)[...] for name in KINDS[settings.kind]}
            x = self.lora_dropout(form.rows(inputs.astype(y.dtype)))
            weight = form.matrix(getattr(self, kind.leaves[0])[...]).T
            rows = linear_adapter.adapted_layer(
                leaves, x, rows, weight, settings.scale, detach_norm=settings.detach_norm
            )
        if bias is not None:
            rows = rows + bias[...].reshape(-1).astype(rows.dtype)
        if settings.units_on:
            mask = sparse.topk_mask(self.gate_scores[...], settings.units_on, settings.temperature)
            units = self.sparse_dropout(sparse.units(rows, self.down[...], mask))
            rows = sparse.add_units(rows, units, self.up[...])
        return form.y_of(rows, y.shape)


class AdaptedEmbed(Adapted):
    """An embedding that trains: rounded after the lookup, for rounded before, its gradient would be too."""

    def __call__(self, inputs: Array, *arguments: Any, **options: Any) -> Array:
        """The embedded inputs, in the module's dtype."""
        wide = _changed(self, dtype=self.embedding[...].dtype)
        return self.plain.__call__(wide, inputs, *arguments, **options).astype(self.dtype)


class AdaptedNorm(Adapted):
    """A norm that trains, whose output has the dtype that it had."""

    def __call__(self, x: Array, *arguments: Any, **options: Any) -> Array:
        """The normalised x; in x's dtype, where the module names none."""
        y = self.plain.__call__(self, x, *arguments, **options)
        return y if self.dtype is not None else y.astype(x.dtype)


def _changed(module: Any, **attributes: Any) -> Any:
    """The same module with other attributes, for the length of a call; the module itself stays as it is."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module) | attributes)
    return twin


@functools.cache
def adapted_class(mixin: type[Adapted], cls: type) -> type:
    """The class of an adapted module of a class; one and the same for the same two."""
    return type(f"Adapted{cls.__name__}", (mixin, cls), {"plain": cls, "__module__": cls.__module__})


def plain_class(cls: type) -> type:
    """The class that a module had before it was adapted."""
    return cls.plain if issubclass(cls, Adapted) else cls


def set_class(thing: Any, cls: type) -> None:
    """Makes a module or a variable one of another class, in place; its attributes stay."""
    object.__setattr__(thing, "__class__", cls)


def dropout(rate: float, rngs: nnx.Rngs, layers: int | None) -> nnx.Dropout:
    """The dropout of an adapter; of stacked layers each has a key of its own."""
    made = nnx.Dropout(rate, rngs=rngs if rate and layers is None else None)
    if rate and layers is not None:
        made.rngs = rngs["dropout"].split(layers)
    return made
