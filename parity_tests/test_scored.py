"""A step on conversations against the reference: a token weighs the same however rows are packed."""

import functools

import numpy as np
import optax
import pytest

from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.data.packing import Rows, batches
from hylorada_jax.models.batch import computed
from hylorada_jax.surgery import layout
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.step import init_state, make_train_step
from parity_tests.families import VOCAB, measuring
from parity_tests.models import CONFIGS, build, errors
from parity_tests.tolerances import MODEL

# Tokens of a row: of the documents three are longer, and are cut into windows.
SEQ_LEN = 12
# Plain descent, so far that the rounding of the adapters is not part of what they moved by.
RATE = 2.0**20


def documents():
    rng = np.random.default_rng(5)
    for length in (5, 9, 20, 3, 13, 26, 8):
        scored = np.arange(length) >= rng.integers(length)  # a question, and its answer
        yield TokenizedDocument(rng.integers(VOCAB, size=length, dtype=np.int32), scored=scored)


def windows():
    """Each window of a document as a row of its own, padded, as torch's users have them."""
    rows = []
    for document in documents():
        labels = np.where(document.scored, document.tokens, -1)
        for start in range(0, len(document) - 1, SEQ_LEN):
            there = np.arange(start, min(start + SEQ_LEN, len(document) - 1))
            row = np.stack([document.tokens[there], labels[there + 1], np.ones_like(there)])
            filled = np.array([[0], [-1], [0]]).repeat(SEQ_LEN, axis=1)
            filled[:, : len(there)] = row
            rows.append(filled)
    tokens, labels, mask = np.stack(rows, axis=1).astype(np.int32)
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


@functools.cache
def reference():
    """Both sides of a model, and the reference's loss and gradients."""
    pair = build("llama", CONFIGS["hylorada_v1"], "float32")
    pair.inputs = windows()
    return pair, pair.expected()


@pytest.mark.parametrize(
    ("packing", "microbatches"), [(True, 3), pytest.param(False, 5, marks=pytest.mark.apart)]
)
def test_loss_and_gradients_are_those_of_torchs_cross_entropy(packing, microbatches):
    rows = Rows(list(documents()), SEQ_LEN, packing=packing)
    size = -(-len(rows) // microbatches) * microbatches
    (batch,) = batches(rows, size)
    training = TrainingConfig(output="unused", steps=1, batch_size=size, microbatches=microbatches)
    descent = optax.sgd(RATE)
    with measuring("float32"):
        pair, expected = reference()
        step = make_train_step(pair.model, descent, training)
        state, metrics = step(init_state(pair.adapters, descent), pair.model.frozen, computed(batch))
    before, after = (layout.flatten(pair.model.sites, a) for a in (pair.adapters, state.adapters))
    got = {name: (before[name].astype(np.float64) - after[name]) / RATE for name in before}
    assert int(metrics["tokens"]) == (pair.inputs["labels"] >= 0).sum() < 0.7 * pair.inputs["labels"].size
    found = errors(got | {"loss": metrics["loss"], "logits": expected["logits"]}, expected)
    assert max(found.values()) <= MODEL["float32"], found
