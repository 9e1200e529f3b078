"""Oracle: every window of the definition computed on its own, with the model's plain logits."""

import copy
from typing import Any

import jax
import numpy as np
import pytest

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.errors import ConfigError, DataError, NonFiniteError
from hylorada_jax.evaluation.lost_in_the_middle import evaluate_lost_in_the_middle
from hylorada_jax.evaluation.perplexity import PerplexityEvaluator, evaluate_perplexity
from hylorada_jax.model import HyLoRADAModel

VOCAB, SEQ_LEN = 31, 12
SHAPE = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": False, "initializer_range": 0.3,
}  # fmt: skip


def documents(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n) for n in (40, 7, 1, 12, 13, 25)]


def direct_loss(logits_of, stride, is_scored=lambda tokens: np.ones(len(tokens), bool)):
    """The definition, one window at a time: a token counts in the first window that predicts it."""
    total, count = 0.0, 0
    for tokens in documents():
        scored, start = 0, 0
        while scored < len(tokens) - 1:
            stop = min(start + SEQ_LEN, len(tokens) - 1)
            window = np.zeros(SEQ_LEN, int)  # one shape for all; what comes later changes nothing before it
            window[: stop - start] = tokens[start:stop]
            logits = np.asarray(logits_of(window[None]), np.float64)[0, : stop - start]
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            nll = -log_p[np.arange(stop - start), tokens[start + 1 : stop + 1]]
            counts = is_scored(tokens)[scored + 1 : stop + 1]
            total, count = total + nll[scored - start :][counts].sum(), count + counts.sum()
            start, scored = start + stride, stop
    return total / count, count


@pytest.mark.parametrize("stride", [SEQ_LEN, 5])
def test_perplexity_of_a_base_model_is_the_definition(base, stride):
    found = evaluate_perplexity(
        base, documents(), seq_len=SEQ_LEN, stride=stride, batch_size=2, progress=False
    )
    loss, count = direct_loss(lambda ids: base(ids).logits, stride)
    assert found.tokens == count == sum(len(d) - 1 for d in documents())
    assert found.loss == pytest.approx(loss, rel=1e-6)  # float32 logits
    assert found.perplexity == pytest.approx(np.exp(loss), rel=1e-5)


def test_perplexity_is_that_of_the_scored_tokens(base):
    def is_scored(tokens):
        return tokens % 3 == 0

    texts = [TokenizedDocument(tokens, is_scored(tokens)) for tokens in documents()]
    found = evaluate_perplexity(base, texts, seq_len=SEQ_LEN, stride=5, batch_size=2, progress=False)
    loss, count = direct_loss(lambda ids: base(ids).logits, 5, is_scored)
    assert found.tokens == count
    assert found.loss == pytest.approx(loss, rel=1e-6)  # float32 logits


def test_adapters_change_what_is_evaluated_and_nothing_compiles_twice(base):
    model = HyLoRADAModel(base, HyLoRADAConfig(method="dora", lora_rank=2, target_modules=("v_proj",)))
    evaluator = PerplexityEvaluator(model, documents(), seq_len=SEQ_LEN, stride=5, batch_size=2)
    other = jax.tree.map(lambda x: x + 1.0, model.adapters)
    before, after = evaluator(progress=False), evaluator(other, progress=False)
    assert evaluator._sweep._run._cache_size() == 1  # type: ignore[attr-defined]
    assert before.loss == pytest.approx(direct_loss(lambda ids: base(ids).logits, 5)[0], rel=1e-6)
    model.adapters = other
    expected, _ = direct_loss(lambda ids: model(ids).logits, 5)
    assert after.loss == pytest.approx(expected, rel=1e-6)
    assert abs(after.loss - before.loss) > 0.01


def test_a_sample_of_the_tokens_takes_rows_from_everywhere(base):
    long = np.random.default_rng(2).integers(0, VOCAB, 4 * SEQ_LEN + 1)
    options: dict[str, Any] = {"seq_len": SEQ_LEN, "stride": SEQ_LEN, "batch_size": 2, "progress": False}
    part = evaluate_perplexity(base, [long], max_tokens=2 * SEQ_LEN, **options)
    chosen = [long[start : start + SEQ_LEN + 1] for start in (0, 2 * SEQ_LEN)]
    first_and_third = evaluate_perplexity(base, chosen, **options)
    assert part.tokens == first_and_third.tokens == 2 * SEQ_LEN
    assert part.loss == pytest.approx(first_and_third.loss, rel=1e-6)


def test_without_its_adapter_a_model_is_measured_as_its_base(base):
    model = HyLoRADAModel(base, HyLoRADAConfig(method="dora", lora_rank=2, target_modules=("v_proj",)))
    model.adapters = jax.tree.map(lambda x: x + 1.0, model.adapters)

    def loss(of):
        return evaluate_perplexity(of, documents(), seq_len=SEQ_LEN, progress=False).loss

    adapted = loss(model)
    with model.disable_adapter():
        assert loss(model) == loss(base)
    assert loss(model) == adapted != loss(base)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"seq_len": 0}, "seq_len 0"),
        ({"seq_len": 12, "stride": 13}, "stride 13, seq_len 12"),
        ({"seq_len": 12, "stride": 0}, "stride 0"),
        ({"seq_len": 12, "max_tokens": 0}, "0 tokens"),
    ],
)
def test_windows_that_never_end_or_leave_tokens_out_are_refused(base, sizes, match):
    with pytest.raises(ConfigError, match=match):
        evaluate_perplexity(base, documents(), progress=False, **sizes)


@pytest.mark.parametrize("batch_size", [0, -1])
@pytest.mark.parametrize("measure", [evaluate_perplexity, evaluate_lost_in_the_middle])
def test_batches_without_a_row_are_refused(base, measure, batch_size):
    with pytest.raises(ConfigError, match=f"batch_size {batch_size}"):
        measure(base, documents(), seq_len=SEQ_LEN, batch_size=batch_size, progress=False)


@pytest.mark.parametrize("measure", [evaluate_perplexity, evaluate_lost_in_the_middle])
def test_the_document_whose_loss_is_not_finite_is_named(base, measure):
    params = copy.deepcopy(base.params)
    params["model"]["embed_tokens"]["embedding"] = (
        base.params["model"]["embed_tokens"]["embedding"].at[29].set(np.nan)
    )
    # Each fills its row: there is none that another's NaN could spoil.
    texts = [np.arange(SEQ_LEN + 1) + start for start in (0, 7, 18, 1)]
    with pytest.raises(NonFiniteError, match="in document 3\n"):
        measure(base.with_params(params), texts, seq_len=SEQ_LEN, batch_size=3, progress=False)


def test_nothing_to_predict_is_refused(base):
    with pytest.raises(DataError, match="two tokens"):
        evaluate_perplexity(base, [[1], []], seq_len=SEQ_LEN)


def test_structure_ids_reach_the_model_beside_their_tokens(base):
    config = HyLoRADAConfig(method="hylorada_v2", lora_rank=2, structure_dim=8)
    model = HyLoRADAModel(base, config)
    rng = np.random.default_rng(1)
    # Off the start, where B and scale_from_structure are zero and structure says nothing.
    model.adapters = jax.tree.map(lambda x: x + rng.normal(0, 0.5, x.shape).astype(x.dtype), model.adapters)
    of_token = rng.integers(0, 60, VOCAB)

    structured = [TokenizedDocument(tokens, structure_ids=of_token[tokens]) for tokens in documents()]

    def loss(texts):
        found = evaluate_perplexity(model, texts, seq_len=SEQ_LEN, stride=5, batch_size=2, progress=False)
        return found.loss

    def logits(ids):
        return model(ids, structure_ids=of_token[ids]).logits

    found = loss(structured)
    assert found == pytest.approx(direct_loss(logits, 5)[0], rel=1e-6)
    assert abs(found - loss(documents())) > 1e-3
    with pytest.raises(ConfigError, match="encoder"):
        evaluate_perplexity(base, structured, seq_len=SEQ_LEN)


@pytest.mark.slow
def test_loss_of_one_window_equals_that_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from hylorada_jax.models.loading import load_model

    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    reference.save_pretrained(tmp_path)
    tokens = documents()[0]
    found = evaluate_perplexity(load_model(tmp_path), [tokens], seq_len=64, progress=False)
    ids = torch.tensor(tokens)[None]
    # transformers' loss is the mean over the same 39 predictions, in float32 there too.
    assert found.loss == pytest.approx(reference(ids, labels=ids).loss.item(), rel=1e-5)
