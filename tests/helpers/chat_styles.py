"""Chat formats and tokenizers of several kinds, for tests of masks and of turns: what the families do, in words of our own."""

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from draftsmith.data.chats.messages import Message

TEXTS = [
    "How many pears are left?",
    "Nine pears are left.",
    "Sure?",
    "Yes, nine.",
    "Name: Ann Bob",
    "Be kind.",
    "model assistant user",
]
PROMPT = "{% if add_generation_prompt %}"
THOUGHT = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Style:
    """A chat format: its template, its end tokens (the first one is the tokenizer's), other special tokens, and whether it rewrites."""

    template: str
    ends: tuple[str, ...]
    special: tuple[str, ...] = ()
    rewrites: bool = False


def _turns(answer: str, asked: str, prompt: str, start: str = "") -> str:
    return (
        f"{start}{{% for m in messages %}}{{% if m.role == 'assistant' %}}{answer}{{% else %}}{asked}{{% endif %}}{{% endfor %}}"
        f"{PROMPT}{prompt}{{% endif %}}"
    )


STYLES = {
    "turn marks": Style(
        _turns(
            "<T>model\n{{ m.content | trim }}<E>\n", "<T>{{ m.role }}\n{{ m.content | trim }}<E>\n", "<T>model\n", "<B>"
        ),
        ("<X>", "<E>"),
        ("<B>", "<T>"),
    ),
    "end mark, then an end of text": Style(
        "{% for m in messages %}<{{ m.role[0] | upper }}>\n{{ m.content }}<E>\n{% endfor %}"
        + PROMPT
        + "<A>\n{% else %}<X>{% endif %}",
        ("<X>", "<E>", "<A>"),
        ("<U>", "<S>"),
    ),
    "spaces around": Style(
        _turns(" {{ m.content | trim }} <X>", "<B>[Q] {{ m.content | trim }} [/Q]", ""), ("<X>",), ("<B>",)
    ),
    "another mark between turns": Style(
        _turns(
            "<T>assistant<C>final<M>{{ m.content }}{{ '<X>' if loop.last and not add_generation_prompt else '<E>' }}",
            "<T>{{ m.role }}<M>{{ m.content }}<E>",
            "<T>assistant",
        ),
        ("<X>", "<Y>"),
        ("<T>", "<C>", "<M>", "<E>"),
        rewrites=True,
    ),
    "the next turn's opening ends replies": Style(
        _turns("<A>\n{{ m.content }}", "<U>\n{{ m.content }}", "<A>\n"), ("<X>", "<U>"), ("<A>",)
    ),
    "empty thought before the last reply": Style(
        _turns(
            "<T>assistant\n{% if loop.last %}" + THOUGHT + "{% endif %}{{ m.content }}<E>\n",
            "<T>{{ m.role }}\n{{ m.content }}<E>\n",
            "<T>assistant\n{% if think is defined and not think %}" + THOUGHT + "{% endif %}",
        ),
        ("<E>", "<X>"),
        ("<T>",),
        rewrites=True,
    ),
    "thought opened by the prompt": Style(
        _turns("<A>{{ m.content.split('</think>')[-1] }}<X>", "<U>{{ m.content }}", "<A><think>\n", "<B>"),
        ("<X>",),
        ("<A>", "<U>", "<B>"),
    ),
    "system text at the last question": Style(
        "{% set ask = messages | selectattr('role', 'equalto', 'user') | list %}<B>{% for m in messages %}{% if m.role == 'user' %}[Q] "
        "{% if messages[0].role == 'system' and m == ask[-1] %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/Q]"
        "{% elif m.role == 'assistant' %} {{ m.content }}<X>{% endif %}{% endfor %}",
        ("<X>",),
        ("<B>",),
        rewrites=True,
    ),
    "words for marks": Style(
        _turns("Bob: {{ m.content }}<X>\n", "Ann: {{ m.content }}\n", "Bob:", "<B>"), ("<X>",), ("<B>",)
    ),
    "block with a newline behind the mark": Style(
        _turns("<A>{% generation %}{{ m.content + '<E>\n' }}{% endgeneration %}", "<U>{{ m.content }}\n", "<A>"),
        ("<E>",),
        ("<A>", "<U>"),
    ),
    "last turn left open": Style(
        _turns(
            "<T>assistant\n{{ m.content }}{{ '<E>\n' if not loop.last }}",
            "<T>{{ m.role }}\n{{ m.content }}<E>\n",
            "<T>assistant\n",
        ),
        ("<X>", "<E>"),
        ("<T>",),
    ),
    "block with header and empty thought": Style(
        _turns(
            "{% generation %}<T>assistant\n" + THOUGHT + "{{ m.content }}<E>\n{% endgeneration %}",
            "<T>user\n{{ m.content }}<E>\n",
            "<T>assistant\n" + THOUGHT,
        ),
        ("<E>",),
        ("<T>",),
    ),
}
ASKED = ("How many pears are left?", "Sure?", "Be kind.")
SAID = ("Nine pears are left.", "Yes, nine.", "Sure, Ann.")
KINDS = ("byte-level", "metaspace", "words", "lower case", "greedy specials")


def styled_tokenizer(name: str, kind: str) -> tuple[PreTrainedTokenizerFast, tuple[int, ...]]:
    """A tokenizer of one kind with one style's template, and the ids that end replies."""
    style = STYLES[name]
    special = [*style.ends, *style.special, "<think>", "</think>"]
    tokenizer = _bare(kind, special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=style.ends[0], unk_token="<unk>")
    # Some families' special tokens take the white space behind them away.
    greedy = kind == "greedy specials"
    fast.add_tokens([AddedToken(one, rstrip=greedy, special=True) for one in special], special_tokens=True)
    fast.chat_template = style.template
    return fast, tuple(int(fast.convert_tokens_to_ids(end)) for end in style.ends)


def _bare(kind: str, special: list[str]) -> Tokenizer:
    words = sorted(
        {word for text in TEXTS for word in pre_tokenizers.Whitespace().pre_tokenize_str(text) for word in word[:1]}
    )
    if kind == "words":
        listed = ["<unk>", *special, *words, "Q", "/", "[", "]", "final"]
        tokenizer = Tokenizer(
            models.WordLevel({word: at for at, word in enumerate(dict.fromkeys(listed))}, unk_token="<unk>")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return tokenizer
    byte_level = kind != "metaspace"
    tokenizer = Tokenizer(models.BPE(unk_token=None if byte_level else "<unk>"))
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if byte_level
        else pre_tokenizers.Metaspace(prepend_scheme="first")
    )
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace(prepend_scheme="first")
    if kind == "lower case":
        tokenizer.normalizer = normalizers.Lowercase()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else list("\n[]/:Q")
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", *special], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return tokenizer


def conversation(turns: int, system: bool = False) -> list[Message]:
    pairs = zip(ASKED[:turns], SAID[:turns], strict=True)
    found = [
        Message(role=role, content=text)
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return [Message(role="system", content="Be kind."), *found] if system else found
