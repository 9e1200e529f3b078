"""The command that measures JAX against the PyTorch reference."""

import shlex
import sys
from importlib.metadata import version
from pathlib import Path

from hylorada_jax.cli.shared import output_file
from hylorada_jax.errors import ConfigError, require_packages
from hylorada_jax.terminal import one_line


def parity(
    *,
    output: Path = Path("parity.json"),
    only: tuple[str, ...] = ("*",),
    whole_models: bool = True,
    overwrite: bool = False,
) -> None:
    """Compare JAX on this machine's default device with the PyTorch reference in float64.

    Prints a table (layer or model × forward/gradient × dtype: worst error, budget, verdict) and writes it as
    JSON with the versions and the device. Exit status 1 if an error exceeds its budget.

    Args:
        output: the JSON file.
        only: names of layers and models, with * for anything: "hylorada*", "qwen2, *".
        whole_models: compare small random models with every method too, not only the layers.
        overwrite: replace an output file that exists.
    """
    require_packages(
        "Parity is measured against the PyTorch reference and transformers' models.",
        ("torch", "transformers"),
        'Install it: `pip install "hylorada[torch]"`.',
    )
    output = output_file(output, overwrite=overwrite, remedy="Give another --output, or --overwrite.")

    from tqdm import tqdm

    from parity_tests import report

    subjects = report.subjects(only, whole_models=whole_models)
    if not subjects:
        known = ", ".join(dict.fromkeys(subject.name for subject in report.subjects()))
        raise ConfigError("A pattern of --only matches a name.", " ".join(only), f"Choose among: {known}.")
    rows = [row for subject in tqdm(subjects, "parity") for row in report.measure(subject)]
    print(report.table(rows))
    if whole_models and (families := report.left_out()):
        print(f"left out with transformers {version('transformers')}: {', '.join(families)}")
    report.write(rows, output, shlex.join(["hylorada", *sys.argv[1:]]))
    print(f"report  {one_line(output)}")
    if not all(row.passed for row in rows):
        sys.exit(1)
