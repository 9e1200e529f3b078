"""Finding the modules of a Flax model that a component can attach to, without the model's weights."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, assert_never

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.tree_util import Partial

from hylorada_jax.errors import ConfigError, ModelError
from hylorada_jax.leaves import LEAVES
from hylorada_jax.math.quantized import as_array
from hylorada_jax.models.base_model import BaseModel
from hylorada_jax.models.families import HEADS, RELATIVE_POSITIONS, that_can
from hylorada_jax.models.mixture import each_expert
from hylorada_jax.models.module_kinds import ModuleKind, kind_of
from hylorada_jax.models.stacks import names_in_stack
from hylorada_jax.placement.shards import on_shards
from hylorada_jax.surgery.targets import is_cross
from hylorada_jax.trees import Params, Tree, TreePath, is_quantized

# jax's caches answer for one value of it only: with a new one an interceptor sees what was traced before.
_looked_at = jax.make_user_context(None)

# What an embedding or a norm is known to have; what a subclass adds stays as it is.
_UNFROZEN = {leaf.name for leaf in LEAVES if leaf.component == "unfrozen"}

# nn.scan stacks the parameters of this submodule along a first axis, one slice per layer.
SCANNED = "layers"


@dataclasses.dataclass(frozen=True)
class Module:
    """One module of a model; under nn.scan it stands for the same module of every block.

    Attributes:
        path: its path in the parameter tree.
        names: its full HF names, "model.layers.3.self_attn.q_proj": one, or one per stacked layer.
        stacked: the leaves have a leading layer axis, of experts' layers followed by one of experts.
    """

    path: TreePath
    names: tuple[str, ...]
    stacked: bool

    def index(self, layer: Any) -> tuple[Any, ...]:
        """Where the leaves have one of ``names``, by its index: on their first axes; () if unstacked."""
        return (layer,) if self.stacked else ()


@dataclasses.dataclass(frozen=True)
class Linear(Module):
    """A linear module.

    Attributes:
        d_in: input features.
        d_out: output features.
        kernel_is_out_in: the kernel is [d_out, d_in]; else [d_in, d_out], each of which may be several axes.
        experts: how many have the layer; each of them is one of ``names``, layer by layer.
    """

    d_in: int
    d_out: int
    kernel_is_out_in: bool
    experts: int | None = None

    def index(self, layer: Any) -> tuple[Any, ...]:
        """As of any module; of an expert's, its layer and its number among the experts."""
        return super().index(layer) if self.experts is None else divmod(layer, self.experts)

    def weight(self, params: Params, layer: Array | int = 0) -> Array:
        """W [d_out, d_in] of one layer of the frozen tree.

        Args:
            params: the model's parameter tree.
            layer: the index of its name; not read for an unstacked module.
        """
        return self.reader(params, layer)()

    def reader(self, params: Params, layer: Array | int = 0) -> Partial:
        """What gives :meth:`weight` where it is called, from the kernels of all layers."""
        kernel = subtree(params, self.path)["kernel"]
        require_arrays(kernel, f"a box around {'.'.join((*self.path, 'kernel'))}")
        if not (is_quantized(kernel) or jnp.issubdtype(kernel.dtype, jnp.floating)):
            raise ModelError(
                "What is adapted holds floating-point numbers.",
                f"{'.'.join(self.path)}, {kernel.dtype}",
                "Adapt the network in float32 or bfloat16, or exclude_modules=[its name].",
            )
        return Partial(self._weight, kernel, layer)

    def _weight(self, kernel: Any, layer: Array | int) -> Array:
        if self.stacked:
            for index in self.index(layer):
                kernel = jax.tree.map(lambda leaf, index=index: _at(leaf, index), kernel)
            kernel = as_it_lies(kernel, self.path)
        weight = as_array(kernel)
        return weight if self.kernel_is_out_in else weight.reshape(self.d_in, self.d_out).T


def _at(leaf: Array, layer: Array | int) -> Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def as_it_lies(kernel: Any, path: TreePath) -> Any:
    """The kernel of a layer, perhaps quantised, in the order of memory that it has among the parameters.

    Left to choose, a TPU's compiler turns the kernels of all layers over, in a copy, before a loop over them.
    """

    def keep(own: Array) -> Array:
        return with_layout_constraint(own, Layout(tuple(range(own.ndim))))

    return jax.tree.map(lambda leaf: on_shards(keep, jnp.asarray(leaf), *path, "kernel"), kernel)


@dataclasses.dataclass(frozen=True)
class Attention(Module):
    """A self-attention module.

    Attributes:
        heads: its query heads.
    """

    heads: int


@dataclasses.dataclass(frozen=True)
class Holder(Module):
    """A module whose own parameters can be trained: an embedding or a norm.

    Attributes:
        shapes: (leaf name, shape in one layer) of each parameter.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Modules:
    """The modules of a model by what can attach to them, each in the order of the tree's paths.

    Attributes:
        linears, attentions, embeddings, norms: as their names say.
        take_positions: some module is called with the tokens and their positions.
        others: modules with a kernel that is not known to be y = x · kernel, "name (class)".
        of_base: they are those of a base model, whose output head no module computes: the loss reads it.
    """

    linears: tuple[Linear, ...] = ()
    attentions: tuple[Attention, ...] = ()
    embeddings: tuple[Holder, ...] = ()
    norms: tuple[Holder, ...] = ()
    take_positions: bool = False
    others: tuple[str, ...] = ()
    of_base: bool = False

    @property
    def linear_names(self) -> list[str]:
        """The full names of all linear layers."""
        return [name for module in self.linears for name in module.names]


def subtree(tree: Tree, path: TreePath) -> Any:
    """The node of a nested mapping at a path."""
    for key in path:
        tree = tree[key]
    return tree


def with_leaves(tree: Tree, path: TreePath, leaves: Tree) -> dict[str, Any]:
    """The tree with ``leaves`` put into the node at ``path``; the given tree is left as it was.

    The leaves that are not replaced are shared with it.
    """
    if not path:
        return {**tree, **leaves}
    return {**tree, path[0]: with_leaves(tree.get(path[0], {}), path[1:], leaves)}


def takes_positions(method: Callable[..., Any]) -> bool:
    """Whether a module's method is called with the tokens and their positions."""
    return {"input_ids", "position_ids"} <= set(inspect.signature(method).parameters)


def require_positions(found: bool, received: object) -> None:
    """Raises a ModelError for a layer that needs the tokens' positions, where none are found."""
    if not found:
        raise ModelError(
            "A layer whose update depends on the position needs a model that is called with input_ids and "
            "position_ids, arguments of these names.",
            received,
            f"Choose method='hylorada_v1', or a model of type {that_can('segments')}.",
        )


def require_arrays(params: Any, received: object) -> None:
    """Raises a ConfigError for parameters in flax's boxes."""

    def is_boxed(leaf: Any) -> bool:
        return isinstance(leaf, nn.meta.AxisMetadata)

    if any(map(is_boxed, jax.tree.leaves(params, is_leaf=is_boxed))):
        raise ConfigError(
            "Parameters must be arrays, without the axes that flax keeps beside them.",
            received,
            "Give flax.linen.meta.unbox of what init returns, here and wherever params are taken.",
        )


def find_modules(init: Callable[[Array], Any]) -> Modules:
    """The modules that a model's initialisation calls and that a component can attach to.

    Args:
        init: key → parameter tree, which calls every module once. It is traced, not run: no memory is
            taken for the weights.

    Returns:
        Linear modules with a kernel of their own, self-attentions, embeddings but not the output head, norms;
        by their classes, see :mod:`hylorada_jax.models.module_kinds`.

    Raises:
        ConfigError: a registered linear module does not hold its weight as a matrix named kernel; the
            parameters of layers under nn.scan or nn.vmap do not lie on axis 0 of a submodule named layers;
            a layer is within nn.jit; or ``init`` gives all collections, not the parameters.

    Example:
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.Dense(3, name="fc")(x)
        >>> import jax.numpy as jnp
        >>> find_modules(lambda key: Net().init(key, jnp.ones((1, 2)))["params"]).linear_names
        ['fc']
    """
    init = inspect.unwrap(init)  # a jitted one, to which jax may know the answer
    _refuse_jitted(init)
    return _found(init, {})


def _refuse_jitted(init: Callable[[Array], Any]) -> None:
    """Traces twice: the second time jax answers for what is within nn.jit, and no interceptor sees it."""
    seen: list[set[TreePath]] = []

    def see(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if kind_of(context) is not None:
            seen[-1].add(context.module.path)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(see), _looked_at(object()):
        for _ in range(2):
            seen.append(set())
            jax.eval_shape(lambda key: init(key), jax.random.key(0))
    if jitted := sorted(".".join(path) for path in seen[0] - seen[1]):
        raise ConfigError(
            "Layers that adapters attach to must not be within nn.jit, whose cache knows of no adapters.",
            ", ".join(jitted),
            "Take nn.jit out of the network, and jit the function that calls it.",
        )


class _Called(NamedTuple):
    """What a model's initialisation calls, by path, and the shapes that it returns.

    Attributes:
        shapes: of the parameters.
        modules: those that a component can attach to: each, its kind, and the shapes of the leaves of its
            own that it reads.
        others: names of modules with a kernel that none can attach to.
        take_positions: some module is called with the tokens' positions.
    """

    shapes: Any
    modules: dict[TreePath, tuple[nn.Module, ModuleKind, dict[str, tuple[int, ...]]]]
    others: dict[TreePath, str]
    take_positions: bool


def _called(init: Callable[[Array], Any]) -> _Called:
    modules: dict[TreePath, tuple[nn.Module, ModuleKind, dict[str, tuple[int, ...]]]] = {}
    others: dict[TreePath, str] = {}
    taking: set[TreePath] = set()
    wrapped: list[tuple[TreePath, str]] = []

    def record(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if takes_positions(context.orig_method):
            taking.add(context.module.path)
        output, module = next_fun(*args, **kwargs), context.module
        own = module.variables.get("params", {}).items()
        read = {name: _shape(leaf) for name, leaf in own if not isinstance(leaf, Mapping)}
        if (kind := kind_of(context)) is not None and not getattr(module, "batch_dims", ()):
            modules[module.path] = module, kind, read
        elif isinstance(module, nn.WeightNorm | nn.SpectralNorm):
            wrapped.append((module.layer_instance.path, type(module).__name__))
        elif "kernel" in read:
            others[module.path] = f"{'.'.join(module.path)} ({type(module).__name__})"
        return output

    # A function of its own: jax would answer from its cache for one that was traced before, and the recorder
    # would see nothing.
    with nn.intercept_methods(record):
        shapes = jax.eval_shape(lambda key: init(key), jax.random.key(0))
    for outer, wrapper in wrapped:  # the kernels that these layers read are others than those in the tree
        for path in [path for path in modules if path[: len(outer)] == outer]:
            if modules[path][1].role == "linear":
                others[path] = f"{'.'.join(path)} ({wrapper})"
                del modules[path]
    return _Called(shapes, modules, others, bool(taking))


def _refuse_other_trees(called: _Called) -> None:
    """Refuses what an initialisation returns, where it is not a tree of parameters alone."""
    shapes, paths = called.shapes, (*called.modules, *called.others)
    require_arrays(shapes, "a network made with nn.with_partitioning, or its like")
    within = shapes.get("params") if isinstance(shapes, Mapping) else None
    if isinstance(within, Mapping) and all(path[:1] != ("params",) for path in paths):
        raise ConfigError(
            "init returns the parameters, and no other collection.",
            f"the collections {', '.join(shapes)}",
            'Give lambda key: network.init(key, x)["params"], and these wherever params are taken.',
        )


def _found(init: Callable[[Array], Any], layer_numbers: Mapping[TreePath, tuple[int, ...]]) -> Modules:
    called = _called(init)
    _refuse_other_trees(called)
    linears: list[Linear] = []
    attentions: list[Attention] = []
    embeddings: list[Holder] = []
    norms: list[Holder] = []
    for path in sorted(called.modules):
        module, kind, read = called.modules[path]
        leaves = _leaves(called.shapes, path)
        lie = {leaf[0]: shape for leaf, shape in leaves.items() if len(leaf) == 1}
        names, stacked = _names(path, leaves, layer_numbers, is_whole=bool(read) and read == lie)
        own = {name: shape[1:] if stacked else shape for name, shape in lie.items()}
        trains = tuple((name, shape) for name, shape in own.items() if name in _UNFROZEN)
        match kind.role:
            case "linear":
                # A tied head runs as a Dense on another module's kernel: it has no leaf, and is left out.
                if "kernel" in own or (path and leaves):
                    if "kernel" in read and read["kernel"] != own.get("kernel"):
                        raise _wrongly_stacked(module, read["kernel"], leaves)
                    sizes = _sizes(module, own, kind.out_in)
                    linears.append(Linear(path, names, stacked, *sizes, kind.out_in))
            case "experts":
                count, d_in, d_out = own["kernel"]
                each = tuple(one for name in names for one in each_expert(name, count))
                linears.append(Linear(path, each, stacked, d_in, d_out, kind.out_in, count))
            case "attention":
                if not is_cross(".".join(path)):
                    attentions.append(Attention(path, names, stacked, module.config.num_attention_heads))
            case "embedding":
                if trains and path[-1] not in (*RELATIVE_POSITIONS, *HEADS):
                    embeddings.append(Holder(path, names, stacked, trains))
            case "norm":
                if trains:
                    norms.append(Holder(path, names, stacked, trains))
            case _:
                assert_never(kind.role)
    others = tuple(called.others[path] for path in sorted(called.others.keys() - called.modules.keys()))
    found = tuple(linears), tuple(attentions), tuple(embeddings), tuple(norms)
    return Modules(*found, called.take_positions, others)


def modules_of(base: BaseModel) -> Modules:
    """The modules of a base model, under the names that its layers have; see :func:`find_modules`."""
    return dataclasses.replace(_found(base.init_params, base.layer_numbers), of_base=True)


def _wrongly_stacked(
    module: nn.Module, kernel: tuple[int, ...], leaves: Mapping[TreePath, tuple[int, ...]]
) -> ConfigError:
    return ConfigError(
        f"Layers under nn.scan or nn.vmap are a submodule named {SCANNED}, with parameters along axis 0.",
        f"{'.'.join(module.path)} reads a kernel {kernel} of {leaves.get(('kernel',))}",
        f'Use variable_axes={{"params": 0, "hylorada": 0}}, and name="{SCANNED}"; '
        "or give a submodule whose parameters are shared another name.",
    )


def _shape(leaf: Any) -> tuple[int, ...]:
    """Of an array, perhaps in one of flax's boxes, which are trees of one leaf."""
    return jax.tree.leaves(leaf)[0].shape


def _sizes(module: nn.Module, own: Mapping[str, tuple[int, ...]], out_in: bool) -> tuple[int, int]:
    """d_in and d_out of a linear module."""
    kernel = own.get("kernel", ())
    if isinstance(module, nn.DenseGeneral):
        summed = 1 if isinstance(module.axis, int) else len(module.axis)
        return math.prod(kernel[:summed]), math.prod(kernel[summed:])
    if len(kernel) != 2:
        raise ConfigError(
            "A linear module must hold its weight as a matrix, in a parameter of its own named kernel.",
            f"{type(module).__name__} at {'.'.join(module.path)} with {dict(own)}",
            "Name the parameter kernel, or do not register the class with register_linear.",
        )
    return (kernel[1], kernel[0]) if out_in else (kernel[0], kernel[1])


def _leaves(shapes: Any, path: TreePath) -> dict[TreePath, tuple[int, ...]]:
    """The leaves below a path, {path from there: shape}."""
    try:
        below = jax.tree_util.tree_flatten_with_path(subtree(shapes, path))[0]
    except KeyError:
        return {}
    return {tuple(str(key.key) for key in leaf): value.shape for leaf, value in below}


def _names(
    path: TreePath,
    leaves: Mapping[TreePath, tuple[int, ...]],
    layer_numbers: Mapping[TreePath, tuple[int, ...]],
    is_whole: bool,
) -> tuple[tuple[str, ...], bool]:
    """The module's full names, and whether its leaves are stacked.

    nn.scan's submodule has no number in its path: HF's Flax models write "layers" too, but number the blocks.
    A stack has no layer that reads its leaves as they lie, whole.
    """
    if (names := names_in_stack(path, layer_numbers)) is not None:
        return names, True
    after = path[path.index(SCANNED) + 1 :] if SCANNED in path else None
    if after is None or not leaves or is_whole or (after and after[0].isdigit()):
        return (".".join(path),), False
    return layer_names(path, next(iter(leaves.values()))[0]), True


def layer_names(path: TreePath, depth: int) -> tuple[str, ...]:
    """The full names of a module of stacked layers, whose path has no number.

    Example:
        >>> layer_names(("model", "layers", "mlp"), 2), layer_names(("blocks", "mlp"), 1)
        (('model.layers.0.mlp', 'model.layers.1.mlp'), ('blocks.0.mlp',))
    """
    split = path.index(SCANNED) + 1 if SCANNED in path else min(1, len(path))
    return tuple(".".join((*path[:split], str(layer), *path[split:])) for layer in range(depth))
