"""What is really accepted, beside what training's forward promises: on prompts that were trained on, and on those of the evaluation.

Owns the check `acceptance`. It tells two diseases apart: a drafter that does not serve as it was trained, and one that was trained on
other text than it meets.

Shape legend: A anchors, K draft steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from draftsmith.data.shards.packing import pack
from draftsmith.data.shards.shards import CachedSample
from draftsmith.decode import Engine, Generation, GenerationSettings
from draftsmith.decode.model_settings import for_target
from draftsmith.evaluate.doctor.alignment import guesses
from draftsmith.evaluate.doctor.case import Case, NotChecked, portion
from draftsmith.evaluate.doctor.report import Finding
from draftsmith.models.drafters.rollout import data_rollout
from draftsmith.models.tree.limits import DraftLimits

_MAX_PROMPTS, _MAX_NEW_TOKENS = 8, 64
_SLIGHT = 0.02  # tokens per step; a difference this small says nothing
_SERVES, _KEEPS = 0.85, 0.75  # of what is promised, of what is had on trained prompts (both as drafted tokens a step)


def replay(correct_AK: Tensor) -> tuple[int, int]:
    """Tokens and cycles of a reply whose drafts are verified against its own text.

    Args:
        correct_AK: bool, whether step k at each of the reply's anchors, one after the other, is right (and inside the reply).

    Example: steps right at anchors as `[[1, 0], [1, 1], [0, 0], [1, 0]]`: cycles begin at anchors 0, 2, 3 and emit 2, 1, 2 tokens, the
    last one past the end, which leaves 4 tokens in 3 cycles.
    """
    lengths = correct_AK.int().cumprod(1).sum(1).tolist()
    place = cycles = 0
    while place < len(lengths):
        place += lengths[place] + 1
        cycles += 1
    return len(lengths), cycles


def promised(case: Case, samples: Sequence[CachedSample], num_steps: int) -> float:
    """Tokens per step of chains over the samples' replies, were decoding to say what training's forward says."""
    drafter = case.trainable
    tokens = cycles = 0
    for sample in samples:
        batch = pack([sample], drafter.features).to(case.ends.device)
        rollout = data_rollout(batch, num_steps)
        correct_AK = (guesses(drafter, batch, rollout) == rollout.targets) & rollout.valid
        # The first anchor's root comes with the prefill; the last has nothing left to predict.
        emitted, steps = replay(correct_AK[:-1])
        tokens, cycles = tokens + emitted, cycles + steps
    return tokens / cycles if cycles else 0.0


def decoded(
    case: Case, prompts: Sequence[tuple[list[int], int]], num_steps: int, temperature: float
) -> list[Generation]:
    """Replies of the real engine with chains.

    Args:
        case: the drafter and its whole target.
        prompts: token ids, and how long a reply may become.
        num_steps: drafted tokens a cycle.
        temperature: of decoding.

    Raises:
        NotChecked: the target's trunk was not loaded.
    """
    if case.target is None:
        raise NotChecked("needs the whole target, of which only the ends were loaded: leave --ends-only out")
    engine = Engine(case.target, case.drafter, DraftLimits(draft_length=num_steps))
    settings = GenerationSettings(temperature=temperature, seed=case.seed, eos_token_ids=case.eos_ids)
    settings = for_target(settings, case.target)
    return [engine.generate([ids], replace(settings, max_new_tokens=budget))[0] for ids, budget in prompts]


def tokens_per_step(replies: Sequence[Generation]) -> float:
    """Over all of the replies; 0 where nothing was drafted."""
    cycles = sum(len(reply.accepted) for reply in replies)
    return sum(len(reply.token_ids) - 1 for reply in replies) / cycles if cycles else 0.0


def first_replies(samples: Sequence[CachedSample]) -> list[CachedSample]:
    """Samples cut to their first prompt and the beginning of its reply, as far as they have both."""
    portions = []
    for sample in samples:
        labelled = sample.loss_mask.bool()
        start = int(labelled.int().argmax())
        if not bool(labelled.any()) or start == 0:
            continue
        length = int(labelled[start:].int().cumprod(0).sum())
        if length >= 4:
            stop = start + min(length, _MAX_NEW_TOKENS)
            portions.append(portion(sample, 0, stop))
        if len(portions) == _MAX_PROMPTS:
            break
    return portions


def check_acceptance(case: Case) -> Finding:
    """Tokens per step on trained prompts against the promise, and on the evaluation's prompts against the trained ones.

    Raises:
        NotChecked: no sample has a prompt and a reply, or the target's trunk was not loaded.
    """
    _ = case.trainable
    num_steps = min(
        max(1, case.trained.config.num_draft_steps), case.use.draft_length or 8, case.drafter.max_draft_steps or 8
    )
    temperature = case.use.temperature or 0.0
    samples = first_replies(case.samples)
    if not samples:
        raise NotChecked("no sample has a prompt and a reply behind it")
    starts = [int(sample.loss_mask.int().argmax()) for sample in samples]
    # Not longer than the reply that was trained on: what would follow it is new to the drafter.
    prompts = [
        (sample.input_ids[:start].tolist(), len(sample.input_ids) - start)
        for sample, start in zip(samples, starts, strict=True)
    ]
    replies = decoded(case, prompts, num_steps, temperature)
    # The promise is about this very text: a sampled reply, or one that rounding turned, is another one.
    again = [
        number
        for number, (sample, start) in enumerate(zip(samples, starts, strict=True))
        if list(replies[number].token_ids) == sample.input_ids[start:].tolist()
    ]
    own = tokens_per_step(replies)
    figures = {"trained prompts": own, "said again": len(again), "steps": num_steps, "temperature": temperature}
    measured = f"{own:.2f} tokens per step on trained prompts"
    promise = kept = 1.0
    expected = f"chains of {num_steps}: no promise, because the engine repeats no reply word for word"
    if again:
        promise = promised(case, [samples[number] for number in again], num_steps)
        kept = tokens_per_step([replies[number] for number in again])
        figures |= {"promised": promise, "kept": kept}
        measured += f", {promise:.2f} promised"
        measured += "" if len(again) == len(samples) else f" and {kept:.2f} kept on the {len(again)} said again"
        expected = f"chains of {num_steps}: as promised"
    room = (case.target.max_positions if case.target is not None else None) or 2**62
    fitting = [(list(sample.prompt_ids), _MAX_NEW_TOKENS) for sample in case.prompts if len(sample.prompt_ids) < room][
        :_MAX_PROMPTS
    ]
    new = tokens_per_step(decoded(case, fitting, num_steps, temperature)) if fitting else None
    if new is not None:
        figures["evaluation prompts"] = new
        measured += f", {new:.2f} on yours"
    if promise - kept > _SLIGHT and kept - 1.0 < _SERVES * (promise - 1.0):
        remedy = (
            "decoding accepts less than training's forward promises on the same text: see `fingerprints`, `states`, `drafter-file`, "
            "`train-serve`, in this order"
        )
        return Finding("acceptance", "fault", measured, expected, remedy, figures)
    if new is not None and new - 1.0 < _KEEPS * (own - 1.0):
        remedy = (
            "the drafter serves as trained, but knows the text it was trained on better than your prompts: train on more replies, to "
            "prompts like those of use"
        )
        return Finding("acceptance", "warning", measured, expected, remedy, figures)
    return Finding("acceptance", "ok", measured, expected, "", figures)
