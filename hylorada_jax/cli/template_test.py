"""A chat template of the user's own: it counts wherever conversations are read, and the adapter keeps it."""

import io
import json
import sys

from hylorada_jax.cli.cli_test import chats, run

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
