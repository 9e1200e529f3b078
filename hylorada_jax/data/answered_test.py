import dataclasses

import pytest
from tokenizers.decoders import ByteLevel

from hylorada_jax.data.answered import answer_text, as_message
from hylorada_jax.data.tokenization_test import byte_tokenizer

CALL = "<|channel|>commentary to=functions.get.it <|constrain|>json<|message|>"


def test_special_tokens_are_part_of_an_answer_but_for_its_end():
    tokenizer = dataclasses.replace(byte_tokenizer(), end_token_ids=(1,))
    tokenizer.backend.decoder = ByteLevel()
    tokenizer.backend.add_special_tokens(["<call>"])
    prompt = tokenizer.encode("Hi")
    end = tokenizer.encode("</s>")
    for text in ("<call>f</s><call>", "ü", ""):
        ids = tokenizer.encode(text)
        assert answer_text(tokenizer, prompt, ids) == answer_text(tokenizer, prompt, ids + end) == text


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>a</think>b", {"content": "<think>a</think>b"}),
        ("", {"content": ""}),
        ("<|channel|>final<|message|>a\nb<|return|>", {"content": "a\nb"}),
        ("<|channel|>analysis<|message|>a", {"content": "", "reasoning_content": "a"}),
        (
            f'<|channel|>analysis<|message|>a<|end|><|start|>assistant{CALL}{{"b": 1}}<|call|>',
            {
                "content": "",
                "reasoning_content": "a",
                "tool_calls": [{"type": "function", "function": {"name": "get.it", "arguments": {"b": 1}}}],
            },
        ),
    ],
)
def test_an_answer_is_a_message_by_its_channels(text, rest):
    assert as_message(text) == {"role": "assistant", **rest}
