"""A chat template of the user's own: it counts wherever conversations are read, and the adapter keeps it."""

import dataclasses
import io
import json
import shutil
import sys
from typing import Any
from unittest import mock

import pytest
from tokenizers import Tokenizer

from hylorada_jax.cli.cli_test import chats, run
from hylorada_jax.cli.sample import sample_of, samples
from hylorada_jax.data.examples import Conversation
from hylorada_jax.errors import DataError
from hylorada_jax.models.tokenizer import load_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}{% generation %}"
TEMPLATE += "{{ m.content }}<end>{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant{% endif %}"


def test_a_model_without_a_template_is_tuned_on_chats_with_one_that_its_adapter_keeps(
    tiny, tmp_path, monkeypatch, capsys
):
    def succeeds(*command):
        status, out, err = run(monkeypatch, capsys, *command)
        assert status == 0, err
        return out

    def fails(*command):
        status, _, err = run(monkeypatch, capsys, *command)
        assert status == 2
        return err

    file, other = tmp_path / "own.jinja", tmp_path / "other.jinja"
    file.write_text("\ufeff" + TEMPLATE)  # as editors of Windows write it
    other.write_text(TEMPLATE + "{# another #}")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats(30)))
    common = ("--model", tiny, "--data", tmp_path / "chats.jsonl", "--seq-len", 48)
    own = ("--chat-template", file)
    assert "--chat-template" in fails("data", *common)
    assert "⟦ w 2 ! <end>⟧" in succeeds("data", *common, *own)

    output = tmp_path / "run"
    train = ("finetune", *common, "--output", output, "--steps", 2, "--batch-size", 2, "--prompt", "")
    assert "needs a model with a chat template" in fails(*train)
    succeeds(*train, *own)
    recipe = json.loads((output / "recipe.json").read_text())
    assert recipe["chat_template"] == str(file)
    assert recipe["learning_rate"] is None  # nobody gave one: with another method it may be another
    assert "chat_template" in fails(*train, "--resume", "--chat-template", other)

    adapter = ("--model", tiny, "--adapter", output / "adapter")
    asked = ("generate", *adapter, "--prompt", "say w3", "--chat", "--max-new-tokens", 6)
    said = succeeds(*asked)
    monkeypatch.setattr(sys, "stdin", io.StringIO("say w3\n"))
    assert succeeds("chat", *adapter, "--max-new-tokens", 6) == said
    assert "perplexity" in succeeds("evaluate", *common, "--adapter", output / "adapter")
    # The adapter's own goes on where it is trained on, and into the merged model.
    further = (*train[:7], "--output", tmp_path / "further", *train[9:], "--start-from", output / "adapter")
    succeeds(*further)
    merged = tmp_path / "merged"
    succeeds("merge", "--adapter", tmp_path / "further" / "adapter", "--output", merged)
    assert (merged / "chat_template.jinja").read_text() == TEMPLATE
    assert "⟦ w 2 ! <end>⟧" in succeeds("data", "--model", merged, *common[2:])


def test_answers_end_where_the_template_ends_those_of_each_conversation(
    chatting, tmp_path, monkeypatch, capsys
):
    model = shutil.copytree(chatting, tmp_path / "model")
    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    backend.add_special_tokens(["<turn>", "<call>"])
    backend.save(str(model / "tokenizer.json"))
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% if not mode or messages[0].role != mode %}{{ raise_exception('no mode') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}"
        "{{ '<call>' if tools else '<turn>' }}{% endif %}{% endfor %}"
    )
    ends: list[Any] = []

    def generate(prompts, *, eos_token_id, **_):
        ends.append(eos_token_id)
        return [[97, eos_token_id[-1]]] * len(prompts)

    monkeypatch.setattr("hylorada_jax.cli.generate.loaded", lambda *_, **__: mock.Mock(generate=generate))
    own, turn, call = (backend.token_to_id(token) for token in ("<end>", "<turn>", "<call>"))
    common = ("generate", "--model", model, "--chat-template", template)
    user = [{"role": "user", "content": "a"}]
    asked = {"messages": user}
    said = {"messages": [{"role": "system", "content": "s"}, *user]}
    calling = said | {"tools": [{"type": "function"}]}
    for rows, mode, expected in (
        ([asked], "user", (own, turn)),
        ([calling], "system", (own, call)),
        ([calling, *[said] * 9], "system", (own, call, turn)),
    ):
        (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = ("--messages", tmp_path / "asked.jsonl", "--chat-template-kwargs")
        status, out, err = run(monkeypatch, capsys, *common, *options, json.dumps({"mode": mode}))
        assert status == 0, err
        assert {ends.pop() for _ in [*ends]} == {expected}
        answers = [json.loads(line)["messages"][-1]["content"] for line in out.splitlines()]
        assert answers == [backend.decode([97])] * len(rows)
    one = ("--prompt", "a", "--chat", "--chat-template-kwargs", '{"mode": "user"}')
    status, out, err = run(monkeypatch, capsys, *common, *one)
    assert (status, out, ends) == (0, f"{backend.decode([97])}\n", [(own, turn)]), err
    # What is written before and after training is an answer in a chat too.
    trained = mock.Mock(generate=generate, base=mock.Mock(position_limit=None))
    tokenizer = dataclasses.replace(load_tokenizer(model), chat_template=template.read_text())
    samples(
        trained,
        None,
        sample_of("a", tokenizer, None, Conversation("", user, [], None, {"mode": "user"})),
        tokenizer,
    )
    assert ends[1:] == [(own, turn)] * 2
    # It is asked as in the training data: with their system message and tools.
    row = Conversation("", calling["messages"], [], calling["tools"], {"mode": "system"})
    sample = sample_of("what", tokenizer, None, row)
    assert (backend.decode(sample.ids), sample.ends) == ("swhat", (own, call))
    with pytest.raises(DataError, match='leave the sample out: --prompt ""'):
        sample_of("what", tokenizer, None, row._replace(messages=user))
