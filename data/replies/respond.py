"""The command `draftsmith data respond`: the target's own replies to prompts, token by token as it generated them.

Owns: the order of the work, and what is printed. Does not know: turns (`dialogues.py`), files (`reply_files.py`), how a reply is decoded
(an engine), caches, training.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from draftsmith import provenance
from draftsmith.arguments import FLAT
from draftsmith.data.chat_template import ChatTemplate
from draftsmith.data.corpus_survey import begun_anew
from draftsmith.data.prompt_ids import chat_for
from draftsmith.data.prompts import ALL_PROMPTS, Prompt, PromptSelection, read_prompts
from draftsmith.data.replies.engine_choice import EngineChoice, EngineName
from draftsmith.data.replies.reply_files import num_begun_anew, run_identity, write_replies, write_settings
from draftsmith.data.replies.reply_plan import SMALL_BATCHES, BatchOptions, Plan, make_plan
from draftsmith.data.replies.reply_settings import MODELS_OWN, SamplingOverrides, reply_settings
from draftsmith.data.replies.server_source import NO_SERVER, ServerOptions
from draftsmith.data.replies.vllm_source import ONE_GPU, VllmOptions
from draftsmith.data.shared_work import OWN_SHARE, Share, ShareOptions
from draftsmith.decode.decode_command import NO_STOP_STRINGS, EndingOptions
from draftsmith.decode.runners import Compile
from draftsmith.decode.sampling import GenerationSettings, ReplyOptions
from draftsmith.json_rows import Dropped, summary
from draftsmith.models.target.options import DEFAULTS, TargetOptions
from draftsmith.models.target.prompt_template import OWN_TEMPLATE, TemplateChoice
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.ownership import check_unclaimed

REPLY = ReplyOptions(max_new_tokens=256)


def respond(
    target: str,
    prompts: Path,
    out: Path,
    selection: Annotated[PromptSelection, FLAT] = ALL_PROMPTS,
    reply: Annotated[ReplyOptions, FLAT] = REPLY,
    ending: Annotated[EndingOptions, FLAT] = NO_STOP_STRINGS,
    sampling: Annotated[SamplingOverrides, FLAT] = MODELS_OWN,
    batches: Annotated[BatchOptions, FLAT] = SMALL_BATCHES,
    share: Annotated[ShareOptions, FLAT] = OWN_SHARE,
    drafter: Path | None = None,
    limits: DraftLimits | None = None,
    where: Annotated[TargetOptions, FLAT] = DEFAULTS,
    rendering: Annotated[TemplateChoice, FLAT] = OWN_TEMPLATE,
    engine: EngineName = "bundled",
    server: Annotated[ServerOptions, FLAT] = NO_SERVER,
    vllm: Annotated[VllmOptions, FLAT] = ONE_GPU,
    compile: Compile = "auto",
    samples: int = 1,
) -> None:
    """Lets the target answer the prompts itself.

    Writes OUT/responses.jsonl, token ids included. Sampling settings default to the model's own. To resume a run, repeat the command.

    Args:
        target: Path or hub id of the target.
        prompts: What `data prompts` wrote.
        out: The folder of the replies.
        selection: Which prompts; see `PromptSelection`.
        reply: Length and seed; see `ReplyOptions`. Each prompt and turn draws its own numbers from the seed.
        ending: What ends a reply early; see `EndingOptions`.
        sampling: How tokens are drawn; see `SamplingOverrides`.
        batches: How many prompts are answered together; see `BatchOptions`.
        share: Which part of the prompts this process answers; see `ShareOptions`.
        drafter: A trained drafter that makes this faster; the replies stay the same.
        limits: How much the drafter drafts. Default: what `draftsmith tune` kept in its folder, else 1x4.
        where: Where the target runs; see `TargetOptions`.
        rendering: The chat template; see `TemplateChoice`.
        engine: What generates: the bundled decoder, vLLM here (give it thousands of --batch_rows), or a server that gives back token ids.
        server: The server's address and how patiently it is asked; see `ServerOptions`.
        vllm: What vLLM may take; see `VllmOptions`.
        compile: on compiles decoding cycles, a minute or more; auto and off run them op by op.
        samples: Replies to each prompt, each drawn apart; more than one needs a temperature above 0.
    """
    check_unclaimed(out)
    choice = EngineChoice(engine, drafter, limits, batches, server, vllm, compile).check(where)
    where, own_share = where.resolved(target), share.own()
    tokenizer = where.tokenizer(target)
    settings = reply_settings(target, tokenizer, sampling, reply, ending.stop, where)
    chosen, unread = _chosen(prompts, selection, samples, settings.temperature)
    opened = choice.open(target, tokenizer, settings, where)
    chat = chat_for(chosen, tokenizer, rendering.template, settings.eos_token_ids, rendering.options)
    digest = _digest(json.dumps(prompt.fields()) for prompt in chosen)
    identity = run_identity(tokenizer, chat, settings, rendering, where) | {"prompts_sha256": digest} | opened.identity
    plan = _own_plan(own_share, chosen, unread, chat, settings, opened.context, batches)
    config = identity | vars(selection) | {"target": target} | choice.facts()
    record = partial(provenance.record, "data respond", config, {str(prompts): digest})
    written = write_replies(out, own_share, plan, chat, opened.engine, identity, record())
    provenance.write(out, record())
    _report(out, own_share, plan, identity, written, server.skip_failed)


def _chosen(
    prompts: Path, selection: PromptSelection, samples: int, temperature: float
) -> tuple[list[Prompt], list[Dropped]]:
    """The prompts to answer, each as often as it is answered, and the rows that are none."""
    unread: list[Dropped] = []
    chosen = read_prompts(prompts, selection.split, unread)[: selection.limit]
    return sampled_prompts(chosen, samples, temperature), unread


def sampled_prompts(prompts: list[Prompt], samples: int, temperature: float) -> list[Prompt]:
    """Each prompt as often as it is answered; the second reply to `p7` has the id `p7#2`, from which its noise follows.

    Args:
        prompts: what to ask.
        samples: replies to each.
        temperature: of these replies.

    Returns:
        The prompts, those of one prompt side by side.

    Raises:
        ValueError: no samples, or several that would be equal.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
    if samples > 1 and temperature == 0.0:
        raise ValueError(
            f"samples is {samples}, and at temperature 0 they would all be equal; set --temperature above 0, such as 0.7"
        )
    repeated = range(2, samples + 1)
    return [
        each for prompt in prompts for each in (prompt, *(replace(prompt, id=f"{prompt.id}#{n}") for n in repeated))
    ]


def _own_plan(
    share: Share,
    chosen: Sequence[Prompt],
    unread: Sequence[Dropped],
    chat: ChatTemplate,
    settings: GenerationSettings,
    context: int | None,
    batches: BatchOptions,
) -> Plan:
    """The plan of one share of the prompts; the first rank lists the rows that are no prompt, `unread`."""
    own = chosen[share.rank :: share.world_size]
    plan = make_plan(own, chat, settings, context, batches, may_be_empty=share.world_size > 1)
    return replace(plan, dropped=[*unread, *plan.dropped]) if share.rank == 0 else plan


def _report(out: Path, share: Share, plan: Plan, identity: dict[str, Any], written: int, may_skip: bool) -> None:
    """Prints what there is now.

    Raises:
        ValueError: prompts got no reply, and the run may not do without them.
    """
    print(f"{written} replies in {out}; {summary(plan.dropped)}")
    if anew := num_begun_anew(out / f"responses{share.suffix}.jsonl"):
        print(begun_anew(anew))
    if written == plan.num_prompts:
        return
    shortfall = (
        f"{plan.num_prompts - written} of {plan.num_prompts} prompts got no reply; the reasons are in "
        f"{out / f'failures{share.suffix}.jsonl'}"
    )
    if not may_skip:
        raise ValueError(
            f"{shortfall}; run the same command again, which asks for these alone, or with --skip_failed true to do without them"
        )
    write_settings(out, share, identity, written)
    print(shortfall)


def _digest(parts: Iterable[str]) -> str:
    """sha256 (hex) of the parts with a zero byte between them; never all of them in memory."""
    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        digest.update(b"\0" * (number > 0) + part.encode())
    return digest.hexdigest()
