"""The embedded conversations: functions of Python's own library, and what their docstrings say of them."""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from hylorada_jax.data.rows import Row

QUESTION = "Write the docstring of this function.\n\n```python\n{source}\n```"
"""What the user says."""

# Characters: what fits into a few hundred tokens, and says more than a name does.
_LONGEST_SOURCE, _DOCSTRING = 1500, range(20, 600)


def docstring_rows(modules: Iterable[Row]) -> Iterator[Row]:
    """A conversation for each function that has a docstring.

    Args:
        modules: Python source in the column ``text``, each named by its file.

    Yields:
        Rows of ``messages``, named ``file:line``: the user gives the function without its docstring, and the
        assistant answers the docstring, cleaned as :func:`inspect.cleandoc` does. Functions of more than
        1,500 characters, and docstrings of fewer than 20 or at least 600, are left out.

    Example:
        >>> module = Row("a.py", {"text": "def one():\\n    '''Return the number one.'''\\n    return 1"})
        >>> (row,) = docstring_rows([module])
        >>> print(row.values["messages"][0]["content"])
        Write the docstring of this function.
        <BLANKLINE>
        ```python
        def one():
            return 1
        ```
        >>> row.place, row.values["messages"][1]["content"]
        ('a.py:1', 'Return the number one.')
    """
    for name, values in modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes like "\\d" in somebody's source
            tree = ast.parse(values["text"])
        lines = values["text"].split("\n")  # as the parser counts them
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (answer := _docstring(node)):
                source = _without_docstring(node, lines)
                if source and len(source) <= _LONGEST_SOURCE and len(answer) in _DOCSTRING:
                    yield Row(f"{name}:{node.lineno}", {"messages": _messages(source, answer)})


def _docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The function's lines but its docstring's; "" where that is all it has, or shares a line."""
    docstring, *rest = node.body
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    alone = rest and docstring.lineno > node.lineno and rest[0].lineno > (docstring.end_lineno or 0)
    if not alone:
        return ""
    kept = lines[first - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    return textwrap.dedent("\n".join(kept)).strip("\n")


def _messages(source: str, answer: str) -> list[dict[str, Any]]:
    question = QUESTION.format(source=source)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
