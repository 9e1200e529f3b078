"""Conversations and completions as tokens, and which of them are an answer that a model is scored on."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np

from hylorada_jax.data.examples import Completion, Conversation
from hylorada_jax.errors import DataError
from hylorada_jax.models.chat_template import Request, marks_generation, render_each
from hylorada_jax.models.template_process import Rendered
from hylorada_jax.models.tokenizer import Encoded, Tokenizer
from hylorada_jax.portions import portions
from hylorada_jax.text import shown

Score = Literal["answers", "last", "all"]
"""What counts: every answer (of the assistant, or a completion), the last one, or all that a row says."""

_AT_ONCE = 512
"""Texts that are encoded together: of each answer its prompt, with all before it, and the whole."""


class Scored(NamedTuple):
    """Tokens, which of them are scored, the characters of a text that each stands for, and the text.

    There may be no such characters where nobody asked for them.
    """

    ids: list[int]
    scored: list[bool]
    offsets: list[tuple[int, int]]
    text: str


def score_answers(
    examples: Sequence[Completion | Conversation],
    tokenizer: Tokenizer,
    score: Score = "answers",
    *,
    offsets: bool = True,
) -> Generator[list[Scored] | DataError, None, None]:
    """The tokens of conversations and completions, and which of them are scored.

    An answer is what the model writes: the tokens that follow those of its prompt, as inference gives them,
    up to the token that ends it. What a template says itself, by ``{% generation %}``, is taken from it.
    Otherwise a turn is what rendering with it adds to the prompt, which is rendered without it and ends with
    the opening of the turn. Where a later prompt does not begin with the earlier turns as they were, as
    where a template takes out what was thought, each turn that this parts is an example of its own.

    Args:
        examples: from :func:`hylorada_jax.data.formats.read_row`.
        tokenizer: the model's.
        score: "answers": what the assistant says, or completions; "last": the last answer of a conversation;
            "all": every token.
        offsets: whether anybody will read those of conversations.

    Yields:
        What each example gives; nothing where it has no answer. Or the error: the template refuses the
        messages, or neither marks the assistant's turns nor renders them as what follows a prompt, or a turn
        has no end.

    Raises:
        DataError: the tokenizer has no chat template.

    Example:
        tokenizer = load_tokenizer("smollm2-135m")
        chat = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
        next(score_answers([Conversation("a", chat, [False, True])], tokenizer))

    Source: transformers 5.24, ``apply_chat_template(…, return_assistant_tokens_mask=True)``, for templates
    that mark what is generated.
    """
    # One batch is encoded while the next one is rendered, in the process of the templates.
    with ThreadPoolExecutor(1) as pool:
        begun: list[_Begun] = []
        for batch in portions(examples, _texts, _AT_ONCE):
            begun.append(_begin(batch, tokenizer, score, pool, offsets))
            if len(begun) == 2:
                yield from _ended(begun.pop(0), tokenizer, score)
        for last in begun:
            yield from _ended(last, tokenizer, score)


def _texts(example: Completion | Conversation) -> int:
    return 1 + 2 * sum(example.answers) if isinstance(example, Conversation) else 2


class _Begun(NamedTuple):
    """A batch of examples, of which the conversations are rendered, and are being encoded.

    Attributes:
        batch: the examples.
        turns: of each conversation the numbers of its answers; None where its template marks them.
        rendered: of each the whole, or for each answer its prompt and what that becomes with it.
        encoded: the tokens of these.
    """

    batch: list[Completion | Conversation]
    turns: list[list[int] | None]
    rendered: list[Rendered | DataError]
    encoded: Future[list[Encoded]]


def _begin(
    batch: list[Completion | Conversation],
    tokenizer: Tokenizer,
    score: Score,
    pool: Executor,
    offsets: bool,
) -> _Begun:
    turns: list[list[int] | None] = []
    requests = []
    for example in batch:
        if not isinstance(example, Conversation):
            continue
        if score == "all" or marks_generation(tokenizer.chat_template, example.tools):
            turns.append(None)
            requests.append(request_of(example, tokenizer))
            continue
        turns.append(numbers := _answers(example, score))
        for number in numbers:
            requests.append(request_of(example, tokenizer, number, opening=True))
            requests.append(request_of(example, tokenizer, number + 1))
    rendered = render_each(tokenizer.chat_template, requests)
    texts = ["" if isinstance(each, DataError) else each.text for each in rendered]
    # What a template marks are characters.
    encoded = pool.submit(tokenizer.encode_each, texts, offsets=offsets or None in turns)
    return _Begun(batch, turns, rendered, encoded)


def _ended(begun: _Begun, tokenizer: Tokenizer, score: Score) -> Iterator[list[Scored] | DataError]:
    texts = [example for example in begun.batch if isinstance(example, Completion)]
    chats = [example for example in begun.batch if isinstance(example, Conversation)]
    found = {
        Completion: _completions(texts, tokenizer, score),
        Conversation: _conversations(chats, begun, tokenizer, score),
    }
    for example in begun.batch:
        scored = next(found[type(example)])
        if isinstance(scored, DataError):
            yield scored.at(example.name)
        else:
            yield [each for each in scored if any(each.scored[1:])]


def _completions(
    examples: Sequence[Completion], tokenizer: Tokenizer, score: Score
) -> Iterator[list[Scored] | DataError]:
    wholes = tokenizer.encode_documents([prompt + completion for _, prompt, completion in examples])
    for example, whole in zip(examples, wholes, strict=True):
        prompt = tokenizer.encode_beginning(example.prompt)
        try:
            answer = _continuation(tokenizer, prompt, whole, example.prompt, example.completion)
        except DataError as error:
            yield error
            continue
        end = tokenizer.eos_token_id
        if end is not None and answer.ids[-1:] != [end]:
            answer = Encoded([*answer.ids, end], [*answer.offsets, (0, 0)])
        past = Scored(prompt.ids, [score == "all"] * len(prompt.ids), prompt.offsets, example.prompt)
        yield [_followed(past, answer, example.prompt + example.completion)]


def _followed(past: Scored, answer: Encoded, text: str) -> Scored:
    """What was there, and an answer behind it."""
    return Scored(
        past.ids + answer.ids, past.scored + [True] * len(answer.ids), past.offsets + answer.offsets, text
    )


def _conversations(
    examples: Sequence[Conversation], begun: _Begun, tokenizer: Tokenizer, score: Score
) -> Iterator[list[Scored] | DataError]:
    pairs = zip(begun.rendered, begun.encoded.result(), strict=True)
    for example, numbers in zip(examples, begun.turns, strict=True):
        taken: list[tuple[Rendered, Encoded]] = []
        try:
            for each, tokens in [*islice(pairs, 1 if numbers is None else 2 * len(numbers))]:
                if isinstance(each, DataError):
                    raise each
                taken.append((each, tokens))
            if numbers is None:
                yield _marked(example, tokenizer, *taken[0], score)
            else:
                yield _grown([example.messages[number] for number in numbers], tokenizer, taken)
        except DataError as error:
            yield error


def request_of(
    example: Conversation, tokenizer: Tokenizer, stop: int | None = None, *, opening: bool = False
) -> Request:
    """What renders a conversation up to a message, with the opening of an answer where that is asked for."""
    variables = {**tokenizer.special_tokens, **example.variables, "add_generation_prompt": opening}
    return Request(example.messages[:stop], variables, example.tools)


def _answers(example: Conversation, score: Score) -> list[int]:
    """The numbers of the messages that are scored; one that begins a conversation answers no prompt."""
    numbers = [number for number, answer in enumerate(example.answers) if answer and number]
    return numbers[-1:] if score == "last" else numbers


def _marked(
    example: Conversation, tokenizer: Tokenizer, rendered: Rendered, encoded: Encoded, score: Score
) -> list[Scored]:
    """A conversation whose template says what the assistant writes."""
    turns = [number for number, message in enumerate(example.messages) if message["role"] == "assistant"]
    answers = _answers(example, score)
    spans, wanted = rendered.generated, [number in answers for number in turns]
    written = [rendered.text[start:stop] for start, stop in spans]
    # A call must be in what is scored, and the whole text may list the tools.
    if score == "all":
        written = [rendered.text] * len(turns)
    elif len(spans) != len(turns):
        written = ["".join(written)] * len(turns)
    for number, want, text in zip(turns, wanted, written, strict=True):
        if want:
            _check_said(example.messages[number], text, tokenizer)
    if score != "all" and not all(wanted):
        if len(spans) != len(turns):
            raise DataError(
                "A template must mark each turn of the assistant once, where not all of them are scored.",
                f"{len(spans)} parts in {{% generation %}} for {len(turns)} turns",
                "Give a template that does, or let all of them count: by score, without `train`, and with no "
                "turn of the assistant that opens the conversation.",
            )
        spans = [span for span, want in zip(spans, wanted, strict=True) if want]
    scored = np.full(len(encoded.ids), score == "all")
    first, last = np.reshape(encoded.offsets, (-1, 2)).T
    for start, stop in spans:
        scored |= (first < stop) & (last > start)
    return [Scored(encoded.ids, scored.tolist(), encoded.offsets, rendered.text)]


def _check_said(message: Mapping[str, Any], text: str, tokenizer: Tokenizer) -> None:
    """Refuses a text without a scored answer, or its calls: a model would learn to say nothing instead."""

    def is_blank(text: str) -> bool:
        return not tokenizer.decode(tokenizer.encode(text)).strip()

    content = message.get("content") or ""
    if content.strip() not in text and is_blank(text) and not is_blank(content):
        raise DataError(
            "A template must write the answers that a model is trained to give.",
            f"the answer {shown(content)}, and a turn without a word",
            "Give a template that writes a content as text (--chat-template), or leave the row out.",
        )
    for call in message.get("tool_calls", ()):
        name = call.get("function", call).get("name")
        if isinstance(name, str) and name not in text:
            raise DataError(
                "A template must write the calls of tools that a model is trained to make.",
                f"a call of {shown(name)}, and a text without it",
                "Give a template that has tools (--chat-template), or leave the row out.",
            )


def _grown(
    answers: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    rendered: Sequence[tuple[Rendered, Encoded]],
) -> list[Scored]:
    """A conversation as it grows: prompts and what each becomes with its answer, by turns."""
    parts: list[Scored] = []
    pairs = zip(rendered[::2], rendered[1::2], strict=True)
    for message, ((before, prompt), (after, whole)) in zip(answers, pairs, strict=True):
        added = _added(before, after)
        _check_said(message, added, tokenizer)
        answer = _to_its_end(tokenizer, _continuation(tokenizer, prompt, whole, before.text, added))
        scored: list[bool] = []
        if parts and prompt.ids[: len(parts[-1].ids)] == parts[-1].ids:
            scored = parts.pop().scored  # the history is what the model wrote
        scored = scored + [False] * (len(prompt.ids) - len(scored))
        past = Scored(prompt.ids, scored, prompt.offsets, before.text)
        parts.append(_followed(past, answer, after.text))
    return parts


def _added(before: Rendered, after: Rendered) -> str:
    """What a turn adds to its prompt."""
    if after.text.startswith(before.text):
        return after.text[len(before.text) :]
    pairs = zip(before.text, after.text, strict=False)
    at = next((n for n, (one, other) in enumerate(pairs) if one != other), len(after.text))
    start = max(0, at - 20)
    raise DataError(
        "A template must render a turn of the assistant as what follows its prompt.",
        f"a prompt with {before.text[start : at + 20]!r}, and with the turn {after.text[start : at + 20]!r}",
        "Give a template that marks what the assistant writes by {% generation %}.",
    )


def _continuation(tokenizer: Tokenizer, prompt: Encoded, whole: Encoded, before: str, text: str) -> Encoded:
    """The tokens of a text behind a prompt that is tokenized without it, as inference does."""
    size = len(prompt.ids)
    if whole.ids[:size] == prompt.ids:
        return Encoded(whole.ids[size:], whole.offsets[size:])
    # A token of the whole stands across the boundary.
    ids, offsets = tokenizer.encode_with_offsets(text)
    if tokenizer.decode_continuation(prompt.ids, ids, skip_special_tokens=False) != text:
        raise DataError(
            "An answer must be tokens of its own behind its prompt.",
            f"{text[:20]!r}, whose first token the prompt would have to share",
            "Move blanks from the end of the prompt to the beginning of the answer.",
        )
    return Encoded(ids, [(start + len(before), stop + len(before)) for start, stop in offsets])


def _to_its_end(tokenizer: Tokenizer, answer: Encoded) -> Encoded:
    """A turn up to the token that ends it, which is scored; what a template writes after it is not."""
    ids = answer.ids
    ends = [n for n, token in enumerate(ids) if token in tokenizer.end_token_ids][:1]
    # A base model's own end may not be the one of its template.
    ends = ends or [n for n, token in enumerate(ids) if token in tokenizer.special_ids][-1:]
    if not ends or tokenizer.decode(ids[ends[0] + 1 :]).strip():
        raise DataError(
            "A turn of the assistant must end with a special token, and have none inside.",
            f"the turn {tokenizer.decode(ids[-20:], skip_special_tokens=False)!r}",
            "Take such tokens out of the messages, or give a template that ends its turns.",
        )
    return Encoded(ids[: ends[0] + 1], answer.offsets[: ends[0] + 1])
