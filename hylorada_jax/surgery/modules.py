"""Finding the modules of a Flax model that a component can attach to, without the model's weights."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax import Array

from hylorada_jax.surgery.targets import HEADS
from hylorada_jax.trees import Params, Tree

Path = tuple[str, ...]

# How each linear module holds its kernel. HF's FlaxConv1D is known by name: its file imports transformers.
KERNEL_IS_OUT_IN = {"Dense": False, "FlaxConv1D": True}
# Attention modules that read their direct adaptation from the adapters' collection.
ATTENTIONS = ("DecoderAttention", "FlaxGPT2Attention", "FlaxBertSelfAttention", "FlaxT5Attention")
CROSS_ATTENTIONS = ("crossattention", "EncDecAttention")
NORMS = ("LayerNorm", "RMSNorm", "FlaxT5LayerNorm")
# T5's table of relative positions is an nn.Embed, but embeds no token and no position.
NOT_EMBEDDINGS = ("relative_attention_bias", *HEADS)
# nn.scan stacks the parameters of this submodule along a first axis, one slice per layer.
SCANNED = "layers"


@dataclasses.dataclass(frozen=True)
class Module:
    """One module of a model; under nn.scan it stands for the same module of every block.

    Attributes:
        path: its path in the parameter tree.
        names: its full HF names, "model.layers.3.self_attn.q_proj": one, or one per stacked layer.
        stacked: the leaves have a leading layer axis.
    """

    path: Path
    names: tuple[str, ...]
    stacked: bool


@dataclasses.dataclass(frozen=True)
class Linear(Module):
    """A linear module.

    Attributes:
        d_in: input features.
        d_out: output features.
        kernel_is_out_in: the kernel is [d_out, d_in]; else [d_in, d_out].
    """

    d_in: int
    d_out: int
    kernel_is_out_in: bool

    def weight(self, params: Params, layer: Array | int = 0) -> Array:
        """W [d_out, d_in] of one layer, as a view of the frozen tree.

        Args:
            params: the model's parameter tree.
            layer: the index along the stacked axis; not read for an unstacked module.
        """
        kernel = subtree(params, self.path)["kernel"]
        if self.stacked:
            kernel = jax.lax.dynamic_index_in_dim(kernel, layer, keepdims=False)
        return kernel if self.kernel_is_out_in else kernel.T


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
    """

    linears: tuple[Linear, ...] = ()
    attentions: tuple[Attention, ...] = ()
    embeddings: tuple[Holder, ...] = ()
    norms: tuple[Holder, ...] = ()
    take_positions: bool = False

    @property
    def linear_names(self) -> list[str]:
        """The full names of all linear layers."""
        return [name for module in self.linears for name in module.names]


def subtree(tree: Tree, path: Path) -> Any:
    """The node of a nested mapping at a path."""
    for key in path:
        tree = tree[key]
    return tree


def with_leaves(tree: Tree, path: Path, leaves: Tree) -> dict[str, Any]:
    """The tree with ``leaves`` put into the node at ``path``; the given tree is left as it was.

    The leaves that are not replaced are shared with it.
    """
    if not path:
        return {**tree, **leaves}
    return {**tree, path[0]: with_leaves(tree.get(path[0], {}), path[1:], leaves)}


def takes_positions(method: Callable[..., Any]) -> bool:
    """Whether a module's method is called with the tokens and their positions."""
    return {"input_ids", "position_ids"} <= set(inspect.signature(method).parameters)


def find_modules(init: Callable[[Array], Any]) -> Modules:
    """The modules that a model's initialisation calls and that a component can attach to.

    Args:
        init: key → parameter tree, which calls every module once. It is traced, not run: no memory is
            taken for the weights. It must not be jitted, or jax may answer from its cache.

    Returns:
        Linear modules with a kernel of their own, self-attentions, embeddings but not the output head, norms.

    Example:
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.Dense(3, name="fc")(x)
        >>> import jax.numpy as jnp
        >>> find_modules(lambda key: Net().init(key, jnp.ones((1, 2)))["params"]).linear_names
        ['fc']
    """
    called: dict[Path, tuple[str, int]] = {}
    taking: set[Path] = set()

    def record(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        kind = type(context.module).__name__
        if takes_positions(context.orig_method):
            taking.add(context.module.path)
        if context.method_name == "__call__":
            heads = context.module.config.num_attention_heads if kind in ATTENTIONS else 0
            called[context.module.path] = kind, heads
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        # A function of its own: jax would answer from its cache for one that was traced before, and the
        # recorder would see nothing.
        shapes = jax.eval_shape(lambda key: init(key), jax.random.key(0))
    found: dict[str, list[Any]] = {"linears": [], "attentions": [], "embeddings": [], "norms": []}
    for path in sorted(called):
        kind, heads = called[path]
        leaves = _leaves(shapes, path)
        common = (path, *_names(path, leaves))
        own = tuple(
            (leaf[0], shape[1:] if common[-1] else shape) for leaf, shape in leaves.items() if len(leaf) == 1
        )
        # A tied head runs as a Dense on another module's kernel: it has no leaf of its own, and is left out.
        if kind in KERNEL_IS_OUT_IN and "kernel" in dict(own):
            out_in = KERNEL_IS_OUT_IN[kind]
            d_in, d_out = dict(own)["kernel"][:: -1 if out_in else 1]
            found["linears"].append(Linear(*common, d_in, d_out, out_in))
        elif kind in ATTENTIONS and path[-1] not in CROSS_ATTENTIONS and path[-2] not in CROSS_ATTENTIONS:
            found["attentions"].append(Attention(*common, heads))
        elif kind == "Embed" and own and path[-1] not in NOT_EMBEDDINGS:
            found["embeddings"].append(Holder(*common, own))
        elif kind in NORMS and own:
            found["norms"].append(Holder(*common, own))
    return Modules(**{kind: tuple(modules) for kind, modules in found.items()}, take_positions=bool(taking))


def _leaves(shapes: Any, path: Path) -> dict[Path, tuple[int, ...]]:
    """The leaves below a path, {path from there: shape}."""
    try:
        below = jax.tree_util.tree_flatten_with_path(subtree(shapes, path))[0]
    except KeyError:
        return {}
    return {tuple(str(key.key) for key in leaf): value.shape for leaf, value in below}


def _names(path: Path, leaves: Mapping[Path, tuple[int, ...]]) -> tuple[tuple[str, ...], bool]:
    """The module's full names, and whether its leaves are stacked.

    nn.scan's submodule has no number in its path: HF's Flax models write "layers" too, but number the blocks.
    """
    split = path.index(SCANNED) + 1 if SCANNED in path else None
    if split is None or not leaves or (split < len(path) and path[split].isdigit()):
        return (".".join(path),), False
    depth = next(iter(leaves.values()))[0]
    return tuple(".".join((*path[:split], str(layer), *path[split:])) for layer in range(depth)), True
