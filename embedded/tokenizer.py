"""The embedded models' tokenizer: a byte-level BPE of at most 1,024 tokens, trained on the sums corpus, with a chat
template.

Owns the vocabulary's rules (single digits, operators with their spaces) and the template. Does not know models.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
VOCAB_SIZE = 768

#: Each message is ``<|role|>content<|end|>``. The assistant's words and its end token are marked as generated.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<|user|>' + message['content'] + '<|end|>' -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<|assistant|>' -}}
{%- generation -%}
{{- message['content'] + '<|end|>' -}}
{%- endgeneration -%}
{%- else -%}
{{- raise_exception("role '" + message['role'] + "' is not known to this template; use user or assistant") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""

# A digit alone; an operator with the spaces around it; a word with the space before it; a run of anything else.
_PIECES = r"\d| ?[-+*/=]+ ?|\n?#+ ?| ?\p{L}+|\n| ?[^\s\p{L}\d]+|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Trains the tokenizer. Any text round-trips: the alphabet is all 256 bytes.

    Raises:
        ValueError: ``vocab_size`` leaves no room for bytes and special tokens.
    """
    special = [PAD, USER, ASSISTANT, END]
    if vocab_size < 256 + len(special):
        raise ValueError(
            f"vocab_size {vocab_size} is below the {256 + len(special)} bytes and special tokens; raise it"
        )
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def chat_text(messages: Iterable[tuple[str, str]]) -> str:
    """The chat template's rendering of (role, content) pairs, without the cost of a template engine."""
    return "".join(f"<|{role}|>{content}{END}" for role, content in messages)
