import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

transformers = pytest.importorskip("hylorada_jax.models.hf.loading", exc_type=ImportError).transformers

from hylorada_jax.errors import ConfigError  # noqa: E402
from hylorada_jax.models.hf.base import HFFlaxModel  # noqa: E402
from hylorada_jax.models.hf.t5 import RepairedT5, relative_buckets, repair_t5  # noqa: E402

# Short distances and few buckets, so that all are in use; a smooth activation, for finite differences.
CONFIG = transformers.T5Config(
    vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, initializer_factor=2.0,
    relative_attention_num_buckets=8, relative_attention_max_distance=10, decoder_start_token_id=0,
    feed_forward_proj="gated-gelu",
)  # fmt: skip
IDS = jnp.array(np.random.default_rng(0).integers(3, 50, (2, 12)))
ANSWER = jnp.array(np.random.default_rng(1).integers(3, 50, (2, 9)))
STACKS = ("encoder", "decoder")
# float32 and two layers, logits of order 10; what is compared differs in the order of sums alone.
ROUNDING: Any = {"atol": 2e-4, "rtol": 1e-5}


@functools.cache
def wrapped() -> HFFlaxModel:
    with repair_t5():
        model = transformers.FlaxT5ForConditionalGeneration(CONFIG, seed=1)
    model._module = RepairedT5(model.module)
    return HFFlaxModel.wrap(model)


def adapted(*leaves: str) -> dict[str, Any]:
    """The model's variables, with these leaves of DAA moved from their start in every self-attention."""
    rng, tree = np.random.default_rng(3), {}
    for stack in STACKS:
        blocks = {}
        for layer in range(2):
            daa = {"alpha": np.ones(4), "beta": np.zeros(4), "position_bias": np.zeros((64, 4))}
            for leaf in leaves:
                daa[leaf] = daa[leaf] + rng.normal(size=daa[leaf].shape)
            leaves32 = {leaf: jnp.asarray(value, jnp.float32) for leaf, value in daa.items()}
            blocks[str(layer)] = {"layer": {"0": {"SelfAttention": leaves32}}}
        tree[stack] = {"block": blocks}
    return {"params": wrapped().params, "hylorada": tree}


@jax.jit
def run(variables, ids, answer, **inputs):
    return wrapped().forward(variables, ids, decoder_input_ids=answer, **inputs).logits


LEAVES = ("alpha", "beta", "position_bias")


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_the_loop_over_integers(bidirectional):
    """Exact arithmetic: bucket b begins at the least a with (a/X)^(N−X) ≥ (D/X)^(b−X)."""
    buckets, longest = 16, 40
    side = buckets // 2 if bidirectional else buckets
    exact = side // 2
    expected = np.zeros((60, 60), int)
    for q in range(60):
        for k in range(60):
            a = abs(q - k) if bidirectional else max(q - k, 0)
            bucket = a
            if a >= exact:
                bucket = max(
                    b
                    for b in range(exact, side)
                    if a ** (side - exact) * exact ** (b - exact)
                    >= longest ** (b - exact) * exact ** (side - exact)
                )
            expected[q, k] = bucket + (side if bidirectional and k > q else 0)
    ours = relative_buckets(60, 60, bidirectional=bidirectional, num_buckets=buckets, max_distance=longest)
    np.testing.assert_array_equal(ours, expected)


def test_a_repaired_model_can_be_called_initialised_and_copied():
    model = wrapped().model
    expected = model(IDS, decoder_input_ids=ANSWER).logits
    again = copy.deepcopy(model)
    np.testing.assert_array_equal(again(IDS, decoder_input_ids=ANSWER).logits, expected)
    shapes = jax.eval_shape(wrapped().init_params, jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, wrapped().params)


def test_daa_at_its_start_gives_hugging_faces_own_output():
    mask = jnp.ones_like(IDS).at[0, 7:].set(0).at[1, :3].set(0)
    expected = run({"params": wrapped().params}, IDS, ANSWER, attention_mask=mask)
    np.testing.assert_allclose(run(adapted(), IDS, ANSWER, attention_mask=mask), expected, **ROUNDING)


def test_alpha_and_the_position_bias_act_and_beta_alone_does_not():
    plain = run({"params": wrapped().params}, IDS, ANSWER)
    for leaf in LEAVES:
        moved = np.abs(run(adapted(leaf), IDS, ANSWER) - plain).max()
        assert moved < 2e-4 if leaf == "beta" else moved > 0.1, leaf


def test_daa_is_on_q_k_before_the_relative_bias():
    """α scales q kᵀ alone: the same as scaled queries. A bias per bucket of T5's own is T5's own table."""
    alpha = jnp.array([0.5, 2.0, -1.0, 1.5])
    variables, params = adapted(), jax.tree.map(lambda leaf: leaf, wrapped().params)
    for stack in STACKS:
        for layer in range(2):
            place = ("block", str(layer), "layer", "0", "SelfAttention")
            daa = functools.reduce(lambda tree, key: tree[key], place, variables["hylorada"][stack])
            daa["alpha"] = alpha
            own = functools.reduce(lambda tree, key: tree[key], place, params[stack])
            own["q"] = {"kernel": own["q"]["kernel"] * jnp.repeat(alpha, 4)}
    expected = run({"params": params}, IDS, ANSWER)
    np.testing.assert_allclose(run(variables, IDS, ANSWER), expected, **ROUNDING)


def test_padding_and_later_tokens_change_nothing():
    variables = adapted(*LEAVES)
    expected = run(variables, IDS, ANSWER)
    for front in (3, 0):
        around = ((0, 0), (front, 3 - front))
        mask = jnp.pad(jnp.ones_like(IDS), around)
        padded = run(variables, jnp.pad(IDS, around), ANSWER, attention_mask=mask)
        np.testing.assert_allclose(padded, expected, **ROUNDING)
    changed = run(variables, IDS, ANSWER.at[:, 5].add(-2)) - expected
    assert np.array_equal(np.abs(changed).max(axis=(0, 2)) > 0, np.arange(9) >= 5)


@pytest.mark.parametrize("leaves", [(), LEAVES], ids=["plain", "daa"])
def test_generation_with_the_cache_is_the_argmax_of_the_full_forward_pass(leaves):
    variables = adapted(*leaves) if leaves else {"params": wrapped().params}
    prompts = [IDS[0].tolist(), IDS[1, :5].tolist()]
    for prompt, answer in zip(
        prompts, wrapped().generate(prompts, variables=variables, max_new_tokens=6), strict=True
    ):
        logits = run(variables, jnp.array([prompt]), jnp.array([[0, *answer[:-1]]]))[0]
        best = np.sort(logits, axis=-1)
        assert (best[:, -1] - best[:, -2] > 1e-2).all()  # no tie that rounding could break
        assert answer == logits.argmax(axis=-1).tolist()


def test_gradients_under_jit_are_the_finite_differences():
    """Along a random direction through all of DAA, in float64 but for the norms, which stay in float32."""
    with jax.enable_x64(True):
        with repair_t5():
            module = type(wrapped().module.module)(CONFIG, dtype=jnp.float64)
        model = copy.copy(wrapped().model)
        model._module = RepairedT5(module)
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), adapted(*LEAVES))
        rng = np.random.default_rng(5)
        weight = jnp.asarray(rng.normal(size=(2, 9, 50)))
        direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), variables["hylorada"])

        @jax.jit
        def loss(step, daa=variables["hylorada"]):
            daa = jax.tree.map(lambda a, b: a + step * b, daa, direction)
            output = HFFlaxModel.wrap(model).forward(
                {**variables, "hylorada": daa}, IDS, decoder_input_ids=ANSWER
            )
            return jnp.mean(weight * output.logits)

        expected = (loss(1e-3) - loss(-1e-3)) / 2e-3
        # The norms' rounding 1e-7/1e-3, and a third derivative of 300 times 1e-6.
        np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.0), expected, atol=1e-3)
        assert abs(expected) > 0.1


def test_daa_in_cross_attention_is_refused():
    daa = {"alpha": jnp.ones(4), "beta": jnp.zeros(4)}
    cross = {"decoder": {"block": {"0": {"layer": {"1": {"EncDecAttention": daa}}}}}}
    with pytest.raises(ConfigError, match=r"EncDecAttention with cross-attention"):
        run({"params": wrapped().params, "hylorada": cross}, IDS, ANSWER)
