"""Text from outside as a terminal can show it: it obeys none, and a message has a bearable length.

The rule of what is printed: messages (errors, warnings, names in progress) are made printable wherever they
go; data (a generated text, JSON, a table) on a terminal only, and a file or a pipe gets it unaltered.
"""

import os
import re
import sys

_said: set[str] = set()
_quiet = False

MAX_LENGTH = 2000
"""Characters of a part of a message."""

_HIDDEN = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f"  # what a terminal obeys, all but tab and newline
    r"\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # unseen or reordering
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f"
    r"\ud800-\udfff"  # which no encoding has
)
# Joiners belong to many scripts and to emoji, behind a character of theirs.
_JOINERS = r"\u200c\u200d"
_UNSAFE = re.compile(rf"[{_HIDDEN}]|(?<![^\x00-\x7f{_JOINERS}{_HIDDEN}])[{_JOINERS}]")


def printable(text: str) -> str:
    """The text with an escape, as Python writes it, for every character that is not seen where it stands.

    These are all of the Unicode categories Cc (controls, ESC among them) but newline and tab, Cs (lone
    surrogates), Zl and Zp (separators of lines and paragraphs), and Cf (what reverses or hides text) but the
    signs of Arabic, Syriac, Kaithi and Egyptian that are seen, and joiners behind a character that is not
    ASCII. Everything else stays: every script, and emoji with their joiners.

    Args:
        text: any str.

    Returns:
        A str that is its own printable form.

    Example:
        >>> print(printable("\\x1b[2Jmodel\\u202e, \\u6f22 \\u0645\\u06cc\\u200c\\u062e"))
        \\x1b[2Jmodel\\u202e, 漢 می‌خ

    Source: The Unicode Standard, section 23.2 and UTS #39; CVE-2021-42574 (reordered text).
    """
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def bar_options(*, shown: bool) -> dict[str, bool]:
    """Arguments of tqdm for a bar that is shown, unless the environment has TQDM_DISABLE=1, or is not.

    ``disable=False`` would win over the environment.
    """
    return {} if shown else {"disable": True}


def brief(value: object) -> str:
    """A part of a message: printable, of bearable length, and no line of it looks like one of another part.

    Args:
        value: shown as it prints.

    Returns:
        At most about ``MAX_LENGTH`` characters, head and tail of a longer one; further lines are indented.

    Example:
        >>> print(brief("name\\nerror: forged"))
        name
            error: forged
        >>> len(brief("x" * 10**6)) < 2100
        True
    """
    text = _cut(printable(str(value)))
    return re.sub(r"\n(?! {4})", "\n    ", text)


def one_line(value: object) -> str:
    """A name from outside for a line of output: as :func:`brief`, with escapes for line ends and tabs.

    Args:
        value: shown as it prints.

    Example:
        >>> one_line("a\\nb")
        'a\\\\nb'
    """
    return _cut(printable(str(value)).replace("\n", r"\n").replace("\t", r"\t"))


def show(text: str) -> None:
    """Prints data to stdout: printable on a terminal, unaltered into a file or a pipe.

    Args:
        text: what a model has written, a table, or JSON.
    """
    print(printable(text) if on_terminal() else text)


def on_terminal() -> bool:
    """Whether stdout is a terminal; where it is closed, it is none."""
    return sys.stdout is not None and sys.stdout.isatty()


def in_colour() -> bool:
    """Whether stdout is a terminal that shows colours, to somebody who wants them (no-color.org)."""
    return on_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def remark(line: str) -> None:
    """Prints a line to stderr, beside a command's result; not after :func:`keep_quiet`.

    Args:
        line: printable.
    """
    if not _quiet:
        print(line, file=sys.stderr)


def say_once(line: str) -> None:
    """As :func:`remark`, the first time in a process."""
    if line not in _said:
        _said.add(line)
        remark(line)


def keep_quiet() -> None:
    """No remarks from here on: of several processes, one makes them."""
    global _quiet
    _quiet = True


def _cut(text: str) -> str:
    if len(text) <= MAX_LENGTH:
        return text
    return f"{text[: 2 * MAX_LENGTH // 3]} … {text[-MAX_LENGTH // 3 :]} ({len(text):,} characters)"


def discard_output() -> None:
    """Lets go of what stdout still holds, of which nobody reads any more.

    It would be written, and fail, once more when Python ends.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
