"""Ids that are not in the vocabulary end in the same error wherever a model takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.adapter_bank import AdapterBank, apply_rows
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import DataError
from hylorada_jax.evaluation.lost_in_the_middle import evaluate_lost_in_the_middle
from hylorada_jax.evaluation.perplexity import PerplexityEvaluator
from hylorada_jax.evaluation.retrieval import evaluate_retrieval
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.ids import check_tokens
from hylorada_jax.models.tokenizer import Encoded

VOCAB = 32
SHAPE = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 2, "intermediate_size": 24}


@functools.cache
def base():
    return CausalLM.from_config(DecoderConfig.from_hf(SHAPE), jax.random.key(0))


@functools.cache
def adapted(method="hylorada_v2"):
    return HyLoRADAModel(base(), HyLoRADAConfig(method=method, lora_rank=2))


@functools.cache
def hf(kind):
    """One of HF's Flax models without weights: it is asked for nothing but a refusal."""
    base = pytest.importorskip("hylorada_jax.models.hf.base", exc_type=ImportError)
    import transformers

    configs = {
        "GPT2LMHeadModel": transformers.GPT2Config(VOCAB, 32, 16, 1, 2),
        "BertForMaskedLM": transformers.BertConfig(VOCAB, 16, 1, 2, 24),
        "BartForConditionalGeneration": transformers.BartConfig(VOCAB, 32, 1, 24, 2, 1, 24, 2, d_model=16),
    }
    return base.HFFlaxModel(getattr(transformers, f"Flax{kind}")(configs[kind], _do_init=False))


def forward(kind, ids, **inputs):
    return hf(kind).forward({"params": {}}, ids, **inputs)


def off(model, function):
    with model.disable_adapter():
        return function(model)


TAKERS = {
    "decoder": lambda ids: base()(ids),
    "decoder, pure": lambda ids: base().forward({"params": base().params}, ids),
    "decoder, hidden": lambda ids: base().hidden({"params": base().params}, ids),
    "adapted": lambda ids: adapted()(ids),
    "adapted, pure": lambda ids: adapted().apply(adapted().adapters, ids),
    "adapter off": lambda ids: off(adapted(), lambda model: model(ids)),
    "bank": lambda ids: AdapterBank(adapted())(ids),
    "bank, by row": lambda ids: AdapterBank(adapted())(ids, [None]),
    "bank, pure": lambda ids: apply_rows(adapted(), AdapterBank(adapted()).stack(), jnp.zeros(1, int), ids),
    "gpt2": lambda ids: forward("GPT2LMHeadModel", ids),
    "generate": lambda ids: base().generate(ids, max_new_tokens=1),
    "generate, adapted": lambda ids: adapted().generate(ids, max_new_tokens=1),
    "generate, off": lambda ids: off(adapted(), lambda model: model.generate(ids, max_new_tokens=1)),
    "generate, gpt2": lambda ids: hf("GPT2LMHeadModel").generate(ids, max_new_tokens=1),
    "perplexity": lambda ids: PerplexityEvaluator(adapted(), ids, seq_len=2),
    "by place": lambda ids: evaluate_lost_in_the_middle(base(), ids, seq_len=10),
}
WRONG = {
    "the vocabulary's size": ([[1, VOCAB, 2]], f"1 … {VOCAB}"),
    "below 0": ([[1, -1, 2]], "-1 … 2"),
    "a jax array": (jnp.array([[1, VOCAB, 2]]), f"1 … {VOCAB}"),
    "1 in 32 of its 64 bits": (np.array([[1, 2**32 + 1, 2]]), f"1 … {2**32 + 1}"),
    "of 80 bits": ([[1, 2**80, 2]], "object"),
    "floats": (np.array([[1.0, 2.0, 3.0]]), "float64"),
    "bools": (np.array([[True, False, True]]), "bool"),
    "a text": (["abc"], ""),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(("ids", "said"), WRONG.values(), ids=WRONG)
def test_ids_outside_the_vocabulary_are_refused(taker, ids, said):
    with pytest.raises(DataError) as error:
        TAKERS[taker](ids)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "ids", [[[0, VOCAB - 1]], np.array([[0, VOCAB - 1]], np.uint8), jnp.array([[0, 31]])]
)
@pytest.mark.parametrize("taker", ["decoder", "adapted", "bank", "bank, by row"])
def test_ids_of_the_vocabulary_are_taken_in_every_form(taker, ids):
    assert np.isfinite(TAKERS[taker](ids).logits).all()


def test_rows_of_several_lengths_are_no_batch():
    with pytest.raises(DataError, match="several lengths"):
        adapted()([[1, 2], [3]])


@pytest.mark.parametrize("ids", [[1, 2, 3], np.array(1), jnp.ones((1, 1, 3), int)], ids=["a text", "0", "3"])
@pytest.mark.parametrize("taker", [*TAKERS][:9])
def test_a_batch_has_two_axes(taker, ids):
    with pytest.raises(DataError, match=r"input_ids are \[batch, seq\]|each row of input_ids"):
        TAKERS[taker](ids)
    with pytest.raises(DataError, match=r"\[batch, seq\]"):
        jax.eval_shape(TAKERS["adapted, pure"], jnp.asarray(ids))


def test_a_model_for_multiple_choice_takes_three_axes_alone_and_in_a_bank():
    base = pytest.importorskip("hylorada_jax.models.hf.base", exc_type=ImportError)
    import transformers

    of_choices = transformers.FlaxBertForMultipleChoice(transformers.BertConfig(VOCAB, 16, 1, 2, 24))
    model = HyLoRADAModel(base.HFFlaxModel(of_choices), HyLoRADAConfig(method="lora", lora_rank=2))
    ids = jnp.arange(18).reshape(2, 3, 3)
    found = AdapterBank(model)(ids, ["default", None]).logits
    np.testing.assert_allclose(found, model(ids).logits, rtol=1e-4, atol=1e-6)  # which starts as the base


def test_a_program_is_traced_without_values_and_refuses_what_it_can_know():
    logits = jax.jit(lambda ids: adapted().apply(adapted().adapters, ids).logits)
    assert logits(jnp.array([[1, VOCAB]])).shape == (1, 2, VOCAB)
    with pytest.raises(DataError, match="float32"):
        logits(jnp.array([[1.0, 2.0]]))
    check_tokens([jnp.int32(1)], VOCAB)
    jax.eval_shape(lambda number: check_tokens([number], VOCAB), jnp.int32(1))


@pytest.mark.parametrize("ids", [[[0.5, 1.0]], [[0, -1]], np.array([[0, 2**32]]), jnp.array([[True, False]])])
def test_structure_ids_are_integers_from_0(ids):
    for call in (
        lambda: adapted()([[1, 2]], structure_ids=ids),
        lambda: AdapterBank(adapted())(jnp.array([[1, 2]]), [None], structure_ids=ids),
        lambda: adapted().generate([[1, 2]], structure_ids=ids, max_new_tokens=1),
    ):
        with pytest.raises(DataError, match="Structure ids must be integers"):
            call()


@pytest.mark.parametrize("position", [-1, 2**32])
def test_positions_fit_into_their_32_bits(position):
    for model in (base(), adapted(), functools.partial(forward, "GPT2LMHeadModel")):
        with pytest.raises(DataError, match=f"a position of {position}"):
            model(np.array([[1, 2]]), position_ids=np.array([[0, position]]))


def test_a_tokenizer_of_another_model_is_refused_by_the_retrieval_probe():
    class Words:
        bos_token_id = None

        def encode(self, text):
            return [VOCAB - 1 + ("locker" in text)] * len(text.split())

        def encode_prompt(self, text):
            return Encoded(self.encode(text), [])

    with pytest.raises(DataError, match=f"… {VOCAB}"):
        evaluate_retrieval(base(), Words(), seq_len=128, samples=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "inputs", "said"),
    [
        ("BertForMaskedLM", {"token_type_ids": [[0, 2]]}, "token_type_ids: 0 … 2"),
        ("BartForConditionalGeneration", {"decoder_input_ids": [[0, -1]]}, "decoder_input_ids: -1 … 0"),
    ],
)
def test_the_other_tables_of_an_encoder_are_looked_at_too(kind, inputs, said):
    with pytest.raises(DataError, match=said):
        forward(kind, jnp.array([[1, 2]]), **inputs)


ONE = {
    "a list of lists": [[1, 2]],
    "of several lengths": [[1, 2], [3]],
    "texts": ["ab"],
    "an array": np.ones((1, 2), int),
    "of jax": jnp.ones((1, 2), int),
    "arrays": [np.ones(2, int)],
}


@pytest.mark.parametrize("prompt", ONE.values(), ids=ONE)
@pytest.mark.parametrize("how", ["generate", "stream"])
def test_a_prompt_is_one_list_of_tokens(prompt, how):
    """Refused at the call, and not by who reads the first token."""
    for model in (base(), adapted(), hf("GPT2LMHeadModel")):
        with pytest.raises(DataError, match=r"one list of token ids[\s\S]*received: prompt 0"):
            model.stream(prompt, max_new_tokens=1) if how == "stream" else model.generate(
                [prompt], max_new_tokens=1
            )


def test_the_structure_of_a_prompt_is_one_list_too():
    for wrong in ([[0]], [[0], [0, 0]], np.zeros((1, 1), int), 0):
        with pytest.raises(DataError, match="structure_ids must have one value per token"):
            adapted().stream([1], structure_ids=wrong, max_new_tokens=1)
