"""The table of faults is not rotten, and the script that tries them can tell a caught one from another."""

import ast
import dataclasses

import pytest

from parity_tests.faults import FAULTS
from parity_tests.mutate import run_all


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_another_program(fault):
    without = dataclasses.replace(fault, new=fault.old)
    assert ast.dump(ast.parse(fault.edited())) != ast.dump(ast.parse(without.edited()))


def test_a_text_that_is_gone_is_told_by_the_faults_name():
    fault = dataclasses.replace(FAULTS["sign of β"], old="no such text")
    with pytest.raises(ValueError, match=r"'sign of β'.*not 0×: 'no such text'"):
        fault.edited()


@pytest.mark.apart  # two processes of pytest
def test_a_fault_is_caught_and_no_fault_survives():
    fault = FAULTS["sign of β"]
    tests = ("parity_tests/test_layers.py::test_edge[hylorada_v1-plain-float64]",)
    without = dataclasses.replace(fault, new=fault.old)
    caught, survived = run_all([(tests, fault), (tests, without)], jobs=2)
    assert (caught.verdict, caught.tests) == ("caught", tests)
    assert (survived.verdict, survived.tests) == ("survived", ())
