"""The model card beside PEFT's files: which base an adapter was trained on, where that was quantised.

PEFT's adapter_config.json has no place for it; PEFT itself writes it into README.md.
"""

import json

from hylorada_jax.math.quantized import HEAD, split_name

CARD_NAME = "README.md"
_BITS = {
    "nf4": "4 bits (nf4, a scale in {dtype} for 64 inputs of an output)",
    "int8": "8 bits (int8, a scale in {dtype} for each output)",
}
_BASES = {
    "nf4": """\
bitsandbytes' nf4 has the same sixteen values and, where 64 divides a layer's inputs, the same blocks, with
scales in float32:

```python
base = AutoModelForCausalLM.from_pretrained(
    {name},
    dtype=torch.{dtype},
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.{dtype}
    ),
)
model = PeftModel.from_pretrained(base, directory)
```""",
    "int8": """\
bitsandbytes' int8 rounds what a layer reads too. The base in {dtype}:

```python
base = AutoModelForCausalLM.from_pretrained({name}, dtype=torch.{dtype})
model = PeftModel.from_pretrained(base, directory)
```""",
}


def card(name: str, dtype: str) -> str:
    """A model card in Markdown, with the header that the Hub reads.

    Args:
        name: of the base model.
        dtype: of its parameters, quantised ones, by :func:`hylorada_jax.math.quantized.dtype_name`.

    Example:
        >>> print(card("a/b", "bfloat16+int8").splitlines()[5])
        The base model, "a/b", had its linear layers in 8 bits (int8, a scale in bfloat16 for each output)
    """
    scales, named = split_name(dtype)
    assert named is not None
    base_dtype, layers = named.removesuffix(HEAD), "linear layers" + " and its head" * named.endswith(HEAD)
    quoted = json.dumps(name, ensure_ascii=False)
    return f"""---
base_model: {quoted}
library_name: peft
---

The base model, {quoted}, had its {layers} in {_BITS[base_dtype].format(dtype=scales.name)}
when this adapter was trained. {_BASES[base_dtype].format(name=quoted, dtype=scales.name)}

`hylorada merge` writes the very numbers that it was trained on, with the adapter in them.
"""
