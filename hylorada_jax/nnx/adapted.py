"""The forward pass of adapted modules: subclasses of the modules' own classes.

A module keeps its place, its variables and its identity; its class becomes a subclass whose ``__call__``
reads the leaves beside the kernel. So paths, shared modules, nnx.split, nnx.jit, nnx.scan and nnx.remat are
as before.
"""

import functools
import inspect
from types import FunctionType
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from hylorada_jax.errors import ModelError
from hylorada_jax.leaves import KINDS, LEAVES, Kind
from hylorada_jax.math import linear_adapter, low_rank, sparse
from hylorada_jax.nnx.kinds import Contraction, contraction, kind_of
from hylorada_jax.nnx.quantized import numbers, untouched, value_of
from hylorada_jax.nnx.tokens import current

RESOLVED = tuple(leaf.resolved for leaf in LEAVES if leaf.component == "linear" and leaf.resolved)
"""The leaves of linear adapters that depend on weights only, once they are resolved."""


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
    """What all adapted modules are, beside what they were.

    Attributes:
        hylorada_plain: the class that the module had.
        hylorada_inner: the class that this one extends: the same, or that of the adapted layer that the
            model is.
        hylorada_mixin: the class that says how it computes.
    """

    hylorada_plain: type
    hylorada_inner: type
    hylorada_mixin: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As of any module; its class, which no module of Python's has, is made again."""
        cls, mixins = type(self), []
        while issubclass(cls, Adapted):
            mixins.append(cls.hylorada_mixin)
            cls = cls.hylorada_inner
        state = super().__reduce_ex__(max(protocol, 2))[2:]
        return _empty, (cls, *reversed(mixins)), *state


class AdaptedLinear(Adapted):
    """A linear module with an adapter, and perhaps a sparse one behind it.

    y = (x Wᵀ + δ)·c + bias          (the bias inside the bracket with ``magnitude_scales_bias``)
    y = y + up(gelu(down(y) ⊙ mask))
    """

    def __call__(self, *arguments: Any, **options: Any) -> Array:
        """The adapted output, in the dtype and shape of the module's own."""
        if not arguments:  # the module's own call says under which name x comes
            call = inspect.signature(self.hylorada_plain.__call__).bind(self, **options)
            arguments, options = call.args[1:], call.kwargs
        inputs, rest = jnp.asarray(arguments[0]), arguments[1:]
        settings: Settings = self.adapter_settings
        kind = kind_of(self.hylorada_plain)
        assert kind is not None
        given = [option for option in (*rest, *options.values()) if isinstance(option, str)]
        form = Contraction.of(given[0], inputs.ndim) if given else contraction(self, kind, inputs.ndim)
        bias = getattr(self, "bias", None) if settings.kind and not settings.scales_bias else None
        bias = bias if isinstance(bias, nnx.Variable) else None  # of somebody's class it may be a setting
        layer = self if bias is None else _changed(self, bias=None, use_bias=False)
        y = self.hylorada_plain.__call__(layer, inputs, *rest, **options)
        return untouched(self._adapted)(form, inputs, y, bias)

    def _adapted(self, form: Contraction, inputs: Array, y: Array, bias: nnx.Variable | None) -> Array:
        """The module's own y, with the adapters and then the bias."""
        settings: Settings = self.adapter_settings
        x, y = form.features_last(inputs.astype(y.dtype)), form.features_of_y_last(y)
        tokens, made = y.shape[: len(form.tokens)], y.shape[len(form.tokens) :]
        if settings.kind:
            leaves = self._resolved(form)
            p = linear_adapter.token_scale(leaves, lambda name: _factor(name, tokens))
            # In the axes of x and y themselves: as rows of one number more, a TPU would lay both out anew.
            a = leaves["lora_A"].reshape(-1, *x.shape[len(tokens) :])
            b, c = leaves["scaled_B"].reshape(*made, -1), leaves.get("column_scale")
            delta = low_rank.low_rank_delta(self.lora_dropout(x), a, b, p)
            c = None if c is None else c.reshape(made)
            y = low_rank.adapted_output(y, delta, c, written=False)
        if bias is not None:
            y = y + bias[...].reshape(made).astype(y.dtype)
        if settings.units_on:
            rows = y.reshape(*tokens, -1)
            units = self.sparse_dropout(sparse.units(rows, self.down[...], self._mask()))
            y = sparse.add_units(rows, units, self.up[...]).reshape(y.shape)
        return form.y_of(y)

    def _resolved(self, form: Contraction) -> dict[str, Array]:
        """All of the adapter that depends on weights only: as :func:`resolve` left it, or from its leaves."""
        settings: Settings = self.adapter_settings
        if hasattr(self, "scaled_B"):
            return {name: getattr(self, name)[...] for name in RESOLVED if hasattr(self, name)}
        leaves = {name: getattr(self, name)[...] for name in KINDS[settings.kind or "lora"]}
        kind = kind_of(self.hylorada_plain)
        assert kind is not None
        weight = form.matrix(numbers(value_of(getattr(self, kind.leaves[0])))).T
        norm, detached = low_rank.row_norm_squared(weight), settings.detach_norm
        return linear_adapter.resolve_leaves(leaves, weight, norm, settings.scale, detach_norm=detached)

    def _mask(self) -> Array:
        settings: Settings = self.adapter_settings
        if hasattr(self, "mask"):
            return self.mask[...]
        return sparse.topk_mask(self.gate_scores[...], settings.units_on, settings.temperature)


def _factor(name: str, tokens: tuple[int, ...]) -> Array:
    """What the model's call knows of the tokens that a layer sees."""
    found = getattr(current(), name)
    if found is None or found.shape[:2] != tokens:
        seen = "the call of no adapted model" if found is None else f"the model's {found.shape[:2]}"
        raise ModelError(
            "A layer whose update depends on the token sees the model's tokens, [batch, seq, d_in].",
            f"x {(*tokens, 'd_in')}, within {seen}",
            "Call the adapted model itself, its tokens first; or exclude_modules=[the layer's name].",
        )
    return found


class AdaptedEmbed(Adapted):
    """An embedding that trains: rounded after the lookup, for rounded before, its gradient would be too."""

    def __call__(self, inputs: Array, *arguments: Any, **options: Any) -> Array:
        """The embedded inputs, in the module's dtype."""
        wide = _changed(self, dtype=self.embedding[...].dtype)
        return self.hylorada_plain.__call__(wide, inputs, *arguments, **options).astype(self.dtype)


class AdaptedNorm(Adapted):
    """A norm that trains, whose output has the dtype that it had."""

    def __call__(self, x: Array, *arguments: Any, **options: Any) -> Array:
        """The normalised x; where the module names no dtype, in that of x and its leaves as they were."""
        y = self.hylorada_plain.__call__(self, x, *arguments, **options)
        if self.dtype is not None:
            return y
        leaves = (getattr(self, name, None) for name in ("scale", "bias"))
        dtypes = [leaf.get_metadata("base")[1] for leaf in leaves if leaf is not None]
        return y.astype(jnp.result_type(x, *dtypes))


def _changed(module: Any, **attributes: Any) -> Any:
    """The same module with other attributes, for the length of a call; the module itself stays as it is."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module) | attributes)
    return twin


@functools.cache
def adapted_class(mixin: type[Adapted], cls: type) -> type:
    """The class of an adapted module of a class; one and the same for the same two.

    The module's class is the first base: an object takes no class whose first base is another, where its own
    has several. So what the mixin defines is laid over it.
    """
    own = {name: value for name, value in vars(mixin).items() if isinstance(value, FunctionType | property)}
    facts = {
        "hylorada_plain": plain_class(cls),
        "hylorada_inner": cls,
        "hylorada_mixin": mixin,
        "__module__": cls.__module__,
    }
    return type(f"Adapted{cls.__name__}", (cls, mixin), own | facts)


def _empty(cls: Any, *mixins: Any) -> Any:
    """A module of a class with these adapters, as it is before it has any attribute."""
    for mixin in mixins:
        cls = adapted_class(mixin, cls)
    return cls.__new__(cls)


def plain_class(cls: type) -> type:
    """The class that a module had before it was adapted."""
    return cls.hylorada_plain if issubclass(cls, Adapted) else cls


def set_class(thing: Any, cls: type) -> None:
    """Makes a module or a variable one of another class, in place; its attributes stay."""
    object.__setattr__(thing, "__class__", cls)


def dropout(rate: float, rngs: nnx.Rngs, layers: int | None, *, deterministic: bool) -> nnx.Dropout:
    """The dropout of an adapter; of stacked layers each has a key of its own."""
    made = nnx.Dropout(rate, deterministic=deterministic, rngs=rngs if rate and layers is None else None)
    if rate and layers is not None:
        made.rngs = rngs["dropout"].split(layers)
    return made
