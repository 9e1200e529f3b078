"""The command line's exchange with PEFT."""

import sys
from pathlib import Path
from typing import Literal

from hylorada_jax.cli.shared import Dtype, base_of, puts_offline, unloaded
from hylorada_jax.errors import DataError
from hylorada_jax.io.bucket import url_of
from hylorada_jax.leaves import Part
from hylorada_jax.terminal import show


@puts_offline
def export_peft(
    *,
    adapter: Path,
    output: Path,
    model: str | None = None,
    drop: tuple[Part, ...] = (),
    sample: str | None = None,
    offline: bool = False,
) -> None:
    """Write an adapter as PEFT's LoRA or DoRA, which works in PyTorch without this library.

    LoRA stays LoRA; DoRA and HyLoRADA become DoRA. Components that act on single tokens or in attention,
    which PEFT cannot express, are refused by name.

    Args:
        adapter: directory of a trained adapter.
        output: directory for PEFT's adapter_config.json and adapter_model.safetensors.
        model: the base model [the one that the adapter names].
        drop: components to leave out although they have an effect.
        sample: a text; a refusal then says how much dropping would change its logits.
        offline: take Hugging Face Hub files from the local cache, without contacting the Hub.
    """
    from hylorada_jax import load_model
    from hylorada_jax.exchange.merged import dtypes_of
    from hylorada_jax.exchange.peft_card import CARD_NAME
    from hylorada_jax.exchange.peft_export import check_export, effect
    from hylorada_jax.exchange.peft_export import export_peft as export
    from hylorada_jax.exchange.peft_files import refuse_taken
    from hylorada_jax.model import HyLoRADAModel
    from hylorada_jax.models.chat_template import TEMPLATE_NAME
    from hylorada_jax.models.tokenizer import load_tokenizer
    from hylorada_jax.saved.opening import open_on
    from hylorada_jax.surgery.merge import acting_leaves

    refuse_taken(output, ())
    name = base_of(adapter, model)
    empty = unloaded(name)
    opened = open_on(empty, adapter)
    saved = opened.saved
    # Magnitudes are those of the weights that were trained on.
    dtype, base_dtype = dtypes_of(saved)
    beside = {CARD_NAME: base_dtype, TEMPLATE_NAME: saved.chat_template}
    refuse_taken(output, [name for name, content in beside.items() if content])
    if sample is None:  # otherwise a refusal says more, and takes the model for it
        check_export(opened.sites, saved.tensors(), saved.config, empty, drop)
    tokens = None
    if sample is not None:
        if not (ids := load_tokenizer(name).encode_prompt(sample).ids):
            raise DataError("A sample must have at least one token.", repr(sample), "Give some text.")
        tokens = [ids]
    adapted = HyLoRADAModel.from_pretrained(load_model(name, dtype=dtype, base_dtype=base_dtype), saved)
    export(adapted, output, drop=drop, sample=tokens)
    acting = {part for part, _, _ in acting_leaves(adapted.sites)}
    for component in sorted(acting.intersection(drop)) if tokens else ():
        print(
            f"dropped {component}: the logits change by {effect(adapted, component, tokens):.2%}",
            file=sys.stderr,
        )
    show(url_of(output) or str(output))


@puts_offline
def import_peft(
    *,
    adapter: Path,
    output: Path,
    model: str,
    method: Literal["lora", "dora", "hylorada_v1"] | None = None,
    dtype: Dtype = "float32",
    offline: bool = False,
) -> None:
    """Convert PEFT's LoRA, rsLoRA or DoRA adapter to this library's format, to continue training it.

    Args:
        adapter: directory that PEFT's save_pretrained wrote.
        output: directory for the adapter; `hylorada finetune --start-from` continues its training.
        model: the base model it was trained on.
        method: hylorada_v1 turns a DoRA adapter into one that computes the same function [the file's].
        dtype: dtype of the base model's weights, as training will have them.
        offline: take Hugging Face Hub files from the local cache, without contacting the Hub.
    """
    from hylorada_jax import load_model
    from hylorada_jax.exchange.peft_files import open_peft
    from hylorada_jax.exchange.peft_import import check_import
    from hylorada_jax.exchange.peft_import import import_peft as read
    from hylorada_jax.saved.adapter_files import refuse_existing

    refuse_existing(output)
    saved = open_peft(adapter)
    check_import(saved, unloaded(model, dtype), method)  # before the model is loaded
    saved.tensors()
    read(load_model(model, dtype=dtype), saved, method=method).save_pretrained(output)
    show(url_of(output) or str(output))
