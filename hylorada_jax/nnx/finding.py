"""Finding the modules of an NNX model that a component can attach to."""

import dataclasses
import math
from typing import Any

from flax import nnx
from jax import Array

from hylorada_jax.errors import ModelError
from hylorada_jax.models.families import HEADS, RELATIVE_POSITIONS
from hylorada_jax.nnx.adapted import plain_class
from hylorada_jax.nnx.kinds import ATTENTIONS, Contraction, Kind, axes_of, contraction, kind_of
from hylorada_jax.nnx.peers import names_of
from hylorada_jax.nnx.quantized import numbers, value_of
from hylorada_jax.surgery.modules import Attention, Holder, Linear, Modules, layer_names
from hylorada_jax.trees import TreePath


@dataclasses.dataclass(frozen=True)
class Found:
    """A module of a model, and what it is to adapters.

    Attributes:
        module: the module itself.
        kind: of its class.
        form: its product, of a linear module.
    """

    module: Any
    kind: Kind
    form: Contraction | None = None

    @property
    def kernel(self) -> Any:
        """What holds a linear module's weight: a variable, or qwix's array of variables."""
        return getattr(self.module, self.kind.leaves[0])

    def leaves(self) -> dict[str, Any]:
        """The module's own arrays, by name; a linear module's weight is its "kernel", which qwix may hold."""
        found = {name: getattr(self.module, name, None) for name in self.kind.leaves}
        arrays = {name: value_of(variable) for name, variable in found.items() if variable is not None}
        return arrays if self.form is None else {"kernel": arrays.pop(self.kind.leaves[0]), **arrays}

    def as_matrix(self, leaves: dict[str, Any]) -> dict[str, Array]:
        """The arrays as the surgery knows them: kernel [d_in, d_out], bias [d_out]."""
        if self.form is None:
            return leaves
        kernel = self.form.matrix(numbers(leaves["kernel"]))
        flat = {
            name: leaf.reshape(*kernel.shape[:-2], -1) for name, leaf in leaves.items() if name != "kernel"
        }
        return flat | {"kernel": kernel}


def find_modules(model: Any) -> tuple[Modules, dict[TreePath, Found]]:
    """The modules of a model that a component can attach to; a shared one once, by its first path.

    Args:
        model: an NNX module; its weights are not read, so one of ``nnx.eval_shape`` does.

    Returns:
        The modules as the surgery plans with them, and each of them by its path.

    Raises:
        ModelError: it is no NNX module, layers are stacked along another axis than the first, or a module
            lacks what its class is registered by.

    Example:
        >>> find_modules(nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0)))[0].linear_names
        ['key', 'out', 'query', 'value']
    """
    if not isinstance(model, nnx.Module):
        raise ModelError(
            "hylorada_jax.nnx takes a Flax NNX module.",
            type(model).__name__,
            "Give the NNX model itself. A Linen model is adapted by hylorada_jax.HyLoRADAModel.",
        )
    found: dict[TreePath, Found] = {}
    linears: list[Linear] = []
    embeddings: list[Holder] = []
    norms: list[Holder] = []
    others: list[str] = []
    attentions: dict[TreePath, Found] = {}
    named = names_of(model)
    modules = {tuple(map(str, path)): module for path, module in nnx.iter_modules(model, graph=True)}
    wrappers = [
        path for path, module in modules.items() if isinstance(module, nnx.WeightNorm | nnx.SpectralNorm)
    ]
    for path, module in sorted(modules.items()):
        described = f"{'.'.join(path)} ({type(module).__name__})"
        kind = kind_of(plain_class(type(module)))
        if kind is not None and kind.role in ATTENTIONS:
            place = path if kind.role == "multi_head" else path[:-1] or path
            if place in attentions:
                raise ModelError(
                    "A module has one attention, whose adapters bear its name.",
                    f"{'.'.join(place)} with two",
                    "Give each a module of its own.",
                )
            attentions[place] = Found(module, kind)
            continue
        if kind is not None and (missing := kind.missing(module)):
            raise ModelError(
                "A class is registered by the attributes that hold its kernel and its equation.",
                f"{described} has no {' and no '.join(missing)}",
                f"register_einsum({plain_class(type(module)).__name__}, kernel=…, equation=…) names them.",
            )
        first = None if kind is None else getattr(module, kind.leaves[0], None)
        if kind is None or first is None:
            if isinstance(getattr(module, "kernel", None), nnx.Variable):
                others.append(described)
            continue
        within = next((modules[outer] for outer in wrappers if path[: len(outer)] == outer), None)
        if kind.role == "linear" and within is not None:  # which gives it another kernel than its own
            others.append(f"{'.'.join(path)} ({type(within).__name__})")
            continue
        try:
            form = contraction(module, kind) if kind.role == "linear" else None
        except ModelError:  # such as one with a kernel for each expert
            others.append(described)
            continue
        names, stacked = _names(path, module, first.shape, axes_of(module, kind))
        names = tuple(map(named, names))
        found[path] = Found(module, kind, form)
        shapes = {
            name: variable.shape[1:] if stacked else variable.shape
            for name in kind.leaves
            if (variable := getattr(module, name, None)) is not None
        }
        if form is not None:
            sizes = dict(zip(form.kernel, shapes[kind.leaves[0]], strict=True))
            d_in, d_out = (math.prod(sizes[c] for c in letters) for letters in (form.summed, form.made))
            linears.append(Linear(path, names, stacked, d_in, d_out, False))
        elif kind.role == "norm":
            norms.append(Holder(path, names, stacked, tuple(shapes.items())))
        elif not path or path[-1] not in (*RELATIVE_POSITIONS, *HEADS):
            embeddings.append(Holder(path, names, stacked, tuple(shapes.items())))
    reached = tuple(_attention(path, here, linears) for path, here in attentions.items())
    parts = Modules(tuple(linears), reached, tuple(embeddings), tuple(norms), others=tuple(others))
    return parts, found | attentions


def _attention(path: TreePath, here: Found, linears: list[Linear]) -> Attention:
    """An attention module, which is stacked as the layers in it are, or those beside the model's own."""
    beside = [linear for linear in linears if linear.path[: len(path)] == path]
    beside = beside or [linear for linear in linears if linear.path[:-1] == path[:-1]]
    if path and beside and all(linear.stacked for linear in beside):
        return Attention(path, layer_names(path, len(beside[0].names)), True, here.module.num_heads)
    return Attention(path, (".".join(path),), False, here.module.num_heads)


def _names(path: TreePath, module: Any, shape: tuple[int, ...], axes: int) -> tuple[tuple[str, ...], bool]:
    """The module's full names, and whether its leaves have an axis of layers in front, as of ``nnx.vmap``."""
    own = _own_shape(module)
    if len(shape) == axes and own in (None, shape):
        return (".".join(path),), False
    if len(shape) != axes + 1 or own not in (None, shape[1:]):
        raise ModelError(
            "Layers are stacked along one axis, the first of their variables.",
            f"{'.'.join(path)} with {shape}" + ("" if own is None else f", of layers with {own}"),
            "Make them with nnx.vmap(…, in_axes=0, out_axes=0), and scan over that axis.",
        )
    return layer_names(path, shape[0]), True


def _own_shape(module: Any) -> tuple[int, ...] | None:
    """The kernel's shape in one layer, where the module says it."""
    if (shape := getattr(module, "kernel_shape", None)) is not None:
        return tuple(shape)
    if not isinstance(module, nnx.Linear | nnx.LinearGeneral):
        return None
    sizes = (module.in_features, module.out_features)
    return tuple(n for size in sizes for n in ((size,) if isinstance(size, int) else size))
