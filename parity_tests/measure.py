"""How far a layer in JAX is from the reference in float64, and how far it may be."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity_tests.layers import LAYERS, Case, Draw
from parity_tests.tolerances import BFLOAT16, LAYER, UNIT_ROUNDOFF, relative_error

DTYPES = ("float64", "float32", "bfloat16")
Results = dict[str, Any]


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Within it JAX has float64 where that is measured, and every product has its operands' full precision.

    Without the second, a TPU would round float32 operands to bfloat16, and a GPU to TF32.
    """
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        yield


def measured_in(case: Case, dtype: str) -> bool:
    """Whether a layer takes the dtype at all: bfloat16 is that of hidden states, and some layers see none."""
    return dtype != "bfloat16" or bool(case.differentiated)


def measure_layer(name: str, draw: Draw, dtype: str) -> dict[str, tuple[float, float]]:
    """The worst relative errors of a registered layer, each with its budget.

    Args:
        name: a key of `LAYERS`.
        draw: what the call is drawn from.
        dtype: of the inputs and the base weight: float64, float32 or bfloat16. Adapters are at least float32.

    Returns:
        {"forward": (error, budget), "gradient": (error, budget)}; the gradients are those with respect to
        every leaf and every hidden state.
    """
    case = LAYERS[name].case(draw)
    found, allowed = errors(case, dtype), budgets(case, dtype)
    gradients = [error for result, error in found.items() if result != "y"]
    return {"forward": (found["y"], allowed["forward"]), "gradient": (max(gradients), allowed["gradient"])}


def errors(case: Case, dtype: str) -> dict[str, float]:
    """The relative error of the output "y" and of every gradient, by name."""
    expected = torch_side(case, dtype)
    with precision(dtype):
        run, arguments = jax_side(case, dtype)
        got = jax.jit(run)(*arguments)
    leaf = "float64" if dtype == "float64" else "float32"
    dtypes = {name: leaf if name in case.leaves else dtype for name in expected}
    assert {name: str(value.dtype) for name, value in got.items()} == dtypes
    return {name: relative_error(got[name], value) for name, value in expected.items()}


def budgets(case: Case, dtype: str) -> dict[str, float]:
    """How large the errors of the output and of the gradients may be (see `tolerances`)."""
    if dtype == "bfloat16":
        lost = _dense_loss(case)
        return {direction: BFLOAT16[direction] * lost[direction] for direction in lost}
    allowed = max(LAYER[dtype], 2 * UNIT_ROUNDOFF[dtype] * case.condition)
    return {"forward": allowed, "gradient": allowed}


def torch_side(case: Case, dtype: str) -> Results:
    """The oracle: output and gradients of the reference, computed in float64 from the values of `dtype`."""
    reference, inputs = _in_torch(case, dtype)
    y = reference(**inputs) * torch.from_numpy(np.asarray(case.keep, np.float64))
    y.backward(torch.from_numpy(_wide(cotangent(case, dtype)))) if y.requires_grad else None
    tensors = {name: inputs[name] for name in case.differentiated} | dict(reference.named_parameters())
    gradients = {
        name: np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
        for name, tensor in tensors.items()
    }
    return {"y": y.detach().numpy(), **gradients}


def jax_side(case: Case, dtype: str) -> tuple[Callable[..., Results], tuple[Results, Results, np.ndarray]]:
    """(function, arguments): output and gradients of the Flax module. Trace it within `precision`."""
    values = _rounded(case, dtype)
    moving = {name: values.pop(name) for name in case.differentiated}
    leaves = {name: _round(leaf, _leaf_dtype(dtype)) for name, leaf in case.leaves.items()}

    def run(leaves: Results, moving: Results, cotangent: jax.Array) -> Results:
        def output(leaves: Results, moving: Results) -> jax.Array:
            params = flax.traverse_util.unflatten_dict(leaves, sep=".")
            y = case.module.apply({"params": params}, **moving, **values)
            return y * jnp.asarray(case.keep, y.dtype)

        y, pull_back = jax.vjp(output, leaves, moving)
        leaf_gradients, input_gradients = pull_back(cotangent)
        return {"y": y, **input_gradients, **leaf_gradients}

    return run, (leaves, moving, cotangent(case, dtype))


def cotangent(case: Case, dtype: str) -> np.ndarray:
    """What is pulled back: along with the output, so that a scalar's gradient is not a sum that cancels."""
    reference, inputs = _in_torch(case, dtype)
    with torch.no_grad():
        y = reference(**inputs).numpy() * np.asarray(case.keep)
    size = np.abs(y).max(initial=0.0) or 1.0  # of order 1, whatever the inputs' size
    factor = np.random.default_rng(0).uniform(0.5, 1.5, y.shape)
    return _round(y * factor / size, _output_dtype(case, dtype))


def _in_torch(case: Case, dtype: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The reference with the leaves' values, and its inputs; both float64, of values that `dtype` has."""
    reference = copy.deepcopy(case.reference).double()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(torch.from_numpy(_wide(_round(case.leaves[name], _leaf_dtype(dtype)))))
    inputs = {
        name: torch.from_numpy(_wide(value)).requires_grad_(name in case.differentiated)
        if isinstance(value, np.ndarray)
        else value
        for name, value in _rounded(case, dtype).items()
    }
    return reference, inputs


def _rounded(case: Case, dtype: str) -> dict[str, Any]:
    """The inputs as the layer gets them: hidden states and weights in `dtype`."""
    hidden = (*case.differentiated, "base_weight")
    return {
        name: _round(value, dtype if name in hidden else _leaf_dtype(dtype))
        if isinstance(value, np.ndarray) and value.dtype.kind == "f"
        else value
        for name, value in case.inputs.items()
    }


def _dense_loss(case: Case) -> dict[str, float]:
    """What the base model computes in the layer's place loses in bfloat16, and at least one rounding.

    Output, and gradients with respect to its inputs and its weight, against the same in float64.
    """
    floor = UNIT_ROUNDOFF["bfloat16"]
    dense = case.dense
    if dense is None or case.inputs[case.differentiated[0]].size == 0:
        return {"forward": floor, "gradient": floor}
    inputs = _rounded(case, "bfloat16")
    hidden = {name: inputs[name] for name in inputs if str(inputs[name].dtype) == "bfloat16"}

    def run(hidden: Results, factor: np.ndarray) -> tuple[jax.Array, Results]:
        y, pull_back = jax.vjp(dense, hidden)
        return y, pull_back(y * jnp.asarray(factor, y.dtype))[0]

    with precision("bfloat16"):
        factor = np.random.default_rng(0).uniform(0.5, 1.5, jax.eval_shape(dense, hidden).shape)
        got, got_gradients = jax.jit(run)(hidden, factor)
    with precision("float64"):
        wide = {name: jnp.asarray(_wide(value)) for name, value in hidden.items()}
        expected, gradients = jax.jit(run)(wide, factor)
    # An input that the dense computation does not read has no gradient there.
    used = [name for name, value in gradients.items() if np.any(value)]
    return {
        "forward": max(floor, relative_error(got, expected)),
        "gradient": max([floor, *(relative_error(got_gradients[name], gradients[name]) for name in used)]),
    }


def _leaf_dtype(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _output_dtype(case: Case, dtype: str) -> str:
    return dtype if case.differentiated else _leaf_dtype(dtype)


def _round(value: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray(value).astype(jnp.dtype(dtype))


def _wide(value: np.ndarray) -> np.ndarray:
    """As float64 where it is a float."""
    return value if value.dtype.kind in "iub" else value.astype(np.float64)
