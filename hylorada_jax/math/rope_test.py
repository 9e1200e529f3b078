import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.math import rope


def test_rotation_equals_complex_multiplication():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8))
    positions = rng.integers(0, 100_000, (2, 5))
    frequencies = rope.default_frequencies(8, 10000.0, np.float64)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[..., None] * frequencies)[:, :, None]
    with jax.enable_x64(True):
        tables = rope.rope_tables(jnp.asarray(positions), frequencies, dtype=jnp.float64)
        mine = np.asarray(rope.apply_rope(jnp.asarray(x), *tables))
    # float64 angles up to 1e5 radians: 1e5 · 2^-53 is 1e-11.
    np.testing.assert_allclose(mine, np.concatenate([turned.real, turned.imag], -1), rtol=0, atol=1e-10)


def test_scores_depend_on_the_distance_alone():
    rng = np.random.default_rng(1)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 16))) for _ in range(2))

    def score(q, k):
        frequencies = rope.default_frequencies(16, 500.0, np.float32)
        turned = [
            rope.apply_rope(x, *rope.rope_tables(jnp.array([[p]]), frequencies, dtype=jnp.float32))
            for x, p in ((query, q), (key, k))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    # float32 products of 16 terms with angles up to 120 radians.
    assert score(7, 3) == pytest.approx(score(120, 116), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-2


def test_bfloat16_tells_neighbouring_positions_apart():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)  # 300 and 301 are one number in bfloat16
    tables = rope.rope_tables(
        jnp.array([[300, 301]]), rope.default_frequencies(8, 1e4, np.float32), dtype=jnp.float32
    )
    turned = rope.apply_rope(x, *tables)
    assert turned.dtype == jnp.bfloat16
    assert not jnp.array_equal(turned[0, 0], turned[0, 1])


@pytest.mark.parametrize(
    ("stretched", "settings"),
    [
        (rope.linear_frequencies, {}),
        (rope.llama3_frequencies, {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 2048}),
        (rope.yarn_frequencies, {"beta_fast": 32.0, "beta_slow": 1.0, "original": 2048, "truncate": True}),
    ],
)
def test_stretching_lies_between_kept_and_divided(stretched, settings):
    base = rope.default_frequencies(64, 1e4, np.float64)
    # 1e-14: a few float64 roundings.
    np.testing.assert_allclose(stretched(64, 1e4, np.float64, factor=1.0, **settings), base, rtol=1e-14)
    frequencies = stretched(64, 1e4, np.float64, factor=8.0, **settings)
    assert (frequencies <= base * (1 + 1e-14)).all()
    assert (frequencies >= base / 8 * (1 - 1e-14)).all()
    np.testing.assert_allclose(frequencies[-1], base[-1] / 8, rtol=1e-14)
    assert (np.diff(frequencies) < 0).all()


def test_dynamic_is_the_default_within_the_context():
    for longest, same in ((63, True), (64, False)):
        frequencies = rope.dynamic_frequencies(
            16, 500.0, jnp.float32, factor=2.0, max_positions=64, positions=jnp.array([[0, longest]])
        )
        assert np.array_equal(frequencies, rope.default_frequencies(16, 500.0, np.float32)) is same
