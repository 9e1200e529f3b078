"""A product of float32 in TF32, a GPU's default, or in bfloat16, a TPU's, is caught.

On a CPU the setting of JAX changes no number. So it is shown that the traced programs ask for full precision,
and that the suite would fail without, in an emulation.
"""

from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax import lax
from jax.extend.core import primitives

from parity_tests.layers import LAYERS, Draw
from parity_tests.measure import budgets, jax_side, precision, torch_side
from parity_tests.models import CONFIGS, build, measuring
from parity_tests.tolerances import relative_error

HIGHEST = (lax.Precision.HIGHEST,) * 2
MANTISSA = {"float32": 23, "TF32": 10, "bfloat16": 7}
CALLS = ("jit", "custom_jvp_call", "custom_vjp_call")


def inner_jaxprs(equation: Any) -> Iterator[Any]:
    for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
        if hasattr(value, "eqns"):
            yield getattr(value, "jaxpr", value)


def products(jaxpr: Any) -> Iterator[Any]:
    """Every matrix product of a program, those in its branches and loops too."""
    for equation in jaxpr.eqns:
        if equation.primitive is primitives.dot_general_p:
            yield equation
        for inner in inner_jaxprs(equation):
            yield from products(inner)


def evaluate(jaxpr: Any, constants: Any, arguments: Any, bits: int) -> list[Any]:
    """A program's results, the operands of its products rounded to so many bits of mantissa."""
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments), strict=True))
    for equation in jaxpr.eqns:
        operands = [atom.val if hasattr(atom, "val") else values[atom] for atom in equation.invars]
        primitive, inner = equation.primitive, list(inner_jaxprs(equation))
        if primitive.name in CALLS:
            closed = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
            results = evaluate(closed.jaxpr, closed.consts, operands, bits)
        elif primitive.name == "cond":
            taken = equation.params["branches"][int(operands[0])]
            results = evaluate(taken.jaxpr, taken.consts, operands[1:], bits)
        else:
            assert not any(list(products(each)) for each in inner), f"{primitive} hides products"
            if primitive is primitives.dot_general_p:
                operands = [lax.reduce_precision(x, exponent_bits=8, mantissa_bits=bits) for x in operands]
            options = primitive.get_bind_params(equation.params)
            results = primitive.bind(*operands, **options)
            results = results if primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
    return [atom.val if hasattr(atom, "val") else values[atom] for atom in jaxpr.outvars]


def traced(case, context):
    """(program, its arguments, the names of its results) of a layer's call in float32."""
    with context:
        run, arguments = jax_side(case, "float32")
        program, results = jax.make_jaxpr(run, return_shape=True)(*arguments)
    return program, arguments, jax.tree.structure(results)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_measured_at_the_highest_precision(name):
    case = LAYERS[name].case(Draw())
    found = list(products(traced(case, precision("float32"))[0].jaxpr))
    assert all(product.params["precision"] == HIGHEST for product in found)
    forgotten = list(products(traced(case, jax.default_matmul_precision("default"))[0].jaxpr))
    assert len(forgotten) == len(found)
    assert not found or any(product.params["precision"] != HIGHEST for product in forgotten)


def test_models_are_measured_at_the_highest_precision():
    with measuring("float32"):
        pair = build("qwen2", CONFIGS["longlora"], "float32")
        program = jax.make_jaxpr(pair.program)(pair.adapters, pair.model.frozen, pair.inputs)
    found = list(products(program.jaxpr))
    assert len(found) > 20
    assert all(product.params["precision"] == HIGHEST for product in found)


@pytest.mark.apart
@pytest.mark.parametrize("name", LAYERS)
def test_products_in_fewer_bits_fail_the_suite(name):
    case = LAYERS[name].case(Draw())
    program, arguments, structure = traced(case, precision("float32"))
    if not list(products(program.jaxpr)):
        return
    expected, allowed = torch_side(case, "float32"), budgets(case, "float32")
    passes = {}
    for emulated, bits in MANTISSA.items():
        with precision("float32"):
            got = evaluate(program.jaxpr, program.consts, jax.tree.leaves(arguments), bits)
        results = jax.tree.unflatten(structure, got)
        budget = {result: allowed["forward" if result == "y" else "gradient"] for result in expected}
        errors = {result: relative_error(results[result], expected[result]) for result in expected}
        passes[emulated] = all(errors[result] <= budget[result] for result in expected)
    assert passes == {"float32": True, "TF32": False, "bfloat16": False}
