"""What TRL's templates for training mark as the assistant's, we score: no more, no less.

TRL ships stock templates of well-known models, and what it trains with in their place, which marks what the
assistant writes.
"""

import numpy as np
import pytest

from hylorada_jax.data.answered import answer_text, as_message
from hylorada_jax.data.tokenization import tokenize
from hylorada_jax.errors import DataError
from parity_tests.chat_templates import FORMATS
from parity_tests.test_answers import ASKED, CALL, CHATS, conversation, mask, pair, prompt_of

pytestmark = pytest.mark.apart
# TRL's name: the format that has its special tokens.
TEMPLATES = {
    "deepseek_r1_distill": "deepseek-r1",
    "gemma3": "gemma-3",
    "llama3": "llama-3.1",
    "phi3": "phi-3",
    "qwen2_5": "qwen2.5",
    "qwen3": "qwen3",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_are_those_of_trl(name):
    pytest.importorskip("trl")
    from trl import chat_template_utils

    stock = getattr(chat_template_utils, f"{name}_chat_template")
    _, theirs = pair(FORMATS[TEMPLATES[name]]._replace(template=stock))
    template = chat_template_utils.get_training_chat_template(theirs)
    assert "generation" in template
    ours, _ = pair(FORMATS[TEMPLATES[name]]._replace(template=template))
    for chat in ("one turn", "system", "two turns", "blanks around", "thinking"):
        given = {"chat_template": template, "return_dict": True, "return_assistant_tokens_mask": True}
        expected = theirs.apply_chat_template(CHATS[chat], **given)
        (found,) = tokenize([conversation(CHATS[chat])], ours)
        assert found.tokens.tolist() == expected["input_ids"], chat
        assert np.array_equal(mask(found), np.array(expected["assistant_masks"], bool)), chat
        assert mask(found).any()


@pytest.mark.parametrize("name", [*TEMPLATES, "lfm2"])
def test_a_call_is_scored_or_refused(name):
    utils = pytest.importorskip("trl.chat_template_utils")
    template = getattr(utils, f"{name}_training_chat_template")
    tokenizer, _ = pair(FORMATS[TEMPLATES.get(name, "chatml")]._replace(template=template))
    chat = conversation([ASKED[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}], TOOLS)
    try:
        (found,) = tokenize([chat], tokenizer)
    except DataError:
        return
    scored = tokenizer.decode(found.tokens[mask(found)].tolist(), skip_special_tokens=False)
    assert '"add"' in scored


ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": ADD}]
SAYS = "<|channel|>{}<|message|>{}<|end|><|start|>assistant"
TO_ADD = "<|channel|>commentary to=functions.add <|constrain|>json<|message|>{}<|call|>"


def gpt_oss():
    """Our tokenizer and transformers', with the template of OpenAI, which TRL ships."""
    pytest.importorskip("trl")
    from trl.chat_template_utils import gptoss_chat_template

    return pair(FORMATS["gpt-oss"]._replace(template=gptoss_chat_template))


@pytest.mark.parametrize("said", [{"content": ""}, {"content": "Well."}, {"thinking": "Hm"}])
def test_a_call_that_openais_template_writes_is_read_as_one(said):
    tokenizer, theirs = gpt_oss()
    message = {"role": "assistant", "content": "", **said, "tool_calls": [CALL]}
    prompt = prompt_of(theirs, ASKED[:1], tools=TOOLS)
    whole = theirs.apply_chat_template([ASKED[0], message], tools=TOOLS, return_dict=False)
    ends = tokenizer.chat_ends(ASKED[:1], TOOLS)
    answer = as_message(answer_text(tokenizer, prompt, whole[len(prompt) :], ends))
    assert whole[: len(prompt)] == prompt
    assert answer.pop("tool_calls") == [CALL]
    # What is said before a call is written as what is thought.
    assert answer == {"role": "assistant", "content": ""} | (
        {"reasoning_content": text} if (text := "".join(said.values())) else {}
    )


def test_an_answer_with_all_that_gpt_oss_says_before_a_call_is_trained_on_again():
    tokenizer, _ = gpt_oss()
    arguments = '{"a": 1, "b": "ü"}'
    answer = SAYS.format("analysis", "Hm") + SAYS.format("commentary", "I add.") + TO_ADD.format(arguments)
    (found,) = tokenize([conversation([ASKED[0], as_message(answer)], TOOLS)], tokenizer)
    scored = tokenizer.decode(found.tokens[mask(found)].tolist(), skip_special_tokens=False)
    assert scored == (
        SAYS.format("analysis", "Hm\n\nI add.")
        + f" to=functions.add<|channel|>commentary json<|message|>{arguments}<|call|>"
    )
