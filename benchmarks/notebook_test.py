"""The notebook runs from start to end, and the file that is kept was run so.

To execute it anew, in place: jupyter execute --inplace benchmarks/hylorada.ipynb
"""

import json
import math
import re
import sys
from pathlib import Path

import pytest

# Its model is large enough for what LLVM takes to be given back.
pytestmark = pytest.mark.optimized

NOTEBOOK = Path(__file__).with_name("hylorada.ipynb")
PLOTS = ("plots", "learned")
# Rounding of thirty layers in float32, as a part of the largest logit.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def kept():
    """The code cells of the file, by name."""
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return {cell["id"]: cell for cell in cells if cell["cell_type"] == "code"}


@pytest.fixture(scope="module")
def executed():
    """The text of every code cell's outputs, by the cell's name, after a run of few steps."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    from jupyter_client.manager import KernelManager

    # A kernel of that name which somebody registered elsewhere would test another installation.
    assert Path(KernelManager(kernel_name="python3").format_kernel_cmd()[0]) == Path(sys.executable)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYLORADA_NOTEBOOK_STEPS", "2")
        # A cell that raises ends this with its error.
        nbclient.NotebookClient(notebook, kernel_name="python3", timeout=600, resources=place).execute()
    return {cell.id: text_of(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"}


def text_of(outputs):
    """What a cell printed or displayed as text; lines may lie in a list, as in the file."""
    parts = []
    for output in outputs:
        data = output.get("data", {})
        parts.append(output.get("text") or data.get("text/markdown") or data.get("text/plain") or "")
    return "".join("".join(part) for part in parts)


def relative_differences(text):
    """Of every line "… 1.2e-05 (logits up to 39)" the quotient."""
    found = re.findall(r"(\S+) \(logits up to (\S+)\)", text)
    assert found, text
    return [float(difference) / float(largest) for difference, largest in found]


@pytest.mark.apart
def test_adapters_start_as_the_base_model(executed):
    assert max(relative_differences(executed["identity"])) < ROUNDING


@pytest.mark.apart
def test_a_saved_adapter_comes_back_and_a_merged_or_exported_one_computes_the_same(executed):
    assert "equal logits: True" in executed["save"]
    assert "direct attention adaptation" in executed["refused"]
    moved, merged = relative_differences(executed["v1"])
    assert merged < ROUNDING < moved
    if "PEFT would" not in executed["torch"]:
        assert max(relative_differences(executed["torch"])) < ROUNDING


@pytest.mark.apart
def test_the_table_has_every_model(executed, kept):
    tables = (executed["compare"], text_of(kept["compare"]["outputs"]))
    for table in tables:
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
        assert [(name, parameters) for name, parameters, *_ in rows] == [
            ("base", "0"),
            ("LoRA", "921,600"),
            ("HyLoRADA", "985,924"),
        ]
        assert all(1 < float(number) < math.inf for row in rows for number in row[2:])


@pytest.mark.apart
def test_generation_continues_the_prompt(executed):
    before, after = executed["generate"].split("--- after ---\n")
    assert "def read_lines(path):" in before
    assert "def read_lines(path):" in after


def test_the_file_was_run_from_start_to_end(kept):
    assert [cell["execution_count"] for cell in kept.values()] == list(range(1, len(kept) + 1))
    for name, cell in kept.items():
        source = "".join(cell["source"])
        shows = re.search(r"^ *(print\(|display\(|plt\.show\(|\w+\.print_)", source, re.MULTILINE)
        assert bool(cell["outputs"]) == bool(shows), name


def test_the_file_keeps_results_and_nothing_of_the_machine(kept):
    assert NOTEBOOK.stat().st_size < 400_000
    for name, cell in kept.items():
        for output in cell["outputs"]:
            assert output["output_type"] != "error", name
            assert output.get("name") != "stderr", (name, text_of([output]))
        assert not re.search(r"(^|[\s'\"=])/\w+/", text_of(cell["outputs"])), name  # an absolute path
        images = [output for output in cell["outputs"] if "image/png" in output.get("data", {})]
        assert len(images) == (name in PLOTS), name
