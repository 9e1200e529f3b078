"""Models whose frozen kernels are in int8 or nf4, against the reference on the numbers they stand for."""

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

import hylorada_torch
from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import CheckpointError
from hylorada_jax.exchange.peft_card import CARD_NAME
from hylorada_jax.exchange.peft_export import export_peft
from hylorada_jax.math.quantized import HEAD, as_array, plain
from hylorada_jax.model import HyLoRADAModel
from hylorada_jax.models.families import ROUTERS
from hylorada_jax.models.loading import load_model
from hylorada_jax.saved.adapter_files import WEIGHTS_NAME
from hylorada_jax.surgery.modules import modules_of
from parity_tests.families import all_in_float64, measuring, saved, torch_base
from parity_tests.models import CONFIGS, SPREAD, Pair, budgets, draw_inputs, errors, random_adapters


def test_an_export_says_how_its_base_was_quantised(tmp_path):
    base = load_model(saved("llama", "float32").name, dtype="bfloat16", base_dtype="int8")
    model = HyLoRADAModel(base, HyLoRADAConfig(method="dora", lora_rank=2, target_modules=("k_proj",)))
    model.chat_template = "{{ messages }}\n"
    export_peft(model, tmp_path / "new")
    card = ModelCard.load(tmp_path / "new" / CARD_NAME)
    assert (card.data.base_model, card.data.library_name) == (base.name, "peft")
    assert "8 bits (int8, a scale in bfloat16" in card.text
    # PEFT's magnitudes start as norms of its base: this one's are of the quantised.
    found, norms = load_file(tmp_path / "new" / WEIGHTS_NAME), plain(base.params)
    for linear in modules_of(base).linears:
        for layer, full in enumerate(linear.names):
            if magnitude := [value for name, value in found.items() if f"{full}.lora_magnitude" in name]:
                weight = np.asarray(linear.weight(norms, layer), np.float64)
                np.testing.assert_allclose(magnitude[0], np.linalg.norm(weight, axis=1), rtol=1e-6)
    assert (tmp_path / "new" / "chat_template.jinja").read_text() == model.chat_template
    (tmp_path / CARD_NAME).write_text("mine")
    with pytest.raises(CheckpointError, match=CARD_NAME):
        export_peft(model, tmp_path)
    assert [place.name for place in sorted(tmp_path.iterdir())] == [CARD_NAME, "new"]


@pytest.mark.parametrize(
    ("family", "name", "base_dtype"),
    [
        ("phi3", "hylorada", "nf4"),
        pytest.param("qwen2_moe", "hylorada_v1", "int8+head", marks=pytest.mark.apart),
    ],
)
def test_a_quantised_base_is_the_reference_on_its_numbers(family, name, base_dtype):
    with measuring("float64"):
        base = load_model(saved(family, "float64").name, dtype="float64", base_dtype=base_dtype)
        numbers = plain(base.params)
        with all_in_float64():
            theirs = torch_base(family, "float64")
            for linear in modules_of(base).linears:
                for layer, full in enumerate(linear.names):
                    weight = theirs.get_submodule(full).weight
                    rounded = torch.tensor(np.asarray(linear.weight(numbers, layer)))
                    assert torch.equal(weight, rounded) == full.endswith(ROUTERS)
                    weight.data.copy_(rounded)
            head = np.asarray(as_array(base.head({"params": base.params})))
            assert np.array_equal(head, theirs.lm_head.weight.detach()) != base_dtype.endswith(HEAD)
            theirs.lm_head.weight.data.copy_(torch.tensor(head))
            reference = hylorada_torch.HyLoRADAModel(theirs, CONFIGS[name])
        pair = Pair(reference, HyLoRADAModel(base, CONFIGS[name]), draw_inputs(family, CONFIGS[name]))
        pair.load(random_adapters(reference, SPREAD))
        found, allowed = errors(pair.got(), pair.expected()), budgets(family, "float64")
    assert all(found[direction] <= allowed[direction] for direction in allowed), (found, allowed)
