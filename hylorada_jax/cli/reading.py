"""The command line's options that say how data are read, and what became of them."""

import dataclasses
import itertools
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, TextIO

import tyro

from hylorada_jax.data.columns import Format
from hylorada_jax.data.corpus import EMBEDDED, Split, divide, load_documents, trained_on
from hylorada_jax.data.examples import Completion, Conversation, Document, Example
from hylorada_jax.data.hub_rows import hub_dataset
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.io.files import user_path
from hylorada_jax.structure.code import Domain
from hylorada_jax.terminal import brief, one_line, remark

if TYPE_CHECKING:
    from hylorada_jax.data.document import TokenizedDocument
    from hylorada_jax.data.mixture import Mixture
    from hylorada_jax.models.tokenizer import Tokenizer

_SHOWN = 5


class Source(NamedTuple):
    """One of the values of ``--data``, and what was read of it.

    Attributes:
        name: of the data, without the weight.
        weight: as given, or None.
        train: the rows to train on.
        held_out: those that are held out.
    """

    name: str
    weight: float | None
    train: Sequence[Example] = ()
    held_out: Sequence[Example] = ()

    def announce(self) -> None:
        """Prints the line that names it."""
        weight = "" if self.weight is None else f", weight {self.weight:g}"
        print(f"data     {one_line(self.name)}{weight}")


def sources_of(given: Sequence[str], *, weights: bool = True, split: str | None = None) -> list[Source]:
    """Sources by their names, in which a weight may stand behind the last ``=``.

    What follows it is a weight where it is a number, unless there is a file of the whole name.

    Args:
        given: values of an option, "chats.jsonl" or "chats.jsonl=0.7".
        weights: whether they can have any.
        split: of the Hub datasets that name none.

    Raises:
        ConfigError: there are none, some have a weight and others not, or a weight or the split has no
            meaning.

    Example:
        >>> [(source.name, source.weight) for source in sources_of(["lr=1/a.txt=0.7", "python-stdlib=0.3"])]
        [('lr=1/a.txt', 0.7), ('python-stdlib', 0.3)]
    """
    sources = [_source(text) for text in given]
    weighted = [source.weight for source in sources if source.weight is not None]
    if len(weighted) not in (0, len(sources)):
        rule = "Of several sources all must have a weight, or none."
        raise ConfigError(rule, " ".join(given), "Give each its own, as in a=0.7.")
    if weighted and not weights:
        rule = "Weights are of the sources that are trained on; of others every row counts."
        raise ConfigError(rule, " ".join(given), "Leave the weights out.")
    if not sources:
        raise ConfigError("Data must have a source.", "none", "Name a file, a glob or a Hub dataset.")
    if weighted:
        from hylorada_jax.data.mixture import check_weights  # which brings jax

        check_weights(weighted)
    return sources if split is None else _split(sources, split)


def _split(sources: Sequence[Source], split: str) -> list[Source]:
    datasets = [hub_dataset(source.name) for source in sources]
    if not any(datasets):
        names = " ".join(source.name for source in sources)
        rule = "A split is one of a Hub dataset."
        raise ConfigError(rule, f"--split {split} for {names}", "Leave it out, or name the dataset.")
    return [
        source._replace(name=str(dataset._replace(split=split))) if dataset and not dataset.split else source
        for source, dataset in zip(sources, datasets, strict=True)
    ]


def _source(text: str) -> Source:
    name, _, weight = text.rpartition("=")
    try:
        value = float(weight)
    except ValueError:
        return Source(text, None)
    return Source(name, value) if name and not os.path.isfile(user_path(text)) else Source(text, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How data are read.

    Args:
        format: text, prompt-completion, messages, alpaca or sharegpt [by the columns].
        split: split of Hub datasets that name none, such as test or train[:1000] [train]; a dataset names its
            own as in owner/name:config:test.
        columns: other names of columns and of messages' keys, as in text=body content=answer.
        score: the scored tokens: answers (the assistant's messages, or completions), the last answer, or all
            tokens. Texts are scored in full.
        overlength: truncate or drop conversations and completions longer than a row, or end with an error.
            Texts are cut into windows.
        skip_bad_rows: leave out malformed rows, and list them.
    """

    format: Format | None = None
    split: str | None = None
    columns: tuple[str, ...] = ()
    score: Literal["answers", "last", "all"] = "answers"
    overlength: Literal["truncate", "drop", "error"] = "truncate"
    skip_bad_rows: bool = False

    def names(self) -> dict[str, str]:
        """Other names by ours; a ConfigError for one without."""
        pairs = [column.partition("=") for column in self.columns]
        if wrong := ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]:
            rule = "A column's other name must be given as ours=theirs."
            raise ConfigError(rule, f"--columns {' '.join(wrong)}", "For example --columns text=body.")
        names = {ours: theirs for ours, _, theirs in pairs}
        if len(names) < len(pairs):
            rule = "A column must be given one other name."
            raise ConfigError(rule, f"--columns {' '.join(self.columns)}", "Leave out all but one.")
        return names

    def counted(self, sources: Sequence[Source]) -> str:
        """What of the held-out rows counts, behind the name of a figure; nothing where all of it does."""
        texts = {isinstance(source.held_out[0], Document) for source in sources if source.held_out}
        if self.score == "all" or texts == {True}:
            return ""
        return " of the answers" + (" and texts" if True in texts else "")

    def load(self, source: str, split: Split = "all") -> list[Example]:
        """The rows of a source; with ``skip_bad_rows``, those that can be read."""
        skipped: list[DataError] | None = [] if self.skip_bad_rows else None
        rows = load_documents(source, split, form=self.format, columns=self.names(), skipped=skipped)
        _list(skipped)
        return rows

    def load_both(self, sources: Sequence[Source], held_out: Sequence[Source]) -> list[Source]:
        """The sources with their rows: those to train on, and a part or sources of their own held out."""
        if held_out:
            rows = [self.load(source.name, side_of(source, "train")) for source in sources]
            trained = [source._replace(train=found) for source, found in zip(sources, rows, strict=True)]
            given = [
                source._replace(held_out=self.load(source.name, side_of(source, "eval")))
                for source in held_out
            ]
            theirs = [row for source in given for row in source.held_out]
            if again := trained_on(theirs, itertools.chain(*rows)):
                said = f"{again:,} of {len(theirs):,} held-out rows are trained on too"
                warnings.warn(f"{said}: of these the perplexity says nothing new", stacklevel=2)
            return trained + given
        rows = [self.load(source.name) for source in sources]
        sides = divide([(found, source.name) for source, found in zip(sources, rows, strict=True)])
        return [
            source._replace(train=train, held_out=rest)
            for source, (train, rest) in zip(sources, sides, strict=True)
        ]

    def prepare(
        self,
        rows: Sequence[Example],
        tokenizer: "Tokenizer",
        seq_len: int,
        structure: Domain | None,
        what: str,
        *,
        to: TextIO | None = None,
    ) -> "list[TokenizedDocument]":
        """The rows' tokens; a line that counts them, named ``what``, is printed to stdout or ``to``."""
        from hylorada_jax.data.tokenization import prepare

        skipped: list[DataError] | None = [] if self.skip_bad_rows else None
        documents, counts = prepare(
            rows,
            tokenizer,
            seq_len,
            structure=structure,
            score=self.score,
            overlength=self.overlength,
            skipped=skipped,
            keep=True,
        )
        _list(skipped)
        said = [f"{counts.rows:,} rows", f"{counts.tokens:,} tokens", f"{counts.scored:,} scored"]
        said += [f"{counts.unscored:,} left out without a scored token"] * bool(counts.unscored)
        said += [f"{counts.too_long:,} left out beyond --seq-len {seq_len}"] * bool(counts.too_long)
        said += [f"{counts.truncated:,} truncated to --seq-len {seq_len}"] * bool(counts.truncated)
        print(f"{what:<8} {form_of(rows)}: {', '.join(said)}", file=to)
        return documents

    def prepare_both(
        self, sources: Sequence[Source], tokenizer: "Tokenizer", seq_len: int, structure: Domain | None
    ) -> "tuple[Mixture, list[TokenizedDocument]]":
        """The tokens to train on, by weight where the sources have one, and those held out, all counted."""
        from hylorada_jax.data.mixture import Mixture

        train: list[tuple[list[TokenizedDocument], float]] = []
        held_out: list[TokenizedDocument] = []
        for source in sources:
            source.announce()
            if source.train:
                documents = self.prepare(source.train, tokenizer, seq_len, structure, "train")
                train.append((documents, source.weight or 1))
            if source.held_out:
                held_out += self.prepare(source.held_out, tokenizer, seq_len, structure, "held out")
        mixture = Mixture(train)
        return mixture if sources[0].weight else Mixture([(mixture.documents, 1)]), held_out


def side_of(source: Source, side: Split) -> Split:
    """All of a source, but of an embedded one the side, so that its held-out part is that of every run."""
    return side if source.name in EMBEDDED else "all"


def form_of(rows: Sequence[Example]) -> str:
    """What a data set has, in a word."""
    match rows[0]:
        case Conversation():
            return "conversations"
        case Completion():
            return "prompts and completions"
        case _:
            return "texts"


def _list(skipped: list[DataError] | None) -> None:
    for error in (skipped or [])[:_SHOWN]:
        remark(f"skipped: {one_line(brief(error.received))}: {brief(error.rule)}")
    if skipped and len(skipped) > _SHOWN:
        remark(f"skipped: {len(skipped) - _SHOWN} rows more")


# A group of the help, without a prefix: --score, not --reading.score.
Reading = Annotated[tyro.conf.OmitArgPrefixes[DataOptions], tyro.conf.arg(name="format")]
AS_IT_IS = DataOptions()
