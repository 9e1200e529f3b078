"""What importing each package loads, seen from a fresh interpreter."""

import subprocess
import sys

import pytest


def loaded_by(statement, watched):
    """Those of the watched top-level modules that a statement loads."""
    program = f"import sys\n{statement}\nprint(*sorted(set({watched!r}) & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return result.stdout.split()


EVERYTHING_IN_JAX = "import hylorada_jax\n[getattr(hylorada_jax, name) for name in hylorada_jax.__all__]"


@pytest.mark.parametrize(
    ("statement", "watched", "loaded"),
    [
        (EVERYTHING_IN_JAX, ["jax", "torch", "transformers"], ["jax"]),
        ("import hylorada_torch", ["jax", "flax", "torch"], ["torch"]),
        ("from hylorada_jax.config import HyLoRADAConfig", ["jax", "flax", "torch", "transformers"], []),
    ],
    ids=["hylorada_jax", "hylorada_torch", "config"],
)
def test_importing_a_package_loads_one_framework(statement, watched, loaded):
    assert loaded_by(statement, watched) == loaded
