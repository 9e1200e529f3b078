import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

transformers = pytest.importorskip("hylorada_jax.models.hf.loading", exc_type=ImportError).transformers

from hylorada_jax.errors import ConfigError, ModelError  # noqa: E402
from hylorada_jax.models.hf.base import HFFlaxModel  # noqa: E402

GPT2 = transformers.GPT2Config(
    vocab_size=50, n_positions=48, n_embd=16, n_layer=2, n_head=4, initializer_range=0.3
)
BERT = {"vocab_size": 50, "max_position_embeddings": 48, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 24, "initializer_range": 0.3}  # fmt: skip
CONFIGS = {
    "gpt2": (transformers.FlaxGPT2LMHeadModel, GPT2),
    "bert": (transformers.FlaxBertForMaskedLM, transformers.BertConfig(**BERT)),
    # Only with cross-attention does Hugging Face's BERT decode with a cache.
    "bert decoder": (
        transformers.FlaxBertForCausalLM,
        transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True),
    ),
}
PLACES: dict[str, list[tuple[str, ...]]] = {
    "gpt2": [("transformer", "h", str(layer), "attn") for layer in range(2)],
    "bert": [("bert", "encoder", "layer", str(layer), "attention", "self") for layer in range(2)],
}
IDS = jnp.array(np.random.default_rng(0).integers(3, 50, (2, 14)))
# float32 and two layers, logits of order 1 to 10; what is compared differs in the order of sums alone.
ROUNDING: Any = {"atol": 3e-5, "rtol": 1e-5}


@functools.cache
def wrapped(name: str) -> HFFlaxModel:
    kind, config = CONFIGS[name]
    model = kind(config, seed=1)
    if name == "gpt2":
        # Its kernels start at 0.02 whatever the config says, and attention would hardly act.
        model.params = jax.tree.map(lambda leaf: 15 * leaf if leaf.ndim == 2 else leaf, model.params)
        model.params["transformer"]["wte"]["embedding"] /= 15
        model.params["transformer"]["wpe"]["embedding"] /= 15
    return HFFlaxModel.wrap(model)


@functools.cache
def adapted(name: str, *leaves: str) -> dict[str, Any]:
    """The model's variables, with these leaves of DAA moved from their start at every attention module."""
    rng = np.random.default_rng(3)
    tree: dict[str, Any] = {}
    for path in PLACES[name.split()[0]]:
        daa: dict[str, Any] = {"alpha": np.ones(4), "beta": np.zeros(4), "position_bias": np.zeros((64, 4))}
        for leaf in leaves:
            daa[leaf] = daa[leaf] + rng.normal(size=daa[leaf].shape)
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node |= {leaf: jnp.asarray(value, jnp.float32) for leaf, value in daa.items()}
    return {"params": wrapped(name).params, "hylorada": tree}


@functools.cache
def compiled(name: str, groups: tuple[int, int] | None = None):
    return jax.jit(lambda v, ids, **inputs: wrapped(name).forward(v, ids, groups=groups, **inputs).logits)


LEAVES = ("alpha", "beta", "position_bias")
every_model = pytest.mark.parametrize("name", CONFIGS)
with_and_without_daa = pytest.mark.parametrize("leaves", [(), LEAVES], ids=["plain", "daa"])


@every_model
def test_without_daa_the_output_is_that_of_hugging_faces_own_attention(name):
    model = wrapped(name)
    # Padding on the right and in the middle, in positions that the caller gives.
    mask = jnp.ones_like(IDS).at[0, 9:].set(0).at[1, 4].set(0)
    positions = jnp.arange(14)[None] + jnp.array([[0], [5]])
    expected = model.model(IDS, attention_mask=mask, position_ids=positions).logits
    variables = {"params": model.params}
    ours = compiled(name)(variables, IDS, attention_mask=mask, position_ids=positions)
    np.testing.assert_allclose(ours, expected, **ROUNDING)
    # Left to Hugging Face's code altogether.
    theirs = model.forward(
        variables, IDS, attention_mask=mask, position_ids=positions, output_attentions=True
    )
    np.testing.assert_allclose(theirs.logits, expected, **ROUNDING)


def test_head_mask_switches_heads_off():
    model, heads = wrapped("bert"), jnp.array([[1, 0, 1, 1], [0, 1, 1, 0]])
    expected = model.model(IDS, head_mask=heads).logits
    logits = model.forward({"params": model.params}, IDS, head_mask=heads).logits
    np.testing.assert_allclose(logits, expected, **ROUNDING)
    assert np.abs(expected - model.model(IDS).logits).max() > 0.1


def test_daa_is_the_formula_on_the_logits():
    """One head's logits, α·S + β + bias[bucket(q − k)], written out in float64."""
    from hylorada_jax.models.hf.attention import SharedAttention

    with jax.enable_x64(True):
        config = transformers.GPT2Config(n_embd=6, n_head=2, n_layer=1, n_positions=40, vocab_size=50)
        module = transformers.models.gpt2.modeling_flax_gpt2.FlaxGPT2Attention(config, dtype=jnp.float64)
        rng = np.random.default_rng(0)
        x, positions = rng.normal(size=(1, 5, 6)), np.array([[0, 1, 7, 20, 39]])
        params = {
            "c_attn": {"kernel": rng.normal(size=(18, 6)), "bias": rng.normal(size=18)},
            "c_proj": {"kernel": np.eye(6), "bias": np.zeros(6)},
        }
        alpha, beta, table = rng.normal(size=2), rng.normal(size=2), rng.normal(size=(64, 2))
        context = SharedAttention()
        context._position_ids, context._attention_mask = jnp.asarray(positions), jnp.ones((1, 5), int)
        daa = {"alpha": alpha, "beta": beta, "position_bias": table}
        with context:
            (output,) = module.apply(jax.tree.map(jnp.asarray, {"params": params, "hylorada": daa}), x)

        projected = x[0] @ params["c_attn"]["kernel"].T + params["c_attn"]["bias"]
        query, key, value = (part.reshape(5, 2, 3) for part in np.split(projected, 3, axis=1))
        # method.md §2: N = 64, H = 32, X = 16, M = 32768.
        offset = positions[0][:, None] - positions[0][None]
        far = 16 + np.floor(np.log(np.maximum(np.abs(offset), 16) / 16) / np.log(2048) * 16)
        bucket = np.where(np.abs(offset) < 16, np.abs(offset), far).astype(int) + 32 * (offset < 0)
        for h in range(2):
            logits = alpha[h] * (query[:, h] @ key[:, h].T) / np.sqrt(3) + beta[h] + table[bucket, h]
            weights = np.exp(np.where(np.tri(5, dtype=bool), logits, -np.inf))
            expected = (weights / weights.sum(axis=1, keepdims=True)) @ value[:, h]
            # float64 rounding.
            np.testing.assert_allclose(output[0, :, 3 * h : 3 * h + 3], expected, atol=1e-13, rtol=1e-13)


@every_model
def test_alpha_and_the_position_bias_act_and_beta_alone_does_not(name):
    plain = compiled(name)({"params": wrapped(name).params}, IDS)
    for leaf in LEAVES:
        moved = np.abs(compiled(name)(adapted(name, leaf), IDS) - plain).max()
        # The softmax does not see what is added to a whole row.
        assert moved < 3e-5 if leaf == "beta" else moved > 0.1, leaf


@with_and_without_daa
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_packed_documents_equal_the_documents_alone(name, leaves):
    variables, run = adapted(name, *leaves), compiled(name)
    row = jnp.concatenate([IDS[:1, :5], IDS[1:, :7], jnp.zeros((1, 2), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 7 + [0] * 2])
    packed = run(variables, row, segment_ids=segments)
    assert np.isfinite(packed).all()
    np.testing.assert_allclose(packed[:, :5], run(variables, IDS[:1, :5]), **ROUNDING)
    np.testing.assert_allclose(packed[:, 5:12], run(variables, IDS[1:, :7]), **ROUNDING)


@with_and_without_daa
@every_model
def test_padding_on_either_side_equals_the_plain_sequence(name, leaves):
    variables, run = adapted(name, *leaves), compiled(name)
    expected = run(variables, IDS[:, :10])
    for front in (3, 0):
        padded = jnp.pad(IDS[:, :10], ((0, 0), (front, 3 - front)))
        mask = jnp.pad(jnp.ones((2, 10), jnp.int32), ((0, 0), (front, 3 - front)))
        logits = run(variables, padded, attention_mask=mask)
        np.testing.assert_allclose(logits[:, front : front + 10], expected, **ROUNDING)


@with_and_without_daa
@pytest.mark.parametrize("name", ["gpt2", "bert decoder"])
def test_generation_with_the_cache_is_the_argmax_of_the_full_forward_pass(name, leaves):
    variables = adapted(name, *leaves)
    prompts = [IDS[0, :9].tolist(), IDS[1, :4].tolist()]
    answers = wrapped(name).generate(prompts, variables=variables, max_new_tokens=6)
    for prompt, answer in zip(prompts, answers, strict=True):
        row = jnp.array([[*prompt, *answer]])
        logits = wrapped(name).forward(variables, row).logits[0, len(prompt) - 1 : -1]
        best = np.sort(logits, axis=-1)
        assert (best[:, -1] - best[:, -2] > 1e-3).all()  # no tie that rounding could break
        assert answer == logits.argmax(axis=-1).tolist()


@with_and_without_daa
@pytest.mark.parametrize("name", ["gpt2", "bert decoder"])
def test_no_later_token_moves_an_earlier_logit(name, leaves):
    variables, run = adapted(name, *leaves), compiled(name)
    changed = run(variables, IDS.at[:, 8].add(-2)) - run(variables, IDS)
    assert np.array_equal(np.abs(changed).max(axis=(0, 2)) > 0, np.arange(14) >= 8)


def receptive_field(run, variables, length: int) -> np.ndarray:
    """[token, logit]: whether changing the token changes the logit."""
    ids = IDS[:1, :length]
    rows = jnp.repeat(ids, length, axis=0) + jnp.eye(length, dtype=int)
    return np.abs(run(variables, rows) - run(variables, ids)).max(axis=-1) > 1e-5


@with_and_without_daa
@pytest.mark.parametrize("length", [8, 14])
def test_groups_of_gpt2_see_what_shifted_sparse_attention_sees(length, leaves):
    size, shift = 4, 2
    place = np.arange(length)
    causal = place[:, None] <= place[None, :]
    plain = causal & (place[:, None] // size == place[None] // size)
    shifted = causal & ((place[:, None] + size - shift) // size == (place[None] + size - shift) // size)
    one_layer = plain | shifted
    two_layers = (one_layer.astype(int) @ one_layer.astype(int)) > 0
    field = receptive_field(compiled("gpt2", (size, shift)), adapted("gpt2", *leaves), length)
    np.testing.assert_array_equal(field, two_layers)
    assert not np.array_equal(two_layers, causal)


def test_groups_respect_documents():
    variables = adapted("gpt2", *LEAVES)
    segments = jnp.array([[1] * 6 + [2] * 8])
    run = functools.partial(compiled("gpt2", (4, 2)), variables, segment_ids=segments)
    changed = run(IDS[:1].at[0, 5].add(-2)) - run(IDS[:1])
    assert np.array_equal(np.flatnonzero(np.abs(changed).max(axis=(0, 2)) > 0), [5])


def test_gradients_under_jit_are_the_finite_differences():
    """Along a random direction through all weights and all of DAA, packed and in groups, in float64."""
    with jax.enable_x64(True):
        model = HFFlaxModel.wrap(transformers.FlaxGPT2LMHeadModel(GPT2, seed=1, dtype=jnp.float64))
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), adapted("gpt2", *LEAVES))
        segments = jnp.array([[1] * 5 + [2] * 9, [1] * 12 + [0] * 2])
        weight = jnp.asarray(np.random.default_rng(5).normal(size=(2, 14, 50)))

        for groups in (None, (4, 2)):

            @jax.jit
            def loss(v, groups=groups):
                return jnp.sum(weight * model.forward(v, IDS, segment_ids=segments, groups=groups).logits)

            rng = np.random.default_rng(6)
            direction = jax.tree.map(lambda leaf, r=rng: jnp.asarray(r.normal(size=leaf.shape)), variables)
            ahead, behind = (
                jax.tree.map(lambda a, b, s=step: a + s * b, variables, direction) for step in (1e-6, -1e-6)
            )
            expected = (loss(ahead) - loss(behind)) / 2e-6
            gradient = jax.jit(jax.grad(loss))(variables)
            products = jax.tree.map(jnp.vdot, gradient, direction)
            # Central differences at 1e-6: rounding 1e-16/1e-6 and a third derivative times 1e-12, of O(1000).
            np.testing.assert_allclose(sum(jax.tree.leaves(products)), expected, rtol=1e-6)
            for leaf in ("alpha", "position_bias"):
                assert np.abs(gradient["hylorada"]["transformer"]["h"]["0"]["attn"][leaf]).max() > 1e-3


def test_what_hugging_faces_attention_would_ignore_is_refused():
    model, variables = wrapped("gpt2"), adapted("gpt2")
    with pytest.raises(ConfigError, match=r"attention adaptation at transformer\.h\.0\.attn with output_att"):
        model.forward(variables, IDS, output_attentions=True)
    plain = {"params": model.params}
    training: dict[str, Any] = {"train": True, "dropout_rng": jax.random.PRNGKey(0)}
    with pytest.raises(ConfigError, match=r"segment_ids, groups at [\s\S]*own dropout"):
        model.forward(plain, IDS, segment_ids=jnp.ones_like(IDS), groups=(4, 2), **training)
    with pytest.raises(ModelError, match=r"received: groups=\(4, 2\) for FlaxBertForMaskedLM"):
        wrapped("bert").forward({"params": wrapped("bert").params}, IDS, groups=(4, 2))
    three = {"transformer": {"h": {"0": {"attn": {"alpha": jnp.ones(3), "beta": jnp.ones(3)}}}}}
    with pytest.raises(ConfigError, match="for 4 heads"):
        model.forward({**plain, "hylorada": three}, IDS)
    uncached = transformers.BertConfig(**BERT, is_decoder=True)
    with pytest.raises(ModelError, match="add_cross_attention=True"):
        HFFlaxModel.wrap(transformers.FlaxBertForCausalLM(uncached)).generate([[5]], max_new_tokens=2)
