"""The compiler for TPUs, on a machine that has none."""

import importlib.machinery
import os
import sys
from pathlib import Path

from hylorada_jax.errors import HyLoRADAError


def libtpu_directory() -> Path:
    """Where libtpu is installed: with the other packages, or apart from them in ``<environment>/libtpu``.

    Apart, because JAX opens a TPU in every program that can import libtpu.

    Raises:
        HyLoRADAError: it is in neither place.
    """
    apart = Path(sys.prefix) / "libtpu"
    found = importlib.machinery.PathFinder.find_spec("libtpu", [*sys.path, str(apart)])
    if found is None or found.origin is None:
        raise HyLoRADAError(
            "Compiling for a TPU needs the package libtpu, though no TPU.",
            f"no libtpu on the module path, nor in {apart}",
            f'Run `pip install --no-deps --target {apart} libtpu`, or `pip install "hylorada[plan]"`.',
        )
    return Path(found.origin).parents[1]


def use_libtpu() -> None:
    """Lets JAX compile for TPUs, though there is none; to be called before it is imported.

    Raises:
        HyLoRADAError: libtpu is not installed.
    """
    sys.path.append(str(libtpu_directory()))
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",  # else it asks the network which TPU this is
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # nothing is opened that two processes could not share
        JAX_ENABLE_COMPILATION_CACHE="false",  # programs for a TPU that is not there cannot be read back
    )
