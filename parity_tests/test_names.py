"""What a name says, read off the ast: a private one stays in its file, and a collection has one."""

import ast
from pathlib import Path

import pytest

from hylorada_jax.trees import COLLECTION

ROOT = Path(__file__).parents[1]
PACKAGES = ("hylorada_jax", "hylorada_torch", "parity_tests", "benchmarks", "examples")
# Public: the underscore keeps a named tuple's fields apart from them, and says that nothing is tidied up.
NO_PRIVATES = {"_asdict", "_fields", "_replace", "_exit"}
# transformers', which has no public name for them; in the files that are tied to it.
TRANSFORMERS = {
    "_attn_implementation", "_concatenate_to_cache", "_create_position_bias", "_is_initialized",
    "_merge_heads", "_module", "_name_or_path", "_split_heads",
}  # fmt: skip


def sources():
    """{path from the root: ast} of every file that is not a test."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {
        str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8"))
        for path in files
        if not path.name.endswith("_test.py") and not path.name.startswith("test_")
    }


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def defined(tree):
    """The names that a file gives to functions, classes, variables and attributes of its own objects."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name


def foreign_privates(tree):
    """The private names of another file that a file uses."""
    own = {*defined(tree), *NO_PRIVATES}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] in PACKAGES:
                yield from (alias.name for alias in names if is_private(alias.name))
            case ast.Attribute(attr=name) if is_private(name) and name not in own:
                yield name


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("model._enabled", ["_enabled"]),
        ("model._enabled = True", ["_enabled"]),
        ("from hylorada_jax.models.loading import _slots", ["_slots"]),
        ("from re import _parser", []),
        ("class Model:\n def __init__(self): self._on = 1\n\ndef f(model): return model._on", []),
        ("row._replace(a=1).__doc__", []),
    ],
)
def test_what_is_private_to_another_file_is_seen(source, found):
    assert [*foreign_privates(ast.parse(source))] == found


def test_no_private_name_of_another_file_is_used():
    found = {path: {*foreign_privates(tree)} for path, tree in sources().items()}
    assert len(found) > 100
    wrong = {path: names - (TRANSFORMERS if "hf" in path else set()) for path, names in found.items()}
    assert not {path: names for path, names in wrong.items() if names}
    assert set().union(*found.values()) == TRANSFORMERS  # each exception is needed


def test_the_collection_is_named_once():
    rooms = ("trees", "models", "surgery", "model.py", "adapter_bank")  # elsewhere it is also a method's name
    named = [
        path
        for path, tree in sources().items()
        if path.startswith(tuple(f"hylorada_jax/{room}" for room in rooms))
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value == COLLECTION
    ]
    assert named == ["hylorada_jax/trees.py"]
