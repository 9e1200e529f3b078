"""Oracle: a model that is known to find, or not to find, what it is asked for."""

import dataclasses
import re
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from hylorada_jax.errors import ConfigError, DataError, NonFiniteError
from hylorada_jax.evaluation import retrieval
from hylorada_jax.evaluation.retrieval import DEPTHS, evaluate_retrieval
from hylorada_jax.models.tokenizer import load_tokenizer
from hylorada_jax.models.tokenizer_directory import begin_and_end

SEQ_LEN = 256
SOFT_CAP = 8.0


class Knowing:
    """A model whose most likely next token is the true one, but where a fact stands in the forgotten part."""

    num_trainable, has_encoder, disabled = 0, False, False

    def __init__(self, vocab, forgets=lambda place: jnp.zeros_like(place, bool)):
        self.embedding, self.forgets = self.code(jnp.arange(vocab)), forgets
        self.adapters, self.frozen = {}, {}
        self.base: Any = types.SimpleNamespace(
            supports_segments=True,
            position_limit=None,
            logit_soft_cap=SOFT_CAP,
            params={},
            head=lambda variables: self.embedding,
        )

    def resolve(self, adapters, frozen):
        return adapters

    def code(self, ids):
        """The sixteen bits of an id as signs: of all codes its own has the largest product with it."""
        return 2.0 * ((ids[..., None] >> jnp.arange(16)) & 1) - 1

    def head(self, resolved, frozen):
        return self.embedding

    def hidden(self, resolved, input_ids, *, segment_ids, **inputs):
        ids, length = input_ids, segment_ids.sum(1)
        answer = ids[jnp.arange(len(ids)), length - 2]
        place = jnp.argmax(ids == answer[:, None], axis=1)  # of the answer's last digits in the fact
        right = self.code(jnp.roll(ids, -1, axis=1))
        return jnp.where(self.forgets(place / SEQ_LEN)[:, None, None], -right, right)


class Broken(Knowing):
    """A model that computes nothing."""

    def head(self, resolved, frozen):
        return super().head(resolved, frozen) * jnp.nan


@pytest.fixture
def tokenizer():
    return load_tokenizer("smollm2-135m")


def probe(tokenizer, model, **settings):
    return evaluate_retrieval(model, tokenizer, seq_len=SEQ_LEN, samples=2, progress=False, **settings)


def test_who_knows_finds_all_and_who_forgets_the_middle_finds_the_ends(tokenizer):
    vocab = tokenizer.vocab_size
    knowing = Knowing(vocab)
    knew = probe(tokenizer, knowing)
    assert knew.accuracy == (1.0,) * DEPTHS
    # Of logits that are bounded as the model bounds them.
    codes = np.asarray(knowing.embedding, np.float64)
    answers = np.array([text["answer"] for text in retrieval.contexts(tokenizer, SEQ_LEN, samples=2)])
    used, places = np.unique(answers, return_inverse=True)
    logits = SOFT_CAP * np.tanh(codes[used] @ codes.T / SOFT_CAP)
    losses = np.log(np.exp(logits).sum(1)) - logits[range(len(used)), used]
    expected = losses[places.reshape(answers.shape)].sum(1)
    np.testing.assert_allclose(np.ravel(knew.losses), expected, rtol=1e-5)
    forgetful = Knowing(vocab, lambda place: (place > 0.3) & (place < 0.7))
    found = probe(tokenizer, forgetful, batch_size=7)
    assert (found.accuracy[0], found.accuracy[5], found.accuracy[-1]) == (1.0, 0.0, 1.0)
    assert found.mean == np.mean(found.accuracy)


def test_logits_that_are_not_finite_end_the_probe(tokenizer):
    model = Broken(tokenizer.vocab_size)
    with pytest.raises(NonFiniteError, match=r"in the text of the tokens \[\d+"):
        probe(tokenizer, model)


def test_the_fact_stands_at_its_depth_and_the_question_at_the_end(tokenizer):
    texts = [
        tokenizer.decode(context["tokens"]) for context in retrieval.contexts(tokenizer, SEQ_LEN, samples=1)
    ]
    fact = texts[0].partition(".")[0].strip()
    assert fact.startswith("The number of ")
    for text in texts:
        assert text.endswith(fact.removeprefix("The number of"))
        assert text.count(fact) == 2
    places = [text.index(fact) / len(text) for text in texts]
    assert places == sorted(places)
    assert places[0] < 0.02
    assert places[-1] > 0.8


def test_other_people_have_numbers_at_the_other_depths(tokenizer):
    for depth, context in enumerate(retrieval.contexts(tokenizer, 2 * SEQ_LEN, samples=1, facts=DEPTHS)):
        text = tokenizer.decode(context["tokens"])
        *facts, question = re.findall(r"The number of (\w+)'s locker is (\d+)", text)
        assert len(dict(facts)) == DEPTHS
        assert len(set(dict(facts).values())) == DEPTHS
        assert facts.index(question) == depth


def test_a_context_without_room_is_refused(tokenizer):
    with pytest.raises(DataError, match="seq_len 64"):
        evaluate_retrieval(Knowing(9), tokenizer, seq_len=64)
    for facts in (0, DEPTHS + 1):
        with pytest.raises(ConfigError, match=f"{facts} facts"):
            evaluate_retrieval(Knowing(9), tokenizer, facts=facts)
    with pytest.raises(ConfigError, match="0 samples"):
        evaluate_retrieval(Knowing(9), tokenizer, samples=0)


def test_a_context_begins_as_the_model_expects_it(tokenizer):
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    begin_and_end(backend, tokenizer.special_tokens["bos_token"], None)
    plain, begun = (
        retrieval.contexts(each, SEQ_LEN, samples=1)[5]["tokens"]
        for each in (tokenizer, dataclasses.replace(tokenizer, backend=backend))
    )
    assert begun[0] == tokenizer.bos_token_id not in (*plain, *begun[1:])
    assert len(begun) <= SEQ_LEN


def test_what_is_found_in_bfloat16_is_the_likeliest_token():
    """Rounded to bfloat16, the largest of 256 logits often has equals before it."""
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=(256, 32)), jnp.bfloat16) for _ in range(2))
    likeliest = (np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T).argmax(-1)
    batch = {"places": jnp.zeros((256, 1), int), "answer": jnp.asarray(likeliest[:, None])}
    assert np.all(retrieval._answered(hidden[:, None], head, None, batch)[:, 0])


def test_the_loss_is_that_of_the_answers_tokens():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(2, 5, 8)), rng.normal(size=(16, 8))
    places, answer = np.array([[1, 2], [3, 0]]), np.array([[4, 9], [7, -1]])
    p = np.exp(hidden @ head.T)
    p /= p.sum(-1, keepdims=True)
    expected = [-np.log(p[0, 1, 4] * p[0, 2, 9]), -np.log(p[1, 3, 7])]
    arrays = {"places": jnp.asarray(places), "answer": jnp.asarray(answer)}
    losses = retrieval._answered(jnp.asarray(hidden), jnp.asarray(head), None, arrays)[:, 1]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
