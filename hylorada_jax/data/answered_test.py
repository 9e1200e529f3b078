import dataclasses

import pytest
from tokenizers.decoders import ByteLevel

from hylorada_jax.data.answered import answer_text, as_message
from hylorada_jax.data.tokenization_test import byte_tokenizer

# Whom a message is addressed to stands in either place.
CALLS = (
    "<|channel|>commentary to=functions.get.it <|constrain|>json<|message|>",
    " to=functions.get.it<|channel|>commentary json<|message|>",
)
CALLED = {"type": "function", "function": {"name": "get.it", "arguments": {"b": 1}}}


def test_special_tokens_are_part_of_an_answer_but_for_its_end():
    tokenizer = dataclasses.replace(byte_tokenizer(), end_token_ids=(1,))
    tokenizer.backend.decoder = ByteLevel()
    tokenizer.backend.add_special_tokens(["<call>"])
    prompt = tokenizer.encode("Hi")
    end = tokenizer.encode("</s>")
    for text in ("<call>f</s><call>", "ü", ""):
        ids = tokenizer.encode(text)
        for said in (ids, ids + end):
            assert answer_text(tokenizer, prompt, said, tokenizer.chat_end_ids) == text


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>a</think>b", {"content": "<think>a</think>b"}),
        ("", {"content": ""}),
        ("<|channel|>final<|message|>a\nb<|return|>", {"content": "a\nb"}),
        ("<|channel|>analysis<|message|>a", {"content": "", "reasoning_content": "a"}),
        ("<|start|>assistant<|message|>a", {"content": "<|start|>assistant<|message|>a"}),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|>"
            "<|start|>assistant<|channel|>final<|message|>c",
            {"content": "b\n\nc", "reasoning_content": "a"},
        ),
        (
            "<|channel|>analysis<|message|>a<|end|><|channel|>final<|message|>b",
            {"content": "b", "reasoning_content": "a"},
        ),
        (  # nobody but the assistant answers
            "<|channel|>final<|message|>a<|end|>"
            "<|start|>functions.f to=assistant<|channel|>commentary<|message|>b",
            {"content": "a"},
        ),
    ],
)
def test_an_answer_is_a_message_by_its_channels(text, rest):
    assert as_message(text) == {"role": "assistant", **rest}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("before", "rest"),
    [
        ([], {"content": ""}),
        (["analysis<|message|>a"], {"content": "", "reasoning_content": "a"}),
        (["commentary<|message|>b"], {"content": "b"}),
        # A template of gpt-oss takes one of the two beside a call.
        (
            ["analysis<|message|>a", "commentary<|message|>b"],
            {"content": "", "reasoning_content": "a\n\nb"},
        ),
    ],
)
def test_a_call_is_found_wherever_its_recipient_stands(call, before, rest):
    parts = [*(f"<|channel|>{each}<|end|>" for each in before), f'{call}{{"b": 1}}<|call|>']
    for several in (parts, [*parts, parts[-1]]):
        expected = {"role": "assistant", **rest, "tool_calls": [CALLED] * (len(several) - len(before))}
        assert as_message("<|start|>assistant".join(several)) == expected
