"""The chat formats of well-known models, restated: what each writes, in as little jinja as that takes.

None has {% generation %}, as the models' own do not. Sources: the models' cards and documentation.
"""

from typing import NamedTuple


class Format(NamedTuple):
    """A chat format.

    Attributes:
        template: in jinja2.
        ends: the tokens at which the model's generation stops.
        special: all special tokens that it writes.
        eos: the tokenizer's.
        tools: it knows tools and their calls.
        system: it knows system messages.
    """

    template: str
    ends: tuple[str, ...]
    special: tuple[str, ...]
    eos: str
    tools: bool = False
    system: bool = True


_CALLS = (
    "{% for c in m.tool_calls or [] %}{% set f = c.function or c %}{{ '\\n' }}<tool_call>\n"
    '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
# Qwen lists tools in the system's turn, and gives what they return as the user's.
_QWEN_SYSTEM = (
    "{% if messages[0].role == 'system' or tools %}<|im_start|>system\n"
    "{{ messages[0].content if messages[0].role == 'system' else 'You are a helpful assistant.' }}"
    "{% if tools %}\n\n# Tools\n<tools>{% for t in tools %}{{ '\\n' }}{{ t | tojson }}{% endfor %}"
    "\n</tools>{% endif %}<|im_end|>\n{% endif %}"
)
_QWEN_TURNS = (
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n"
    "{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% elif m.role != 'system' or not loop.first %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
)
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

FORMATS: dict[str, Format] = {
    "chatml": Format(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_end|>",),
        CHATML,
        "<|im_end|>",
    ),
    # A system turn of its own where there is none.
    "smollm2": Format(
        "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_end|>",),
        CHATML,
        "<|im_end|>",
    ),
    # Content is trimmed, and a header with dates comes before all.
    "llama-3.1": Format(
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}"
        "{% endif %}<|eot_id|>{% for m in messages %}{% if m.role == 'system' %}{% elif m.tool_calls %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% set f = m.tool_calls[0].function %}"
        '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eot_id|>'
        "{% else %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
        "{% if tools and loop.first %}Functions: {{ tools | tojson }}\n\n{% endif %}{{ m.content | trim }}"
        "<|eot_id|>{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|eom_id|>",
        ),
        "<|eot_id|>",
        tools=True,
    ),
    "qwen2.5": Format(
        _QWEN_SYSTEM + "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant"
        "{% if m.content or not m.tool_calls %}{{ '\\n' }}{{ m.content }}{% endif %}"
        + _CALLS
        + "<|im_end|>\n"
        + _QWEN_TURNS
        + "{% endif %}",
        ("<|im_end|>", "<|endoftext|>"),
        CHATML,
        "<|im_end|>",
        tools=True,
    ),
    # Thinking stays in the turns after the last question only; the last turn has its frame even when empty.
    "qwen3": Format(
        "{% set n = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set n.asked = loop.index0 %}{% endif %}{% endfor %}"
        + _QWEN_SYSTEM
        + "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
        "{% set thought = m.reasoning_content or '' %}{% set said = m.content or '' %}"
        "{% if not thought and '</think>' in said %}{% set thought ="
        " said.split('</think>')[0].split('<think>')[-1]"
        " %}{% set said = said.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{% if loop.index0 > n.asked and (loop.last or thought) %}<think>\n{{"
        " thought.strip('\\n') }}\n</think>\n\n"
        "{% endif %}{{ said }}"
        + _CALLS
        + "<|im_end|>\n"
        + _QWEN_TURNS
        + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{%"
        " endif %}",
        ("<|im_end|>", "<|endoftext|>"),
        CHATML,
        "<|im_end|>",
        tools=True,
    ),
    # The system's text is a preface to the first question; roles alternate.
    "gemma-3": Format(
        "{{ bos_token }}{% set first = messages[0].content + '\n\n' if messages[0].role == 'system'"
        " else '' %}"
        "{% set turns = messages[1:] if first else messages %}{% for m in turns %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ("<eos>", "<end_of_turn>"),
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
    ),
    # Nothing opens an answer; the system's text stands before the last question, and moves as it does.
    "mistral": Format(
        "{{ bos_token }}{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% set turns = messages[1:] if first else messages %}{% for m in turns %}{% if"
        " m.role == 'user' %}[INST]"
        "{% if first and (loop.last or loop.revindex == 2 and turns[-1].role == 'assistant') %} {{ first }}\n"
        "{% endif %} {{ m.content }}[/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{%"
        " endfor %}",
        ("</s>",),
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "</s>",
    ),
    # The last turn ends otherwise than those before; what is said in the final channel stays.
    "gpt-oss": Format(
        "<|start|>system<|message|>You are ChatGPT.<|end|>{% for m in messages %}<|start|>"
        "{% if m.role == 'assistant' %}assistant<|channel|>final<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
        "{% else %}{{ 'developer' if m.role == 'system' else m.role }}<|message|>{{ m.content }}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|return|>", "<|call|>"),
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"),
        "<|return|>",
    ),
    # The end of a text follows the end of the last turn.
    "phi-3": Format(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<|endoftext|>", "<|assistant|>", "<|end|>"),
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|endoftext|>",
    ),
    # What was thought is taken out of every turn, the last one too.
    "deepseek-r1": Format(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>"
        "{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
        ("<｜end▁of▁sentence｜>",),
        ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        "<｜end▁of▁sentence｜>",
    ),
}
