"""What TRL's templates for training mark as the assistant's, we score: no more, no less.

TRL ships stock templates of well-known models, and what it trains with in their place, which marks what the
assistant writes.
"""

import numpy as np
import pytest

from hylorada_jax.data.tokenization import tokenize
from parity_tests.chat_templates import FORMATS
from parity_tests.test_answers import CHATS, conversation, mask, pair

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
