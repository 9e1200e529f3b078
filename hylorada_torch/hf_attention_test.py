import pytest
import torch

from hylorada_jax.config import HyLoRADAConfig
from hylorada_jax.errors import ModelError
from hylorada_torch.conftest import INPUT_IDS, base_model
from hylorada_torch.model import HyLoRADAModel

DAA = HyLoRADAConfig(method="lorada", daa_position_bias=True)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "bert", "t5"])
def test_every_kind_of_mask_is_heeded(name, implementation):
    base = base_model(name, attn_implementation=implementation)
    inputs = {"attention_mask": MASK}
    if name == "t5":
        inputs |= {"decoder_input_ids": INPUT_IDS.flip(1), "decoder_attention_mask": MASK}
    before = base(INPUT_IDS, **inputs).logits
    after = HyLoRADAModel(base, DAA)(INPUT_IDS, **inputs).logits
    real = MASK.bool()
    # transformers' eager softmax is in float32; else rounding of a few float64 matrix products.
    tolerance = 1e-12 if implementation == "sdpa" and name != "t5" else 1e-5
    torch.testing.assert_close(after[real], before[real], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_alpha_is_a_factor_of_the_queries_of_its_head(name):
    model, scaled = HyLoRADAModel(base_model(name), DAA), base_model(name)
    with torch.no_grad():
        for place, value in model.adapters().items():
            if not place.endswith(".alpha"):
                continue
            value.uniform_(0.5, 2)
            attention = scaled.get_submodule(place.removesuffix(".alpha"))
            layer = {"gpt2": "c_attn", "llama": "q_proj", "bert": "query"}[name]
            weight, bias = (attention.get_submodule(layer).get_parameter(leaf) for leaf in ("weight", "bias"))
            per_feature = value.repeat_interleave(4)  # heads of four features, in all three
            queries = len(per_feature)
            (weight[:, :queries] if name == "gpt2" else weight.T).mul_(per_feature)
            bias[:queries].mul_(per_feature)
    # Rounding of a few float64 matrix products, logits of order 1.
    got, expected = model(INPUT_IDS).logits, scaled(INPUT_IDS).logits
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(expected, base_model(name)(INPUT_IDS).logits, atol=1e-3)


def test_another_model_of_the_same_config_keeps_its_attention():
    base = base_model("llama")
    other = type(base)(base.config).double().eval()
    before = other(INPUT_IDS).logits
    HyLoRADAModel(base, DAA)
    assert torch.equal(other(INPUT_IDS).logits, before)


def test_an_attention_that_computes_something_else_is_refused():
    base = base_model("gpt2")
    base.transformer.h[1].attn.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx"):
        HyLoRADAModel(base, DAA)
    base = base_model("bert")
    base.bert.encoder.layer[0].attention.self.is_decoder = True
    with pytest.raises(ModelError, match=r"Bert(Sdpa)?SelfAttention"):
        HyLoRADAModel(base, DAA)
