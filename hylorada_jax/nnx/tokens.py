"""What adapters read of the tokens: known to the model's own call, read in its layers."""

import contextlib
import hashlib
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from hylorada_jax.errors import DataError, ModelError
from hylorada_jax.math.position import check_positions
from hylorada_jax.models.ids import check_structure_ids
from hylorada_jax.modules.checks import check_structure
from hylorada_jax.trees import is_traced

# What a model calls the places of its tokens.
_POSITIONS = ("position_ids", "positions")


class Tokens(NamedTuple):
    """Facts of a batch's tokens, [batch, seq] each, or None where they are not known."""

    position_ids: Array | None = None
    structure_ids: Array | None = None
    structure_positions: Array | None = None


class Pass(NamedTuple):
    """One call of a model: what its layers multiply their updates by, computed once.

    Attributes:
        positions: of the tokens, [batch, seq]; None: the model was called with no batch of tokens.
        counted: nobody has given them, and they are 0, 1, 2 … in each row.
        position: t = tanh(position_bias[bucket]) of every token.
        prior: the structure prior of every token.
    """

    positions: Array | None = None
    counted: bool = False
    position: Array | None = None
    prior: Array | None = None


_GIVEN: ContextVar[Tokens | None] = ContextVar("given", default=None)
_PASS: ContextVar[Pass | None] = ContextVar("pass", default=None)
# A function that jax has compiled for other tokens, which it read from here, must not answer for these.
_TRACED: Any = jax.make_user_context(None)
_KEY: ContextVar[Any] = ContextVar("key", default=None)


@contextlib.contextmanager
def tokens(
    position_ids: Int[Array, "*batch seq"] | None = None,
    *,
    structure_ids: Int[Array, "batch seq"] | None = None,
    structure_positions: Int[Array, "batch seq"] | Float[Array, "batch seq"] | None = None,
) -> Iterator[None]:
    """A context that gives an adapted model its tokens' positions where its own call does not.

    A model whose call takes ``positions`` or ``position_ids`` needs no context for these. Without either they
    count 0, 1, 2 … in each row, which a KV cache or packed documents make wrong. A part of the model that is
    called by itself, or another method, knows no positions but the context's, whatever arguments it takes.
    Open it inside the compiled function: around one, other positions recompile it.

    Args:
        position_ids: of the tokens.
        structure_ids: what the domain knows of each token, for method="hylorada_v2".
        structure_positions: their places in the domain, for the structure encoder; by default position_ids.

    Raises:
        DataError: they are not one of each for every token, or an id is below 0.
        ModelError: an adapted model is being called, whose layers know their tokens already.

    Example:
        >>> from flax import nnx
        >>> from hylorada_jax import HyLoRADAConfig
        >>> from hylorada_jax.nnx import adapt
        >>> config = HyLoRADAConfig(target_modules="all-linear", daa_enabled=False)
        >>> model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
        >>> model = adapt(model, config, nnx.Rngs(1))
        >>> with tokens(jnp.array([[4, 5, 6]])):
        ...     model(jnp.ones((1, 3, 2))).shape
        (1, 3, 2)

    Source: method.md §§1, 2, 5.
    """
    if _PASS.get() is not None:
        raise ModelError(
            "tokens() is around an adapted model's call, which computes once what its layers read of them.",
            "tokens() within that call",
            "Open it where the model is called, or give Attention its positions=.",
        )
    check_structure_ids(structure_ids)
    given = Tokens(
        *(None if x is None else jnp.asarray(x) for x in (position_ids, structure_ids, structure_positions))
    )
    if given.position_ids is not None:
        check_positions(given.position_ids)
    if given.structure_positions is not None:
        check_structure(given.structure_positions, given.structure_ids)
    with _within(_GIVEN, given):
        yield


@contextlib.contextmanager
def called(now: Pass) -> Iterator[None]:
    """A context in which the layers of a model see the pass that they are in."""
    with _within(_PASS, now):
        yield


@contextlib.contextmanager
def _within(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    key = (_KEY.get(), variable.name, _digest(value))
    before, outer = variable.set(value), _KEY.set(key)
    try:
        with _TRACED(key):
            yield
    finally:
        variable.reset(before)
        _KEY.reset(outer)


def _digest(value: Tokens | Pass) -> object:
    """Equal for equal arrays, which are constants of what is compiled; for tracers it equals nothing else."""
    arrays = [x for x in value if isinstance(x, jax.Array)]
    if is_traced(arrays) or not all(array.is_fully_addressable for array in arrays):
        return object()
    return tuple(_constant(x) if isinstance(x, jax.Array) else x for x in value)


def _constant(array: Array) -> object:
    content = hashlib.sha256(np.asarray(array).tobytes()).digest()
    return array.shape, array.dtype, array.sharding, content


def given_to_rows(rows: int) -> dict[str, Array]:
    """What the context around gives, by the names of :func:`tokens`, as [rows, 1, seq].

    Raises:
        DataError: it is of another number of rows.
    """

    def of_rows(array: Array) -> Array:
        if array.ndim > 1 and array.shape[0] not in (1, rows):
            raise DataError(
                "tokens() gives facts of one row for all, or of each row.",
                f"{array.shape} for {rows} rows",
                "Give one row for each of the batch.",
            )
        return jnp.broadcast_to(array, (rows, array.shape[-1]))[:, None]

    given = (_GIVEN.get() or Tokens())._asdict()
    return {name: of_rows(array) for name, array in given.items() if array is not None}


def current() -> Pass:
    """The pass of the model that is being called."""
    return _PASS.get() or Pass()


def known_positions(shape: tuple[int, ...]) -> Array | None:
    """The positions that somebody has given the tokens of an attention [batch, seq]; None: they count.

    They are those of the model's call; outside of one, those of the context around, as for a call.
    """
    if (now := _PASS.get()) is not None:
        return None if now.counted else now.positions
    given = (_GIVEN.get() or Tokens()).position_ids
    return None if given is None else _in_rows(given, shape)


def tokens_of(call: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tokens, bool]:
    """What is known of the tokens that a model is called with.

    Args:
        call: the model's ``__call__``.
        arguments: its arguments, without the model itself; the first array of two axes or more is taken for
            [batch, seq, …].
        options: its keyword arguments.

    Raises:
        DataError: there is not one position for each of them.
    """
    given = _GIVEN.get() or Tokens()
    bound = inspect.signature(call).bind(None, *arguments, **options)
    named = bound.arguments | bound.kwargs  # those of **kwargs too
    found = ((name, named[name]) for name in _POSITIONS if named.get(name) is not None)
    name, own = next(found, ("", None))
    arrays = [value for value in (*bound.args, *bound.kwargs.values()) if getattr(value, "ndim", 0) >= 2]
    if not arrays:
        return given, False
    shape = arrays[0].shape[:2]
    positions = own if given.position_ids is None else given.position_ids
    if counted := positions is None:
        positions = jnp.arange(shape[1])
    positions = _in_rows(jnp.asarray(positions), shape)
    try:
        check_positions(positions, shape)
    except DataError as error:
        if given.position_ids is not None:
            raise
        remedy = f"{error.remedy} An argument that means something else needs another name."
        raise DataError(error.rule, f"{name} of the model's call: {error.received}", remedy) from None
    return given._replace(position_ids=positions), counted


def _in_rows(positions: Array, shape: tuple[int, ...]) -> Array:
    """Positions of tokens [batch, seq]: those of one row for every row, and any others as they are."""
    one = positions.shape in ((shape[1],), (1, shape[1]))
    return jnp.broadcast_to(positions, shape) if one else positions
