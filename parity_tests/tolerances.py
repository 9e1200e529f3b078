"""Every tolerance of the parity tests with its reason, and the one measure that most of them bound."""

import math

import numpy as np
from numpy.typing import ArrayLike

# The largest relative error of one rounding.
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9}

# One layer against the reference in float64, fed with the very numbers that the layer got: its output, and
# the vector-Jacobian products with every leaf and every hidden state. In float64 all differences come from
# the order of sums, a few units in the last place: a miss is a bug in a formula. In float32 the sums' own
# rounding comes on top: a few dozen units at these sizes. A layer whose exact result magnifies errors (a row
# of W + s·B·A that cancels) is given two roundings times its condition, where that is more.
LAYER = {"float64": 1e-10, "float32": 1e-5}

# The same with hidden states and base weight in bfloat16, as multiples of what the dense layer in its place
# loses in bfloat16 (at least one rounding). A dense product of given operands rounds its result once. The
# low-rank path rounds A, B, x·Aᵀ and the sum; its backward pass as many again.
BFLOAT16 = {"forward": 4.0, "gradient": 4.0}

# One program compiled as a whole and run operation by operation, in float64: fused sums round in another
# order.
FUSION = 1e-13

# The algebraic identities between the methods (LoRA and DoRA as special cases, the collapse): a few roundings
# of float64, on outputs of order 1.
IDENTITY = 1e-14

# Our decoder without adapters, absolute, on logits of order 1. float32: sums of a few hundred terms, four
# layers deep, in two orders; 1e-5 is the project's promise. float64: the same, with room for 2⁻⁵³·10⁴.
DECODER = {"float64": 1e-12, "float32": 1e-5}

# A whole adapted model, two blocks with softmax and norms: logits, loss, and the gradients of all adapters.
MODEL = {"float64": 1e-10, "float32": 1e-5}

# The same with its base in bfloat16, as a multiple of what the base model alone loses. The adapters' own
# roundings about double the error of the logits; some gradients, such as that of DAA's α, are sums over
# queries and keys of terms that cancel in every row.
BFLOAT16_MODEL = {"forward": 4.0, "gradient": 8.0}

# Adapters after 20 AdamW steps, absolute, in float64 alone: the project's own acceptance bound. AdamW divides
# by the root of the second moment, which turns the rounding of a gradient that all but vanishes into a step.
TRAJECTORY = 1e-8

# A step of the optimizer, as a part of the longest, the group's peak rate. float64: steps are told from
# parameters of order 1, which round by 1e-16, at rates of 2e-4. float32: optax computes 1 − 0.999^t in it,
# which loses 6e-8 of 1e-3 at the first step, and half of it in the root.
STEP = {"float64": 1e-10, "float32": 3e-5}


def relative_error(got: ArrayLike, expected: ArrayLike) -> float:
    """The largest difference as a part of the largest value: max|got − expected| / max|expected|.

    Entry by entry would ask the impossible of an entry that is the sum of terms which cancel. Infinite where
    a value is not finite.
    """
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    difference, scale = np.abs(got - expected).max(initial=0.0), np.abs(expected).max(initial=0.0)
    if not np.isfinite(difference):
        return math.inf
    return float(difference / scale) if scale else float(difference)
