"""What importing each package loads, seen from a fresh interpreter; and which way imports point."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

JAX = Path(__file__).parents[1] / "hylorada_jax"
# A room imports from those above it and from itself, also within its functions.
_TABLE = (
    (JAX.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("| room of")[2].split("\n\n")[0]
)
_FIRST = "".join(line.split("|")[1] for line in _TABLE.splitlines()[2:])
ROOMS = [*re.findall(r"`(\w+)/?`", _FIRST), "__main__"]


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
        # What a command needs to give its help, or to refuse an option.
        ("import hylorada_jax.cli.main", ["jax", "flax", "torch", "transformers"], []),
    ],
    ids=["hylorada_jax", "hylorada_torch", "config", "commands"],
)
def test_importing_a_package_loads_one_framework(statement, watched, loaded):
    assert loaded_by(statement, watched) == loaded


def test_of_parity_tests_the_wheel_has_what_the_command_imports():
    settings = tomllib.loads((JAX.parent / "pyproject.toml").read_text(encoding="utf-8"))
    left_out = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["exclude"]
    here = Path(__file__).parent
    shipped = {
        path.stem
        for path in here.glob("*.py")
        if not any(path.match(pattern) or f"parity_tests/{path.name}" == pattern for pattern in left_out)
    }
    found, reached = {"__init__", "report"}, set[str]()
    while new := found - reached:
        reached |= new
        texts = [(here / f"{name}.py").read_text(encoding="utf-8") for name in new]
        found |= {
            name for text in texts for name in re.findall(r"from parity_tests(?:\.| import )(\w+)", text)
        }
    assert shipped == reached


def test_the_layers_need_nothing_of_the_tools():
    """What docs/own_network.md says of an installation without dependencies."""
    tools = [
        "gguf", "google", "grain", "huggingface_hub", "jinja2", "matplotlib", "re2", "safetensors",
        "tokenizers", "tqdm", "tyro",
    ]  # fmt: skip
    layers = (
        "[getattr(package, name) for package in (hylorada_jax, hylorada_jax.nnx) for name in package.__all__ "
        "if name in LAYERS]"
    )
    names = (JAX / "__init__.pyi").read_text(encoding="utf-8")
    found = set(re.findall(r"from \.modules\.\w+ import (\w+)", names)) | {"HyLoRADAConfig"}
    assert len(found) > 10
    blocked = f"import sys\nsys.modules.update(dict.fromkeys({tools!r}))\nLAYERS = {found!r}"
    # Those of NNX have the same names; the config is once.
    statement = f"{blocked}\nimport hylorada_jax.nnx\nassert len({layers}) == 2 * len(LAYERS) - 1"
    assert loaded_by(statement, ["jax"]) == ["jax"]


def imports():
    """{module of hylorada_jax: those of its modules that it imports anywhere}, without tests."""
    files = [path for path in sorted(JAX.rglob("*.py")) if not path.name.endswith("_test.py")]
    modules = {".".join(path.relative_to(JAX).with_suffix("").parts): path for path in files}
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hylorada_jax."):
                source = str(node.module).removeprefix("hylorada_jax.")
                names = {f"{source}.{alias.name}" for alias in node.names}
                found[name] |= (names & modules.keys()) or {source}
    return found


def test_imports_point_one_way():
    found = imports()
    assert {name.partition(".")[0] for name in found} == {*ROOMS, "__init__"}
    place = {room: at for at, room in enumerate(ROOMS)}
    back = [
        f"{name} imports {source}"
        for name, sources in found.items()
        for source in sources
        if place[source.partition(".")[0]] > place[name.partition(".")[0]]
    ]
    assert not back
    assert [*graphlib.TopologicalSorter(found).static_order()]  # raises where there is a cycle


def test_two_places_import_what_is_tied_to_an_old_transformers():
    places = {
        name
        for name, sources in imports().items()
        if not name.startswith("models.hf.") and any(source.startswith("models.hf") for source in sources)
    }
    assert places == {"models.loading", "models.wrapped"}


WITHOUT = """
import runpy
import sys

sys.modules["hylorada_jax.models.hf"] = None
import jax
from hylorada_jax import CausalLM, HyLoRADAModel
from hylorada_jax.models.decoder_config import DecoderConfig

loop, directory = sys.argv[1:]
shape = {"model_type": "llama", "vocab_size": 29, "hidden_size": 8, "num_hidden_layers": 1}
shape |= {"num_attention_heads": 2, "intermediate_size": 12, "initializer_range": 0.3}
base = CausalLM.from_config(DecoderConfig.from_hf(shape), jax.random.key(0))
ids = jax.numpy.arange(12)[None]
runpy.run_path(loop)["train"](base, ids, directory, steps=1)
assert (HyLoRADAModel.from_pretrained(base, directory)(ids).logits != base(ids).logits).any()
"""


def test_a_model_is_trained_saved_and_loaded_without_them(tmp_path):
    loop = JAX.parent / "examples/own_loop.py"
    subprocess.run([sys.executable, "-c", WITHOUT, loop, tmp_path / "adapter"], check=True, timeout=240)
