"""A chat format with tools and thoughts in the manner of Qwen3, on the tiny tokenizer, and rows for it."""

from typing import Any

from tiny import SPECIAL, TEXTS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MARKS = ["<tools>", "</tools>", "<call>", "</call>", "<think>", "</think>", "<|tool|>", "<|image|>"]
# A thought is shown behind the last user turn alone; variables: tools, enable_thinking.
TOOL_TEMPLATE = (
    "{%- set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>"
    "{% if m.reasoning_content and loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}<|end|>"
    "{% else %}<|{{ m.role }}|>{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ part.text if part.type == 'text' else '<|image|>' if part.type == 'image' }}{% endfor %}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
ASKED = {"role": "user", "content": "Is it warm?"}
TOOL_ROW: dict[str, Any] = {
    "tools": [WEATHER],
    "messages": [
        ASKED,
        {"role": "assistant", "content": None, "reasoning_content": "I ask.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "9 C"},
        {"role": "assistant", "content": "No.", "reasoning_content": "9 is cold."},
    ],
}


def tool_tokenizer(template: str | None = TOOL_TEMPLATE) -> PreTrainedTokenizerFast:
    """Bytes, and every mark as one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    fast.chat_template = template
    return fast
