import json
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError, ConfigError, DataError, ModelError
from hylorada_jax.saved.adapter_files import write_adapter
from hylorada_jax.saved.base_identity import base_identity
from hylorada_torch.conftest import CAUSAL_MODELS, INPUT_IDS, base_model, randomize
from hylorada_torch.model import HyLoRADAModel

SHAPES = (("A", (8, 9)), ("B", (9, 8)))


def small_model(seed=0):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False))
    return HyLoRADAModel(
        base, HyLoRADAConfig(use_hylorada=True, lora_rank=2, target_modules=("0", "2")), seed=seed
    )


def test_adapters_are_named_by_layer_and_leaf():
    leaves = ("lora_A", "lora_B", "magnitude", "magnitude_gate", "residual_weight")
    assert list(small_model().adapters()) == [f"{layer}.{leaf}" for layer in "02" for leaf in leaves]


def test_loading_reproduces_the_model():
    trained, fresh = small_model(seed=0), small_model(seed=1)
    with torch.no_grad():
        for value in trained.adapters().values():
            value.add_(torch.randn_like(value))
    x = torch.randn(2, 5, 4)
    assert not torch.equal(fresh(x), trained(x))
    fresh.load_adapters(trained.adapters())
    assert torch.equal(fresh(x), trained(x))


def test_loading_what_does_not_fit_changes_nothing():
    model = small_model()
    before = {name: value.detach().clone() for name, value in model.adapters().items()}
    wrong = {name: value + 1 for name, value in before.items()}
    wrong["0.lora_C"] = wrong.pop("0.lora_B")
    wrong["2.lora_A"] = wrong["2.lora_A"][:1]
    with pytest.raises(CheckpointError) as error:
        model.load_adapters(wrong)
    for part in ("missing 0.lora_B", "unknown 0.lora_C", "2.lora_A is (1, 6), not (2, 6)"):
        assert part in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.adapters().items())


@pytest.mark.parametrize("names", [("block_0", "block_1"), ("fc", "out")])
def test_an_adapter_whose_depths_were_read_otherwise_keeps_its_ranks(names, tmp_path):
    """Of a version to which these names had no depth: each layer has the full rank."""
    layers = OrderedDict((name, nn.Linear(9, 9, bias=False)) for name in names)
    base = nn.Sequential(layers)
    config = HyLoRADAConfig(
        method="lora", lora_rank=8, rank_strategy="decreasing", target_modules="all-linear"
    )
    leaves = {f"{name}.lora_{leaf}": torch.randn(*shape).numpy() for name in names for leaf, shape in SHAPES}
    write_adapter(tmp_path, leaves, config, base_identity(None, None, [(name, 9, 9) for name in names]))
    x = expected = torch.randn(4, 9)
    for name, layer in layers.items():
        A, B = (torch.from_numpy(leaves[f"{name}.lora_{leaf}"]) for leaf in "AB")
        s = config.lora_alpha / config.lora_rank
        expected = expected @ layer.weight.T + s * expected @ A.T @ B.T
    model = HyLoRADAModel.from_pretrained(base, tmp_path)
    # Sums of nine products in float32, in another order.
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=atol)


def test_print_trainable_parameters(capsys):
    small_model().print_trainable_parameters()
    # 2·4 + 6·2 + 6 + 2 and 2·6 + 3·2 + 3 + 2 adapter parameters; 4·6 + 6 + 6·3 frozen ones.
    assert capsys.readouterr().out == "trainable params: 51 || all params: 99 || trainable%: 51.5152\n"


@pytest.mark.parametrize(
    ("name", "recorded"), [("owner/model", "owner/model"), ("models/tiny", "./models/tiny")]
)
def test_a_base_from_a_path_that_looks_like_a_hub_name_is_recorded_as_a_path(
    name, recorded, tmp_path, monkeypatch
):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    base = base_model("gpt2")
    base.config._name_or_path = name
    HyLoRADAModel(base, HyLoRADAConfig(method="lora")).save_pretrained("adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model"]["name"] == recorded


# In a whole model: positions, masks, caches, groups. All weights and adapters are random, in float64.

METHODS: dict[str, dict[str, Any]] = {
    "unified": {"method": "hylorada", "sparse_enabled": True, "s2_attn_enabled": True, "s2_group_size": 4},
    "v2": {"method": "hylorada_v2", "structure_seq_len": 16},
}
WINDOW = 5  # of conftest's Mistral


def random_model(name, method="unified"):
    model = HyLoRADAModel(base_model(name), HyLoRADAConfig(lora_rank=3, **METHODS[method]))
    randomize(model.adapters().values())
    return model


def cache_of(output):
    """The cache of an output as an input, under the name that this version of transformers gives it."""
    name = "cache" if "cache" in output else "past_key_values"
    return {name: output[name]}


def same(got, expected):
    # Rounding of a few float64 matrix products, logits of order 1, in sums of another order.
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_padding_packing_and_a_cache_give_the_numbers_of_the_plain_sequence(name, method):
    model = random_model(name, method)
    a, b = INPUT_IDS[:1, :4], INPUT_IDS[1:, :5]
    with torch.no_grad():
        plain_a, plain_b = model(a).logits, model(b).logits
        pad, keep = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)
        left = model(torch.cat([pad, b], 1), attention_mask=torch.cat([pad, keep], 1)).logits
        right = model(torch.cat([b, pad], 1), attention_mask=torch.cat([keep, pad], 1)).logits
        restart = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        packed = model(torch.cat([a, b], 1), position_ids=restart).logits
        same(left[:, 3:], plain_b)
        same(right[:, :5], plain_b)
        same(packed, torch.cat([plain_a, plain_b], 1))
        # Token by token, after a padded prompt.
        mask = torch.cat([pad, keep], 1)
        output = model(torch.cat([pad, b], 1)[:, :6], attention_mask=mask[:, :6], use_cache=True)
        steps = [output.logits]
        for end in (7, 8):
            inputs = {"attention_mask": mask[:, :end], **cache_of(output)}
            output = model(b[:, end - 4 : end - 3], use_cache=True, **inputs)
            steps.append(output.logits)
        same(torch.cat(steps, 1)[:, 3:], plain_b)
        output = model(a[:, :3], use_cache=True)
        same(model(a[:, 3:], **cache_of(output)).logits, plain_a[:, 3:])


@pytest.mark.parametrize(("name", "method"), [("bert", "hylorada"), ("roberta", "hylorada_v1")])
def test_an_encoder_padded_on_either_side_gives_the_numbers_of_the_plain_sequence(name, method):
    model = HyLoRADAModel(base_model(name), HyLoRADAConfig(method=method, lora_rank=3))
    randomize(model.adapters().values())
    ids = 2 + INPUT_IDS[1:, :5] % 29  # RoBERTa knows padding by its token, 1
    pad, keep = torch.ones(1, 3, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)
    with torch.no_grad():
        plain = model(ids).logits
        left = model(torch.cat([pad, ids], 1), attention_mask=torch.cat([0 * pad, keep], 1)).logits
        right = model(torch.cat([ids, pad], 1), attention_mask=torch.cat([keep, 0 * pad], 1)).logits
    same(left[:, 3:], plain)
    same(right[:, :5], plain)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_which_logits_a_token_reaches(name, training):
    """Two layers: in training groups of 4 and groups shifted by 2, else all that are not earlier."""
    model = random_model(name).train(training)
    model.base_model.eval()
    for module in model.modules():
        if type(module).__name__ == "AdaptedAttention":
            module.train(training)
    seq = INPUT_IDS.shape[1]
    ahead = torch.ones(seq, seq, dtype=torch.bool).tril()
    slots = torch.arange(seq)
    if name == "mistral":
        ahead &= slots[:, None] - slots < WINDOW
    seen = ahead
    if training:
        plain, shifted = slots // 4, (slots + 2) // 4
        seen = ahead & ((plain[:, None] == plain) | (shifted[:, None] == shifted))
    expected = (seen.int() @ seen.int()) > 0
    with torch.no_grad():
        before = model(INPUT_IDS).logits
        for token in range(seq):
            other = INPUT_IDS.clone()
            other[:, token] = (other[:, token] + 1) % 31
            moved = (model(other).logits != before).any(-1)
            assert torch.equal(moved, expected[:, token].expand(2, -1)), token


def test_structure_changes_the_numbers_and_is_computed_from_what_is_given():
    model = random_model("llama", "v2")
    ids = INPUT_IDS % 7
    positions = torch.arange(9).expand(2, 9)
    with torch.no_grad():
        plain = model(INPUT_IDS).logits
        assert not torch.equal(model(INPUT_IDS, structure_ids=ids).logits, plain)
        assert not torch.equal(model(INPUT_IDS, structure_positions=positions + 0.5).logits, plain)
        assert torch.equal(model(INPUT_IDS, structure_positions=positions).logits, plain)
        calls = []
        model.structure_encoder.register_forward_hook(lambda *call: calls.append(call))
        model(INPUT_IDS)
        assert len(calls) == 1


def test_what_a_forward_pass_cannot_take_is_refused():
    model = random_model("llama")
    for structure in ({"structure_ids": INPUT_IDS}, {"structure_positions": INPUT_IDS}):
        with pytest.raises(ConfigError, match="hylorada_v2"):
            model(INPUT_IDS, **structure)
    with pytest.raises(DataError, match="structure_ids"):
        random_model("llama", "v2")(INPUT_IDS, structure_ids=INPUT_IDS[:, 1:])
    with pytest.raises(DataError, match="Structure ids must be integers ≥ 0"):
        random_model("llama", "v2")(INPUT_IDS, structure_ids=INPUT_IDS - INPUT_IDS.max())
    with pytest.raises(DataError, match="structure_prior"):
        random_model("llama", "v2")(INPUT_IDS, structure_positions=INPUT_IDS[:, 1:])
    for positions in (-INPUT_IDS, INPUT_IDS[:1]):
        with pytest.raises(DataError, match="Position ids"):
            model(INPUT_IDS, position_ids=positions)
    with pytest.raises(ModelError, match="HyLoRADAModel"):
        model.base_model(INPUT_IDS)
    cache = cache_of(base_model("llama")(INPUT_IDS, use_cache=True))
    with pytest.raises(ModelError, match="cache"):
        model(INPUT_IDS[:, :1], **cache)


def test_a_model_starts_in_its_base_s_mode():
    config = HyLoRADAConfig(lora_dropout=0.5)
    assert not any(module.training for module in HyLoRADAModel(base_model("gpt2"), config).modules())
    assert all(module.training for module in HyLoRADAModel(base_model("gpt2").train(), config).modules())
