"""Patterns from users and files over layers' names: Python's regular expressions, matched in linear time.

Python's own engine can take for ever on ``([a-z.]+)+!``. Here Python's parser reads a pattern, so that it
means what it means elsewhere, and RE2 matches it, an automaton that never goes back in the name.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from re import _constants as op  # type: ignore[attr-defined]  # private, but the same since Python 3.11
from re import _parser  # type: ignore[attr-defined]
from typing import Any

import re2  # type: ignore[import-untyped]

from hylorada_jax.errors import TargetError
from hylorada_jax.text import cut

MAX_SIZE = 3000
"""The characters of a pattern, and RE2's instructions for it: the automaton's states then fit in memory."""
MAX_WORK = 10**8
"""Size × names, of all patterns of one setting: seconds, and enough to name each of a thousand layers."""
_LEAST_SIZE = 80  # what the call takes, in instructions
_READING = 100  # what reading a pattern takes, in calls

_AT = {
    op.AT_BEGINNING: "^", op.AT_BEGINNING_STRING: r"\A", op.AT_BOUNDARY: r"\b", op.AT_NON_BOUNDARY: r"\B",
    op.AT_END: "$", op.AT_END_STRING: r"\z",
}  # fmt: skip
# RE2's \s lacks some of Python's.
_CATEGORIES = {
    op.CATEGORY_DIGIT: r"\d", op.CATEGORY_NOT_DIGIT: r"\D",
    op.CATEGORY_WORD: r"\w", op.CATEGORY_NOT_WORD: r"\W",
    op.CATEGORY_SPACE: r"\t-\r\x1c-\x20", op.CATEGORY_NOT_SPACE: r"\x00-\x08\x0e-\x1b\x21-\x{10ffff}",
}  # fmt: skip
_FLAGS = {re.IGNORECASE: "i", re.MULTILINE: "m", re.DOTALL: "s"}
_SMALLER = "Use smaller repetitions, or name fewer layers in one pattern."
_REFUSED = {
    op.ASSERT: "a lookahead or lookbehind inside",
    op.ASSERT_NOT: "a lookahead or lookbehind inside",
    op.GROUPREF: "a back-reference",
    op.GROUPREF_EXISTS: "a conditional group",
    op.ATOMIC_GROUP: "an atomic group",
    op.POSSESSIVE_REPEAT: "a possessive repetition",
}


def matches(patterns: Iterable[str], names: Sequence[str], *, endings: bool = False) -> Iterator[set[str]]:
    r"""The names that each pattern matches from end to end, as ``re.fullmatch`` does.

    A pattern may begin with lookaheads. \w, \d, \s, \b and (?i) know ASCII only.

    Args:
        patterns: regular expressions in Python's syntax.
        names: of layers.
        endings: a pattern may also match the end of a name after a dot, as PEFT's ``rank_pattern`` does.

    Yields:
        The names that the next pattern matches.

    Raises:
        TargetError: a pattern is not a regular expression, is too long, or may take more than linear time; or
            all together are more than a model needs.

    Example:
        >>> [sorted(found) for found in matches([r"(?!h\.0).*c_\w+"], ["h.0.c_fc", "h.1.c_fc", "h.1.ln"])]
        [['h.1.c_fc']]

    Source: Cox 2007, "Regular Expression Matching Can Be Simple And Fast", and his RE2.
    """
    work, encoded = 0, {name: name.encode("utf-8", "surrogatepass") for name in names}
    for pattern in patterns:
        tests = _compiled(pattern, endings)
        size = max(_LEAST_SIZE, len(pattern), sum(regex.programsize for regex, _ in tests))
        work += size * (len(names) + _READING)
        if size > MAX_SIZE:
            raise _invalid(pattern, f"a size of {size:,}, more than {MAX_SIZE:,}", _SMALLER)
        if work > MAX_WORK:
            raise TargetError(
                "The patterns of a setting must be few and small enough to be matched in seconds.",
                f"too many or too large ones for {len(names)} layers, up to {_short(pattern)}",
                "Match more layers with each of fewer patterns.",
            )
        yield {name for name, text in encoded.items() if all(bool(r.search(text)) is is_ for r, is_ in tests)}


def _compiled(pattern: str, endings: bool) -> list[tuple[Any, bool]]:
    """RE2's expressions that must, or must not, be found in a name."""
    if len(pattern) > MAX_SIZE:
        raise _invalid(pattern, f"a length of {len(pattern):,}, more than {MAX_SIZE:,}", _SMALLER)
    options = re2.Options()
    options.log_errors, options.never_capture, options.max_mem = False, True, 2**21
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = _parser.parse(pattern)
        return [
            (re2.compile(rf"(?{_flags(tree.state.flags)}:{written})", options), wanted)
            for written, wanted in _tests([*tree], endings)
        ]
    except NotImplementedError as error:
        raise _invalid(
            pattern, str(error), "Lookaheads may begin it, as in ^(?!…); write out the others, or list names."
        ) from error
    except re2.error as error:
        raise _invalid(pattern, error.args[0].decode(), _SMALLER) from error
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise _invalid(pattern, str(error), "Escape or correct it.") from error


def _tests(items: list[Any], endings: bool) -> Iterator[tuple[str, bool]]:
    begins = items[:1] in ([(op.AT, op.AT_BEGINNING)], [(op.AT, op.AT_BEGINNING_STRING)])
    start = r"\A(?:.*\.)?" if endings and not begins else r"\A"
    items = items[begins:]
    while items and start == r"\A":
        match items[0]:
            case (op.ASSERT | op.ASSERT_NOT) as kind, (1, ahead):
                yield start + _group(ahead), kind == op.ASSERT
                items = items[1:]
            case _:
                break
    yield start + _group(items) + r"\z", True


def _group(items: Iterable[Any]) -> str:
    return f"(?:{''.join(map(_written, items))})"


def _written(item: Any) -> str:
    """A node of Python's tree in RE2's syntax."""
    match item:
        case op.LITERAL, code:
            return rf"\x{{{code:x}}}"
        case op.NOT_LITERAL, code:
            return rf"[^\x{{{code:x}}}]"
        case op.RANGE, (first, last):
            return rf"\x{{{first:x}}}-\x{{{last:x}}}"
        case op.CATEGORY, category:
            return _CATEGORIES[category]
        case op.IN, [(op.NEGATE, _), *members]:
            return f"[^{''.join(map(_written, members))}]"
        case op.IN, members:
            return f"[{''.join(map(_written, members))}]"
        case op.ANY, _:
            return "."
        case op.AT, place:
            return _AT[place]
        case op.FAILURE, _:
            return r"[^\x00-\x{10ffff}]"
        case op.BRANCH, (_, branches):
            return f"(?:{'|'.join(map(_group, branches))})"
        case op.SUBPATTERN, (_, added, taken, body):
            off = _flags(taken)
            return f"(?{_flags(added)}{'-' + off if off else ''}:{_group(body)})"
        case ((op.MAX_REPEAT | op.MIN_REPEAT), (least, most, body)):
            return f"{_group(body)}{{{least},{'' if most == op.MAXREPEAT else most}}}"
    raise NotImplementedError(_REFUSED.get(item[0], str(item[0])))


def _flags(flags: int) -> str:
    return "".join(letter for flag, letter in _FLAGS.items() if flags & flag)


def _invalid(pattern: str, reason: str, remedy: str) -> TargetError:
    rule = "A target must be a layer name or a regular expression that takes linear time."
    return TargetError(rule, f"{_short(pattern)} ({reason})", remedy)


def _short(pattern: str) -> str:
    return repr(cut(pattern, 200))
