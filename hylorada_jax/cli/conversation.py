"""A conversation on a terminal, or with a pipe."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hylorada_jax.cli.prompts import chat_of
from hylorada_jax.errors import ConfigError, DataError, HyLoRADAError
from hylorada_jax.structure.code import Domain
from hylorada_jax.terminal import on_terminal, printable

if TYPE_CHECKING:
    from jax import Array

    from hylorada_jax.models.tokenizer import Tokenizer

HELP = """\
/system TEXT  how the model shall answer; without TEXT, as it likes
/reset        forget what was said; the system message stays
/quit         leave; so does the end of the input (Ctrl-D)
Ctrl-C        stop an answer; what was said of it stays said
A message that begins with / is written with a space in front."""


@dataclass
class Talk:
    """A conversation with a model.

    Attributes:
        model: what answers.
        tokenizer: the model's, with the chat template.
        structure: that an adapter reads.
        context: tokens of a prompt and its answer, at most; None for any number.
        rng: of the sampling; each answer has a key of its own.
        settings: of ``model.stream``, without those of an answer: its end tokens, and its key.
        variables: what the template is given beside the messages.
        system: what the system's message says, or "".
        messages: what was said.
        begins: the tokens of a prompt to those in front of its answer, in the answer's row.
    """

    model: Any
    tokenizer: "Tokenizer"
    structure: Domain | None
    context: int | None
    rng: "Array"
    settings: dict[str, Any]
    variables: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    begins: Callable[[int], int] = int

    def answer(self, text: str) -> None:
        """Says something to the model, and prints what it answers as it comes.

        An interrupt ends the answer, and what was said of it stays; a question without any is forgotten.

        Raises:
            HyLoRADAError: the template refuses the conversation, it is too long, or the model is damaged.
        """
        import jax

        from hylorada_jax.data.answered import answer_text, as_message

        asks = _asks(self.system, self.messages, text)
        try:
            prompt, structure_ids = chat_of(asks, self.tokenizer, self.structure, self.variables)
        except DataError as error:
            raise DataError(error.rule, error.received, self._remedy(text) or error.remedy) from error
        ends = self.tokenizer.chat_ends(asks, variables=self.variables)
        settings = self.settings | {"rng": jax.random.fold_in(self.rng, len(self.messages))}
        settings["eos_token_id"] = ends or None
        if self.context is not None:
            room = self._room(len(prompt), self.context)
            if room < 1:
                raise DataError(
                    f"A conversation and its answer must fit into {self.context} tokens.",
                    f"{len(prompt)} tokens, and none of an answer",
                    self._remedy(text) or "Start again with a larger --max-context, or another model.",
                )
            settings["max_new_tokens"] = min(room, settings["max_new_tokens"])
        if structure_ids is not None:
            settings["structure_ids"] = structure_ids
        ids: list[int] = []
        printer = _Printer(self.tokenizer)
        try:
            for tokens in self.model.stream(prompt, **settings):
                ids += tokens
                printer.show(answer_text(self.tokenizer, prompt, ids, ends))
        except KeyboardInterrupt:
            pass
        said = answer_text(self.tokenizer, prompt, ids, ends)
        printer.show(said, last=True)
        if ids:
            self.messages += [asks[-1], as_message(said)]

    def _room(self, length: int, context: int) -> int:
        """The tokens that an answer to a prompt may have; 0 or less where it does not fit."""
        return 0 if length > context else context - self.begins(length)

    def _remedy(self, text: str) -> str | None:
        """What makes a message, or a shorter one, such that it can be answered; None: nothing here does."""
        away = "take the system message away with /system alone"
        for remedy, system, messages, said in (
            ("Start over with /reset, which keeps the system message.", self.system, [], text),
            (f"{away.capitalize()}.", "", self.messages, text),
            (f"Start over with /reset, and {away}.", "", [], text),
            ("Give a system message with /system TEXT.", self.system or "s", self.messages, text),
            ("Write a shorter message.", self.system, self.messages, "a"),
            ("Start over with /reset, and write a shorter message.", self.system, [], "a"),
            (f"Start over with /reset, {away}, and write a shorter message.", "", [], "a"),
        ):
            if self._answers(_asks(system, messages, said)):
                return remedy
        return None

    def _answers(self, asks: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the template takes a conversation, and there is room for an answer."""
        try:
            prompt, _ = chat_of(asks, self.tokenizer, None, self.variables)
        except DataError:
            return False
        return self.context is None or self._room(len(prompt), self.context) >= 1


def opening(tokenizer: "Tokenizer", variables: Mapping[str, Any]) -> list[int]:
    """The token ids of a prompt that begins a conversation, with a system message where one is asked for.

    Raises:
        DataError: the template takes neither.
    """
    try:
        return chat_of(_asks("", [], "Hello."), tokenizer, None, variables)[0]
    except DataError as error:
        with contextlib.suppress(DataError):
            return chat_of(_asks("s", [], "Hello."), tokenizer, None, variables)[0]
        raise error


def _asks(system: str, messages: Sequence[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *messages, {"role": "user", "content": text}]


class _Printer:
    """Prints a text that grows, each character when it is whole."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._by_words = tokenizer.cleans_up  # the space before a word may still go
        self._printed = 0

    def show(self, text: str, *, last: bool = False) -> None:
        """Prints what is new in a text, and a line end behind the last."""
        if not last:
            text = text.rstrip("\ufffd")  # the first bytes of a character, mostly
            text = text[: text.rfind(" ") + 1].rstrip() if self._by_words else text
        # The whole of it: whether a joiner is seen depends on what is before it.
        text = printable(text) if on_terminal() else text
        print(text[self._printed :], end="\n" if last else "", flush=True)
        self._printed = max(self._printed, len(text))


def converse(talk: Talk, *, interactive: bool) -> None:
    """Reads lines until the end, and answers them.

    Args:
        talk: the conversation.
        interactive: somebody types: there is a prompt, and an error or an interrupt does not end it.

    Raises:
        HyLoRADAError: as :meth:`Talk.answer`, or an unknown command, where nobody types.
    """
    while True:
        try:
            if not _obey(talk, input("> " if interactive else "")):
                return
        except EOFError:
            print(end="\n" if interactive else "")
            return
        except (HyLoRADAError, KeyboardInterrupt) as error:
            if not interactive:
                raise
            print(error)  # an interrupt drops the line, as in a shell


def _obey(talk: Talk, line: str) -> bool:
    """Does what a line says; False where it says to leave."""
    command, _, text = line.partition(" ")
    match command:
        case "/quit":
            return False
        case "/help":
            print(HELP)
        case "/reset":
            talk.messages.clear()
        case "/system":
            talk.system = text.strip()
        case _ if line.startswith("/"):
            raise ConfigError(
                "A command must be /system, /reset, /help or /quit.", command, "Put a space before a message."
            )
        case _ if text := line.strip():
            talk.answer(text)
    return True
