"""Structure ids of Python source: how deeply each token is nested. Imports neither jax nor torch."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

Domain = Literal["code"]  # whose structure is read off a text; other domains bring their ids
DOMAINS = get_args(Domain)

# Lists of a syntax node that stand one level deeper than the node itself.
_SUITES = ("body", "orelse", "finalbody", "cases")
_OPENING, _CLOSING = tuple("([{"), tuple(")]}")
_BLANK = np.array([ord(character) for character in " \t\n\f"])
# Of one name: the parser joins a module's piece by piece, which takes the square of its length.
_MOST_DOTS = 1000
_LAYOUT = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)

# The markers of lists' items may stand before a fence that opens, and indent its block by their width. What
# stands behind backticks has none, or they are of one line. Runs are possessive (+): to give characters back
# would match nothing more, and take the square of a line's length.
_OPENING_FENCE = re.compile(
    r"(?P<indent>(?: |[-+*] |\d{1,9}[.)] )*)(?P<fence>~{3,}+|`{3,}+(?!.*`))[ \t]*+(?P<language>[\w+-]*+).*\n"
)
_CLOSING_FENCE = re.compile(r"(?P<indent> *)(?P<fence>~{3,}|`{3,})[ \t\r]*\n?")


class _Block(NamedTuple):
    """A fenced block: its language, how far it is indented, and the characters [start, stop) of its code."""

    language: str
    indent: int
    start: int
    stop: int


class _Lexed(NamedTuple):
    """What the tokens of a source tell, positions as numbers of characters.

    Attributes:
        lines: where each logical line starts.
        brackets: (position, +1 or -1) of each change of the number of open brackets.
        comments: (start, stop, blocks around it) of each comment that has a line of its own.
    """

    lines: list[int]
    brackets: list[tuple[int, int]]
    comments: list[tuple[int, int, int]]


def token_depths(source: str, offsets: Sequence[tuple[int, int]]) -> tuple[np.ndarray, bool]:
    """The nesting depth of every token of a language model's tokenizer: that of its last character.

    Args:
        source: Python source.
        offsets: the characters [start, stop) of each token; a token that has none, as one that only begins
            or ends a text, is at depth 0.

    Returns:
        The depths, int32 [tokens], and whether the source parses (:func:`character_depths`).

    Example:
        >>> token_depths("if a:\\n    b(c)", [(0, 0), (0, 4), (4, 10), (10, 12), (12, 13), (13, 14)])
        (array([0, 0, 0, 1, 2, 1], dtype=int32), True)
    """
    depths, parses = character_depths(source)
    return _at_their_ends(depths, offsets), parses


def fenced_depths(
    text: str, offsets: Sequence[tuple[int, int]], special: Sequence[bool] | None = None
) -> tuple[np.ndarray, bool]:
    """The nesting depth of every token of a conversation: that of the blocks of Python in it, 0 elsewhere.

    Args:
        text: with blocks of code in Markdown's fences. Those of ``python``, ``py`` or ``python3`` count, and
            those without a language that parse.
        offsets: the characters [start, stop) of each token.
        special: which tokens are special, as those around messages are; a block ends before such a one.

    Returns:
        The depths, int32 [tokens], and whether every block that says it is Python parses.

    Example:
        >>> text = "Try:\\n```python\\nif a:\\n  b\\n```"
        >>> fenced_depths(text, [(0, 14), (14, 20), (20, 24), (24, 27)])
        (array([0, 0, 1, 0], dtype=int32), True)

    Source: CommonMark 0.31, section 4.5.
    """
    depths, all_parse = np.zeros(len(text), np.int32), True
    between = [span for span, ends in zip(offsets, special or (), strict=bool(special)) if ends]
    starts, stops = [0, *(stop for _, stop in between)], [*(start for start, _ in between), len(text)]
    for first, last in zip(starts, stops, strict=True):
        for block in _blocks(text[first:last]):
            named = block.language.lower() in ("python", "py", "python3")
            if named or not block.language:
                start, stop = first + block.start, first + block.stop
                inner, parses = _indented_depths(text[start:stop], block.indent)
                all_parse &= parses or not named
                if parses or named:
                    depths[start:stop] = inner
    return _at_their_ends(depths, offsets), all_parse


def _blocks(text: str) -> Iterator[_Block]:
    """The fenced blocks of a text; one that is not closed reaches to its end."""
    opened: _Block | None = None
    fence = ""
    for line in re.finditer(r"[^\n]*\n|[^\n]+", text):
        if opened is None:
            if found := _OPENING_FENCE.fullmatch(line[0]):
                opened = _Block(found["language"], len(found["indent"]), line.end(), len(text))
                fence = found["fence"]
        elif (
            (found := _CLOSING_FENCE.fullmatch(line[0]))
            and found["fence"].startswith(fence)
            and len(found["indent"]) <= opened.indent + 3
        ):
            yield opened._replace(stop=line.start())
            opened = None
    if opened is not None:
        yield opened


def _indented_depths(code: str, indent: int) -> tuple[np.ndarray, bool]:
    """As :func:`character_depths`, of lines that are all indented, or less."""
    if not indent:
        return character_depths(code)
    kept = np.ones(len(code), bool)
    for line in re.finditer(rf"^ {{1,{indent}}}", code, re.MULTILINE):
        kept[line.start() : line.end()] = False
    inner, parses = character_depths(re.sub(rf"^ {{1,{indent}}}", "", code, flags=re.MULTILINE))
    # The number of those before it, as a blank has the depth of the text before it.
    return np.array([0, *inner], np.int32)[np.cumsum(kept)], parses


def _at_their_ends(depths: np.ndarray, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    spans = np.asarray(offsets, np.int64).reshape(-1, 2)
    filled = spans[:, 1] > spans[:, 0]
    found = np.zeros(len(spans), np.int32)
    found[filled] = depths[spans[filled, 1] - 1]
    return found


def character_depths(source: str) -> tuple[np.ndarray, bool]:
    """The nesting depth of every character of Python source.

        depth = number of suites around it + number of brackets open around it

    A suite is the list of statements that a header such as ``if x:`` governs, on lines of its own or behind
    the colon, and the cases of a ``match``; ``else``, ``elif``, ``except`` and decorators stand where their
    header stands. A bracket belongs to what is outside it; those inside f-strings do not count. A comment
    on a line of its own is where its indentation puts it. Blank characters have the depth of the text
    before them. So, in a source that parses, the depth of a character follows from the text up to it, and
    tells a language model nothing about what comes next.

    Source that Python cannot parse, or that is nested too deeply for its parser, gets the depth of the
    indentation of its lines.

    Args:
        source: Python source with any line ends, with or without a byte order mark.

    Returns:
        The depths, int32 [len(source)], and whether the source parses.

    Example:
        >>> character_depths("f(a[0])")[0].tolist()
        [0, 0, 1, 1, 2, 1, 0]
        >>> character_depths("if (")
        (array([0, 0, 0, 0], dtype=int32), False)

    Source: method.md, section 5; the Python Language Reference, sections 2.1 (indentation) and 8 (suites).
    """
    if source.startswith("\ufeff"):  # the parser takes it in a file but not in a string
        depths, parses = character_depths(source[1:])
        return np.concatenate([np.zeros(1, np.int32), depths]), parses
    if "\r" in source:  # ast counts every line end, tokenize only "\n"
        depths, parses = character_depths(re.sub("\r\n?", "\n", source))
        widths = np.ones(len(depths), np.int64)
        pairs = [match.start() for match in re.finditer("\r\n", source)]
        widths[np.array(pairs, np.int64) - np.arange(len(pairs))] = 2
        return np.repeat(depths, widths), parses
    starts = [0, *(match.end() for match in re.finditer("\n", source))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes like "\d" in somebody's source
            lexed = _lex(source, starts)
            tree = ast.parse(source)
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError):
        return _fill_blanks(source, _by_indentation(source)), False
    changes = np.zeros(len(source) + 1, np.int32)
    for start, stop in _suites(tree, source, starts, lexed.lines):
        changes[start] += 1
        changes[stop] -= 1
    for position, change in lexed.brackets:
        changes[position] += change
    depths = np.cumsum(changes[:-1], dtype=np.int32)
    for start, stop, depth in lexed.comments:
        depths[start:stop] = depth
    return _fill_blanks(source, depths), True


def _lex(source: str, starts: list[int]) -> _Lexed:
    found = _Lexed([], [], [])
    indents, at_line_start, fstrings, dots = [0], True, 0, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind, text, (row, column) = token.type, token.string, token.start
        if kind in _LAYOUT:  # at the end of a source these stand on a line that it does not have
            if kind == tokenize.INDENT:
                indents.append(_width(text))
            elif kind == tokenize.DEDENT:
                indents.pop()
            elif kind == tokenize.NEWLINE:
                at_line_start = True
            continue
        at = starts[row - 1] + column
        if kind == tokenize.COMMENT:
            if at_line_start:
                width = _width(source[at - column : at])
                # The indentation of a suite is a token only at its first statement, after such a comment.
                depth = bisect_right(indents, width) - 1 + (width > indents[-1])
                found.comments.append((at, at + len(text), depth))
            continue
        if at_line_start:
            found.lines.append(at)
            at_line_start = False
        dots = dots + (text == ".") if text == "." or kind == tokenize.NAME else 0
        if dots > _MOST_DOTS:
            raise ValueError("a name has too many parts")
        # Until Python 3.12 an f-string is one token: what is inside does not count, so that all agree.
        if kind == tokenize.OP:
            if text in _OPENING and not fstrings:
                found.brackets.append((at + 1, 1))
            elif text in _CLOSING and not fstrings:
                found.brackets.append((at, -1))
        elif tokenize.tok_name[kind].endswith("STRING_START"):
            fstrings += 1
        elif tokenize.tok_name[kind].endswith("STRING_END"):
            fstrings -= 1
    return found


def _suites(tree: ast.Module, source: str, starts: list[int], lines: list[int]) -> Iterator[tuple[int, int]]:
    """The characters [start, stop) of every suite but the module's; it ends with its last line."""

    def position(line: int, column: int) -> int:
        """ast counts a column in bytes of UTF-8."""
        start = starts[line - 1]
        before = source[start : start + column]  # at least as long as the column: a character has ≥ 1 byte
        return start + (column if before.isascii() else len(before.encode()[:column].decode()))

    def first(node: ast.AST) -> int:
        # "@" and "case" have no position of their own, but begin a line.
        if isinstance(node, ast.match_case):
            return line_of(node.pattern)
        if decorators := getattr(node, "decorator_list", None):
            return line_of(decorators[0])
        return position(node.lineno, node.col_offset)  # type: ignore[attr-defined]

    def line_of(node: ast.AST) -> int:
        at = position(node.lineno, node.col_offset)  # type: ignore[attr-defined]
        return lines[bisect_right(lines, at) - 1]

    def last_line(node: ast.AST) -> int:
        return node.body[-1].end_lineno if isinstance(node, ast.match_case) else node.end_lineno  # type: ignore

    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        todo += getattr(node, "handlers", ())
        for name in _SUITES:
            suite = getattr(node, name, None)
            if not suite:
                continue
            todo += suite
            start, line = first(suite[0]), last_line(suite[-1])
            is_elif = isinstance(suite[0], ast.If) and source.startswith("elif", start)
            if node is not tree and not is_elif:
                yield start, starts[line] if line < len(starts) else len(source)


def _by_indentation(source: str) -> np.ndarray:
    """The depth of every character by the indentation of its line; not set on blank lines."""
    depths, lengths, indents = [], [], [0]
    for line in re.split("(?<=\n)", source):
        text = line.lstrip(" \t\f")
        if text.strip("\n"):
            width = _width(line[: len(line) - len(text)])
            while indents[-1] > width:
                indents.pop()
            if indents[-1] < width:
                indents.append(width)
        depths.append(len(indents) - 1)
        lengths.append(len(line))
    return np.repeat(np.array(depths, np.int32), lengths)


def _width(indentation: str) -> int:
    """Its columns as Python counts them: a tab goes to the next multiple of 8, a form feed starts again."""
    return len(indentation.rpartition("\f")[2].expandtabs(8))


def _fill_blanks(source: str, depths: np.ndarray) -> np.ndarray:
    """The depths, each blank character's taken from the text before it; 0 before any text."""
    codes = np.frombuffer(source.encode("utf-32-le", "surrogatepass"), "<u4")
    last = np.maximum.accumulate(np.where(np.isin(codes, _BLANK), -1, np.arange(len(codes))))
    return np.where(last < 0, 0, depths[last]).astype(np.int32)
