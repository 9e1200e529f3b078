"""Oracle: jax.grad of the plain mean cross-entropy over full logits, in float64."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hylorada_jax.config import METHODS, HyLoRADAConfig
from hylorada_jax.data.document import TokenizedDocument
from hylorada_jax.data.packing import Rows, batches
from hylorada_jax.math.loss import token_nll
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models import scoring
from hylorada_jax.models.causal_lm import CausalLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.training.config import TrainingConfig
from hylorada_jax.training.optimizer import make_optimizer
from hylorada_jax.training.step import init_state, make_train_step

CONFIG = HyLoRADAConfig(method="hylorada_v1", lora_rank=2)


def tiny_model(config=CONFIG, vocab=37, dtype=jnp.float32, **shape):
    hf = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    decoder = DecoderConfig.from_hf(hf | shape)
    return HyLoRADAModel(CausalLM.from_config(decoder, jax.random.key(0), dtype=dtype), config)


def documents(count=12, vocab=37, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 30, count)
    return [TokenizedDocument(rng.integers(0, vocab, n, dtype=np.int32)) for n in lengths]


def trained(adapters, seed=1):
    """Adapters away from their initial values, where B = 0 hides half of the gradients."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), adapters)


def first_batch(rows, batch_size):
    return next(batches(rows, batch_size))


def plain_loss(model, adapters, batch, frozen):
    """Mean nll of one batch over full logits."""
    inputs = {"segment_ids": batch["segment_ids"]}
    logits = model.apply(adapters, batch["input_ids"], frozen=frozen, **inputs).logits
    targets = batch["targets"]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return jnp.where(targets >= 0, nll, 0).sum() / (targets >= 0).sum()


# What is not LoRA's: norms, a tied embedding that the loss reads too, gates, a bias for all layers.
ALL_ON = HyLoRADAConfig(
    method="hylorada",
    lora_rank=2,
    sparse_enabled=True,
    sparse_adapter_dim=6,
    train_embeddings=True,
    train_norms=True,
)


@pytest.mark.parametrize(
    ("config", "microbatches", "tied"), [(CONFIG, 1, True), (CONFIG, 4, False), (ALL_ON, 2, True)]
)
def test_step_is_the_optimizer_on_the_mean_loss_whatever_the_microbatches(config, microbatches, tied):
    model = tiny_model(config, tie_word_embeddings=tied)
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)
        adapters, frozen = wide(trained(model.adapters)), wide(model.frozen)
        batch = first_batch(Rows(documents(), 16), 4)
        training = TrainingConfig(
            output="run", steps=10, batch_size=4, microbatches=microbatches, warmup_ratio=0.0
        )
        optimizer = make_optimizer(adapters, training, config)
        oracle = jax.jit(jax.value_and_grad(lambda a, frozen: plain_loss(model, a, batch, frozen)))
        expected_loss, gradient = oracle(adapters, frozen)
        updates, _ = jax.jit(optimizer.update)(gradient, jax.jit(optimizer.init)(adapters), adapters)
        expected = optax.apply_updates(adapters, updates)

        step = make_train_step(model, optimizer, training)
        state, metrics = step(init_state(adapters, optimizer), frozen, batch)
        # float64: only the order of sums differs.
        assert float(metrics["loss"]) == pytest.approx(float(expected_loss), rel=1e-12)
        assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-11)
        assert float(metrics["adapter_norm"]) == pytest.approx(float(optax.tree.norm(expected)), rel=1e-11)
        assert int(metrics["tokens"]) == (batch["targets"] >= 0).sum()
        # Adam divides by √v, which magnifies the rounding of a gradient near 0: hence 1e-8 on steps of 1e-4.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), state.adapters, expected
        )
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.adapters, adapters)
        # DAA's β has no gradient: the softmax does not see it.
        by_path = jax.tree_util.tree_leaves_with_path(moved)
        assert min(value for path, value in by_path if path[-1].key != "beta") > 1e-5


def test_a_bfloat16_base_trains_float32_adapters():
    batch = first_batch(Rows(documents(), 16), 4)
    training = TrainingConfig(output="run", steps=10, batch_size=4, warmup_ratio=0.0)
    losses = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = tiny_model(dtype=dtype)
        optimizer = make_optimizer(model.adapters, training, CONFIG)
        step = make_train_step(model, optimizer, training)
        state, metrics = step(init_state(model.adapters, optimizer), model.frozen, batch)
        assert {leaf.dtype for leaf in jax.tree.leaves((state.adapters, metrics["loss"]))} == {
            jnp.dtype("f4")
        }
        losses.append(float(metrics["loss"]))
    # bfloat16 keeps 8 bits: 0.4 % per rounding of logits of size 0.1, on a loss near ln 37 = 3.6.
    assert losses[1] == pytest.approx(losses[0], abs=5e-3)
    assert losses[1] != losses[0]


# bfloat16, one rounding. A layer's own products lose a few of them, whether tokens come at once or in parts.
ROUNDING = 2.0**-9


def gradients(config, dtype, batch, microbatches):
    """By a step of plain descent, so long that its rounding is not part of it; bfloat16 holds the weights."""
    model = tiny_model(config, vocab=128, dtype=jnp.bfloat16, num_hidden_layers=1)
    frozen = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.bfloat16 else x, model.frozen)
    training = TrainingConfig(
        output="run", steps=1, batch_size=len(batch["targets"]), microbatches=microbatches
    )
    descent = optax.sgd(rate := 2.0**20)
    before = trained(model.adapters)
    state, _ = make_train_step(model, descent, training)(init_state(before, descent), frozen, batch)
    return jax.tree.map(
        lambda a, b: (np.asarray(a, np.float64) - np.asarray(b)) / rate, before, state.adapters
    )


def rows_of(ids):
    ones = np.ones_like(ids)
    return {
        "input_ids": ids,
        "targets": np.concatenate([ids[:, 1:], -ones[:, :1]], axis=1),
        "segment_ids": ones,
    }


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(ALL_ON, id="all on", marks=pytest.mark.apart),
        pytest.param(HyLoRADAConfig(method="longlora", lora_rank=2, s2_group_size=16), id="longlora"),
    ],
)
def test_a_bfloat16_base_sums_its_gradients_in_float32(config):
    """Zipf's tokens: the most frequent is seen two thousand times, and bfloat16 counts to 256."""
    ids = np.random.default_rng(0).zipf(1.3, (64, 64)) % 128
    batch = rows_of(ids.astype(np.int32))
    wide = gradients(config, jnp.float32, batch, 1)
    whole, parts = (gradients(config, jnp.bfloat16, batch, count) for count in (1, 16))
    for (path, exact), one, many in zip(
        jax.tree_util.tree_leaves_with_path(wide), *map(jax.tree.leaves, (whole, parts)), strict=True
    ):
        if path[-1].key == "beta":  # has no gradient
            continue
        rounding, name = ROUNDING * np.linalg.norm(exact), jax.tree_util.keystr(path)
        of_one, of_many = (np.linalg.norm(found - exact) for found in (one, many))
        # Both lose what the layers lose, which is much where the terms of a gradient cancel (softmax, gates);
        # of a scalar one of the two may be right by chance.
        chance = (32 if exact.size <= 4 else 2) * rounding
        assert max(of_one, of_many) <= 2 * min(of_one, of_many) + chance, name
        if path[-1].key in ("embedding", "scale"):
            assert of_one <= 8 * rounding, name


@pytest.mark.parametrize("method", METHODS)
def test_what_microbatches_add_up_is_float32_in_a_bfloat16_base(method):
    config = HyLoRADAConfig(method=method, lora_rank=2, train_embeddings=True, train_norms=True)
    model = tiny_model(config, dtype=jnp.bfloat16)
    resolved = jax.eval_shape(model.resolve, model.adapters, model.frozen)
    assert {leaf.dtype for leaf in jax.tree.leaves(resolved)} == {jnp.dtype(jnp.float32)}


def test_a_norms_gradient_does_not_depend_on_the_microbatches_in_bfloat16():
    config = HyLoRADAConfig(method="lora", lora_rank=2, train_norms=True)
    batch = rows_of(np.tile(np.random.default_rng(0).integers(128, size=(1, 4), dtype=np.int32), (1024, 1)))
    scales = [
        gradients(config, dtype, batch, count)["model"]["norm"]["scale"]
        for dtype, count in ((jnp.float32, 1), (jnp.bfloat16, 1), (jnp.bfloat16, 1024))
    ]
    budget = 8 * ROUNDING * np.linalg.norm(scales[0])
    assert max(np.linalg.norm(narrow - scales[0]) for narrow in scales[1:]) <= budget


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_norms_that_train_leave_a_bfloat16_base_as_it_is(tied):
    """To the bit: a float32 leaf that bfloat16 holds is rounded to itself."""
    batch = {
        name: jnp.asarray(x) for name, x in rows_of(np.arange(24, dtype=np.int32).reshape(2, 12)).items()
    }
    batch.pop("targets")
    plain, own = (
        tiny_model(
            HyLoRADAConfig(method="lora", lora_rank=2, train_embeddings=trains, train_norms=trains),
            dtype=jnp.bfloat16,
            tie_word_embeddings=tied,
        )
        for trains in (False, True)
    )
    assert jnp.array_equal(plain(**batch).logits, own(**batch).logits)
    hidden = own.hidden(own.resolve(own.adapters), **batch)
    assert hidden.dtype == jnp.bfloat16
    assert own.generate([[1, 2, 3]], max_new_tokens=8) == plain.generate([[1, 2, 3]], max_new_tokens=8)
    merged = own.merge_and_unload().params
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}


def test_packed_log_probabilities_equal_the_separate_ones():
    model, texts = tiny_model(), documents()
    model.adapters = trained(model.adapters)

    def log_probabilities(rows):
        found = {}
        for batch in batches(rows, 2):
            logits = model(**{name: batch[name] for name in ("input_ids", "segment_ids")}).logits
            log_p = np.asarray(jax.nn.log_softmax(logits))
            for r, segments in enumerate(batch["segment_ids"]):
                for segment in range(1, segments.max() + 1):
                    inside = segments == segment
                    found[tuple(batch["input_ids"][r][inside])] = log_p[r, inside]
        return found

    packed, separate = (log_probabilities(Rows(texts, 32, packing=p)) for p in (True, False))
    assert len(Rows(texts, 32)) < len(texts) == len(separate)
    assert packed.keys() == separate.keys()
    for key, values in packed.items():
        np.testing.assert_allclose(values, separate[key], rtol=0, atol=1e-5)  # another order


def test_a_step_tells_the_model_each_tokens_structure_position():
    config = HyLoRADAConfig(method="hylorada_v2", lora_rank=2, structure_encoder_type="temporal")
    model, texts = tiny_model(config), documents()
    adapters = trained(model.adapters)
    training = TrainingConfig(output="run", steps=10, batch_size=4)
    optimizer = make_optimizer(adapters, training, config)
    step = make_train_step(model, optimizer, training)
    texts = [dataclasses.replace(text, structure_positions=24.0 * np.arange(len(text)) + 6) for text in texts]
    batch = first_batch(Rows(texts, 16), 4)
    _, metrics = step(init_state(adapters, optimizer), model.frozen, batch)
    names = ("input_ids", "segment_ids", "structure_positions")
    log_p = jax.nn.log_softmax(
        model.apply(adapters, **{name: jnp.asarray(batch[name]) for name in names}).logits
    )
    nll = -jnp.take_along_axis(log_p, jnp.maximum(batch["targets"], 0)[..., None], -1)[..., 0]
    # float32: a sum of a few dozen terms in another order.
    expected = float(nll[batch["targets"] >= 0].mean())
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-6)
    later = batch | {"structure_positions": batch["structure_positions"] + 5}
    _, others = step(init_state(adapters, optimizer), model.frozen, later)
    assert abs(float(others["loss"]) - expected) > 1e-4


def test_dropout_masks_depend_on_seed_step_and_row_only():
    config = HyLoRADAConfig(
        method="lora",
        lora_rank=2,
        lora_dropout=0.5,
        sparse_enabled=True,
        sparse_adapter_dim=6,
        sparse_dropout=0.5,
    )
    model = tiny_model(config)
    batch = first_batch(Rows(documents(), 16), 4)

    def metrics(microbatches, *seeds_and_steps):
        training = TrainingConfig(output="run", steps=10, batch_size=4, microbatches=microbatches)
        optimizer = make_optimizer(model.adapters, training, config)
        step = make_train_step(model, optimizer, training)
        for seed, at in seeds_and_steps:
            state = init_state(trained(model.adapters), optimizer, seed)._replace(step=jnp.int32(at))
            found = step(state, model.frozen, batch)[1]
            yield float(found["loss"]), float(found["grad_norm"])

    first, again, other_step, other_seed = metrics(1, (0, 3), (0, 3), (0, 4), (1, 3))
    assert first == again
    assert len({first, other_step, other_seed}) == 3
    for microbatches in (2, 4):
        (parted,) = metrics(microbatches, (0, 3))
        # float32: the same sums in another order.
        assert parted == pytest.approx(first, rel=1e-5)
    # The same row four times loses other inputs each time.
    same = {name: np.stack([x[0]] * 4) for name, x in batch.items()}
    resolved = model.resolve(trained(model.adapters))
    dropped = partial(model.hidden, train=True, rngs={"dropout": jax.random.key(0)})
    hidden = jax.jit(dropped)(resolved, same["input_ids"])
    assert len({np.asarray(row).tobytes() for row in hidden}) == 4


def test_a_second_step_does_not_compile_again_and_holds_no_weights():
    model = tiny_model(vocab=5_000)
    training = TrainingConfig(output="run", steps=10, batch_size=4)
    optimizer = make_optimizer(model.adapters, training, CONFIG)
    step = make_train_step(model, optimizer, training)
    state = init_state(model.adapters, optimizer)
    batch = first_batch(Rows(documents(), 16), 4)
    # 5,000 · 16 weights of the embedding alone would take 640,000 characters as a constant.
    assert len(step.lower(state, model.frozen, batch).as_text()) < 500_000
    for _ in range(2):
        state, _ = step(state, model.frozen, batch)
    assert step._cache_size() == 1  # type: ignore[attr-defined]


def test_runs_that_differ_in_numbers_alone_share_one_program():
    def lowered(learning_rate, seed, alpha, dropout, gate, ratio):
        config = HyLoRADAConfig(
            use_hylorada=True,
            lora_rank=2,
            lora_alpha=alpha,
            lora_dropout=dropout,
            gate_init=gate,
            lora_plus_enabled=True,
            lora_plus_ratio=ratio,
        )
        model = tiny_model(config)
        training = TrainingConfig(
            output="run", steps=10, batch_size=4, learning_rate=learning_rate, seed=seed
        )
        optimizer = make_optimizer(model.adapters, training, config)
        state = init_state(model.adapters, optimizer, seed)
        batch = first_batch(Rows(documents(), 16), 4)
        return make_train_step(model, optimizer, training).lower(state, model.frozen, batch).as_text()

    one = lowered(1e-3, 0, 4.0, 0.1, 0.0, 10.0)
    assert lowered(2e-4, 7, 3.0, 0.2, 1.0, 5.0) == one
    # A part that is off is none of the program.
    assert lowered(1e-3, 0, 4.0, 0.0, 0.0, 10.0) != one


@pytest.mark.parametrize("tied", [True, False])
def test_temporary_memory_of_the_step_does_not_grow_with_vocab(monkeypatch, tied):
    chunk = 2**15
    monkeypatch.setattr(scoring, "token_nll", partial(token_nll, chunk_elements=chunk))
    config = HyLoRADAConfig(method="lora", lora_rank=2)  # the smallest program to compile

    def temporary_bytes(vocab):
        model = tiny_model(config, vocab=vocab, tie_word_embeddings=tied)
        training = TrainingConfig(output="run", steps=10, batch_size=32)
        optimizer = make_optimizer(model.adapters, training, config)
        batch = first_batch(Rows(documents(200), 32), 32)
        step = make_train_step(model, optimizer, training)
        compiled = step.lower(init_state(model.adapters, optimizer), model.frozen, batch).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    small, large = temporary_bytes(2**11), temporary_bytes(2**14)
    assert large - small <= chunk * 4, (small, large)
    # The law would also hold for a program that is as large at both sizes: the full logits are 64 MiB.
    assert large < 32 * 32 * 2**14 * 4 / 8, large
