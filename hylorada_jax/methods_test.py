"""Every method in every kind of model is alive: what is on acts and learns, what is off is not there."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hylorada_jax.config import METHODS, HyLoRADAConfig
from hylorada_jax.errors import ConfigError, DataError, ModelError
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.causal_lm import CausalLM, DecodeStep
from hylorada_jax.models.decoder import DecoderLM
from hylorada_jax.models.decoder_config import DecoderConfig
from hylorada_jax.surgery import layout
from hylorada_jax.surgery.intercept import adapt
from hylorada_jax.surgery.plan import count_parameters
from hylorada_jax.surgery.split import join, split
from hylorada_jax.trees import COLLECTION

VOCAB, LENGTH = 29, 12
DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}
# A sparse adapter is an option of every method; here the full method has it, so that all are on together.
CONFIGS = {
    method: HyLoRADAConfig(
        method=method,
        lora_rank=2,
        sparse_adapter_dim=8,
        sparse_topk_ratio=0.5,
        s2_group_size=4,
        sparse_enabled=True if method in ("sparse", "hylorada") else None,
    )
    for method in METHODS
}
FAMILIES = ("gpt2", "qwen2")
# Quick: the fullest of the methods without a structure encoder, and the plainest.
QUICK = {("hylorada", "llama"), ("lora", "qwen2")}
# GPT-2 differs in its attention, names and embeddings: of the linear adapters the fullest and the plainest.
# Llama's is Qwen2's decoder, without its biases and with a head of its own: once, with all that is on.
# The linear methods between these two are parts of the full one.
PARTS = {("lorada", "qwen2"), ("dora", "qwen2"), ("hylorada_v1", "qwen2")}
CASES = [
    pytest.param(
        *case, marks=() if case in QUICK else pytest.mark.apart if case in PARTS else pytest.mark.slow
    )
    for case in [
        *itertools.product(CONFIGS, ("qwen2",)),
        *itertools.product(("longlora", "sparse", "hylorada_v2", "hylorada"), ("gpt2",)),
        ("hylorada", "llama"),
    ]
]
every_case = pytest.mark.parametrize(("method", "family"), CASES)
# float32 logits of order 1 after two layers; what is compared differs in the order of sums alone.
ROUNDING = 2e-5


@functools.cache
def base_model(family):
    if family == "gpt2":
        hf = pytest.importorskip("hylorada_jax.models.hf.loading", exc_type=ImportError).transformers
        # c_attn alone holds q, k and v; biases everywhere.
        config = hf.GPT2Config(
            n_layer=2, n_head=2, n_embd=8, vocab_size=VOCAB, n_positions=32, initializer_range=0.3
        )
        return hf.FlaxGPT2LMHeadModel(config, seed=0)
    options: dict[str, dict[str, Any]] = {
        "llama": {"tie_word_embeddings": False},
        "qwen2": {"tie_word_embeddings": True},
        "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    }
    shape = DecoderConfig.from_hf({"model_type": family, **DECODER, **options[family]})
    return CausalLM.from_config(shape, jax.random.key(0))


@functools.cache
def adapted(config, family):
    return HyLoRADAModel(base_model(family), config)


@functools.cache
def moved(config, family):
    """Adapters far from their start, all leaves of them."""
    model, rng = adapted(config, family), np.random.default_rng(1)
    tensors = {
        name: (leaf + 0.3 * rng.normal(size=leaf.shape)).astype(np.float32)
        for name, leaf in layout.flatten(model.sites, model.adapters).items()
    }
    return layout.unflatten(model.sites, tensors)


@functools.cache
def inputs(config):
    """A batch of tokens, and structure ids where the method reads them."""
    rng = np.random.default_rng(2)
    given = {"input_ids": jnp.asarray(rng.integers(VOCAB, size=(2, LENGTH)))}
    if config.use_hylorada_v2:
        given["structure_ids"] = jnp.asarray(rng.integers(8, size=(2, LENGTH)))
    return given


@functools.cache
def in_training(config, family):
    """(adapters, inputs, key) → logits in training mode, compiled once."""
    model = adapted(config, family)
    run = jax.jit(
        lambda adapters, frozen, given, key: (
            model.apply(adapters, train=True, rngs={"dropout": key}, frozen=frozen, **given).logits
        )
    )
    return lambda adapters, given, seed=0: np.asarray(
        run(adapters, model.frozen, given, jax.random.key(seed))
    )


def logits(config, family, adapters, given):
    """As a user gets them, in evaluation mode."""
    model = adapted(config, family)
    model.adapters, before = adapters, model.adapters
    try:
        return np.asarray(model(**{name: jnp.asarray(value) for name, value in given.items()}).logits)
    finally:
        model.adapters = before


@every_case
def test_a_fresh_adapter_changes_nothing(method, family):
    config = CONFIGS[method]
    given = inputs(config)
    plain = base_model(family)(given["input_ids"]).logits
    np.testing.assert_allclose(
        logits(config, family, adapted(config, family).adapters, given), plain, atol=ROUNDING
    )
    assert np.abs(logits(config, family, moved(config, family), given) - plain).max() > 0.01


def components(model):
    """{component: its leaves' paths}; a leaf's name and place say what it is for."""
    found: dict[str, list] = {}
    for site in model.sites:
        for leaf in site.leaves:
            kind = site.component
            if kind == "linear":
                kind = leaf if leaf in ("scale_from_structure", "position_scale", "magnitude") else "low rank"
                kind = "gates" if leaf in ("magnitude_gate", "residual_weight") else kind
            if kind == "daa":
                kind = f"daa {leaf}"
            found.setdefault(kind, []).append((*site.module.path, leaf))
    return found


@every_case
def test_every_component_learns_and_acts(method, family):
    """Three steps of plain gradient descent: gradients arrive, and no component could be left out again."""
    config = CONFIGS[method]
    model, given = adapted(config, family), inputs(config)
    targets = jnp.roll(given["input_ids"], -1, axis=1)

    @jax.jit
    def losses_and_gradient(adapters, frozen):
        def loss(adapters):
            logits = model.apply(adapters, train=True, frozen=frozen, **given).logits
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
            return nll.mean(), nll

        (_, nll), gradient = jax.value_and_grad(loss, has_aux=True)(adapters)
        return nll, gradient

    adapters, seen = model.adapters, dict[str, int]()
    for step in range(1, 5):
        _, gradient = losses_and_gradient(adapters, model.frozen)
        for component, paths in components(model).items():
            if all(np.abs(np.asarray(get(gradient, path))).max() > 0 for path in paths):
                seen.setdefault(component, step)
        # Every leaf moves, and by less each time, so that none comes back to where it was; but not by a
        # gradient that is rounding alone, as that of DAA's β, which would make noise of the others.
        adapters = jax.tree.map(
            lambda a, g, rate=0.5 / step: a - rate * g / (1e-6 + jnp.abs(g).max()), adapters, gradient
        )
    # lora_B, up and scale_from_structure start at 0: what they multiply waits for them.
    waits = {"structure_encoder": 3, "position_scale": 3}
    late = {name: seen.get(name) for name in components(model) if seen.get(name, 9) > waits.get(name, 2)}
    assert not late, seen

    losses, _ = losses_and_gradient(adapters, model.frozen)
    for component, paths in components(model).items():
        _, fresh = split(model.adapters, paths)
        without, _ = losses_and_gradient(join(adapters, fresh), model.frozen)
        change = float(jnp.abs(without - losses).max())
        # DAA's β is constant along every row: the softmax does not see it.
        assert change < ROUNDING if component == "daa beta" else change > 10 * ROUNDING, (component, change)


def get(tree, path):
    for key in path:
        tree = tree[key]
    return tree


@every_case
def test_no_later_token_moves_an_earlier_logit(method, family):
    config = CONFIGS[method]
    given, adapters = inputs(config), moved(config, family)
    changed = {name: value.at[:, 7].set((value[:, 7] + 1) % VOCAB) for name, value in given.items()}
    runs = [functools.partial(logits, config, family)]
    if config.s2_attn_enabled:
        runs.append(in_training(config, family))
    for run in runs:
        before, after = run(adapters, given), run(adapters, changed)
        np.testing.assert_array_equal(after[:, :7], before[:, :7])
        assert (after[:, 7] != before[:, 7]).any()


@every_case
def test_padding_and_packing_give_the_plain_numbers(method, family):
    config = CONFIGS[method]
    run, given = functools.partial(logits, config, family, moved(config, family)), inputs(config)
    plain = run(given)
    for left, right in ((3, 0), (0, 3)):
        pad = lambda value, cut=(left, right): np.pad(value, ((0, 0), cut))
        rows = {name: pad(value) for name, value in given.items()}
        got = run(rows | {"attention_mask": pad(np.ones((2, LENGTH), np.int32))})
        np.testing.assert_allclose(got[:, left : left + LENGTH], plain, atol=ROUNDING)
    row = {name: np.reshape(value, (1, -1)) for name, value in given.items()}
    got = run(row | {"segment_ids": np.repeat([[1, 2]], LENGTH, axis=1)})
    np.testing.assert_allclose(got.reshape(plain.shape), plain, atol=ROUNDING)


@every_case
def test_decoding_with_a_cache_gives_the_plain_numbers(method, family):
    config = CONFIGS[method]
    model, given = adapted(config, family), inputs(config)
    prompts = [np.asarray(given["input_ids"][row, :length]).tolist() for row, length in ((0, 8), (1, 5))]
    structure = {}
    if "structure_ids" in given:
        # New tokens go on with the last id of their prompt.
        ids = np.array(given["structure_ids"])
        ids[0, 8:], ids[1, 5:] = ids[0, 7], ids[1, 4]
        structure = {"structure_ids": ids}
    prompt_ids = {name: [ids[0, :8].tolist(), ids[1, :5].tolist()] for name, ids in structure.items()}
    model.adapters, before = moved(config, family), model.adapters
    try:
        new = model.generate(prompts, max_new_tokens=4, **prompt_ids)
    finally:
        model.adapters = before
    rows = np.zeros((2, LENGTH), np.int32)
    for row, prompt, tokens in zip(rows, prompts, new, strict=True):
        row[: len(prompt) + 4] = prompt + tokens
    expected = logits(config, family, moved(config, family), {"input_ids": rows} | structure).argmax(-1)
    assert new == [expected[0, 7:11].tolist(), expected[1, 4:8].tolist()]


def test_cached_logits_of_an_adapted_model_are_the_full_ones():
    """A prompt padded in front, single tokens, and a chunk; generation above compares the largest alone."""
    config = CONFIGS["hylorada"]
    model, adapters, ids = adapted(config, "qwen2"), moved(config, "qwen2"), inputs(config)["input_ids"]
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    full = model.apply(adapters, ids, attention_mask=jnp.asarray(mask)).logits
    positions = jnp.asarray(np.maximum(mask.cumsum(1) - 1, 0))
    resolved, step, start = model.resolve(adapters), DecodeStep(model.base.module), 0
    cache = model.base.init_cache(2, LENGTH)
    with adapt(resolved, config):
        for end in (5, 6, 7, LENGTH):
            part = slice(start, end)
            logits, cache = step(
                {"params": model.base.params, COLLECTION: resolved},
                ids[:, part],
                position_ids=positions[:, part],
                key_valid=jnp.asarray(mask[:, part] > 0),
                cache=cache,
            )
            np.testing.assert_allclose(logits, full[:, end - 1], rtol=0, atol=ROUNDING)
            start = end


@pytest.mark.parametrize("method", ["hylorada", "hylorada_v2"])
def test_a_stream_of_an_adapted_model_gives_the_tokens_of_generate(method):
    config = CONFIGS[method]
    model = HyLoRADAModel(base_model("qwen2"), config)
    model.adapters = moved(config, "qwen2")
    prompt, ids = [3, 1, 4, 1, 5], [2, 2, 3, 3, 1]
    structure: dict[str, Any] = {"structure_ids": ids} if config.use_hylorada_v2 else {}
    settings: dict[str, Any] = {
        "max_new_tokens": 9,
        "temperature": 0.8,
        "rng": jax.random.key(0),
        "eos_token_id": (),
    }
    expected = model.generate([prompt], **{name: [each] for name, each in structure.items()}, **settings)
    assert [[t for some in model.stream(prompt, **structure, **settings) for t in some]] == expected
    with model.disable_adapter():
        plain = [t for some in model.stream(prompt, **settings) for t in some]
    assert [plain] == base_model("qwen2").generate([prompt], **settings) != expected


@every_case
def test_evaluation_drops_nothing(method, family):
    """With dropout and without, evaluation is one program; training draws."""
    dropping = dataclasses.replace(CONFIGS[method], lora_dropout=0.4, sparse_dropout=0.4)
    # As lowered: the rate is an input of both, which an evaluation does not read.
    one, other = (traced(config, family).lower().as_text() for config in (dropping, CONFIGS[method]))
    assert one == other
    assert "random_bits" in str(traced(dropping, family, train=True).jaxpr)
    assert "random_bits" not in str(traced(CONFIGS[method], family, train=True).jaxpr)


def traced(config, family, train=False):
    model, given = adapted(config, family), inputs(config)

    def run(adapters, frozen, given, key):
        rngs = {"dropout": key}
        return model.apply(adapters, frozen=frozen, train=train, rngs=rngs, **given).logits

    return jax.jit(run).trace(model.adapters, model.frozen, given, jax.random.key(0))


@every_case
def test_counts_are_those_of_the_live_tree(method, family):
    model = adapted(CONFIGS[method], family)
    assert count_parameters(model.sites) == sum(leaf.size for leaf in jax.tree.leaves(model.adapters))


@every_case
def test_a_second_call_compiles_nothing(method, family):
    config = CONFIGS[method]
    given = inputs(config)
    logits(config, family, adapted(config, family).adapters, given)
    before = adapted(config, family)._jitted._cache_size()
    logits(config, family, moved(config, family), {name: jnp.roll(value, 1) for name, value in given.items()})
    assert adapted(config, family)._jitted._cache_size() == before > 0


def flops(config, family, train=False):
    model, given = adapted(config, family), inputs(config)
    run = jax.jit(
        lambda adapters, frozen, given: model.apply(adapters, frozen=frozen, train=train, **given).logits
    )
    return run.lower(model.adapters, model.frozen, given).compile().cost_analysis()["flops"]  # type: ignore[index]


QKVO = ("q", "k", "v", "o")
LORA = HyLoRADAConfig(method="lora", target_modules=QKVO, lora_rank=2)
OFF = [
    ("lorada", {"daa_enabled": False}, LORA),
    ("longlora", {"s2_attn_enabled": False, "train_embeddings": False, "train_norms": False}, LORA),
    (
        "hylorada",
        {
            "position_bias_enabled": False,
            "daa_enabled": False,
            "daa_position_bias": False,
            "sparse_enabled": False,
        },
        HyLoRADAConfig(method="hylorada_v1", lora_rank=2),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "off", "plain"), OFF)
def test_what_is_off_leaves_no_parameter_and_no_operation(method, off, plain, family):
    config = dataclasses.replace(CONFIGS[method], **off)
    shapes = [layout.tensor_shapes(adapted(c, family).sites) for c in (config, plain)]
    assert shapes[0] == shapes[1]
    assert flops(config, family, train=True) == flops(plain, family, train=True)
    # What is on costs something; shifted attention costs less, and only in training.
    assert flops(CONFIGS[method], family, train=True) != flops(plain, family, train=True)
    if method == "longlora":
        assert flops(CONFIGS[method], family) == flops(plain, family)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "method", "family"),
    [
        ("dots", "hylorada", "qwen2"),
        ("full", "longlora", "qwen2"),
        ("full", "hylorada_v2", "qwen2"),
        ("dots", "hylorada_v1", "mixtral"),  # each expert with an adapter
    ],
)
def test_rematerialisation_changes_no_gradient(remat, method, family):
    config, base = CONFIGS[method], base_model(family)
    if family == "mixtral":
        config = dataclasses.replace(config, target_modules=("all-linear",))
    given, adapters = inputs(config), moved(config, family)
    wide = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)

    def gradient(base):
        model = HyLoRADAModel(base, config)
        loss = lambda adapters, frozen: (
            model.apply(adapters, frozen=frozen, train=True, **given).logits ** 2
        ).mean()
        return jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(wide(adapters), model.frozen))

    with jax.enable_x64(True):
        base = base.with_params(wide(base.params))
        again = dataclasses.replace(base, module=DecoderLM(base.config, remat))
        got, expected = gradient(again), gradient(base)
    sizes = [np.abs(value).max() for _, value in expected]
    for (path, found), (_, value), size in zip(got, expected, sizes, strict=True):
        if path[-1].key == "beta":  # which the softmax does not see: its own is zero
            size = max(sizes)
        # float64, whose sums XLA may fuse otherwise.
        np.testing.assert_allclose(
            found, value, rtol=0, atol=1e-11 * size, err_msg=jax.tree_util.keystr(path)
        )


def test_the_receptive_field_of_shifted_attention():
    """One layer: a token moves the later ones of its plain and of its shifted group, and no other."""
    shape = DecoderConfig.from_hf({"model_type": "llama", **DECODER, "num_hidden_layers": 1})
    base = CausalLM.from_config(shape, jax.random.key(0))
    model = HyLoRADAModel(base, dataclasses.replace(CONFIGS["longlora"], s2_shift_ratio=0.25))
    ids = np.random.default_rng(3).integers(VOCAB, size=14)
    segments = np.array([1] * 9 + [2] * 5)
    # Row t has token t changed; row 14 none. Groups of 4; the shifted ones begin one token later.
    rows = np.stack([np.where(np.arange(14) == t, (ids + 1) % VOCAB, ids) for t in range(15)])
    logits = model.apply(
        model.adapters, jnp.asarray(rows), segment_ids=jnp.asarray([segments] * 15), train=True
    ).logits
    moves = np.abs(logits[:-1] - logits[-1]).max(-1) > 0
    slot = np.arange(14)
    together = np.zeros((14, 14), bool)
    for group in (slot // 4, (slot + 3) // 4):
        together |= group[:, None] == group[None, :]
    later = slot[:, None] <= slot[None, :]
    np.testing.assert_array_equal(moves, together & later & (segments[:, None] == segments[None, :]))


@pytest.mark.slow
def test_the_bias_of_distances_is_not_kept_for_the_backward_pass():
    """Memory that grows with the depth: the same with DAA's position bias as without it."""

    def temporary_bytes(depth, **daa):
        options = {"num_hidden_layers": depth, "tie_word_embeddings": True}
        shape = DecoderConfig.from_hf({"model_type": "llama", **DECODER, **options})
        config = dataclasses.replace(CONFIGS["lora"], **daa)
        model = HyLoRADAModel(CausalLM.from_config(shape, jax.random.key(0)), config)
        ids = jnp.zeros((1, 64), jnp.int32)
        loss = lambda adapters, frozen: (model.apply(adapters, ids, frozen=frozen).logits ** 2).sum()
        compiled = jax.jit(jax.grad(loss)).lower(model.adapters, model.frozen).compile()
        return compiled.memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]

    growth = [
        temporary_bytes(6, **daa) - temporary_bytes(2, **daa)
        for daa in ({}, {"daa_enabled": True, "daa_position_bias": True})
    ]
    one_bias = DECODER["num_attention_heads"] * 64 * 64 * 4
    assert growth[1] - growth[0] < 0.5 * one_bias  # four layers more; kept, it would be four of them


SWITCHES = {
    "daa_enabled": {"alpha", "beta"},
    "sparse_enabled": {"down", "up", "gate_scores"},
    "s2_attn_enabled": set(),
    "train_embeddings": {"weight"},
    "train_norms": {"weight"},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_component_can_be_switched_on_alone(switch):
    alone = dataclasses.replace(CONFIGS["lora"], **{switch: True})  # type: ignore[arg-type]
    names = [layout.tensor_shapes(adapted(c, "qwen2").sites) for c in (alone, CONFIGS["lora"])]
    added = {name.rsplit(".", 1)[-1] for name in set(names[0]) - set(names[1])}
    assert added - {"bias"} == SWITCHES[switch]
    run = [in_training(c, "qwen2")(moved(c, "qwen2"), inputs(c)) for c in (alone, CONFIGS["lora"])]
    assert np.abs(run[0] - run[1]).max() > 1e-3


# What keeps a method from being merged; after setting it to its neutral value, the rest can be. What can be
# merged as it is, parity_tests/test_models.py merges.
LIVE = {
    "hylorada_v2": {"scale_from_structure": 0.0},
    "hylorada": {"position_bias": 0.0, "alpha": 1.0, "up": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", LIVE)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_cannot_be_merged_is_refused_by_name_and_without_it_merging_changes_nothing(method, family):
    config = CONFIGS[method]
    model, given = HyLoRADAModel(base_model(family), config), inputs(config)
    model.adapters = moved(config, family)
    with pytest.raises(ModelError) as caught:
        model.merge_and_unload()
    assert all(leaf in str(caught.value) for leaf in LIVE[method])
    tensors = layout.flatten(model.sites, model.adapters)
    for name, tensor in tensors.items():
        if (leaf := name.rsplit(".", 1)[-1]) in LIVE[method]:
            tensors[name] = np.full_like(tensor, LIVE[method][leaf])
    model.adapters = layout.unflatten(model.sites, tensors)
    expected = np.asarray(model(**given).logits)
    merged = model.merge_and_unload()
    np.testing.assert_allclose(merged(given["input_ids"]).logits, expected, atol=ROUNDING)
    assert np.abs(expected - base_model(family)(given["input_ids"]).logits).max() > 0.01


def test_bad_structure_and_positions_are_refused():
    v2, v1 = adapted(CONFIGS["hylorada_v2"], "qwen2"), adapted(CONFIGS["hylorada_v1"], "qwen2")
    ids = jnp.ones((2, 4), jnp.int32)
    with pytest.raises(DataError, match=r"\(2, 5\)"):
        v2(ids, structure_ids=jnp.ones((2, 5), jnp.int32))
    with pytest.raises(ConfigError, match="hylorada_v2"):
        v1(ids, structure_ids=ids)
    with pytest.raises(DataError, match="lengths"):
        v2.generate([[1, 2]], structure_ids=[[1]], max_new_tokens=1)
    with pytest.raises(DataError, match="-1"):
        v1(ids, position_ids=ids - 2)
    one_head = DecoderConfig.from_hf({"model_type": "llama", **DECODER, "num_attention_heads": 1})
    base = CausalLM.from_config(one_head, jax.random.key(0))
    with pytest.raises(ConfigError, match="halves the heads"):
        HyLoRADAModel(base, CONFIGS["longlora"])


def test_split_and_join_are_inverses():
    params = base_model("qwen2").params
    paths = [("model", "embed_tokens", "embedding"), ("model", "layers", "input_layernorm", "scale")]
    rest, taken = split(params, paths)
    assert str(jax.tree.structure(join(rest, taken))) == str(jax.tree.structure(params))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a is b, join(rest, taken), params)))
    assert len(jax.tree.leaves(taken)) == 2
