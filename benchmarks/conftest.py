"""Models that several benchmarks' tests run on."""

import pytest


@pytest.fixture(scope="session")
def worded_llama(tmp_path_factory):
    """shape → the directory of a small random Llama of that shape, with SmolLM2's tokenizer."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from hylorada_jax.models.tokenizer import load_tokenizer

    def made(**shape):
        own = load_tokenizer("smollm2-135m")
        directory = tmp_path_factory.mktemp("base") / "llama"
        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=own.vocab_size, initializer_range=0.2, **shape)
        transformers.LlamaForCausalLM(config).save_pretrained(directory)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=own.backend, chat_template=own.chat_template, **own.special_tokens
        ).save_pretrained(directory)
        return str(directory)

    return made
