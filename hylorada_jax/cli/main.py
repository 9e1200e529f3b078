"""The commands by name."""

import io
import sys

import tyro

from hylorada_jax.cli.evaluate import evaluate
from hylorada_jax.cli.finetune import finetune
from hylorada_jax.cli.generate import generate
from hylorada_jax.cli.merge import merge
from hylorada_jax.cli.params import params
from hylorada_jax.cli.parity import parity
from hylorada_jax.cli.peft import export_peft, import_peft
from hylorada_jax.errors import HyLoRADAError


def main() -> None:
    """Runs the command; bad input ends with its error alone and exit status 2, an interrupt with 130."""
    # A text may have what the terminal's encoding has not; stderr writes that in escapes already.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        tyro.extras.subcommand_cli_from_dict(
            {
                "finetune": finetune,
                "evaluate": evaluate,
                "generate": generate,
                "params": params,
                "merge": merge,
                "export-peft": export_peft,
                "import-peft": import_peft,
                "parity": parity,
            },
            prog="hylorada",
            description="HyLoRADA: parameter-efficient fine-tuning of language models in JAX.",
        )
    except HyLoRADAError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except KeyboardInterrupt as interrupt:
        sys.exit(_fail(str(interrupt) or "interrupted", 130))


def _fail(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
