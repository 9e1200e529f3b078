"""Which tokens of a conversation are scored: those, and only those, that the model would have to generate.

Oracles: transformers' rendering and its mask for templates that mark what is generated; for all others
generation itself: the tokens before an answer are the prompt that transformers makes, and forcing the answer
behind it ends where generation stops.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hylorada_jax.data.answers import score_answers
from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.data.examples import Completion, Conversation, Document
from hylorada_jax.data.tokenization import prepare, tokenize
from hylorada_jax.errors import DataError
from hylorada_jax.models.tokenizer import Tokenizer
from hylorada_jax.structure.code import character_depths
from parity_tests.chat_templates import FORMATS, Format

SYSTEM = {"role": "system", "content": "Sei kurz."}
ASKED = [{"role": "user", "content": "How many, 1 + 1?"}, {"role": "user", "content": " And naïve 漢字 😀?"}]
SAID = [{"role": "assistant", "content": "It is 2."}, {"role": "assistant", "content": "Yes\n\n😀"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
THOUGHT = {"role": "assistant", "content": "<think>\nfour\n</think>\n\nFour."}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [ASKED[0], SAID[0]],
    "system": [SYSTEM, ASKED[0], SAID[0]],
    "two turns": [ASKED[0], SAID[0], ASKED[1], SAID[1]],
    "system, two turns, a question": [SYSTEM, ASKED[0], SAID[0], ASKED[1], SAID[1], ASKED[0]],
    "an empty turn": [ASKED[0], {"role": "assistant", "content": ""}, ASKED[1], SAID[1]],
    "blanks around": [ASKED[0], {"role": "assistant", "content": "\n  a \n"}, ASKED[1], SAID[0]],
    "thinking": [ASKED[0], THOUGHT, ASKED[1], THOUGHT],
    "two in a row": [ASKED[0], SAID[0], SAID[1]],
    "tools": [
        ASKED[0], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}, SAID[0],
    ],
}  # fmt: skip
# Where a template refuses the messages, or renders the first of two turns otherwise when the second follows.
REFUSED = {("gemma-3", "two in a row"): "alternate", ("qwen3", "two in a row"): "follows its prompt"}


@functools.cache
def backend(special: tuple[str, ...]) -> tokenizers.Tokenizer:
    """A byte-level BPE that has learned from the conversations, line ends and all."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    texts = [str(message.get("content")) for chat in CHATS.values() for message in chat]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    made.train_from_iterator([*texts, "assistant\n\n", "\n\n\n", "user\n"] * 3, trainer)
    return made


def pair(chat_format: Format) -> tuple[Tokenizer, Any]:
    """Our tokenizer and transformers', of the same files."""
    made = backend(chat_format.special)
    roles = {"bos_token": chat_format.special[0], "eos_token": chat_format.eos}
    ends = tuple(made.token_to_id(end) for end in chat_format.ends)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=chat_format.template, **roles
    )
    return Tokenizer(made, roles, chat_format.template, ends), theirs


def conversation(messages: list[dict[str, Any]], tools: Any = None, **variables: Any) -> Conversation:
    answers = [message["role"] == "assistant" for message in messages]
    return Conversation("chat", messages, answers, tools, variables)


def mask(document: TokenizedDocument) -> np.ndarray:
    assert document.scored is not None
    return document.scored


def prompt_of(theirs: Any, messages: Any, **given: Any) -> list[int]:
    return theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **given)


CASES = [
    (name, chat)
    for name, chat in itertools.product(FORMATS, CHATS)
    if (FORMATS[name].tools or chat != "tools") and (FORMATS[name].system or "system" not in chat)
]


@pytest.mark.parametrize(("name", "chat"), CASES)
def test_every_answer_is_what_generation_would_have_to_give(name, chat):
    tokenizer, theirs = pair(FORMATS[name])
    messages, tools = CHATS[chat], TOOLS if chat == "tools" else None
    if said := REFUSED.get((name, chat)):
        with pytest.raises(DataError, match=said):
            tokenize([conversation(messages, tools)], tokenizer)
        return
    found = tokenize([conversation(messages, tools)], tokenizer)
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    answers = []
    for document in found:
        start = 0
        for at, (token, scored) in enumerate(zip(document.tokens.tolist(), mask(document), strict=True)):
            if not scored:
                start = at + 1
            elif token in tokenizer.end_token_ids:
                answers.append((document.tokens[:start].tolist(), document.tokens[start : at + 1].tolist()))
                start = at + 1
        assert start == len(document)  # all that is scored ends
    assert len(answers) == len(turns)
    for turn, (prompt, answer) in zip(turns, answers, strict=True):
        assert prompt == prompt_of(theirs, messages[:turn], tools=tools)
        whole = theirs.apply_chat_template(messages[: turn + 1], tools=tools, tokenize=False)
        forced = theirs.decode(prompt + answer)
        assert whole.startswith(forced)
        assert not theirs.decode(theirs.encode(whole[len(forced) :]), skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_in_a_chat_ends_where_training_ends_a_turn(name):
    tokenizer, _ = pair(FORMATS[name])
    for ends in (tokenizer.end_token_ids, ()):  # as of a base model, whose own end is another
        each = Tokenizer(tokenizer.backend, tokenizer.special_tokens, tokenizer.chat_template, ends)
        (document,) = tokenize([conversation(CHATS["one turn"])], each)
        last = int(document.tokens[mask(document)][-1])
        assert each.chat_end_ids == tuple(dict.fromkeys([*ends, last]))


CHATML = FORMATS["chatml"]
_TAGGED_TURN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}TURN{{ '\\n' }}{% else %}"
    "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = {
    "the turn": "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}",
    "its text": "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>",
    "on lines": "\n{%- generation -%}\n{{ m.content + '<|im_end|>' }}\n{%- endgeneration %}",
}


@pytest.mark.parametrize("tag", TAGGED)
@pytest.mark.parametrize(
    "chat", ["two turns", "system, two turns, a question", "an empty turn", "two in a row"]
)
def test_what_a_template_marks_is_what_transformers_masks(tag, chat):
    template = _TAGGED_TURN.replace("TURN", TAGGED[tag])
    tokenizer, theirs = pair(CHATML._replace(template=template))
    # transformers leaves out all but the first token of a character that ends a marked part.
    messages = [m | {"content": m["content"].rstrip("😀")} for m in CHATS[chat]]
    (document,) = tokenize([conversation(messages)], tokenizer)
    masked = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert document.tokens.tolist() == masked["input_ids"]
    assert mask(document).astype(int).tolist() == masked["assistant_masks"]
    if tag == "the turn":  # the same as is found without the mark, but for what follows the last turn
        (plain,) = tokenize([conversation(messages)], pair(CHATML)[0])
        shared = len(plain.tokens)
        np.testing.assert_array_equal(document.tokens[:shared], plain.tokens)
        np.testing.assert_array_equal(mask(document)[:shared], mask(plain))
        assert not mask(document)[shared:].any()


def refusing(condition: str) -> str:
    """ChatML, which refuses some conversations."""
    return f"{{% if {condition} %}}{{{{ raise_exception('no') }}}}{{% endif %}}" + CHATML.template


# Templates by what a conversation must have for them, or by how they write an answer.
ASKING: dict[str, Any] = {
    "a system message": refusing("messages[0].role != 'system'"),
    "a variable": refusing("mode is not defined"),
    "tools": refusing("not tools"),
    "a second question": refusing("messages | length < 4"),
    "tools by name": {"tool_use": CHATML.template},
    "another end with tools": CHATML.template.replace(
        "}}<|im_end|>", "}}{{ '<|endoftext|>' if tools else '<|im_end|>' }}"
    ),
    "in capitals": CHATML.template.replace("m.content", "m.content | upper"),
    "with a capital": CHATML.template.replace("m.content", "m.content | capitalize"),
    "trimmed": CHATML.template.replace("m.content", "m.content | trim"),
    "behind a thought": CHATML.template.replace("{{ m.content", "<think></think><|im_start|>{{ m.content"),
    "marked": _TAGGED_TURN.replace("TURN", TAGGED["the turn"]),
    "marked before a token": _TAGGED_TURN.replace("TURN", TAGGED["the turn"] + "<|endoftext|>"),
}
# Which of them no conversation shows that is made up.
UNKNOWN = ("a variable", "a second question", "another end with tools")


@pytest.mark.parametrize(
    ("name", "tools"), [(name, TOOLS) for name in ASKING] + [(n, None) for n in ASKING if "tools" not in n]
)
def test_the_answer_that_is_asked_for_ends_where_training_ends_it(name, tools):
    made = dataclasses.replace(pair(CHATML)[0], chat_template=ASKING[name])
    messages, variables = CHATS["system, two turns, a question"], {"mode": "x"}
    chat = conversation([*messages, SAID[0]], tools, **variables)
    for end in ("", "<|im_end|>", "<|endoftext|>"):  # as of a base model
        ends = tuple(made.encode(end))
        tokenizer = dataclasses.replace(made, end_token_ids=ends)
        (found,) = score_answers([chat], tokenizer, "last")
        assert not isinstance(found, DataError)
        last = [token for token, scored in zip(found[-1].ids, found[-1].scored, strict=True) if scored][-1]
        assert last in made.special_ids
        expected = tuple(dict.fromkeys([*ends, last]))
        assert tokenizer.chat_ends(messages, tools, variables) == expected
        if name not in UNKNOWN:
            assert tokenizer.chat_end_ids == expected


def scored_texts(tokenizer: Tokenizer, documents: Any) -> list[str]:
    return [
        tokenizer.decode(each.tokens[mask(each)].tolist(), skip_special_tokens=False) for each in documents
    ]


def test_scores_are_all_the_last_or_those_of_the_messages_that_train():
    tokenizer, theirs = pair(CHATML)
    chat = conversation(CHATS["two turns"])
    (last,) = tokenize([chat], tokenizer, score="last")
    assert scored_texts(tokenizer, [last]) == [SAID[1]["content"] + "<|im_end|>"]
    (whole,) = tokenize([chat], tokenizer, score="all")
    assert whole.scored is None
    assert whole.tokens.tolist() == theirs.apply_chat_template(chat.messages, return_dict=False)
    first = chat._replace(answers=[False, True, False, False])
    for template in (CHATML.template, _TAGGED_TURN.replace("TURN", TAGGED["the turn"])):
        marked = pair(CHATML._replace(template=template))[0]
        (document,) = tokenize([first], marked)
        assert scored_texts(marked, [document]) == [SAID[0]["content"] + "<|im_end|>"]
        # What opens a conversation answers nothing.
        opened = conversation([SAID[1], *CHATS["one turn"]])
        assert scored_texts(marked, tokenize([opened], marked)) == [SAID[0]["content"] + "<|im_end|>"]
    assert tokenize([chat._replace(answers=[False] * 4)], tokenizer) == []


def test_a_comment_may_speak_of_the_marks():
    plain, _ = pair(CHATML)
    commented, _ = pair(CHATML._replace(template="{#- no {% generation %} here -#}" + CHATML.template))
    chats = [conversation(CHATS["two turns"])]
    assert scored_texts(commented, tokenize(chats, commented)) == scored_texts(plain, tokenize(chats, plain))


def test_a_turn_that_is_marked_in_parts_counts_with_all_of_them_or_not_at_all():
    parts = "{% generation %}{{ m.thinking }}{% endgeneration %}\n" + TAGGED["the turn"]
    tokenizer, _ = pair(CHATML._replace(template=_TAGGED_TURN.replace("TURN", parts)))
    thought = [ASKED[0], SAID[0] | {"thinking": "hm"}]
    for score in ("answers", "last"):
        assert scored_texts(tokenizer, tokenize([conversation(thought)], tokenizer, score=score)) == [
            "hm" + SAID[0]["content"] + "<|im_end|>"
        ]
    with pytest.raises(DataError, match="4 parts in"):
        tokenize([conversation(thought * 2)], tokenizer, score="last")


def test_thinking_that_a_template_takes_out_makes_an_example_of_each_turn():
    tokenizer, _ = pair(FORMATS["qwen3"])
    found = tokenize([conversation(CHATS["thinking"])], tokenizer)
    assert scored_texts(tokenizer, found) == [THOUGHT["content"] + "<|im_end|>"] * 2
    assert tokenizer.decode(found[1].tokens.tolist()).count("</think>") == 1
    assert [each.name for each in found] == ["chat, part 1", "chat, part 2"]


def test_the_frame_of_no_thinking_belongs_to_the_prompt_that_writes_it():
    tokenizer, _ = pair(FORMATS["qwen3"])
    for variables, frame in (({}, "<think>\n\n</think>\n\n"), ({"enable_thinking": False}, "")):
        found = tokenize([conversation(CHATS["one turn"], **variables)], tokenizer)
        assert scored_texts(tokenizer, found) == [f"{frame}It is 2.<|im_end|>"]
        assert "</think>" in tokenizer.decode(found[0].tokens.tolist())


def test_a_pad_token_that_is_the_end_is_scored_like_any_end():
    tokenizer, _ = pair(CHATML)
    padded = Tokenizer(
        tokenizer.backend,
        {**tokenizer.special_tokens, "pad_token": "<|im_end|>"},
        tokenizer.chat_template,
        tokenizer.end_token_ids,
    )
    found = tokenize([conversation(CHATS["one turn"])], padded)
    assert scored_texts(padded, found) == ["It is 2.<|im_end|>"]


def test_a_tokenizer_that_adds_bos_adds_none_to_a_template_that_writes_it():
    tokenizer, _ = pair(FORMATS["gemma-3"])
    added = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    added.post_processor = tokenizers.processors.TemplateProcessing(
        "<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    ours = Tokenizer(added, tokenizer.special_tokens, tokenizer.chat_template, tokenizer.end_token_ids)
    found = tokenize([conversation(CHATS["two turns"])], ours)
    assert (found[0].tokens == ours.bos_token_id).sum() == 1
    (text,) = tokenize([Completion("row", "a", "b")], ours)
    assert text.tokens.tolist()[0] == ours.bos_token_id
    assert (text.tokens == ours.bos_token_id).sum() == 1


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("1 + 1 = ", "2"),
        ("user", "\nname"),
        ("It", " is"),
        ("", "It is 2."),
        ("na", "ïve 漢"),
        ("😀", "😀"),
        ("a\n", "\n\nb"),
    ],
)
def test_a_completion_is_scored_behind_the_very_tokens_of_its_prompt(prompt, completion):
    tokenizer, theirs = pair(CHATML)
    (document,) = tokenize([Completion("row", prompt, completion)], tokenizer)
    given = theirs.encode(prompt)
    ids = document.tokens.tolist()
    assert ids[: len(given)] == given
    assert document.scored is None or document.scored.tolist() == [False] * len(given) + [True] * (
        len(ids) - len(given)
    )
    assert theirs.decode(ids) == prompt + completion + "<|im_end|>"
    assert ids.count(tokenizer.eos_token_id) == 1
    (whole,) = tokenize([Completion("row", prompt, completion)], tokenizer, score="all")
    assert whole.scored is None


WRONG: dict[str, Any] = {
    "opening that a turn does not have": (
        CHATML.template.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
        CHATS["one turn"],
        r"row: a prompt with 'im_start\|>assistant\\n<think>\\n', and with the turn 'im_start",
    ),
    "no end": (
        CHATML.template.replace("{{ m.content }}<|im_end|>", "{{ m.content }}"),
        CHATS["one turn"],
        "must end with a special token",
    ),
    "an end inside": (
        CHATML.template,
        [ASKED[0], {"role": "assistant", "content": "a<|im_end|>b"}],
        r"row: the turn 'a<\|im_end\|>b<\|im_end\|>",
    ),
    "an answer that it leaves out": (  # it loops over the parts of a content, which is text
        CHATML.template.replace("m.content", "m.content[99:]"),
        CHATS["one turn"],
        r"row: the answer .*, and a turn without a word",
    ),
    "an answer that it leaves out and marks": (
        "{% for m in messages %}{% generation %}{{ m.content[99:] }}<|im_end|>"
        "{% endgeneration %}{% endfor %}",
        CHATS["one turn"],
        r"row: the answer .*, and a turn without a word",
    ),
    "a call that it leaves out": (
        CHATML.template,
        [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        r"row: a call of 'add', and a text without it",
    ),
    "a call that it leaves out and marks": (
        "{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}",
        [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        r"row: a call of 'add', and a text without it",
    ),
    "a call of a tool that it names elsewhere": (
        "add {% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
        [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        r"row: a call of 'add', and a text without it",
    ),
    "a system prompt that is refused": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
        CHATS["system"],
        r"row: .*System role not supported",
    ),
    "marks that are not the turns": (
        "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}",
        [ASKED[0], SAID[0] | {"train": False}, ASKED[1], SAID[1]],
        "row: 1 parts in {% generation %} for 2 turns",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_template_that_cannot_be_scored_is_refused_by_name(name):
    template, messages, said = WRONG[name]
    tokenizer, _ = pair(CHATML._replace(template=template))
    chat = conversation(messages)
    chat = chat._replace(
        name="row", answers=[a and m.get("train", True) for a, m in zip(chat.answers, messages, strict=True)]
    )
    good = conversation([ASKED[0], SAID[0]])
    with pytest.raises(DataError, match=said):
        tokenize([good, chat] if name == "an end inside" else [chat], tokenizer)
    skipped: list[DataError] = []
    kept, counts = prepare([chat, good, chat], tokenizer, 100, skipped=skipped)
    assert len(skipped) + len(kept) == 3
    assert len(skipped) >= 2
    assert counts[:3] == (3, len(kept), sum(map(len, kept)))
    assert counts.unscored == counts.too_long == 0


def test_a_conversation_in_parts_whose_code_does_not_parse_is_counted_once():
    tokenizer, _ = pair(FORMATS["qwen3"])
    asked = {"role": "user", "content": "```python\nif:\n```"}
    with pytest.warns(UserWarning, match="structure: 1 of 1 documents do not parse"):
        found = tokenize([conversation([asked, THOUGHT, ASKED[1], THOUGHT])], tokenizer, "code")
    assert len(found) == 2


def test_a_refused_row_leaves_the_tokenizer_to_others():
    tokenizer, _ = pair(CHATML)
    refused = conversation([ASKED[0], {"role": "assistant", "content": "a<|im_end|>b"}])
    rows = [refused, *[conversation(CHATS["two turns"])] * 400]
    running = threading.active_count()
    with pytest.raises(
        DataError, match="must end with a special token"
    ) as kept:  # with all that it refers to
        tokenize(rows, tokenizer)  # whose next rows are being encoded when the first is refused
    assert threading.active_count() == running
    assert kept.tb


def test_conversations_need_a_chat_template():
    tokenizer, _ = pair(CHATML)
    with pytest.raises(DataError, match="chat template"):
        tokenize([conversation(CHATS["one turn"])], Tokenizer(tokenizer.backend))


def test_what_is_too_long_is_cut_dropped_or_an_error_and_counted():
    tokenizer, _ = pair(CHATML)
    chats = [conversation(CHATS["one turn"]), conversation(CHATS["two turns"])]
    short, long = tokenize(chats, tokenizer)
    untrained = chats[0]._replace(answers=[False, False])
    # Rows hold one token less than a document, whose last one is only predicted.
    kept, counts = prepare([*chats, untrained], tokenizer, len(short) - 1)
    assert [len(each) for each in kept] == [len(short), len(short)]
    np.testing.assert_array_equal(mask(kept[1]), mask(long)[: len(short)])
    scored = int(mask(short).sum() + mask(kept[1]).sum())
    assert counts == (3, 2, 2 * len(short), scored, 1, 0, 1)
    kept, counts = prepare(chats, tokenizer, len(short) - 1, overlength="drop")
    assert [len(each) for each in kept] == [len(short)]
    assert (counts.unscored, counts.too_long, counts.truncated) == (0, 1, 0)
    with pytest.raises(DataError, match=f"chat: {len(long) - 1}"):
        prepare(chats, tokenizer, len(short) - 1, overlength="error")
    # What is cut before its answer has nothing left to score.
    first = int(np.flatnonzero(mask(short))[0])
    kept, counts = prepare(chats[:1], tokenizer, first - 1)
    assert (kept, counts.unscored, counts.too_long, counts.truncated) == ([], 1, 0, 1)
    # Texts are cut into windows later.
    (text,), counts = prepare([Document("text", "a b c d e f g")], tokenizer, 2)
    assert len(text) > 3
    assert counts == (1, 1, len(text), len(text) - 1, 0, 0, 0)


@pytest.mark.parametrize("after", ["\n(or)", ""])
def test_code_in_a_conversation_has_its_depths_and_all_else_none(after):
    tokenizer, _ = pair(CHATML)
    code = "if a:\n    b(c)\n"
    answer = {"role": "assistant", "content": f"if so:\n    (this)\n```python\n{code}```{after}"}
    later = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "So:\n    (that)"}]
    (found,) = tokenize([conversation([ASKED[0], answer, *later])], tokenizer, "code")
    depths, _ = character_depths(code)
    assert found.structure_ids is not None
    assert set(found.structure_ids.tolist()) == set(depths.tolist())
    ends = np.cumsum([len(tokenizer.decode([token], skip_special_tokens=False)) for token in found.tokens])
    text = tokenizer.decode(found.tokens.tolist(), skip_special_tokens=False)
    start = text.index(code)
    for end, depth in zip(ends, found.structure_ids.tolist(), strict=True):
        inside = start < end <= start + len(code)
        assert depth == (depths[end - 1 - start] if inside else 0)
