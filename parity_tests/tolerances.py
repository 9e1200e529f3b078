"""Every tolerance of the parity tests with its reason, and the one measure that they bound."""

import numpy as np
from numpy.typing import ArrayLike

# All differences come from the order of sums: both sides compute in the dtype of the key throughout.

# One layer: output and vector-Jacobian products. The bounds are the project's acceptance; the worst of some
# hundred drawn layers was 1e-15 in float64 and 6e-7 in float32.
LAYER = {"float64": 1e-10, "float32": 1e-5}

# The algebraic identities between the methods (LoRA and DoRA as special cases, the collapse): a few roundings
# of float64, on outputs of order 1.
IDENTITY = 1e-14

# A whole adapted model, two blocks with softmax and norms: logits, and the gradients of all adapters.
MODEL = {"float64": 1e-10, "float32": 1e-5}

# Adapters after 20 AdamW steps, absolute, in float64 alone: the project's own acceptance bound. AdamW divides
# by the root of the second moment, which turns the rounding of a gradient that all but vanishes into a step.
TRAJECTORY = 1e-8


def relative_error(got: ArrayLike, expected: ArrayLike) -> float:
    """The largest difference as a part of the largest value: max|got − expected| / max|expected|.

    Entry by entry would ask the impossible of an entry that is the sum of terms which cancel.
    """
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    difference, scale = np.abs(got - expected).max(initial=0.0), np.abs(expected).max(initial=0.0)
    assert np.isfinite(difference), "a value is not finite"
    return float(difference / scale) if scale else float(difference)
