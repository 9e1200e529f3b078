from collections import Counter
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.errors import ConfigError, DataError, NonFiniteError
from hylorada_jax.models import decoder_layer
from hylorada_jax.models import generate as generation
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.models.generate import generate, stream
from hylorada_jax.models.sampling import filter_logits

VOCAB = 50


def chain_cache(batch, slots):
    return jnp.zeros((batch, 2), jnp.int32)


def chain_decode(variables, input_ids, *, position_ids, key_valid=None, cache, empty=False):
    """A model that can be computed by hand: what follows is a sum over real tokens and their positions."""
    valid = jnp.ones_like(input_ids, bool) if key_valid is None else key_valid
    seen = jnp.stack([input_ids * variables["weight"], position_ids], -1)
    cache = cache + jnp.where(valid[..., None], seen, 0).sum(1)
    return jax.nn.one_hot(cache.sum(1) % VOCAB, VOCAB), cache


def chain_by_hand(prompt, steps, eos=None):
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(sum(3 * token + position for position, token in enumerate(tokens)) % VOCAB)
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


def run(prompts, **settings):
    return generate(chain_decode, chain_cache, {"weight": jnp.int32(3)}, prompts, **settings)


PROMPTS = [[5], list(range(1, 71)), [7, 8, 9]]


@pytest.mark.parametrize("steps", [1, 2, 64, 65])
def test_tokens_equal_those_computed_by_hand(steps):
    assert run(PROMPTS, max_new_tokens=steps) == [chain_by_hand(prompt, steps) for prompt in PROMPTS]


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_rows_end_with_their_end_token(prompt):
    eos = chain_by_hand(prompt, 12)[5]
    assert run(PROMPTS, max_new_tokens=40, eos_token_id=eos) == [
        chain_by_hand(each, 40, eos) for each in PROMPTS
    ]
    assert run(PROMPTS, max_new_tokens=40, eos_token_id=[VOCAB + 1, eos]) == run(
        PROMPTS, max_new_tokens=40, eos_token_id=eos
    )


def test_decoding_stops_when_all_rows_have_ended():
    calls = []

    def counting(variables, input_ids, **rest):
        jax.debug.callback(lambda: calls.append(1))
        return chain_decode(variables, input_ids, **rest)

    eos = chain_by_hand([5], 4)[3]
    generate(counting, chain_cache, {"weight": jnp.int32(3)}, [[5]], max_new_tokens=60, eos_token_id=eos)
    jax.effects_barrier()
    assert len(calls) == 4


@pytest.mark.parametrize(("value", "sampled"), [(np.nan, False), (np.inf, True), (-np.inf, False)])
def test_logits_that_are_not_finite_end_generation(value, sampled):
    calls = []

    def breaking(variables, input_ids, *, position_ids, **rest):
        jax.debug.callback(lambda: calls.append(1))
        logits, cache = chain_decode(variables, input_ids, position_ids=position_ids, **rest)
        return jnp.where(position_ids[:, -1:] == 5, logits.at[:, 7].set(value), logits), cache

    settings: dict[str, Any] = {"temperature": 0.5, "top_k": 5, "rng": jax.random.key(0)} if sampled else {}
    # After position 5 a prompt of one token has six new ones, and one of three tokens has four.
    for prompts, place in (([[5]], "token 6 of prompt 1"), ([[5], [7, 8, 9]], "token 4 of prompt 2")):
        calls.clear()
        with pytest.raises(NonFiniteError, match=f"at new {place}"):
            generate(breaking, chain_cache, {"weight": jnp.int32(3)}, prompts, max_new_tokens=60, **settings)
        jax.effects_barrier()
        assert len(calls) == int(place.split()[1])
    if not sampled:  # a row that has ended no longer counts
        eos = chain_by_hand([5], 4)[3]
        (row,) = generate(
            breaking, chain_cache, {"weight": jnp.int32(3)}, [[5]], max_new_tokens=60, eos_token_id=eos
        )
        assert row == chain_by_hand([5], 4)


def test_nothing_is_compiled_again():
    config = DecoderConfig.from_hf(
        {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "num_attention_heads": 2}
        | {"intermediate_size": 32, "num_hidden_layers": 2}
    )
    settings: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.7, "top_k": 9, "top_p": 0.9}
    settings["rng"] = jax.random.key(0)
    CausalLM.from_config(config, jax.random.key(0)).generate([[1, 2, 3]], **settings)

    def programs():
        return generation._begin._cache_size(), generation._go_on._cache_size()  # type: ignore[attr-defined]

    compiled = programs()
    other = CausalLM.from_config(config, jax.random.key(1))  # other weights, in another object
    other.generate([list(range(40))], **settings)
    changed: dict[str, Any] = {
        "max_new_tokens": 30,
        "temperature": 1.3,
        "top_k": 4,
        "top_p": 0.5,
        "rng": jax.random.key(2),
    }
    other.generate([[4]], **changed)
    turn = list(range(8))
    for _ in range(4):  # a conversation has the same programs, and the same tokens
        said = [token for some in other.stream(turn, **changed) for token in some]
        assert [said] == other.generate([turn], **changed)
        turn += said[:8]
    assert programs() == compiled
    other.generate([[1] * 69], **settings)  # the next bucket
    assert [*other.stream(turn * 2, **settings)]
    assert programs() == (compiled[0] + 1, compiled[1] + 1)


SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4, "sliding_window": 5,
}  # fmt: skip
BOTH = ["sliding_attention", "full_attention"]
SHAPES: dict[str, dict[str, Any]] = {
    "windows": {
        "model_type": "qwen3", "num_hidden_layers": 4, "use_sliding_window": True, "layer_types": BOTH * 2
    },
    "sinks": {
        "model_type": "gpt_oss", "num_hidden_layers": 2, "layer_types": BOTH,
        "num_local_experts": 3, "num_experts_per_tok": 2,
    },
    "shared keys and values": {
        "model_type": "gemma4_text", "num_hidden_layers": 8, "layer_types": BOTH * 4,
        "num_kv_shared_layers": 4, "global_head_dim": 12, "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": VOCAB,
    },
}  # fmt: skip


@pytest.mark.parametrize(("kind", "longest"), [*((kind, 70) for kind in SHAPES), ("windows", 300)])
def test_prompts_of_unequal_lengths_attend_to_themselves_and_then_to_the_cache(kind, longest):
    """Oracle: the pass over each row alone, without padding and without a cache."""
    base = CausalLM.from_config(DecoderConfig.from_hf(SHAPE | SHAPES[kind]), jax.random.key(0))
    rng, attend, seen = np.random.default_rng(1), decoder_layer.attend, set()
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in (longest, 1, 40)]

    def noted(query, key, value, patterns, *arguments, **options):
        seen.add((query.shape[1], key.shape[1], patterns[0].own))
        return attend(query, key, value, patterns, *arguments, **options)

    with mock.patch.object(decoder_layer, "attend", noted):
        new = base.generate(prompts, max_new_tokens=6, eos_token_id=())
    width = 128 if longest == 70 else 384
    assert seen == {(width, width, True), (1, width + 64, False)}
    for prompt, tokens in zip(prompts, new, strict=True):
        logits = base(jnp.array([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == tokens


def test_prompts_of_one_length_may_be_an_array():
    rows = [[5, 6], [0, 0]]
    for array in (np.array(rows), jnp.array(rows)):
        assert run(array, max_new_tokens=3) == run(rows, max_new_tokens=3)
    with pytest.raises(DataError, match="at least one token"):
        run(np.zeros((0, 2), int), max_new_tokens=3)


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "rng": jax.random.key(3)},
    "filtered": {"temperature": 2.0, "top_k": 20, "top_p": 0.95, "min_p": 1e-3, "rng": jax.random.key(4)},
    "penalised": {"repetition_penalty": 1.4},
    "penalised samples": {"temperature": 1.0, "repetition_penalty": 0.7, "rng": jax.random.key(5)},
}


def streamed(prompt, **settings):
    """The tokens of a stream, of which the first comes alone and none comes empty."""
    first, *others = stream(chain_decode, chain_cache, {"weight": jnp.int32(3)}, prompt, **settings)
    assert len(first) == 1
    assert all(0 < len(some) <= 4 for some in others)
    return first + [token for some in others for token in some]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_stream_gives_the_tokens_of_generate(settings):
    for prompt, tokens in (([7, 8, 9], 1), ([1] * 60, 2), ([5], 11), ([7, 8], 9)):
        (whole,) = run([prompt], max_new_tokens=tokens, **settings)
        assert len(whole) == tokens
        assert streamed(prompt, max_new_tokens=tokens, **settings) == whole
    end = whole[4]
    ended = whole[: whole.index(end) + 1]
    assert streamed(prompt, max_new_tokens=9, eos_token_id=[VOCAB + 1, end], **settings) == ended
    with pytest.raises(ConfigError, match="max_new_tokens"):  # before anything is asked of it
        streamed(prompt, max_new_tokens=0, **settings)


def test_a_stream_computes_what_is_read_of_it_and_no_more():
    calls: list[int] = []

    def counting(variables, input_ids, **rest):
        jax.debug.callback(lambda: calls.append(1))
        return chain_decode(variables, input_ids, **rest)

    found = stream(counting, chain_cache, {"weight": jnp.int32(3)}, [5], max_new_tokens=60)
    read = [next(found), next(found)]
    jax.effects_barrier()
    assert len(calls) == sum(map(len, read)) == 5
    assert [token for some in read for token in some] == chain_by_hand([5], 5)


def test_a_conversation_that_grows_has_few_widths():
    widths = [generation.pad_left([[1] * length]).shape[1] for length in range(1, 4097)]
    assert sorted(set(widths)) == [64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096]
    assert widths == sorted(widths)
    assert all(0 <= width - length < max(64, length / 2) for length, width in enumerate(widths, 1))


LOGITS = np.log([0.4, 0.3, 0.15, 0.1, 0.05])


def constant_decode(variables, input_ids, *, cache, **_):
    return jnp.broadcast_to(variables["logits"], (len(input_ids), 5)), cache


def draws(**settings):
    rng = settings.pop("rng", jax.random.key(0))
    return generate(
        constant_decode,
        chain_cache,
        {"logits": jnp.float32(LOGITS)},
        [[0]] * 500,
        max_new_tokens=8,
        rng=rng,
        **settings,
    )


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 1.0}, 5),
        ({"temperature": 0.5, "top_k": 0}, 5),
        ({"temperature": 1.0, "top_k": 3}, 3),
        ({"temperature": 1.0, "top_p": 0.8}, 3),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.6}, 2),
        ({"temperature": 2.0, "top_k": 1}, 1),
    ],
    ids=str,
)
def test_samples_follow_the_filtered_distribution(settings, kept):
    weights = np.exp(LOGITS / settings["temperature"])[:kept]
    expected = weights / weights.sum()
    counts = Counter(token for row in draws(**settings) for token in row)
    assert set(counts) == set(range(kept))
    for token, p in enumerate(expected):
        # 4000 independent draws: five standard errors.
        assert counts[token] / 4000 == pytest.approx(p, abs=5 * np.sqrt(p * (1 - p) / 4000))


# The smallest float32 with all its digits is 1.2e-38; a device takes what is below it for 0.
@pytest.mark.parametrize(
    "settings",
    [
        *({"temperature": cold} for cold in (1e-20, 1e-30, 1e-31, 1e-38, 1e-45, 1e-60)),
        *({"temperature": 1.0, "top_p": few} for few in (1e-7, 1e-38, 1e-45)),
        {"temperature": 1e-38, "top_p": 1e-38, "top_k": 2**40},
    ],
    ids=str,
)
def test_sampling_in_the_limit_is_greedy(settings):
    assert {token for row in draws(**settings) for token in row} == {0}


@pytest.mark.parametrize("p", [1.0, 1 - 1e-9])  # the second is 1 in float32
def test_all_of_the_probability_is_all_of_the_vocabulary(p):
    logits = jax.random.normal(jax.random.key(0), (1, 151_936)) * 3
    assert jnp.array_equal(filter_logits(logits, top_p=jnp.float32(p)), logits)
    few = filter_logits(logits, top_k=jnp.int32(7), top_p=jnp.float32(p))
    assert int(jnp.isfinite(few).sum()) == 7


def test_samples_depend_on_the_key_the_row_and_the_step():
    first = draws(temperature=1.0)
    assert first == draws(temperature=1.0)
    assert first != draws(temperature=1.0, rng=jax.random.key(1))
    assert len(set(map(tuple, first))) > 400
    assert len(set(map(tuple, zip(*first, strict=True)))) == 8


def test_filter_keeps_ties_and_at_least_one():
    logits = jnp.array([[2.0, 1.0, 1.0, 0.0]])
    assert jnp.isfinite(filter_logits(logits, top_k=jnp.int32(2))).tolist() == [[True, True, True, False]]
    assert jnp.isfinite(filter_logits(logits, top_p=jnp.float32(1e-6))).tolist() == [[True] + [False] * 3]


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "words"),
    [
        ([], {}, DataError, "prompt"),
        ([[1], []], {}, DataError, r"\[1, 0\]"),
        ([[1]], {"max_new_tokens": 0}, ConfigError, "max_new_tokens"),
        *(
            ([[1]], {"max_new_tokens": value}, ConfigError, "max_new_tokens")
            for value in (2.5, "5", None, 2**31, 2**33, 10**21, np.int64(2**40))
        ),
        *(
            ([[1]], {"eos_token_id": value}, ConfigError, "eos_token_id")
            for value in (2**31, 2**40, 10**21, 1.5, "</s>", ["</s>"], [1, 2.0], [[1]], [None])
        ),
        *(
            ([[1]], {name: value, "rng": jax.random.key(0)}, ConfigError, f"{name} must be a number")
            for name in ("temperature", "top_p", "min_p", "repetition_penalty")
            for value in ("0.5", [0.5], np.ones(1))
        ),
        ([[1]], {"temperature": None}, ConfigError, "temperature must be a number"),
        ([[1]], {"temperature": -1.0}, ConfigError, "temperature"),
        ([[1]], {"temperature": float("nan")}, ConfigError, "temperature"),
        ([[1]], {"temperature": 1.0}, ConfigError, "rng"),
        *(([[1]], {"top_k": value}, ConfigError, "top_k") for value in (-1, 0.9, 5.5)),
        ([[1]], {"top_p": 0.0}, ConfigError, "top_p"),
        ([[1]], {"top_p": 1.5}, ConfigError, "top_p"),
        ([[1]], {"top_p": -1e-38}, ConfigError, "top_p"),
        ([[1]], {"top_p": float("nan")}, ConfigError, "top_p"),
        ([[1]], {"temperature": -1e-38}, ConfigError, "temperature"),
        ([[1]], {"temperature": float("inf")}, ConfigError, "temperature"),
        ([[1]], {"top_k": float("nan")}, ConfigError, "top_k"),
        *(([[1]], {"min_p": value}, ConfigError, "min_p") for value in (-0.1, 1.1, float("nan"))),
        *(
            ([[1]], {"repetition_penalty": value}, ConfigError, "repetition_penalty")
            for value in (0.0, -1.0, float("nan"), float("inf"))
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(prompts, settings, error, words):
    with pytest.raises(error, match=words):
        run(prompts, **{"max_new_tokens": 4, **settings})


@pytest.mark.parametrize(
    "form", [int, np.int64, jnp.int32, lambda end: jnp.array([end, -1]), lambda end: [end]]
)
def test_an_end_is_taken_in_every_form(form):
    (row,) = run([[5]], max_new_tokens=9, eos_token_id=())
    assert run([[5]], max_new_tokens=9, eos_token_id=form(row[3])) == [row[: row.index(row[3]) + 1]]
    assert run([[5]], max_new_tokens=9, eos_token_id=-1) == [row]
