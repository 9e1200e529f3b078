"""Finding the linear layers of a Flax model, without its weights."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax import Array

Path = tuple[str, ...]
Tree = Mapping[str, Any]

# How each linear module holds its kernel. HF's FlaxConv1D is known by name: its file imports transformers.
KERNEL_IS_OUT_IN = {"Dense": False, "FlaxConv1D": True}
# nn.scan stacks the parameters of this submodule along a first axis, one slice per layer.
SCANNED = "layers"


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear module of a model; under nn.scan it stands for the same layer of every block.

    Attributes:
        path: its path in the parameter tree.
        d_in: input features.
        d_out: output features.
        kernel_is_out_in: the kernel is [d_out, d_in]; else [d_in, d_out].
        names: its full HF names, "model.layers.3.self_attn.q_proj": one, or one per stacked layer.
        stacked: the leaves have a leading layer axis.
    """

    path: Path
    d_in: int
    d_out: int
    kernel_is_out_in: bool
    names: tuple[str, ...]
    stacked: bool

    def weight(self, params: Tree, layer: Array | int = 0) -> Array:
        """W [d_out, d_in] of one layer, as a view of the frozen tree.

        Args:
            params: the model's parameter tree.
            layer: the index along the stacked axis; not read for an unstacked module.
        """
        kernel = subtree(params, self.path)["kernel"]
        if self.stacked:
            kernel = jax.lax.dynamic_index_in_dim(kernel, layer, keepdims=False)
        return kernel if self.kernel_is_out_in else kernel.T


def subtree(tree: Tree, path: Path) -> Any:
    """The node of a nested mapping at a path."""
    for key in path:
        tree = tree[key]
    return tree


def with_leaf(tree: Tree, path: Path, value: Any) -> dict[str, Any]:
    """The tree with ``value`` at ``path``; the given tree is left as it was, its other leaves shared."""
    if not path:
        return value
    return {**tree, path[0]: with_leaf(tree.get(path[0], {}), path[1:], value)}


def find_linears(init: Callable[[Array], Any]) -> list[Linear]:
    """Every linear module that a model's initialisation calls and that has a kernel of its own.

    Args:
        init: key → parameter tree, which calls every module once. It is traced, not run: no memory is
            taken for the weights. It must not be jitted, or jax may answer from its cache.

    Returns:
        The modules in the order of the tree's paths.

    Example:
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.Dense(3, name="fc")(x)
        >>> import jax.numpy as jnp
        >>> find_linears(lambda key: Net().init(key, jnp.ones((1, 2)))["params"])[0].names
        ('fc',)
    """
    kinds: dict[Path, bool] = {}

    def record(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        kind = KERNEL_IS_OUT_IN.get(type(context.module).__name__)
        if kind is not None and context.method_name == "__call__":
            kinds[context.module.path] = kind
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        # A function of its own: jax would answer from its cache for one that was traced before, and the
        # recorder would see nothing.
        shapes = jax.eval_shape(lambda key: init(key), jax.random.key(0))
    flat = {
        tuple(str(key.key) for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]
    }
    # A tied head runs as a Dense on another module's kernel: it has no leaf of its own, and is left out.
    return [
        _linear(path, flat[(*path, "kernel")], kinds[path])
        for path in sorted(kinds)
        if (*path, "kernel") in flat
    ]


def _linear(path: Path, shape: tuple[int, ...], kernel_is_out_in: bool) -> Linear:
    stacked = len(shape) == 3
    d_out, d_in = shape[-2:] if kernel_is_out_in else shape[:-3:-1]
    names: tuple[str, ...] = (".".join(path),)
    if stacked:
        split = path.index(SCANNED) + 1
        names = tuple(".".join((*path[:split], str(layer), *path[split:])) for layer in range(shape[0]))
    return Linear(path, d_in, d_out, kernel_is_out_in, names, stacked)
