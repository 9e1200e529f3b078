"""What the loss costs a TPU by the size of its chunks, and what a step on conversations costs: as XLA says.

    python -m benchmarks.tpu_loss --output benchmarks/results

No TPU is needed. tpu-loss.json has, for a v5e in bfloat16, by the names of ``benchmarks.tpu_compile``:

    losses          the loss with its gradient by the hidden states, of 4,096 scored tokens, by shape of the
                    head (vocabulary × d): by the kernel, and without it by tokens in a chunk; ``chosen`` is
                    the library's own chunk where there is no kernel
    step            of LoRA on SmolLM2-135M, eight rows of 512 tokens, where all count (``text``), and on
                    python-docstrings, packed (``conversations``): the same program, whose loop over the
                    chunks takes ``turns`` of ``chunks``, in the mean of an epoch's steps

The loop's length is the data's, so the compiler does not know it; its body is counted as often as is said
here. Of a gather XLA counts all that it may read from.
"""

import importlib.metadata
import itertools
import math
from pathlib import Path
from typing import Any

from benchmarks.command import run, started
from benchmarks.tpu_compile import MODEL
from hylorada_jax.io.files import refuse_unusable, write_json
from hylorada_jax.planning.libtpu import use_libtpu

# Heads of SmolLM2-135M, Qwen3-0.6B and Llama 3.1 8B, and a small vocabulary.
HEADS = ((49_152, 576), (151_936, 1024), (128_256, 4096), (32_000, 2048))
CHUNKS = (128, 256, 512)
BATCH_SIZE, SEQ_LEN = 8, 512


def main(*, output: Path) -> None:
    """Compile the loss and a training step for a TPU v5e, and write tpu-loss.json.

    Args:
        output: the directory that it is written to.
    """
    refuse_unusable(output)
    use_libtpu()
    from benchmarks import tpu_programs
    from hylorada_jax.math.loss import chunk_tokens
    from hylorada_jax.models.decoder_config import DecoderConfig
    from hylorada_jax.models.source import find_source
    from hylorada_jax.planning.programs import loss_chunk, mesh_of_devices, topology_devices
    from parity_tests.environment import environment

    device = topology_devices("v5e:2x2")[0]
    tokens = BATCH_SIZE * SEQ_LEN
    losses: dict[str, Any] = {}
    for vocab, width in HEADS:
        chosen, found = chunk_tokens(tokens, vocab), {}
        for chunk in sorted({*CHUNKS, chosen}):
            found[str(chunk)] = tpu_programs.compile_loss(vocab, width, chunk, device, tokens=tokens)
            print(vocab, width, chunk, found[str(chunk)], flush=True)
        kernel = tpu_programs.compile_loss(vocab, width, None, device, tokens=tokens)
        losses[f"{vocab} × {width}"] = {"kernel": kernel, "chosen": chosen, "chunks": found}
    config = DecoderConfig.from_hf(find_source(MODEL, config_only=True).config)
    size = loss_chunk(config, tokens, mesh_of_devices([device]))
    chunks, scored = math.ceil(tokens / size), scored_tokens()
    turns = sum(math.ceil(count / size) for count in scored) / len(scored)
    step = tpu_programs.compiled_step("lora", config, [device], batch_size=BATCH_SIZE, seq_len=SEQ_LEN)
    record = {
        "command": started(),
        "environment": environment() | {"libtpu": importlib.metadata.version("libtpu")},
        "device": device.device_kind,
        "losses": losses,
        "step": {
            "scored": sum(scored) / len(scored) / tokens,
            "chunks": chunks,
            "turns": turns,
            "text": tpu_programs.record(step, turns=chunks),
            "conversations": tpu_programs.record(step, turns=turns),
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "tpu-loss.json", record)


def scored_tokens() -> list[int]:
    """How many tokens each step of an epoch on python-docstrings scores, in rows packed as in training."""
    from hylorada_jax import load_documents, load_tokenizer, prepare
    from hylorada_jax.data.loading import mixed_batches
    from hylorada_jax.data.packing import Rows

    documents, _ = prepare(load_documents("python-docstrings", "train"), load_tokenizer(MODEL), SEQ_LEN)
    rows = Rows(documents, SEQ_LEN)
    epoch = itertools.islice(mixed_batches([(rows, 1)], BATCH_SIZE, seed=0), len(rows) // BATCH_SIZE)
    return [int((batch["targets"] >= 0).sum()) for batch in epoch]


if __name__ == "__main__":
    run(main)
