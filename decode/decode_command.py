"""``draftsmith decode``: one reply, streamed, with the accepted runs coloured.

Owns what a person sees of one decoded reply. Knows nothing of measuring; that is ``draftsmith evaluate``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.text import Text
from torch import nn
from transformers import PreTrainedTokenizerBase

from draftsmith.arguments import FLAT, WHOLE
from draftsmith.decode.batch import Generation
from draftsmith.decode.engine import Engine
from draftsmith.decode.model_settings import for_target
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.decode.verify.rule_text import parse_rule
from draftsmith.foreign import visible
from draftsmith.models import load_tokenizer
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_folder import adapted, load_drafter
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import NO_OPTIONS, NO_TEMPLATE, PromptTemplate, TemplateOptions
from draftsmith.models.tree.shapes import parse_shape


def decode(
    prompt: str,
    target: str = "embedded:target",
    drafter: Path | None = None,
    shape: str = "1x4",
    rule: str = "lossless",
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Annotated[tuple[str, ...], WHOLE] = (),
    chat: bool | None = None,
    dtype: str = "float32",
    drafter_adapter: Path | None = None,
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    template: str | None = None,
    rendering: Annotated[TemplateOptions, FLAT] = NO_OPTIONS,
) -> None:
    """Decode one prompt and show which tokens were drafted and accepted.

    Accepted draft tokens are printed in green, the target's own in bold white; the last line gives the tokens per step (bonus counted).
    The text is the target's own, whatever the drafter, unless a LOSSY rule is asked for: what stands by it alone is printed in yellow.

    Args:
        prompt: the user's message, or the raw text to continue.
        target: model directory, hub id, embedded:target or embedded:draft_lm.
        drafter: directory of an exported drafter; none decodes plainly.
        shape: how much to draft: WIDTHxLENGTH beams with LENGTH drafted tokens, 10x6n60 a dynamic tree, tree:FILE.json or t3.2.1 a
            static one, s1.1.1 or k4.2.1 a sampled one; p0.1 prunes, e0.5 stops early.
        rule: lossless; or LOSSY: judge:FOLDER, judge:FOLDER@0.9, top-k@3, typical@0.09, kl@0.5, everything.
        max_new_tokens: length of the reply at most.
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with this probability.
        min_p: drop tokens below this share of the likeliest one's probability.
        repetition_penalty: above 1 makes tokens already in the text less likely.
        seed: of the sampling noise; with and without a drafter one seed gives one text, but for sampled trees.
        stop: strings that end the reply.
        chat: true wraps the prompt in the model's chat template, false continues it as raw text; default: true where the tokenizer has
            a template.
        dtype: float32, bfloat16 ...
        drafter_adapter: a trained adapter of the drafter; without --drafter, of the one that it names.
        where: the target's devices, revision, adapter and quantization; see `TargetOptions`.
        template: Jinja file, or `none` for raw text; default: the tokenizer's own.
        rendering: the chat template's name and variables; see `TemplateOptions`.
    """
    limits = parse_shape(shape)
    _, lossy = parse_rule(rule)
    model = where.load(target, dtype)
    tokenizer = load_tokenizer(target, where.revision, where.trust_remote_code)
    head = _drafter(drafter, drafter_adapter, dtype, where.trust_remote_code)
    if head is not None:
        nn.Module.to(head, model.device)
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        eos_token_ids=model.eos_token_ids,
        stop_strings=stop,
    )
    settings = for_target(settings, model, tells_text=True)
    engine = Engine(model, head, limits, tokenizer, rule=lossy)
    ids = prompt_ids(tokenizer, prompt, chat, template, model.eos_token_ids, rendering)
    generation = engine.generate([ids], settings)[0]
    console = Console(highlight=False)
    if chat is None and template is None and not tokenizer.chat_template:
        console.print("[dim]the tokenizer has no chat template: the prompt is continued as raw text[/dim]")
    console.print(coloured(tokenizer, generation))
    if generation.accepted:
        emitted, cycles = len(generation.token_ids) - 1, len(generation.accepted)
        console.print(
            f"[dim]{emitted} tokens in {cycles} target steps: {emitted / cycles:.2f} tokens per step; ended by {generation.finish}[/dim]"
        )
    if lossy is not None:
        console.print(
            Text("LOSSY ", "yellow"),
            Text(f"by the rule {visible(lossy)}: {len(generation.by_rule)} tokens are not the target's choice", "dim"),
            sep="",
        )


def _drafter(folder: Path | None, adapter: Path | None, dtype: str, trust_remote_code: bool) -> Drafter | None:
    """The drafter with its adapter; the one that the adapter names where no folder is given."""
    if folder is None:
        return None if adapter is None else load_drafter(adapter, dtype, trust_remote_code)
    drafter = load_drafter(folder, dtype, trust_remote_code)
    return drafter if adapter is None else adapted(drafter, adapter)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    chat: bool | None = None,
    template: str | None = None,
    eos_ids: Iterable[int] = (),
    options: TemplateOptions = NO_OPTIONS,
) -> list[int]:
    """Token ids of one user message under the chat template, or of a plain document: what other commands ask too.

    `chat` None takes the template where the tokenizer has one.

    Raises:
        ValueError: a chat is asked for and there is no template, or options of a template go with plain text.
    """
    if chat is False and template not in (None, NO_TEMPLATE):
        raise ValueError(f"chat is false and template {template!r}; raw text has no template, leave one of the two out")
    if chat is None and template is None and not tokenizer.chat_template and options == NO_OPTIONS:
        chat = False
    if chat and template == NO_TEMPLATE:
        raise ValueError("chat is true and template 'none'; leave one of the two out")
    asked = PromptTemplate(tokenizer, NO_TEMPLATE if chat is False else template, eos_ids, options)
    if asked.text is None:
        return asked.document_prompt_ids(prompt)
    return asked.first_prompt_ids([{"role": "user", "content": prompt}])


def coloured(tokenizer: PreTrainedTokenizerBase, generation: Generation) -> Text:
    """The reply with accepted draft tokens in green, the target's own in bold, and in yellow what stands by a lossy rule alone.

    Text is decoded incrementally, so that characters of several tokens appear once, with the token that completes them.
    """
    target_places = {0}
    place = 1
    for accepted in generation.accepted:
        place += accepted
        target_places.add(place)
        place += 1
    text, shown = Text(), ""
    for index in range(len(generation.token_ids)):
        whole = str(tokenizer.decode(generation.token_ids[: index + 1]))
        if whole.endswith("�"):
            continue
        style = "yellow" if index in generation.by_rule else "bold" if index in target_places else "green"
        text.append(visible(whole[len(shown) :]), style=style)
        shown = whole
    return text
