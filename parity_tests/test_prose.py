"""The prose of errors: a rule and a remedy are sentences, as HyLoRADAError says."""

import ast
from collections.abc import Iterator
from pathlib import Path

from hylorada_jax import errors

ROOT = Path(__file__).parents[1]
KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and name.endswith("Error")}
SOURCES = [
    path
    for package in ("hylorada_jax", "hylorada_torch", "benchmarks", "parity_tests")
    for path in sorted((ROOT / package).rglob("*.py"))
    if not path.name.startswith("test_") and not path.stem.endswith("_test")
]


def sentences(tree: ast.AST) -> Iterator[ast.expr]:
    """The rules and remedies: arguments of errors, and what variables of such names are set to."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(args=[rule, _, remedy]) if ast.unparse(node.func) in KINDS:
                yield from (rule, remedy)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                if name.lower().endswith(("rule", "remedy")):
                    yield value


def ends_of(node: ast.expr) -> Iterator[str]:
    """How the texts that an expression may be end; a variable or a call is checked in its own place."""
    match node:
        case ast.IfExp(body=body, orelse=orelse):
            yield from (*ends_of(body), *ends_of(orelse))
        case ast.JoinedStr(values=[*_, ast.Constant(value=str(text))]) | ast.Constant(value=str(text)):
            yield text.rstrip()
        case ast.JoinedStr():
            yield "a value"


def test_rules_and_remedies_are_sentences():
    found = [
        (end, f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
        for path in SOURCES
        for node in sentences(ast.parse(path.read_text(encoding="utf-8")))
        for end in ends_of(node)
    ]
    assert len(found) > 500
    # Near matches and the like, which are sentences themselves.
    assert sum(end == "a value" for end, _ in found) <= 3
    wrong = [where for end, where in found if not end.endswith((".", "?", "!", "a value"))]
    assert not wrong, "\n".join(wrong)
