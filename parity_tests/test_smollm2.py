"""The real SmolLM2-135M: logits, loss, gradients and a fine-tuning run, JAX against the reference."""

import pytest

from parity_tests.smollm2 import BOUNDS, ORACLE, measure, plot


@pytest.mark.slow
@pytest.mark.optimized
def test_smollm2(tmp_path):
    measured = measure()
    over = {
        (dtype, name): error
        for dtype, found in measured["errors"].items()
        for name, error in found.items()
        if not error <= BOUNDS[dtype][name]
    }
    assert not over, measured["errors"]
    assert set(measured["errors"]) == set(BOUNDS)
    oracle = measured["losses"][ORACLE]
    assert sum(oracle[-5:]) < sum(oracle[:5])  # five batches, gone through again and again
    plot(measured["losses"], tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
