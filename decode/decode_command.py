"""``draftsmith decode``: one reply, streamed, with the accepted runs coloured.

Owns what a person sees of one decoded reply, and the option of stop strings that commands share: `sampling.py` is shipped with drafters
and knows no command line. Knows nothing of measuring; that is ``draftsmith evaluate``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from draftsmith.arguments import FLAT, WHOLE
from draftsmith.decode.batch import Generation
from draftsmith.decode.engine import Engine
from draftsmith.decode.model_settings import for_target
from draftsmith.decode.runners import Compile
from draftsmith.decode.sampling import GREEDY, NO_FILTERS, DrawOptions, FilterOptions, settings_of
from draftsmith.decode.verify.lossy_rule import LossyRule
from draftsmith.decode.verify.lossy_rules import JudgeRule
from draftsmith.decode.verify.rule_text import parse_rule
from draftsmith.escapes import visible
from draftsmith.models.branches import default_for
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_folder import drafter_fingerprint, drafter_folder, load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.drafters.registry import default_limits
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.lora.adapted_drafter import adapted
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import (
    NO_OPTIONS,
    NO_TEMPLATE,
    OWN_TEMPLATE,
    PromptTemplate,
    TemplateChoice,
    TemplateOptions,
)
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.models.tree.shapes_by_rows import ShapesByRows


@dataclass(frozen=True, kw_only=True)
class EndingOptions:
    """What ends a reply before its longest length, beside the target's end tokens.

    Args:
        stop: Strings that end a reply.
    """

    stop: Annotated[tuple[str, ...], WHOLE] = ()


NO_STOP_STRINGS = EndingOptions()


def decode(
    prompt: str,
    target: str = "embedded:target",
    drafter: Path | None = None,
    shape: str | None = None,
    rule: str = "lossless",
    draw: Annotated[DrawOptions, FLAT] = GREEDY,
    filters: Annotated[FilterOptions, FLAT] = NO_FILTERS,
    ending: Annotated[EndingOptions, FLAT] = NO_STOP_STRINGS,
    chat: bool | None = None,
    drafter_adapter: Path | None = None,
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
    compile: Compile = "auto",
) -> None:
    """Decode one prompt and show which tokens were drafted and accepted.

    Accepted draft tokens are printed in green, the target's own in bold white; the last line gives the tokens per step (bonus counted).
    The text is the target's own, whatever the drafter, unless you choose a LOSSY rule: tokens that only the rule accepted are yellow.

    Args:
        prompt: The user's message, or the raw text to continue.
        target: Model directory, hub id, embedded:target or embedded:draft_lm.
        drafter: Folder or hub id of a drafter or a draft LM, or embedded:suffix; none decodes plainly.
        shape: How much to draft: WIDTHxLENGTH beams with LENGTH drafted tokens, 10x6n60 a dynamic tree (m2 behind it merges branches),
            tree:FILE.json or t3.2.1 a static one, s1.1.1, k4.2.1 or b1.1.1 a sampled one; p0.1 prunes, e0.5 stops early. Default: what
            `draftsmith tune` kept in the drafter's folder, else the family's own, else 1x4.
        rule: lossless; or LOSSY: judge:FOLDER@0.9, top-k@3, typical@0.09, kl@0.5, kl-unsure@0.5, ensemble@0.7, fly@0.3, margin@0.3,
            relaxed:BEGIN,END@0.5 (the ids of the tokens around a thought), everything.
        draw: Length, seed and temperature; see `DrawOptions`. With and without a drafter one seed gives one text, except for sampled trees.
        filters: Which tokens can be drawn; see `FilterOptions`.
        ending: What ends the reply early; see `EndingOptions`.
        chat: true wraps the prompt in the model's chat template, false continues it as raw text; default: true where there is one.
        drafter_adapter: A trained adapter of the drafter; without --drafter, of the one that it names.
        where: Where the target runs; see `TargetOptions`.
        rendering: The chat template; see `TemplateChoice`.
        compile: on compiles decoding cycles (on CUDA it captures them), off runs them op by op; auto is off so far. Compiling takes a
            minute or more.
    """
    limits: DraftLimits | ShapesByRows | None = None if shape is None else parse_shape(shape)
    _, lossy = parse_rule(rule)
    where = where.resolved(target)
    model, tokenizer = where.load_to_decode(target), where.tokenizer(target)
    bond = TargetBond(model.ends, tokenizer_fingerprint(tokenizer))
    head = _drafter(drafter, drafter_adapter, where.dtype, where.trust_remote_code, bond)
    if head is not None:
        head.to_decode(model.device)
        if limits is None and lossy is None:
            limits = head.kept_shapes(model)
        limits = limits or default_for(model, default_limits(head, DraftLimits(draft_length=4)))
    _warn_of_unknown_draft(lossy, drafter_adapter or drafter, limits)
    settings = for_target(settings_of(draw, filters, model.eos_token_ids, ending.stop), model, tells_text=True)
    engine = Engine(model, head, limits, tokenizer, rule=lossy, compile=compile)
    ids = prompt_ids(tokenizer, prompt, chat, rendering.template, model.eos_token_ids, rendering.options)
    console = Console(highlight=False)
    generation = engine.generate([ids], settings)[0]
    if chat is None and rendering.template is None and not tokenizer.chat_template:
        console.print("[dim]the tokenizer has no chat template: the prompt is continued as raw text[/dim]")
    console.print(coloured(tokenizer, generation))
    _print_counts(console, generation, None if lossy is None else str(lossy))


def _print_counts(console: Console, generation: Generation, rule: str | None) -> None:
    """The line on tokens and steps, and where a lossy rule decided, how often."""
    if generation.accepted:
        emitted, cycles = len(generation.token_ids) - 1, len(generation.accepted)
        console.print(
            f"[dim]{emitted} tokens in {cycles} target steps: {emitted / cycles:.2f} tokens per step; ended by {generation.finish}[/dim]"
        )
    if rule is not None:
        console.print(
            Text("LOSSY ", "yellow"),
            Text(f"by the rule {visible(rule)}: {len(generation.by_rule)} tokens are not the target's choice", "dim"),
            sep="",
        )


def _warn_of_unknown_draft(
    rule: LossyRule | None, drafter: Path | None, limits: DraftLimits | ShapesByRows | None
) -> None:
    """Of drafts that a judge has not seen; other rules know no drafters. A drafter with an adapter drafts as the adapter's folder does."""
    if not isinstance(rule, JudgeRule) or drafter is None or not isinstance(limits, DraftLimits):
        return
    said = rule.unknown_draft(str(drafter), drafter_fingerprint(drafter_folder(str(drafter))), limits)
    if said:
        warnings.warn(said, stacklevel=3)


def _drafter(
    folder: Path | None, adapter: Path | None, dtype: str, trust_remote_code: bool, target: TargetBond
) -> Drafter | None:
    """The drafter with its adapter; the one that the adapter names where no folder is given."""
    if folder is None:
        return None if adapter is None else load_drafter(adapter, dtype, trust_remote_code, target=target)
    drafter = load_drafter(folder, dtype, trust_remote_code, target=target)
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

    Args:
        tokenizer: of the target.
        prompt: the message or the raw text.
        chat: whether the template is applied; None applies it where the tokenizer has one.
        template: Jinja file, or ``none`` for raw text; None takes the tokenizer's own.
        eos_ids: the target's end-of-sequence tokens.
        options: the chat template's name and variables.

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
