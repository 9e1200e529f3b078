"""Many texts that share parts as token ids: what stands between special tokens is encoded once."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import tokenizers

Tokens = tuple[list[int], list[tuple[int, int]]]
"""Ids, and for each the characters [start, end) that it stands for."""


class Specials(NamedTuple):
    """The special tokens that part a text, whatever stands beside them.

    Attributes:
        ids: by the text of each.
        begins: one of the characters that they begin with.
        lengths: in characters, the longest first.
    """

    ids: dict[str, int]
    begins: re.Pattern[str]
    lengths: list[int]


def specials_of(backend: tokenizers.Tokenizer) -> Specials | None:
    """The tokens at which a text falls into parts that are encoded each on its own.

    The library takes added tokens out of a text first, the leftmost and longest ones, and normalizes and
    splits each of the parts between them without regard to the others.

    Args:
        backend: the tokenizer.

    Returns:
        The tokens; None where there are none, or where it depends on what stands beside them whether or as
        what they are taken: they take in blanks, or another added token may overlap them.
    """
    added = backend.get_added_tokens_decoder()
    ids = {token.content: number for number, token in added.items() if token.special}
    firsts = {content[0] for content in ids}
    for token in added.values():
        bare = not (token.lstrip or token.rstrip or token.single_word or token.normalized)
        if (token.content[0] in firsts and not (bare and token.special)) or firsts & {*token.content[1:]}:
            return None
    if not ids or backend.encode_special_tokens:
        return None
    begins = re.compile(f"[{re.escape(''.join(sorted(firsts)))}]")
    return Specials(ids, begins, sorted({*map(len, ids)}, reverse=True))


def encode_segments(
    backend: tokenizers.Tokenizer, specials: Specials, texts: Sequence[str], *, offsets: bool = True
) -> list[Tokens]:
    """What the tokenizer makes of each text, with nothing added.

    Args:
        backend: the tokenizer.
        specials: from :func:`specials_of`.
        texts: any texts, such as a conversation at each of its turns.
        offsets: whether they are wanted; without them there are none.

    Returns:
        Ids and offsets of each, those of ``backend.encode_batch(texts, add_special_tokens=False)``.
    """
    parted = [*_parted(specials, texts)]
    # How a tokenizer begins a part may depend on whether it begins the text.
    new = [(part, at == 0) for shared, parts in parted for at, part in parts[shared:]]
    keys = [key for key in dict.fromkeys(new) if key[0] not in specials.ids]
    opening = max(specials.ids, key=len)  # no other one begins with it
    encodings = backend.encode_batch(
        [part if first else opening + part for part, first in keys], add_special_tokens=False
    )
    known: dict[tuple[str, bool], Tokens] = {}
    for key, encoding in zip(keys, encodings, strict=True):
        ids, places = encoding.ids, encoding.offsets if offsets else []
        known[key] = (ids, places) if key[1] else (ids[1:], _moved(places[1:], -len(opening)))
    for part, number in specials.ids.items():
        known[part, True] = known[part, False] = [number], [(0, len(part))] if offsets else []

    found: list[Tokens] = []
    ends: list[int] = []  # of the parts of the text before, in tokens
    for shared, parts in parted:
        ends = ends[:shared]
        count = ends[-1] if ends else 0
        ids, places = (found[-1][0][:count], found[-1][1][:count]) if count else ([], [])
        for at, part in parts[shared:]:
            more, of_part = known[part, at == 0]
            ids += more
            places += _moved(of_part, at)
            ends.append(len(ids))
        found.append((ids, places))
    return found


def _parted(specials: Specials, texts: Sequence[str]) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """Of each text the special tokens and what stands between them, each with its first character's number,
    and how many of them are those of the text before, where this one goes on from it."""
    before = ""
    parts: list[tuple[int, str]] = []
    for text in texts:
        shared, end = 0, 0
        if text.startswith(before):
            for number in range(len(parts), 0, -1):
                at, part = parts[number - 1]
                # The end of a text may be the beginning of a longer token.
                if part in specials.ids and at + specials.lengths[0] <= len(before):
                    shared, end = number, at + len(part)
                    break
        before, parts = text, parts[:shared]
        for match in specials.begins.finditer(text, end):
            at = match.start()
            if at < end:
                continue
            for length in specials.lengths:
                if (part := text[at : at + length]) in specials.ids:
                    if at > end:
                        parts.append((end, text[end:at]))
                    parts.append((at, part))
                    end = at + len(part)
                    break
        if end < len(text):
            parts.append((end, text[end:]))
        yield shared, parts


def _moved(offsets: Iterable[tuple[int, int]], by: int) -> list[tuple[int, int]]:
    return [(start + by, stop + by) for start, stop in offsets]
