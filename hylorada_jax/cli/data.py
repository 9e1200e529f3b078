"""The command that shows data as a model is trained on them."""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from hylorada_jax.cli.reading import AS_IT_IS, Reading, sources_of
from hylorada_jax.cli.shared import puts_offline, template_of, tokenizer_of
from hylorada_jax.data.corpus import PYTHON_STDLIB
from hylorada_jax.errors import ConfigError
from hylorada_jax.models.packaged import PACKAGED_MODEL
from hylorada_jax.terminal import in_colour, on_terminal, one_line, printable
from hylorada_jax.training.config import TrainingConfig

if TYPE_CHECKING:
    from hylorada_jax.data.document import TokenizedDocument
    from hylorada_jax.models.tokenizer import Tokenizer


@puts_offline
def data(
    *,
    data: tuple[str, ...] = (PYTHON_STDLIB,),
    model: str = PACKAGED_MODEL,
    reading: Reading = AS_IT_IS,
    seq_len: int = TrainingConfig.seq_len,
    rows: int = 3,
    chat_template: Path | None = None,
    offline: bool = False,
) -> None:
    """Show the first rows of data with the scored tokens marked, in colour or in ⟦brackets⟧, and the counts.

    Args:
        data: python-stdlib or python-docstrings (embedded), a file, a glob or a Hub dataset, as in finetune.
        model: the model whose tokenizer and chat template are used; its weights are not read.
        reading: How data files are read, and which tokens are scored.
        seq_len: tokens per row.
        rows: number of rows shown of each source.
        chat_template: a Jinja file in place of the model's template.
        offline: take Hugging Face Hub files from the local cache, without contacting the Hub.
    """
    from hylorada_jax.data.document import check_predicted
    from hylorada_jax.data.packing import check_windows

    check_windows(seq_len)
    if rows < 1:
        raise ConfigError("At least one row must be shown.", f"--rows {rows}", "Leave it out for three.")
    template = template_of(chat_template)
    sources = [
        source._replace(train=reading.load(source.name)) for source in sources_of(data, split=reading.split)
    ]
    tokenizer = tokenizer_of(model, template)
    found: list[TokenizedDocument] = []
    for source in sources:
        source.announce()
        documents = reading.prepare(source.train, tokenizer, seq_len, None, "rows")
        found += documents
        for document in documents[:rows]:
            print(f"\n--- {one_line(document.name)}: {len(document):,} tokens")
            counts = [True] * len(document) if document.scored is None else document.scored.tolist()
            scored = [False, *counts[1:]]  # the first token follows nothing: it is never predicted
            print(_marked(tokenizer, document.tokens.tolist(), scored))
    check_predicted(found, "The data")


def _marked(tokenizer: "Tokenizer", ids: list[int], scored: list[bool]) -> str:
    """The text of tokens, special ones written out, with marks around what is scored."""
    start, stop = ("\x1b[32m", "\x1b[0m") if in_colour() else ("⟦", "⟧")
    is_obeyed = on_terminal()  # what the text itself has of escapes
    parts, at = [], 0
    for counts, run in groupby(scored):
        size = len([*run])
        text = tokenizer.decode_continuation(ids[:at], ids[at : at + size], skip_special_tokens=False)
        text = printable(text) if is_obeyed else text
        parts.append(f"{start}{text}{stop}" if counts else text)
        at += size
    return "".join(parts)
