"""TRL's SFTTrainer: how it prepares conversations, and its training step."""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.contenders.chats import Row, tagged_tokenizer
from benchmarks.contenders.in_torch import torch_base, torch_device
from benchmarks.contenders.setting import Contender, Setting


def dataset(rows: list[Row]) -> Any:
    """Rows as the data set that TRL is given."""
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(rows)


def tokenizer(model: str) -> Any:
    """The tokenizer that we use, as transformers wraps it."""
    import transformers

    own = tagged_tokenizer(model)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own.backend, chat_template=own.chat_template, **own.special_tokens
    )


def prepared(model: str, seq_len: int, data: Any) -> Any:
    """What SFTTrainer makes of a data set before it trains; its model, of one layer, is not used."""
    import transformers

    own = tokenizer(model)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(own), **sizes))
    return _trainer(network, own, data, {"max_length": seq_len + 1}).train_dataset


def read(data: Any) -> Iterator[tuple[Sequence[int], Sequence[bool]]]:
    """The ids of each conversation, and whether each counts."""
    for row in data:
        yield row["input_ids"], [label != -100 for label in row["labels"]]


def sft(use_dora: bool, setting: Setting, rows: list[Row], **options: Any) -> tuple[Contender, list[int]]:
    """PEFT's LoRA or DoRA on q, k, v and o in SFTTrainer's own loop, which is held between its steps.

    Args:
        use_dora: DoRA, else LoRA.
        setting: what all have in common; of each conversation as many tokens as fit into a row.
        rows: the conversations, which are batched in this order.
        options: further ones of SFTConfig.

    Returns:
        The contender, and the tokens of its batches, which come round again and again.
    """
    import peft
    import torch

    torch.set_num_threads(setting.torch_threads)
    training = setting.training
    options |= {
        "max_length": setting.seq_len,
        "max_steps": setting.steps,
        "per_device_train_batch_size": setting.batch_size,
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "lr_scheduler_type": training.schedule,
        "optim": "adamw_torch_fused",
    }
    adapter = peft.LoraConfig(
        r=setting.rank,
        lora_alpha=setting.alpha,
        use_dora=use_dora,
        target_modules=list(setting.adapted),
    )
    trainer = _trainer(torch_base(setting), tokenizer(setting.model), dataset(rows), options, adapter)
    trainable = sum(leaf.numel() for leaf in trainer.model.parameters() if leaf.requires_grad)
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    size = setting.batch_size
    tokens = [sum(lengths[at : at + size]) for at in range(0, len(lengths), size)]
    return Contender(_held(trainer), trainable), tokens


def _trainer(network: Any, own: Any, data: Any, options: dict[str, Any], adapter: Any = None) -> Any:
    """An SFTTrainer that scores what the assistant says, in float32, and writes and reports nothing."""
    import torch
    import trl

    class InOrder(trl.SFTTrainer):
        """Takes rows in their order, and keeps the loss of a step."""

        loss = float("nan")

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.loss = loss.item()
            return loss

    with tempfile.TemporaryDirectory() as directory:
        config = trl.SFTConfig(
            output_dir=directory,
            assistant_only_loss=True,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=torch_device() == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        return InOrder(
            model=network, args=config, train_dataset=data, processing_class=own, peft_config=adapter
        )


def _held(trainer: Any) -> Callable[[], float]:
    """Lets a trainer's own loop do one step, in a thread that waits after each, and gives its loss."""
    import transformers

    turns: queue.SimpleQueue[None] = queue.SimpleQueue()
    done: queue.SimpleQueue[float | BaseException] = queue.SimpleQueue()

    class Hold(transformers.TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            done.put(trainer.loss)
            if state.global_step < state.max_steps:
                turns.get()

    def train() -> None:
        turns.get()
        try:
            trainer.train()
        except BaseException as error:  # goes to whoever waits for the step
            done.put(error)

    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Hold)
    threading.Thread(target=train, daemon=True).start()

    def step() -> float:
        turns.put(None)
        found = done.get()
        if isinstance(found, BaseException):
            raise found
        return found

    return step
