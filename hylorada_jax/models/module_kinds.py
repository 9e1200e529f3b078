"""What adapters find in a model, by the classes of its modules."""

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import flax.linen as nn

from hylorada_jax.errors import ConfigError

Role = Literal["linear", "experts", "attention", "embedding", "norm"]
_Class = TypeVar("_Class", bound=type[nn.Module])


@dataclass(frozen=True)
class ModuleKind:
    """What a class of modules is to adapters.

    Attributes:
        role: "attention" is self-attention that reads its direct adaptation itself, see ``models.daa``;
            "experts" a linear layer that each of many experts has, see ``models.mixture``.
        out_in: the kernel of a linear module is [d_out, d_in]; else [d_in, d_out].
    """

    role: Role
    out_in: bool = False


_KINDS: dict[type[nn.Module], ModuleKind] = {}


def register_linear(cls: _Class, out_in: bool = False) -> _Class:
    """Makes the modules of a class linear layers, to which adapters attach.

        y = x · kernel + bias          (x · kernelᵀ + bias with ``out_in``)

    A subclass counts as its class does; where it calls ``super().__call__``, that call is what is adapted.
    One that computes y by itself is registered by itself. ``nn.Dense`` and ``nn.DenseGeneral`` are
    registered.

    Args:
        cls: a Linen module with this ``__call__`` of x, and parameters named kernel and, perhaps, bias
            [d_out]. Its attributes ``dtype``, ``precision``, ``promote_dtype``, ``dot_general`` and
            ``dot_general_cls``, where it has them, are those of ``nn.Dense``.
        out_in: the kernel is [d_out, d_in]; else [d_in, d_out].

    Returns:
        The class, so that this is a decorator too.

    Raises:
        ConfigError: it is not such a class, or is registered as something else.

    Example:
        >>> class Projection(nn.Module):
        ...     features: int
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         shape = (self.features, x.shape[-1])
        ...         return x @ self.param("kernel", nn.initializers.normal(), shape).T
        >>> register_linear(Projection, out_in=True).__name__
        'Projection'
    """
    return register(cls, "linear", out_in)


def register(cls: _Class, role: Role, out_in: bool = False) -> _Class:
    """As :func:`register_linear`, for modules of any role."""
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and inspect.isfunction(cls.__call__)):
        raise ConfigError(
            "What is registered must be a class of Linen modules with a __call__.",
            repr(cls),
            "Give the class itself, a subclass of flax.linen.Module.",
        )
    kind = ModuleKind(role, out_in)
    if _KINDS.setdefault(cls, kind) != kind:
        raise ConfigError(
            "A class of modules must be registered as one thing.",
            f"{cls.__qualname__} as {kind}, and before as {_KINDS[cls]}",
            "Register a subclass of it with a __call__ of its own.",
        )
    return cls


def kind_of(context: Any) -> ModuleKind | None:
    """What a called module is to adapters, None for nothing; by the context of an interceptor."""
    cls = called_class(context, _KINDS)
    return None if cls is None else _KINDS[cls]


def registered_class(module: nn.Module) -> type[nn.Module]:
    """The class by which a module is what :func:`kind_of` finds."""
    cls = _first_of(type(module), _KINDS)
    assert cls is not None  # kind_of found it
    return cls


def called_class(context: Any, classes: Collection[type]) -> type | None:
    """The first of a module's classes, in Python's order, that is one of these; None where there is none.

    None also where the call is not of this class's own ``__call__``: a subclass may do more around it.

    Args:
        context: of an interceptor (``nn.intercept_methods``).
        classes: what to look for.
    """
    found = _first_of(type(context.module), classes)
    # flax binds the method by a partial, and wraps that of the class.
    called = inspect.unwrap(context.orig_method.func)
    return found if found is not None and called is inspect.unwrap(found.__call__) else None


def _first_of(own: type, classes: Collection[type]) -> Any:
    return next((cls for cls in own.__mro__ if cls in classes), None)


register(nn.Dense, "linear")
register(nn.DenseGeneral, "linear")
register(nn.Embed, "embedding")
register(nn.LayerNorm, "norm")
register(nn.RMSNorm, "norm")
