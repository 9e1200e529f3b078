"""The rows of a file of conversations, each answered by a model."""

import codecs
import contextlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from hylorada_jax.data.answered import answer_text, as_message
from hylorada_jax.data.corpus import load_documents
from hylorada_jax.data.examples import Conversation
from hylorada_jax.errors import DataError, NonFiniteError
from hylorada_jax.terminal import remark
from hylorada_jax.text import to_json

if TYPE_CHECKING:
    from jax import Array

    from hylorada_jax.models.tokenizer import Tokenizer


def asked(source: str, variables: Mapping[str, Any]) -> list[Conversation]:
    """The conversations of a source, each without an answer that ends it.

    Args:
        source: as of :func:`load_documents`.
        variables: what the template is given where a row does not say.

    Raises:
        DataError: it cannot be read, or has texts or completions.
    """
    chats = []
    for row in load_documents(source):
        if not isinstance(row, Conversation):
            received = f"{row.name}: a {type(row).__name__.lower()}"
            raise DataError("What is answered must be conversations.", received, "Give rows of messages.")
        chats.append(_asked(row._replace(variables={**variables, **row.variables})))
    return chats


def _asked(chat: Conversation) -> Conversation:
    *before, last = chat.messages
    if last["role"] != "assistant" or not before:
        return chat
    return chat._replace(messages=before, answers=chat.answers[:-1])


def ends_of(chats: Sequence[Conversation], tokenizer: "Tokenizer") -> tuple[int, ...]:
    """The tokens at which the answer to any of the conversations ends, for they are generated together.

    A template is asked once for all of the same roles and variables, with tools or without them.
    """
    alike: dict[tuple[Any, ...], Conversation] = {}
    for chat in chats:
        roles = tuple(message["role"] for message in chat.messages)
        alike.setdefault((roles, bool(chat.tools), to_json(dict(chat.variables))), chat)
    ends = (tokenizer.chat_ends(chat.messages, chat.tools, chat.variables) for chat in alike.values())
    return tuple(dict.fromkeys(itertools.chain.from_iterable(ends)))


def answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    inputs: Mapping[str, Sequence[Any]],
    tokenizer: "Tokenizer",
    batch_size: int,
    rng: "Array",
    **settings: Any,
) -> Iterator[str]:
    """The answers, generated several at a time, with a progress bar; at the end it is said how many are cut.

    Args:
        model: what generates.
        prompts: token ids.
        inputs: of ``model.generate`` too, with a value for each of the prompts.
        tokenizer: the model's.
        batch_size: prompts at a time.
        rng: of the sampling; each batch has a key of its own.
        settings: of ``model.generate``.

    Raises:
        NonFiniteError: a logit is NaN or infinite; it says in which batch.
    """
    import jax

    cut = 0
    with tqdm(total=len(prompts), desc="answering", unit="row") as bar:
        for first in range(0, len(prompts), batch_size):
            rows = range(len(prompts))[first : first + batch_size]
            # A last batch of fewer would compile anew; a row is drawn by its place, whatever the others are.
            filled = [*rows, *[rows[-1]] * (min(batch_size, len(prompts)) - len(rows))]
            try:
                found = model.generate(
                    [prompts[row] for row in filled],
                    rng=jax.random.fold_in(rng, first),
                    **{name: [values[row] for row in filled] for name, values in inputs.items()},
                    **settings,
                )
            except NonFiniteError as error:  # which counts the prompts from this one
                raise error.at(f"answers {first + 1} to {rows[-1] + 1}") from error
            for row, tokens in zip(rows, found[: len(rows)], strict=True):
                cut += is_cut(tokens, settings)
                yield answer_text(tokenizer, prompts[row], tokens, settings["eos_token_id"] or ())
            bar.update(len(rows))
    tell_cut(cut, len(prompts), settings)


def is_cut(tokens: Sequence[int], settings: Mapping[str, Any]) -> bool:
    """Whether an answer stopped at the limit, before the token that would have ended it.

    Args:
        tokens: its ids.
        settings: of ``model.generate``, by which it was made.
    """
    return len(tokens) == settings["max_new_tokens"] and tokens[-1] not in (settings["eos_token_id"] or ())


def tell_cut(count: int, total: int, settings: Mapping[str, Any]) -> None:
    """Says how many of the answers are cut, if any: in a file they look like the others."""
    if count:
        remark(
            f"cut: {count:,} of {total:,} answers stopped at {settings['max_new_tokens']:,} tokens, before "
            "their end; --max-new-tokens sets another limit"
        )


def write(chats: Sequence[Conversation], found: Iterable[str], output: Path | None) -> None:
    """A JSON line for each conversation with its answer as the last message, as it comes.

    The line can be read as the conversation was: with its tools, its template's variables, and which turns of
    the assistant count.

    Args:
        chats: what was asked.
        found: the answers.
        output: a new file, made with the first answer; None for stdout.
    """
    answered = zip(chats, found, strict=True)
    first = [*itertools.islice(answered, 1)]  # before the file: an empty one would be in the next run's way
    with contextlib.nullcontext(sys.stdout) if output is None else output.open("x", encoding="utf-8") as file:
        in_utf8 = codecs.lookup(file.encoding or "utf-8").name == "utf-8"
        for chat, text in itertools.chain(first, answered):
            said = [
                message if counts or message["role"] != "assistant" else {**message, "train": False}
                for message, counts in zip(chat.messages, chat.answers, strict=True)
            ]
            row: dict[str, Any] = {"messages": [*said, as_message(text)]}
            if chat.tools:
                row["tools"] = chat.tools
            if chat.variables:
                row["chat_template_kwargs"] = chat.variables
            line = json.dumps(row, ensure_ascii=not in_utf8)
            # A lone surrogate, which has no UTF-8, is written as JSON escapes it.
            line = line.encode(errors="backslashreplace").decode()
            print(line, file=file, flush=True)
