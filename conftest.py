"""Settings of every test run."""

import os
from pathlib import Path

from jaxtyping import install_import_hook

# Most of a test's time is compilation, and many tests compile the same small programs: keep them on disk.
# Set in the environment, so that the processes which tests start share it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# The shapes and dtypes that the mathematics states are checked at every call that a test makes.
install_import_hook("hylorada_jax.math", "beartype.beartype")
