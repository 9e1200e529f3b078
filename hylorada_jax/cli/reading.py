"""The command line's options that say how data are read, and what became of them."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from hylorada_jax.data.corpus import Split, divide, load_documents
from hylorada_jax.data.examples import Completion, Conversation, Document, Example
from hylorada_jax.data.formats import Format
from hylorada_jax.errors import ConfigError, DataError
from hylorada_jax.structure.code import Domain
from hylorada_jax.terminal import brief, one_line

if TYPE_CHECKING:
    from hylorada_jax.data.document import TokenizedDocument
    from hylorada_jax.models.tokenizer import Tokenizer

_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How data are read.

    Args:
        format: text, prompt-completion, messages, alpaca or sharegpt [as the columns tell].
        columns: other names of columns and of a message's keys, as text=body content=answer.
        score: what counts: the answers (what the assistant says, or completions), the last of them, or all.
            Texts count whole.
        overlength: of conversations and completions longer than a row: truncate them, drop them, or end with
            an error. Texts are cut into windows.
        skip_bad_rows: leave malformed rows out, and list them.
    """

    format: Format | None = None
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
        return {ours: theirs for ours, _, theirs in pairs}

    def counts_all(self, rows: list[Example]) -> bool:
        """Whether every token counts."""
        return self.score == "all" or isinstance(rows[0], Document)

    def load(self, source: str, split: Split = "all") -> list[Example]:
        """The rows of a source; with ``skip_bad_rows``, those that can be read."""
        skipped: list[DataError] | None = [] if self.skip_bad_rows else None
        rows = load_documents(source, split, form=self.format, columns=self.names(), skipped=skipped)
        _list(skipped)
        return rows

    def load_both(self, source: str, held_out: str | None) -> tuple[list[Example], list[Example]]:
        """The rows to train on, and those that are held out: of a source of their own, or a part."""
        rows = self.load(source)
        return (rows, self.load(held_out)) if held_out else divide(rows, source)

    def prepare(
        self,
        rows: list[Example],
        tokenizer: "Tokenizer",
        seq_len: int,
        structure: Domain | None,
        what: str | None,
    ) -> "list[TokenizedDocument]":
        """The rows' tokens; a line that counts them is printed where ``what`` names them."""
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
        )
        _list(skipped)
        said = [f"{counts.rows:,} rows", f"{counts.tokens:,} tokens", f"{counts.scored:,} scored"]
        said += [f"{counts.dropped:,} rows without a scored token or too long"] * bool(counts.dropped)
        said += [f"{counts.truncated:,} truncated"] * bool(counts.truncated)
        if what:
            print(f"{what:<8} {form_of(rows)}: {', '.join(said)}")
        return documents


def form_of(rows: list[Example]) -> str:
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
        print(f"skipped: {one_line(brief(error.received))}: {brief(error.rule)}", file=sys.stderr)
    if skipped and len(skipped) > _SHOWN:
        print(f"skipped: {len(skipped) - _SHOWN} rows more", file=sys.stderr)


# Without a prefix: --score, not --reading.score.
Reading = Annotated[DataOptions, tyro.conf.arg(name="")]
AS_IT_IS = DataOptions()
