"""Text to token ids and back, from a model directory or from the metadata of a GGUF file."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import tokenizers

from hylorada_jax.errors import DataError
from hylorada_jax.models.chat_template import Request, render, render_each
from hylorada_jax.models.end_tokens import end_tokens
from hylorada_jax.models.families import is_encoder_decoder
from hylorada_jax.models.segments import Specials, encode_segments, specials_of
from hylorada_jax.models.source import find_source
from hylorada_jax.models.tokenizer_backend import refusing
from hylorada_jax.models.tokenizer_directory import read_tokenizer
from hylorada_jax.models.tokenizer_gguf import read_gguf_tokenizer
from hylorada_jax.text import well_formed

# What transformers replaces where clean_up_tokenization_spaces is set, in its order.
_CLEANED = {
    " .": ".", " ?": "?", " !": "!", " ,": ",", " ' ": "'", " n't": "n't", " 'm": "'m", " 's": "'s",
    " 've": "'ve", " 're": "'re",
}  # fmt: skip


# Two answers that end otherwise, however a template writes them: what follows both is no part of them.
_ANSWERS = ("an answer", "a reply")
_TOOL = {"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object"}}}
_SYSTEM, _USER = {"role": "system", "content": "s"}, {"role": "user", "content": "a"}
# What a template may ask for before it writes a turn, where no conversation is at hand.
_CONVERSATIONS: tuple[tuple[Sequence[Mapping[str, Any]], Any], ...] = (
    ([_USER], None),
    ([_SYSTEM, _USER], None),
    ([_SYSTEM, _USER], [_TOOL]),
    ([_USER], [_TOOL]),
)


class Encoded(NamedTuple):
    """A text as token ids, and for each the characters [start, end) that it stands for.

    Tokens that share one character (its bytes) share its offsets; one that was added, to begin or to end the
    text, stands for none, (0, 0).
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of a base model; use `load_tokenizer`.

    Special tokens that are written out in a text, such as <|im_start|>, become their ids, as in transformers.
    What its files say may be found not to work at a certain text only: a ModelError then.

    Args:
        backend: the tokenizer of the tokenizers library; truncation and padding are switched off in it.
        special_tokens: the text of the special tokens by role: bos_token, eos_token, pad_token …
        chat_template: the jinja2 template of the model's chat format, or its templates by name, if any.
        end_token_ids: the tokens at which a generated text ends: those that the model's files name, and
            ``eos_token_id``, with which training ends a document.
        cleans_up: decoding takes out spaces before punctuation.
        encoder_decoder: the model's encoder reads a whole text, and its decoder writes another.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | Mapping[str, str] | None = None
    end_token_ids: tuple[int, ...] = ()
    cleans_up: bool = False
    encoder_decoder: bool = False

    def __post_init__(self) -> None:
        # Many tokenizer.json files carry those of somebody's training run, which cut long texts in silence.
        self.backend.no_truncation()
        self.backend.no_padding()

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text."""
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills a row."""
        return self._special_id("pad_token")

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; the model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The special tokens, which decoding can leave out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token for token, added in added.items() if added.special)

    @functools.cached_property
    def _specials(self) -> Specials | None:
        return specials_of(self.backend)

    @functools.cached_property
    def chat_end_ids(self) -> tuple[int, ...]:
        """The tokens at which an answer in a chat ends: ``end_token_ids``, and what ends a turn otherwise.

        A base model's own end is not always that of its template, or of one that it was given. A template
        that asks for variables refuses what is tried here; :meth:`chat_ends` knows the conversation.
        """
        tried = (self._ends_behind(messages, tools, {}) for messages, tools in _CONVERSATIONS)
        return next((ends for ends in tried if ends is not None), self.end_token_ids)

    def chat_ends(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> tuple[int, ...]:
        """The tokens at which the answer to a conversation ends: ``end_token_ids``, and what ends its turn.

        Args:
            messages: the conversation, without the answer.
            tools, variables: as for :meth:`apply_chat_template`.

        Returns:
            The token ids; ``chat_end_ids`` where the template refuses an answer there.

        Example:
            asked = [{"role": "user", "content": "1 + 1?"}]
            load_tokenizer("smollm2-135m").chat_ends(asked)
        """
        ends = self._ends_behind(messages, tools, variables)
        return self.chat_end_ids if ends is None else ends

    def _ends_behind(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, variables: Mapping[str, Any]
    ) -> tuple[int, ...] | None:
        """As :meth:`chat_ends`; None where the template refuses an answer, or leaves it out."""
        given = {**self.special_tokens, **variables, "add_generation_prompt": False}
        chats = [[*messages, {"role": "assistant", "content": answer}] for answer in _ANSWERS]
        try:
            found = render_each(self.chat_template, [Request(chat, given, tools) for chat in chats])
        except DataError:
            return None
        rendered = [each for each in found if not isinstance(each, DataError)]
        if len(rendered) < len(chats) or rendered[0].text == rendered[1].text:
            return None
        # Training ends a turn in what a template marks as generated, where that has an end.
        marked = [text[: spans[-1][1]] if spans else text for text, spans in rendered]
        for texts in (marked, [each.text for each in rendered]):
            after = self.encode(_common_end(*texts))
            if set(after) & {*self.end_token_ids}:
                break
            if special := [token for token in after if token in self.special_ids]:
                return *self.end_token_ids, special[-1]
        return self.end_token_ids

    def _special_id(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self.backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text, such as a part of one, or a conversation that the chat template wrote.

        Args:
            text: any text.
            add_special_tokens: also add what the model's own template adds, such as a first bos token.

        Returns:
            The ids.
        """
        with refusing():
            return self.backend.encode(well_formed(text), add_special_tokens=add_special_tokens).ids

    def encode_with_offsets(self, text: str) -> Encoded:
        """Token ids of a text, to which nothing is added, with their places in it.

        Args:
            text: any text.
        """
        with refusing():
            encoding = self.backend.encode(well_formed(text), add_special_tokens=False)
        return Encoded(encoding.ids, encoding.offsets)

    def encode_each(self, texts: Sequence[str], *, offsets: bool = True) -> list[Encoded]:
        """What :meth:`encode_with_offsets` gives for each of several texts.

        Args:
            texts: any texts; they are encoded in parallel, and what they share between special tokens once.
            offsets: whether they are wanted; without them there are none.
        """
        texts = [*map(well_formed, texts)]
        with refusing():
            if self._specials is not None:
                segments = encode_segments(self.backend, self._specials, texts, offsets=offsets)
                return [Encoded(*each) for each in segments]
            encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        return [Encoded(each.ids, each.offsets if offsets else []) for each in encodings]

    def encode_prompt(self, text: str) -> Encoded:
        """Token ids of a text that a model is to continue, as :meth:`encode_beginning` gives them.

        Those for an encoder are of the whole text: with all that the tokenizer adds, such as its end.

        Args:
            text: any text; a bos or eos token that is written in it is not doubled.
        """
        if not self.encoder_decoder:
            return self.encode_beginning(text)
        with refusing():
            return self._once(self.backend.encode(well_formed(text)))

    def encode_beginning(self, text: str) -> Encoded:
        """Token ids of a text that goes on behind them: with the bos token where the model expects one.

        No eos token is added, though the tokenizer may end every text with one: nothing follows an end.

        Args:
            text: any text; a bos token that it begins with is not doubled.
        """
        with refusing():
            ids, offsets = self._once(self.backend.encode(well_formed(text)))
        is_bos = ids == [self.bos_token_id]  # many models have one token for both
        if ids[-1:] == [self.eos_token_id] and offsets[-1] == (0, 0) and not is_bos:
            ids, offsets = ids[:-1], offsets[:-1]
        return Encoded(ids, offsets)

    def encode_documents(self, texts: Sequence[str]) -> list[Encoded]:
        """Token ids of whole texts: with the bos token where the model expects one, and one eos token.

        Args:
            texts: any texts; they are encoded in parallel.
        """
        end = [] if self.eos_token_id is None else [self.eos_token_id]
        with refusing():
            encodings = self.backend.encode_batch([well_formed(text) for text in texts])
        return [
            each if each.ids[-1:] == end else Encoded(each.ids + end, each.offsets + [(0, 0)] * len(end))
            for each in map(self._once, encodings)
        ]

    def _once(self, encoding: tokenizers.Encoding) -> Encoded:
        """Without a bos or eos token that was added beside one that is written in the text."""
        ids, offsets = encoding.ids, encoding.offsets
        if ids[:2] == [self.bos_token_id] * 2 and offsets[0] == (0, 0) != offsets[1]:
            ids, offsets = ids[1:], offsets[1:]
        if ids[-2:] == [self.eos_token_id] * 2 and offsets[-1] == (0, 0) != offsets[-2]:
            ids, offsets = ids[:-1], offsets[:-1]
        return Encoded(ids, offsets)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids, exactly as it was encoded.

        Args:
            ids: token ids.
            skip_special_tokens: leave special tokens out.

        Returns:
            The text; bytes that form no character come out as U+FFFD.
        """
        with refusing():
            text = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        for spaced, joined in _CLEANED.items() if self.cleans_up else ():
            text = text.replace(spaced, joined)
        return text

    def decode_continuation(
        self, prompt: Sequence[int], ids: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        """The text by which token ids continue a prompt.

        Both are decoded together, because a token's text depends on what is before it: many tokenizers drop a
        space at the beginning of a text, and a character may begin in the prompt and end in the continuation.

        Args:
            prompt: its token ids.
            ids: those that follow.
            skip_special_tokens: leave special tokens out.

        Returns:
            What follows the prompt's text; a character that the prompt only begins belongs to it.
        """
        before = self.decode(prompt, skip_special_tokens)
        whole = self.decode([*prompt, *ids], skip_special_tokens)
        changed = (place for place, pair in enumerate(zip(before, whole, strict=False)) if pair[0] != pair[1])
        return whole[next(changed, len(before)) :]

    def decode_answer(
        self, prompt: Sequence[int], ids: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        """The text that a model has given for a prompt.

        Args:
            prompt: its token ids.
            ids: the model's: they continue the prompt, but those of a decoder beside an encoder are a text of
                their own.
            skip_special_tokens: leave special tokens out.

        Returns:
            The text; after a prompt that is continued as :meth:`decode_continuation` gives it.
        """
        if self.encoder_decoder:
            return self.decode(ids, skip_special_tokens)
        return self.decode_continuation(prompt, ids, skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """A conversation as the text that the model was trained on.

        Args:
            messages: [{"role": "user", "content": "…"}, …].
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: JSON schemas of what the assistant may call.
            variables: what else the template knows, such as documents or enable_thinking.

        Returns:
            The text, special tokens written out, to be encoded without further special tokens.

        Raises:
            DataError: the model has no chat template, or the template refuses the messages.
        """
        given = {**self.special_tokens, "add_generation_prompt": add_generation_prompt, **variables}
        return render(self.chat_template, Request(messages, given, tools))


def _common_end(one: str, other: str) -> str:
    """The longest text with which both end.

    Example:
        >>> _common_end("an answer<|im_end|>", "a reply<|im_end|>")
        '<|im_end|>'
    """
    pairs = zip(reversed(one), reversed(other), strict=False)
    size = next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(one), len(other)))
    return one[len(one) - size :]


def load_tokenizer(name: str | Path) -> Tokenizer:
    """Load the tokenizer of a base model.

    Args:
        name: as for `find_source`; a Hub name fetches no weights.

    Returns:
        The tokenizer.

    Raises:
        ModelError: the model is not found, or its tokenizer is of a kind that is not read.

    Example:
        >>> tokenizer = load_tokenizer("smollm2-135m")
        >>> tokenizer.decode(tokenizer.encode("Grüße, 42!"))
        'Grüße, 42!'
    """
    source = find_source(name, config_only=True)
    files = read_gguf_tokenizer(source.gguf) if source.gguf else read_tokenizer(source.path, source.config)
    tokenizer = Tokenizer(
        files.backend,
        files.special_tokens,
        files.chat_template,
        cleans_up=files.cleans_up,
        encoder_decoder=is_encoder_decoder(source.config),
    )
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return replace(tokenizer, end_token_ids=tuple(dict.fromkeys([*end_tokens(source), *own])))
