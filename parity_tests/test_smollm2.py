"""The real SmolLM2-135M: logits, loss, gradients and a fine-tuning run, JAX against the reference."""

import jax
import pytest

from parity_tests.smollm2 import BATCHES, BOUNDS, ORACLE, measure, plot


@pytest.mark.apart
@pytest.mark.optimized
def test_smollm2(tmp_path):
    # Where there is float64, it tells the most; `python -m parity_tests.smollm2` measures float32 beside it.
    dtype = "float32" if jax.default_backend() == "tpu" else "float64"
    measured = measure((dtype,), BATCHES + 1)
    over = {
        (dtype, name): error
        for dtype, found in measured["errors"].items()
        for name, error in found.items()
        if not error <= BOUNDS[dtype][name]
    }
    assert not over, measured["errors"]
    assert set(measured["errors"]) == {dtype}
    oracle = measured["losses"][ORACLE]
    assert oracle[-1] < oracle[0]  # the first batch, met again
    plot(measured["losses"], tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
