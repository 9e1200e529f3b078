"""Every tolerance of the parity tests with its reason, and the one measure that they bound."""

import math

import numpy as np
from numpy.typing import ArrayLike

# The largest relative error of one rounding.
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9}

# One layer against the reference in float64, fed with the very numbers that the layer got: its output, and the
# vector-Jacobian products with every leaf and every hidden state. In float64 all differences come from the
# order of sums, a few units in the last place: a miss is a bug in a formula. In float32 the sums' own rounding
# comes on top: a few dozen units at these sizes. A layer whose exact result magnifies errors (a row of
# W + s·B·A that cancels) is given eight roundings times its condition, where that is more.
LAYER = {"float64": 1e-10, "float32": 1e-5}

# The same with hidden states and base weight in bfloat16, as multiples of what the dense layer in its place
# loses in bfloat16 (at least one rounding). A dense product of given operands rounds its result once. The
# low-rank path rounds A, B, x·Aᵀ and the sum; its backward pass as many again.
BFLOAT16 = {"forward": 4.0, "gradient": 4.0}

# One program compiled as a whole and run operation by operation, in float64: fused sums round in another order.
FUSION = 1e-13

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

    Entry by entry would ask the impossible of an entry that is the sum of terms which cancel. Infinite where a
    value is not finite.
    """
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    difference, scale = np.abs(got - expected).max(initial=0.0), np.abs(expected).max(initial=0.0)
    if not np.isfinite(difference):
        return math.inf
    return float(difference / scale) if scale else float(difference)
