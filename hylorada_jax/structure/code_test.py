"""Oracles: depths written by hand, tokenize's own INDENT and DEDENT, and laws over Python's own library."""

import io
import re
import textwrap
import tokenize
from pathlib import Path

import numpy as np
import pytest

from hylorada_jax.structure import code as module
from hylorada_jax.structure.code import character_depths, fenced_depths, token_depths

# Under each line of source, the depth of each of its characters.
BY_HAND = r"""
@mark(
000000
    a)
    10
class A:  # of what it is
00000 00  0 00 0000 00 00
    # its name
    1 111 1111
    '''doc
    111111
string'''
111111111
    @cached
    1111111
    def f(x=[1, (2)]): return x; y = 2  # done
    111 1122233 343211 222222 22 2 2 2  2 2222
  # between
  0 0000000
    async def g():
    11111 111 1111
        if x: pass
        22 22 3333
        elif (y): z
        2222 2322 3
        else:
        22222
            if t:
            33 33
                u
                4
        # back
        2 2222
        try: a
        2222 3
        except E:
        222222 22
            b
            3
        finally: c
        22222222 3
match x:
00000 00
    case [1, _]:
    1111 122 211
        lambda: {0: (1)}
        2222222 233 3432
é = 'π{' ; f(é, \
0 0 0000 0 0011 1
  (é))
  1210
"""

DOES_NOT_PARSE = """
def f(:
000 000
\tif x:
\t11 11
            y
            2
        print z
        11111 1
    odd
    111
end
000
"""


def read(text):
    """The source, and its depths with those of the text before them at blanks."""
    source = ""
    depths: list[int] = []
    lines = text.strip("\n").split("\n")
    for line, row in zip(lines[::2], lines[1::2], strict=True):
        for character, depth in zip(line + "\n", row + "\n", strict=True):
            assert character.isspace() == depth.isspace(), (line, row)
            depths.append(int(depth) if depth.strip() else (depths or [0])[-1])
        source += line + "\n"
    return source, depths


def library(count):
    """Some files of Python's own library, each with its text."""
    for path in sorted(Path(io.__file__).parent.glob("*.py"))[:: 180 // count]:
        yield path.name, path.read_text("utf-8")


def test_depths_are_those_written_by_hand():
    source, depths = read(BY_HAND)
    found, parses = character_depths(source)
    assert parses
    assert found.dtype == np.int32
    assert found.tolist() == depths


def test_a_logical_line_is_as_deep_as_tokenize_has_indented_it():
    for name, source in library(20):
        starts = np.cumsum([0, *(len(line) for line in source.splitlines(keepends=True))])
        found, parses = character_depths(source)
        assert parses, name
        indents, fresh, checked = 0, True, 0
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            indents += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
            if token.type == tokenize.NEWLINE:
                fresh = True
            elif fresh and token.type in (tokenize.NAME, tokenize.OP, tokenize.STRING):
                assert found[starts[token.start[0] - 1] + token.start[1]] == indents, (name, token)
                fresh, checked = False, checked + 1
        assert checked > 0 or not source.strip()


def test_a_depth_follows_from_the_text_before_it():
    rng, checked = np.random.default_rng(0), 0
    for name, source in [("by hand", read(BY_HAND)[0]), *library(10)]:
        ends = np.cumsum([len(line) for line in source.splitlines(keepends=True)])
        whole, _ = character_depths(source)
        for end in rng.choice(ends, min(15, len(ends)), replace=False):
            depths, parses = character_depths(source[:end])
            if parses:
                np.testing.assert_array_equal(depths, whole[:end], err_msg=f"{name}, {end} characters")
                checked += 1
    assert checked > 30


def test_other_line_ends_a_byte_order_mark_and_wide_characters_change_no_depth():
    source, expected = read(BY_HAND)
    depths = np.array(expected)
    is_end = np.array([character == "\n" for character in source])
    pairs, parses = character_depths(source.replace("\n", "\r\n"))
    assert parses
    assert pairs.tolist() == np.repeat(depths, 1 + is_end).tolist()
    for same in (source.replace("\n", "\r"), source.replace("A", "Ä").replace("doc", "😀oc")):
        assert character_depths(same)[0].tolist() == expected
    # A string before the code on its line: ast counts the columns behind it in bytes.
    assert character_depths("if '😀é': y")[0].tolist() == [0] * 9 + [1]
    assert character_depths("\ufeff" + source)[0].tolist() == [0, *expected]


def test_source_that_does_not_parse_gets_depth_by_indentation():
    source, expected = read(DOES_NOT_PARSE)
    depths, parses = character_depths(source)
    assert not parses
    assert depths.tolist() == expected


@pytest.mark.parametrize(
    "source",
    [
        "(" * 10_000,
        "[" * 5_000 + "]" * 5_000,
        "-" * 50_000 + "1",
        "1" + "+1" * 50_000,
        "x" + ".a" * 50_000,
        "import x" + ".a" * 200_000,  # which Python alone would take a minute for
        "lambda:" * 10_000 + "1",
        "a\0b",
        "\ud800",
        "x = '''",
        "\\\n",
        "if x:\n\ty\n        z\n",
        "f'{",
        "prose, it's not code",
    ],
)
def test_what_no_parser_takes_is_flat_and_ends_no_run(source):
    depths, parses = character_depths(source)
    assert not parses
    assert len(depths) == len(source)
    assert set(depths.tolist()) <= {0, 1}


def test_a_long_chain_of_elif_is_no_deeper_than_a_short_one():
    # Python 3.11 gives up on it, and then each of its lines is at the indentation it has.
    depths, parses = character_depths("if x: pass\n" + "elif x: pass\n" * 5_000)
    assert depths.max() == parses
    depths, parses = character_depths("if x: pass\n" + "elif x: pass\n" * 50)
    assert parses
    assert depths.max() == 1


def test_indentation_deeper_than_python_allows_has_its_depth():
    source = "".join(" " * depth + "if x:\n" for depth in range(150))
    depths, parses = character_depths(source)
    assert not parses
    assert [depths[source.index("\n" + " " * n + "i") + 1 + n] for n in range(1, 150)] == list(range(1, 150))


@pytest.mark.parametrize("source", ["", "\n", " ", "#", "\r\n\r", "\ufeff", "\f"])
def test_source_without_code_is_flat(source):
    depths, parses = character_depths(source)
    assert parses
    assert depths.tolist() == [0] * len(source)


def test_a_form_feed_does_not_end_a_line_and_escapes_warn_nobody(recwarn):
    source = "if a:\n\f    b = '\\d'\n\f\nc\n"
    depths, parses = character_depths(source)
    assert parses
    assert [depths[source.index(name)] for name in "abc"] == [0, 1, 0]
    assert not recwarn.list


def test_a_token_has_the_depth_of_its_last_character():
    source = "if x:\n    f('é')"
    offsets = [(0, 0), (0, 4), (4, 10), (10, 12), (12, 14), (13, 14), (14, 16), (0, 0)]
    depths, parses = token_depths(source, offsets)
    assert parses
    # bos, "if x", ":\n    ", "f(", two tokens of the bytes of one character, "')", eos
    assert depths.tolist() == [0, 0, 0, 1, 2, 2, 1, 0]
    assert token_depths("", [])[0].tolist() == []


@pytest.mark.parametrize("language", ["python", ""])
@pytest.mark.parametrize(
    ("before", "indent"),
    [
        ("So:\n", ""),
        ("1. Do:\n", "   "),
        ("10. Do:\n\n", "    "),
        ("```a = 1``` is one.\n", ""),
        ("10. ```sh\n    ls\n    ```\n\nThen:\n", ""),
        ("- a\n   - ```sh\r\n     ls\r\n     ```\r\n", ""),
    ],
)
def test_a_block_in_a_list_or_behind_code_in_a_line_has_its_depths(before, indent, language):
    """Also behind one that a list's marker opens, which hides no later block."""
    code = "if a:\n    b(c)\n\n    '''\n  d\n'''\n"
    text = before + textwrap.indent(f"```{language}\n{code}```", indent) + "\nif c:\n  d"
    found, parses = fenced_depths(text, [(at, at + 1) for at in range(len(text))])
    assert parses
    start, stop = text.rindex("`" + language + "\n", 0, text.index("if a")), text.rindex("```")
    at = [number for number in range(start + 1 + len(language), stop) if not text[number].isspace()]
    expected = [depth for depth, c in zip(character_depths(code)[0], code, strict=True) if not c.isspace()]
    assert found[at].tolist() == expected
    assert not found[:start].any()
    assert not found[stop:].any()


def test_a_block_that_a_lists_marker_opens_has_its_depths():
    text = "2. - ```python\n     if a:\n       b\n     ```\n"
    found, parses = fenced_depths(text, [(at, at + 1) for at in range(len(text))])
    assert parses
    assert {text[at] for at in np.flatnonzero(found)} == {"b", "\n"}
    assert found[text.index("b")] == 1


@pytest.mark.parametrize(
    "line",
    ["`" * 2**20 + "a`\n", "~" * 2**20, "```" + " " * 2**20, "~~~" + "a" * 2**20],
    ids=["backticks", "tildes", "blanks", "letters"],
)
def test_a_long_line_that_opens_no_block_takes_one_look(line):
    """A second look at each character, as a pattern that goes back takes, would be 10¹² steps."""
    depths, parses = fenced_depths(line, [(0, len(line))])
    assert (depths.tolist(), parses) == ([0], True)


def test_fences_are_those_of_the_pattern_that_may_go_back():
    plain = re.compile(module._OPENING_FENCE.pattern.replace("}+", "}").replace("*+", "*"))
    assert plain.pattern != module._OPENING_FENCE.pattern
    rng, parts = np.random.default_rng(0), [*"``~~ \t-a1.", "```", "~~~"]
    for _ in range(20_000):
        line = "".join(rng.choice(parts, rng.integers(1, 12))) + "\n" * rng.integers(2)
        found, expected = (
            match and (match.groupdict(), match.span())
            for match in (module._OPENING_FENCE.fullmatch(line), plain.fullmatch(line))
        )
        assert found == expected, line
