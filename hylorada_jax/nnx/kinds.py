"""What adapters find in an NNX model, by the classes of its modules; and a linear module as a matrix."""

import dataclasses
import inspect
import math
import string
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
from flax import nnx
from jax import Array

from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.nnx.hooks import Attention, AttentionScores
from hylorada_jax.nnx.peers import EINSUMS, qualified

_Class = TypeVar("_Class", bound=type[nnx.Module])
_LETTERS = string.ascii_letters


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A linear module's product as an einsum without an ellipsis: the letters of x, of its kernel, and of y.

    Every letter of the kernel is summed over with x's, or comes out in y.

    Example:
        >>> import jax.numpy as jnp
        >>> form = Contraction.of("BTD,NDH->BTNH", 3)
        >>> form.tokens, form.summed, form.made, form.matrix(jnp.ones((2, 5, 4))).shape
        ('BT', 'D', 'NH', (5, 8))
    """

    x: str
    kernel: str
    y: str

    @classmethod
    def of(cls, equation: str, ndim: int) -> "Contraction":
        """The contraction of an equation, for an x of so many axes.

        Raises:
            ModelError: it is not the equation of a linear layer.
        """
        operands, _, y = equation.replace(" ", "").partition("->")
        x, _, kernel = operands.partition(",")
        spare = [letter for letter in _LETTERS if letter not in equation]
        tokens = "".join(spare[: max(0, ndim - len(x.replace("...", "")))])
        form = cls(x.replace("...", tokens), kernel, y.replace("...", tokens))
        letters = form.x + form.kernel + form.y
        repeats = any(len(set(part)) < len(part) for part in (form.x, form.kernel, form.y))
        if repeats or any(letters.count(letter) != 2 for letter in letters) or len(form.x) != ndim:
            raise ModelError(
                "A linear module sums over letters of its kernel that x has and y has not.",
                f"{equation!r}, for x of {ndim} axes",
                "Leave the module out: exclude_modules=[its name].",
            )
        return form

    @property
    def summed(self) -> str:
        """The letters of d_in, in x's order."""
        return "".join(letter for letter in self.x if letter in self.kernel)

    @property
    def made(self) -> str:
        """The letters of d_out, in y's order."""
        return "".join(letter for letter in self.y if letter in self.kernel)

    @property
    def tokens(self) -> str:
        """The letters that x and y share, in x's order."""
        return "".join(letter for letter in self.x if letter in self.y)

    def matrix(self, kernel: Array) -> Array:
        """The kernel as [d_in, d_out]; one that is stacked as [layers, d_in, d_out]."""
        kernel, lead = _last(kernel, self.kernel, self.summed + self.made)
        split = lead + len(self.summed)
        rows, columns = math.prod(kernel.shape[lead:split]), math.prod(kernel.shape[split:])
        return kernel.reshape(*kernel.shape[:lead], rows, columns)

    def is_mergeable(self, kernel: Array) -> bool:
        """Whether :meth:`matrix` can be taken: explicit mesh axes cut the first of d_in or d_out alone."""
        lead = kernel.ndim - len(self.kernel)
        cut = dict(zip(self.kernel, jax.typeof(kernel).sharding.spec[lead:], strict=True))
        return not any(cut[letter] for letters in (self.summed, self.made) for letter in letters[1:])

    def kernel_of(self, matrix: Array, shape: tuple[int, ...]) -> Array:
        """The kernel, of its own shape, that :meth:`matrix` makes a matrix of."""
        order, lead = self.summed + self.made, len(shape) - len(self.kernel)
        sizes = dict(zip(self.kernel, shape[lead:], strict=True))
        matrix = matrix.reshape(*shape[:lead], *(sizes[letter] for letter in order))
        return _last(matrix, order, self.kernel)[0]

    def features_last(self, x: Array) -> Array:
        """x as [*tokens, *d_in]."""
        return _last(x, self.x, self.tokens + self.summed)[0]

    def features_of_y_last(self, y: Array) -> Array:
        """y as [*tokens, *d_out]."""
        return _last(y, self.y, self.tokens + self.made)[0]

    def y_of(self, y: Array) -> Array:
        """The y that :meth:`features_of_y_last` brings into another order."""
        return _last(y, self.tokens + self.made, self.y)[0]


def _last(array: Array, letters: str, order: str) -> tuple[Array, int]:
    """The array, its last axes brought from the order of ``letters`` into another; how many precede them."""
    lead = array.ndim - len(letters)
    axes = [lead + letters.index(letter) for letter in order]
    return array.transpose(*range(lead), *axes), lead


Role = Literal["linear", "embedding", "norm", "attention", "scores", "multi_head"]
# Those whose attention scores direct attention adaptation reaches.
ATTENTIONS = ("attention", "scores", "multi_head")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a class of modules is to adapters.

    Attributes:
        role: as it says.
        leaves: its own variables, which the adapters read or train; of a linear module the kernel is first.
        equation: (module, axes of x) → the product of a linear module, as of ``jnp.einsum``; or the attribute
            that holds it, of a class that is registered by it.
    """

    role: Role
    leaves: tuple[str, ...] = ()
    equation: str | Callable[[Any, int], str] | None = None

    @property
    def attributes(self) -> tuple[str, ...]:
        """All that a module is read by: its leaves, and where it is one, the attribute of its equation."""
        return (*self.leaves, self.equation) if isinstance(self.equation, str) else self.leaves

    def equation_of(self, module: Any, ndim: int) -> str:
        """The product of a linear module, for an x of so many axes."""
        if isinstance(self.equation, str):
            return getattr(module, self.equation)
        assert self.equation is not None
        return self.equation(module, ndim)

    def missing(self, module: Any) -> list[str]:
        """The attributes that a module has not, and its class is registered by; its kernel may be None."""
        if not isinstance(self.equation, str):
            return []
        kernel = [name for name in self.leaves if not hasattr(module, name)]
        return kernel if isinstance(getattr(module, self.equation, None), str) else [*kernel, self.equation]


def _general(layer: nnx.LinearGeneral, ndim: int) -> str:
    x = _LETTERS[:ndim]
    summed = [x[axis] for axis in sorted(axis % ndim for axis in layer.axis)]
    made = _LETTERS[ndim : ndim + len(layer.out_features)]
    kept = "".join(letter for letter in x if letter not in summed)
    batched = "".join(x[axis] for axis in layer.batch_axis)
    return f"{x},{batched}{''.join(summed)}{made}->{kept}{made}"


_LINEAR = ("kernel", "bias")
_KINDS: dict[type, Kind] = {
    nnx.Linear: Kind("linear", _LINEAR, lambda layer, ndim: "...a,ab->...b"),
    nnx.LinearGeneral: Kind("linear", _LINEAR, _general),
    nnx.Einsum: Kind("linear", _LINEAR, lambda layer, ndim: layer.einsum_str),
    nnx.Embed: Kind("embedding", ("embedding",)),
    nnx.LayerNorm: Kind("norm", ("scale", "bias")),
    nnx.RMSNorm: Kind("norm", ("scale",)),
    Attention: Kind("attention"),
    AttentionScores: Kind("scores"),
    nnx.MultiHeadAttention: Kind("multi_head"),
}


def _einsum(kernel: str, equation: str) -> Kind:
    return Kind("linear", (kernel,), equation)


_KNOWN = dict.fromkeys(EINSUMS, _einsum("w", "einsum_str"))


def register_einsum(cls: _Class, kernel: str = "w", equation: str = "einsum_str") -> _Class:
    """Makes the modules of a class linear layers, to which :func:`hylorada_jax.nnx.adapt` attaches.

        y = einsum(equation, x, kernel)

    Args:
        cls: an NNX module with this ``__call__`` of x, and without a bias.
        kernel: the attribute that holds the kernel, an ``nnx.Param``.
        equation: the attribute that holds the equation, such as "BTD,NDH->BTNH".

    Returns:
        The class, so that this is a decorator too.

    Raises:
        ConfigError: it is not such a class, or is registered as something else.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> class Einsum(nnx.Module):
        ...     def __init__(self, einsum_str, shape, *, rngs):
        ...         self.einsum_str = einsum_str
        ...         self.w = nnx.Param(jax.random.normal(rngs.params(), shape))
        ...     def __call__(self, x):
        ...         return jnp.einsum(self.einsum_str, x, self.w[...])
        >>> register_einsum(Einsum).__name__
        'Einsum'
    """
    if not (isinstance(cls, type) and issubclass(cls, nnx.Module) and inspect.isfunction(cls.__call__)):
        raise ConfigError(
            "What is registered must be a class of NNX modules with a __call__.",
            repr(cls),
            "Give the class itself, a subclass of flax.nnx.Module; Linen has hylorada_jax.register_linear.",
        )
    kind = _einsum(kernel, equation)
    if (known := _KINDS.setdefault(cls, kind)) != kind:
        raise ConfigError(
            "A class of modules must be registered as one thing.",
            f"{cls.__qualname__} as linear ({kernel}, {equation}), where it is {known.role} "
            f"({', '.join(known.attributes)}) already",
            "Register it once, or a subclass of it with a __call__ of its own.",
        )
    return cls


def kind_of(cls: type) -> Kind | None:
    """What a class of modules is to adapters, None for nothing.

    A subclass counts as its class does where it leaves ``__call__`` alone; else it is registered by itself.
    """
    for base in cls.__mro__:
        if kind := _KINDS.get(base) or _KNOWN.get(qualified(base)):
            return kind if cls.__call__ is base.__call__ else None
    return None


def axes_of(module: Any, kind: Kind) -> int:
    """How many axes the first of a module's leaves has where it is not stacked."""
    if kind.role == "linear":
        return len(contraction(module, kind).kernel)
    if kind.role == "embedding":
        return 2
    axes = getattr(module, "feature_axes", -1)
    return 1 if isinstance(axes, int) else len(axes)


def contraction(module: Any, kind: Kind, ndim: int | None = None) -> Contraction:
    """The product of a linear module, for an x of so many axes; without any, for as many as it may have."""
    if ndim is None:
        ndim = _written_axes(module, kind)
    return Contraction.of(kind.equation_of(module, ndim), ndim)


def _written_axes(module: Any, kind: Kind) -> int:
    if isinstance(module, nnx.LinearGeneral):
        # Enough for every axis that it names from the front, and for those from the back.
        return 1 + max(0, *module.axis) + len(module.axis)
    x = kind.equation_of(module, 0).partition(",")[0].strip()
    return len(x.replace("...", "")) + ("..." in x)
