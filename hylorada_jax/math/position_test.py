import bisect
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from hylorada_jax.errors import DataError
from hylorada_jax.math import position

M = 32768
OFFSETS = np.arange(-40_000, 40_001)


@functools.cache
def starts(base, divisor, nudge, n):
    """Where ⌊n·ln(a/divisor + nudge)/ln(base)⌋ reaches k = 1, 2, …: where (a/divisor + nudge)ⁿ ≥ baseᵏ."""

    def reaches(k):
        return lambda a: (Fraction(a, divisor) + nudge) ** n >= base**k

    return [bisect.bisect_left(range(M), True, key=reaches(k)) for k in range(1, n)]


def position_bucket(p):
    """method.md §2, one number at a time, and exactly."""
    p = min(max(p, 0), M - 1)
    return p if p < 32 else 32 + bisect.bisect(starts(M - 32, 1, 0, 31), p - 32)


def log_bucket(a, exact, count, nudge):
    far = starts(Fraction(M, exact), exact, nudge, count - exact)
    return a if a < exact else min(exact + bisect.bisect(far, a), count - 1)


def relative_bucket(offset):
    return log_bucket(abs(offset), 16, 32, 0) + (32 if offset < 0 else 0)


def structure_bucket(offset, n=64):
    return (n if offset >= 0 else 0) + log_bucket(abs(offset), n // 2, n, Fraction(1, 10**6))


def test_position_buckets_over_80_000_positions():
    # The bias is the bucket's number, so that the factor tells the bucket.
    bias = jnp.arctanh(jnp.arange(64) / 64)
    factor = jax.jit(position.position_factor)(bias, jnp.asarray(OFFSETS))
    found = np.asarray(jnp.rint(factor * 64)).astype(int)
    np.testing.assert_array_equal(found, [position_bucket(p) for p in OFFSETS.tolist()])


def test_offset_buckets_over_80_000_offsets():
    offsets = jnp.asarray(OFFSETS)
    for table, bucket in (
        (position.relative_buckets(), relative_bucket),
        (position.structure_buckets(), structure_bucket),
        (position.structure_buckets(200), lambda o: structure_bucket(o, 200)),
    ):
        found = position.offset_buckets(table, offsets)
        np.testing.assert_array_equal(found, [bucket(o) for o in OFFSETS.tolist()])
        # Beyond the table, up to the ends of int32.
        far = position.offset_buckets(table, jnp.array([-(2**31) + 1, 2**31 - 1]))
        np.testing.assert_array_equal(far, found[jnp.array([0, -1])])


def test_buckets_are_in_order_and_one_side_sees_no_other():
    for table in (position.position_buckets(), position.relative_buckets()[M - 1 :]):
        assert (np.diff(table.astype(int)) >= 0).all()
    assert set(position.relative_buckets()[: M - 1]).isdisjoint(position.relative_buckets()[M - 1 :])


def test_position_factor_gradient_against_differences():
    with jax.enable_x64(True):
        bias = jnp.asarray(np.random.default_rng(1).normal(size=64))
        positions = jnp.array([[0, 1, 31, 32, 40, 40_000]])
        factor = jax.jit(lambda b: position.position_factor(b, positions))
        check_grads(factor, (bias,), order=1, modes=["rev"])


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (jnp.array([[0, -2]]), "position of -2"),
        (jnp.array([[0, 1, 2]]), r"\(1, 3\)"),
        (jnp.ones((1, 2)), "float"),
    ],
)
def test_positions_are_refused(positions, message):
    with pytest.raises(DataError, match=message):
        position.check_positions(positions, (1, 2))


def test_traced_positions_pass_the_check():
    jax.jit(lambda p: position.check_positions(p, (1, 2)))(jnp.array([[0, -2]]))


def test_positions_count_the_tokens_before():
    rng = np.random.default_rng(4)
    mask, segments = rng.integers(0, 2, (4, 12)), np.sort(rng.integers(0, 4, (4, 12)), axis=1)
    by_mask = position.default_positions(mask.shape, attention_mask=jnp.asarray(mask))
    by_segment = position.default_positions(mask.shape, segment_ids=jnp.asarray(segments))
    for b, t in np.ndindex(4, 12):
        assert by_mask[b, t] == max(mask[b, : t + 1].sum() - 1, 0)
        assert by_segment[b, t] == (segments[b, :t] == segments[b, t]).sum()
    assert position.default_positions((2, 3)).tolist() == [[0, 1, 2]] * 2
