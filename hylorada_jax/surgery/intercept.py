"""Tokens second: the forward pass of adapted layers, attached without editing the model."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, assert_never

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList
from jax import Array
from jax.typing import DTypeLike

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError
from hylorada_jax.leaves import LEAVES, POSITION_BIAS, STRUCTURE_ENCODER
from hylorada_jax.math import experts, linear_adapter, low_rank, position, quantized, sparse, structure
from hylorada_jax.models.dense import dot_general, promote_dtype
from hylorada_jax.models.module_kinds import kind_of, registered_class
from hylorada_jax.surgery.modules import as_it_lies, require_positions, takes_positions
from hylorada_jax.surgery.plan import DROPOUT_RATE
from hylorada_jax.trees import COLLECTION, Resolved, Tree

DROPOUT_RNG = "dropout"
# Part of what jax's cache of jitted functions goes by: they are compiled anew within another context.
_within: Any = jax.make_user_context(None)
_RESOLVED = tuple(
    leaf.resolved for leaf in LEAVES if leaf.component in ("linear", "sparse") and leaf.resolved
)
# What resolve replaces: the forward pass reads none of it.
_RAW = {leaf.name for leaf in LEAVES if leaf.resolved != leaf.name}

# At the top of the resolved tree, and no leaves of the outermost module.
_OF_THE_MODEL = (POSITION_BIAS, DROPOUT_RATE)


@dataclasses.dataclass(frozen=True)
class Structure:
    """What the structure encoder reads of the tokens, [batch, seq] each, or None.

    Attributes:
        ids: what the domain knows, such as a syntax tree's depth.
        positions: the tokens' places in the domain; None: the model's own position ids.
        decoding: the arrays are the prompt's; a token that is generated goes on with the last of them.
    """

    ids: Array | None = None
    positions: Array | None = None
    decoding: bool = False

    def of(self, given: Array | None, shape: tuple[int, ...]) -> Array | None:
        """The part of ``given`` that belongs to the tokens at hand."""
        if given is None or not self.decoding or given.shape == shape:
            return given
        return jnp.broadcast_to(given[:, -1:], shape)


@dataclasses.dataclass
class _Pass:
    """One forward pass: what every layer multiplies its update by, computed once.

    Attributes:
        position: t = tanh(position_bias[bucket]) of every token, for the Unified layer.
        prior: the structure prior of every token, for v2.
    """

    position: Array | None = None
    prior: Array | None = None


class adapt:  # noqa: N801 - reads as a verb: `with adapt(resolved, config):`
    """A context in which every linear module with variables in the ``hylorada`` collection is adapted.

        y = (x Wᵀ + δ·p)·c + bias          (the bias inside the bracket with ``magnitude_scales_bias``)
        y = y + up(gelu(down(y) ⊙ mask))   where the module has a sparse adapter
        y = round(embedding[ids])          of an embedding that trains, and round(norm(x)) of such a norm,
                                           with the collection's leaves in the place of the parameters

    Flax hands each module its own slice of the collection, so that no model needs to be edited; nn.scan,
    nn.vmap and nn.RNN hand on those collections alone that they name. Modules without leaves run as they are.
    p depends on the token: the model's own position ids are read off the call of its outermost module that
    takes ``position_ids``.

    Embeddings and norms that train are float32 in a base of bfloat16 too: their gradients are sums over all
    tokens, in which bfloat16 would lose what it adds. Only what they give is rounded, to the dtype that it
    has in the base, so that the layers after them compute in it.

    Open it within the function that is compiled: a jitted function called in the context is compiled for its
    config, with the position bias and the structure encoder that it is first called with.

    Args:
        resolved: from :func:`hylorada_jax.surgery.resolve.resolve`; what serves the whole model is read.
        config: ``sparse_dropout``, ``magnitude_scales_bias`` and ``structure_seq_len`` are read.
        train: apply dropout, where ``resolved`` has a rate of it; needs an rng named "dropout".
        dtype: of the base's embeddings and norms, where ``params`` has those that train in their place; read
            of a module that names none.
        structure: what the structure encoder reads.
        rows: the number of every row among those of its step: its dropout is its own, whatever rows it is
            computed with. None: they count from 0.

    Raises:
        ModelError: within the context, for a module that ``resolved`` has leaves of and that is called
            without them; for one that is called with adapters as they are, not resolved; or for one whose
            update depends on tokens that it does not see.

    Example:
        >>> dense, x = nn.Dense(4, use_bias=False), jnp.ones((1, 3))
        >>> params = dense.init(jax.random.key(0), x)["params"]
        >>> resolved = {"lora_A": jnp.ones((1, 3)), "scaled_B": jnp.ones((4, 1))}
        >>> with adapt(resolved, HyLoRADAConfig(method="lora")):
        ...     y = dense.apply({"params": params, "hylorada": resolved}, x)
        >>> bool(jnp.allclose(y - dense.apply({"params": params}, x), 3.0, atol=1e-5))
        True
    """

    def __init__(
        self,
        resolved: Resolved,
        config: HyLoRADAConfig,
        *,
        train: bool = False,
        dtype: DTypeLike | None = None,
        structure: Structure = Structure(),
        rows: Array | None = None,
    ) -> None:
        self._resolved = resolved
        self._bias, self._encoder = resolved.get(POSITION_BIAS), resolved.get(STRUCTURE_ENCODER)
        # Resolved leaves are differentiated, and this one is not a parameter.
        self._rate = jax.lax.stop_gradient(resolved.get(DROPOUT_RATE))
        self._config, self._train, self._dtype, self._structure = config, train, dtype, structure
        self._rows = rows
        self._pass: _Pass | None = None
        self._own_call: tuple[str, ...] | None = None
        self._contexts = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._contexts.enter_context(_within((self._config, self._train, self._dtype)))
        self._contexts.enter_context(nn.intercept_methods(self._intercept))

    def __exit__(self, *error: Any) -> None:
        self._contexts.__exit__(*error)

    def _intercept(self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if self._pass is None and (tokens := self._tokens(context, args, kwargs)) is not None:
            self._pass = tokens
            try:
                return next_fun(*args, **kwargs)
            finally:
                self._pass = None
        kind = kind_of(context)
        tied_head = isinstance(module, nn.Embed) and context.method_name == "attend"
        if module.path == self._own_call or not ((kind or tied_head) and self._is_adapted(module)):
            return next_fun(*args, **kwargs)
        if kind is None:
            return self._with_trained(module, context.method_name, *args, **kwargs)
        given = inspect.signature(context.orig_method).bind(*args, **kwargs)
        x, *more = given.args
        match kind.role:
            case "experts":
                return self._experts(module, x, _adapter(module), *more)
            case "linear":
                adapter = _adapter(module)
                adapted = "lora_A" in adapter
                y = self._adapted(module, x, adapter, kind.out_in) if adapted else next_fun(*args, **kwargs)
                return self._with_sparse(module, y, adapter) if "mask" in adapter else y
            case "embedding":
                return self._embedded(module, x)
            case "norm":
                return self._with_trained(module, "__call__", x, *more, **given.kwargs)
            case "attention":  # it reads its leaves itself
                return next_fun(*args, **kwargs)
            case _:
                assert_never(kind.role)

    def _is_adapted(self, module: Any) -> bool:
        """Whether the module has leaves; an error for those of another tree, or where they were dropped."""
        if own := _leaves(module.variables.get(COLLECTION)):
            if raw := sorted(own & _RAW):
                raise ModelError(
                    "A network is called with resolved adapters: the forward pass reads these alone.",
                    f"{', '.join(raw)} of {'.'.join(module.path) or type(module).__name__}",
                    "Give what resolve(sites, adapters, params, constants, config) returns, to adapt and to "
                    "apply.",
                )
            return True
        node: Any = self._resolved
        for name in module.path:
            node = node.get(name) if isinstance(node, Mapping) else None
        if module.is_initializing() or not _leaves(node).difference(() if module.path else _OF_THE_MODEL):
            return False
        raise ModelError(
            "A module that has adapters must be given the collection 'hylorada' wherever it gets params.",
            f"{'.'.join(module.path) or type(module).__name__} was called without it",
            'Call apply({"params": …, "hylorada": resolved}), and name it to nn.scan and nn.vmap, '
            'variable_axes={"params": 0, "hylorada": 0}, and to nn.RNN, '
            'variable_broadcast=("params", "hylorada").',
        )

    def _tokens(self, context: Any, args: Any, kwargs: Any) -> _Pass | None:
        """The pass that this call begins, if it does, and if anything depends on its positions."""
        if self._bias is None and self._encoder is None:
            return None
        if not takes_positions(context.orig_method):
            return None
        given = inspect.signature(context.orig_method).bind(*args, **kwargs).arguments
        ids, positions = given.get("input_ids"), given.get("position_ids")
        tokens: Any = positions if ids is None else ids
        shape = () if tokens is None else jnp.shape(tokens)
        if len(shape) != 2:
            raise ModelError(
                "Positions are those of the tokens that the model is called with, [batch, seq].",
                f"{type(context.module).__name__} with "
                + ("neither" if tokens is None else f"{'position' if ids is None else 'input'}_ids {shape}"),
                "Give input_ids [batch, seq], or position_ids [batch, seq] beside embeddings.",
            )
        if positions is None:
            positions = jnp.arange(shape[1])
        positions = jnp.broadcast_to(positions, shape)
        found = _Pass()
        if self._bias is not None:
            found.position = position.position_factor(self._bias, positions)
        if self._encoder is not None:
            domain = self._structure
            places = domain.of(domain.positions, shape)
            found.prior = structure.structure_prior(
                self._encoder,
                positions if places is None else places,
                domain.of(domain.ids, shape),
                self._config.structure_seq_len,
            )
        return found

    def _embedded(self, module: Any, ids: Array) -> Array:
        """What ``nn.Embed`` gives, rounded after the lookup: rounded before, its gradient would be too."""
        table = module.get_variable(COLLECTION, "embedding")
        # Of a single row, flax gives that row whatever the id.
        rows = jnp.take(table, jnp.zeros_like(ids) if len(table) == 1 else ids, axis=0)
        return rows.astype(module.dtype or self._dtype or module.get_variable("params", "embedding").dtype)

    def _with_trained(self, module: Any, method: str, x: Array, *more: Any, **options: Any) -> Any:
        """A norm, or a tied head, with the leaves that train in the place of the base's."""
        trained = {
            name: module.get_variable(COLLECTION, name) for name in _leaves(module.variables[COLLECTION])
        }
        y = self._call(module, method, trained, x, *more, **options)
        if getattr(module, "dtype", None):  # it rounds to it by itself
            return y
        own = [module.get_variable("params", name).dtype for name in trained]
        dtype = jnp.result_type(x, *([self._dtype] if self._dtype else own))
        return y.astype(dtype) if jnp.promote_types(y.dtype, dtype) == y.dtype else y

    def _call(self, module: Any, method: str, own: Tree, *arguments: Any, **options: Any) -> Any:
        """A module's own method, with these in the place of parameters of its own."""

        def put(variables: Any) -> Any:
            return variables | {"params": variables["params"] | own}

        def call(inner: Any) -> Any:
            # What a subclass does around it is running already.
            cls = registered_class(inner) if method == "__call__" else type(inner)
            return getattr(cls, method)(inner, *arguments, **options)

        self._own_call = module.path
        try:
            # The call outside is captured, with the output that is adapted.
            return nn.map_variables(call, "params", put, variables=DenyList("intermediates"))(module)
        finally:
            self._own_call = None

    def _adapted(self, module: Any, inputs: Array, adapter: dict[str, Array], out_in: bool) -> Array:
        # Of these, a class that is not flax's has what it needs.
        bias = module.get_variable("params", "bias", None)
        dtype, precision = getattr(module, "dtype", None), getattr(module, "precision", None)
        promote = getattr(module, "promote_dtype", nn.dtypes.promote_dtype)
        promote = promote_dtype if promote is nn.dtypes.promote_dtype else promote
        scales_bias = self._config.magnitude_scales_bias
        kernel = as_it_lies(module.get_variable("params", "kernel"), module.path)
        x, kernel, bias = promote(inputs, kernel, bias, dtype=dtype)
        if _multiplies_by_itself(module):
            without = {} if bias is None or scales_bias else {"bias": jnp.zeros_like(bias)}
            base = self._call(module, "__call__", without, inputs)
            x = _features_last(module, inputs.astype(base.dtype))
        else:
            axes = (((x.ndim - 1,), (1 if out_in else 0,)), ((), ()))
            base = quantized.dot_general(x, kernel, axes, precision=precision)
            if bias is not None and scales_bias:
                base = base + bias
        x, scale = self._dropout(module, x, self._rate), self._token_scale(module, adapter)
        if scale is not None and scale.shape != x.shape[:-1]:
            raise ModelError(
                "A layer whose update depends on the token must see the model's tokens, [batch, seq, d_in].",
                f"{'.'.join(module.path)} sees {x.shape}, the tokens are {scale.shape}",
                "Exclude the layer: exclude_modules=[its name].",
            )
        delta = low_rank.low_rank_delta(x, adapter["lora_A"], adapter["scaled_B"], scale)
        y = low_rank.adapted_output(base.reshape(delta.shape), delta, adapter.get("column_scale"))
        y = y.reshape(base.shape)
        return y if bias is None or scales_bias else y + bias

    def _experts(self, module: Any, inputs: Array, adapter: dict[str, Array], rows: experts.Rows) -> Array:
        x, kernel, _ = promote_dtype(inputs, module.get_variable("params", "kernel"), None)
        base = experts.experts_dot(x, kernel, rows)
        x = self._dropout(module, x, self._rate, rows)
        scale = self._token_scale(module, adapter, rows)
        delta = experts.low_rank_delta(x, adapter["lora_A"], adapter["scaled_B"], rows, scale)
        columns = adapter.get("column_scale")
        return low_rank.adapted_output(base, delta, None if columns is None else columns[rows.expert])

    def _token_scale(
        self, module: Any, adapter: dict[str, Array], rows: experts.Rows | None = None
    ) -> Array | None:
        """p of every token, [batch, seq], or of every row of experts; None where it is 1."""
        if rows is None:
            return linear_adapter.token_scale(adapter, lambda name: self._of_pass(name, module))

        def of_rows(name: str) -> Array:
            found = self._of_pass(name, module)
            return experts.rows_of(found.reshape(len(rows.order), -1, *found.shape[2:]), rows)

        return linear_adapter.token_scale(adapter, of_rows, rows.expert)

    def _of_pass(self, name: str, module: Any) -> Array:
        found: Any = getattr(self._pass, name, None)
        require_positions(found is not None, f"{'.'.join(module.path)} was called outside of one")
        return found

    def _dropout(
        self, module: Any, x: Array, rate: Array | float | None, rows: experts.Rows | None = None
    ) -> Array:
        if not self._train or rate is None:
            return x
        if not (module.has_rng(DROPOUT_RNG) or module.has_rng("params")):  # which flax makes others of
            raise ModelError(
                "A module that has adapters must be given the random numbers 'dropout' in training.",
                f"{'.'.join(module.path)} was called without them",
                'Call apply(…, rngs={"dropout": key}), and name it to nn.scan and nn.vmap, '
                'split_rngs={"params": True, "dropout": True}.',
            )
        kept, key = 1 - jnp.asarray(rate), module.make_rng(DROPOUT_RNG)
        shape, own_rows = x.shape, self._rows
        if own_rows is None:
            own_rows = jnp.arange(len(x) if rows is None else 1)
        if rows is not None:  # of experts, as tokens lie: how they are sorted differs from mesh to mesh
            shape = (len(own_rows), shape[0] * shape[1] // len(own_rows), shape[2])
        if len(own_rows) == shape[0]:
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, own_rows)
            keep = jax.vmap(lambda own: jax.random.bernoulli(own, kept, shape[1:]))(keys)
        else:  # a layer that sees the tokens of all rows together
            keep = jax.random.bernoulli(jax.random.fold_in(key, own_rows[0]), kept, shape)
        if rows is not None:
            keep = experts.in_order(keep.reshape(x.shape), rows)
        return jnp.where(keep, x / kept.astype(x.dtype), 0)

    def _with_sparse(self, module: Any, h: Array, adapter: dict[str, Array]) -> Array:
        rows = h
        if isinstance(module, nn.DenseGeneral) and not isinstance(module.features, int):
            rows = h.reshape(*h.shape[: -len(module.features)], -1)
        units = sparse.units(rows, adapter["down"], adapter["mask"])
        units = self._dropout(module, units, self._config.sparse_dropout or None)
        return sparse.add_units(rows, units, adapter["up"]).reshape(h.shape)


def _multiplies_by_itself(module: Any) -> bool:
    """Whether a linear module has a product of its own: over several axes, or in 8 bits."""
    if isinstance(module, nn.DenseGeneral):
        return True
    ours = (None, jax.lax.dot_general, dot_general)
    given = getattr(module, "dot_general_cls", None), getattr(module, "dot_general", None)
    return given[0] is not None or given[1] not in ours


def _features_last(module: Any, x: Array) -> Array:
    """x [*tokens, d_in], whatever axes a linear module sums over."""
    if not isinstance(module, nn.DenseGeneral):
        return x
    axes = (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)
    # In their order in x, whatever the module's: so flax builds the kernel.
    x = jnp.moveaxis(x, sorted(axis % x.ndim for axis in axes), range(-len(axes), 0))
    return x.reshape(*x.shape[: -len(axes)], -1)


def _leaves(node: Any) -> set[str]:
    """The names of a module's own leaves in a collection, at its node there."""
    if not isinstance(node, Mapping):
        return set()
    return {name for name, value in node.items() if not isinstance(value, Mapping)}


def _adapter(module: Any) -> dict[str, Array]:
    """The resolved leaves of a module's own adapters."""
    return {
        name: module.get_variable(COLLECTION, name)
        for name in _RESOLVED
        if module.has_variable(COLLECTION, name)
    }
