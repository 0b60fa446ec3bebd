"""The sections about decoding: each measures one thing and returns its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from benchmarks.gpu.oracle import Oracle
from benchmarks.gpu.subject import (
    FAMILIES,
    Scale,
    Timing,
    fastest_runner,
    prompt,
    random_drafter,
    random_target,
    runners,
    shape_of,
    timed,
)
from draftsmith.decode import Engine, Ledger
from draftsmith.evaluate.roofline.memory_speed import MemorySpeed, memory_speed
from draftsmith.evaluate.roofline.roofline import CycleClock, CycleLoad, Roofline, roofline
from draftsmith.models.target.target import Target
from draftsmith.models.tree.shapes import parse_shape

ORACLE_SHAPE = "9x7"  # 64 nodes
TIE = 2.0**-6
"""Two roundings of bfloat16, as a share of the largest logit: tokens whose logits are closer are tied."""


@dataclass
class Bench:
    """What the sections share.

    Attributes:
        scale: how large everything is.
        device: where it runs.
    """

    scale: Scale
    device: torch.device
    _plain: dict[int, Timing] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU, float32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @cached_property
    def target(self) -> Target:
        """The target that most sections decode with."""
        return random_target(self.scale, self.dtype, self.device)

    @cached_property
    def speed(self) -> MemorySpeed:
        """Of the device's memory."""
        return memory_speed(self.device)

    def free(self) -> None:
        """Give up the target, so that another one fits."""
        self.__dict__.pop("target", None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def plain(self, context: int) -> Timing:
        """Plain decoding behind a prompt, by the fastest runner; run once."""
        if context not in self._plain:
            engine = Engine(self.target, **fastest_runner(self.device))
            self._plain[context] = timed(engine, [prompt(self.scale, context)], self.scale.new_tokens)
        return self._plain[context]

    def load(self, context: int, num_nodes: int = 1) -> CycleLoad:
        """The mean text of a timed reply's cycles."""
        return CycleLoad(context + self.scale.new_tokens / 2, num_nodes=num_nodes)


def memory(bench: Bench) -> dict[str, Any]:
    """How fast the device copies."""
    return {"copy_gb_per_s": bench.speed.bandwidth / 1e9, "caches_mb": (bench.speed.caches or 0) / 1e6}


def plain(bench: Bench) -> dict[str, Any]:
    """Steps of plain decoding against the roofline."""
    figures: dict[str, Any] = {}
    for context in bench.scale.contexts:
        timing = bench.plain(context)
        bound = roofline(bench.target, None, None, bench.load(context), bench.speed)
        figures[f"context {context}"] = cycle_figures(timing, bound)
    return figures


def cycle_figures(timing: Timing, bound: Roofline) -> dict[str, Any]:
    """A cycle beside the time that its bytes take at least."""
    return {
        "cycle_ms": 1e3 * timing.cycle_seconds,
        "bound_ms": 1e3 * bound.bound_seconds,
        "bytes": bound.total_bytes,
        "share_of_roofline": bound.bound_seconds / timing.cycle_seconds,
        "over_bound": timing.cycle_seconds / bound.bound_seconds,
        "first_use_s": timing.first_use_seconds,
    }


def verify(bench: Bench) -> dict[str, Any]:
    """A cycle that verifies 64 nodes, drafts for free and accepts 0 to 7 tokens, against a plain step.

    It holds more than the forward over 64 nodes: the walk through the tree and the compaction as well.
    """
    context = bench.scale.contexts[0]
    step = bench.plain(context)
    ids = prompt(bench.scale, context)
    # More cycles than tokens a cycle accepts, so that enough of them are steady.
    new_tokens = 4 * bench.scale.new_tokens
    truth = timed(Engine(bench.target, **fastest_runner(bench.device)), [ids], new_tokens).token_ids[0]
    limits = parse_shape(ORACLE_SHAPE)
    oracle = Oracle(bench.target.ends, [[*ids, *truth]])
    timing = timed(Engine(bench.target, oracle, limits, **fastest_runner(bench.device)), [ids], new_tokens)
    ledger = Ledger()
    timed(Engine(bench.target, oracle, limits, ledger=ledger, compile="off"), [ids], new_tokens)
    generation = timing.generations[0]
    return {
        "nodes": limits.max_nodes,
        "cycle_ms": 1e3 * timing.cycle_seconds,
        "plain_step_ms": 1e3 * step.cycle_seconds,
        "over_plain_step": timing.cycle_seconds / step.cycle_seconds,
        "tokens_per_step": (len(generation.token_ids) - 1) / len(generation.accepted),
        "eager_stage_ms": stage_ms(ledger),
        "same_tokens": generation.token_ids == truth,
    }


def stage_ms(ledger: Ledger) -> dict[str, float]:
    """Milliseconds of one cycle by stage."""
    return {name: 1e3 * seconds for name, seconds in CycleClock(ledger.seconds, ledger.cycles).of_a_cycle().items()}


def cycles(bench: Bench) -> dict[str, Any]:
    """Whole cycles of drafters against their own bound."""
    context = bench.scale.contexts[0]
    figures: dict[str, Any] = {}
    for family, (_, shape) in FAMILIES.items():
        drafter, limits = random_drafter(family, bench.target, bench.scale), shape_of(family)
        engine = Engine(bench.target, drafter, limits, **fastest_runner(bench.device))
        timing = timed(engine, [prompt(bench.scale, context)], bench.scale.new_tokens)
        load = bench.load(context, limits.max_nodes)
        bound = roofline(bench.target, engine.drafter, limits, load, bench.speed)
        ledger = Ledger()
        eager = Engine(bench.target, drafter, limits, ledger=ledger, compile="off")
        timed(eager, [prompt(bench.scale, context)], bench.scale.new_tokens)
        figures[f"{family} {shape}"] = cycle_figures(timing, bound) | {
            "draft_vocabulary": drafter.num_draft_tokens,
            "over_plain_step": timing.cycle_seconds / bench.plain(context).cycle_seconds,
            "eager_stage_ms": stage_ms(ledger),
        }
    return figures


def all_runners(bench: Bench) -> dict[str, Any]:
    """Plain steps and ReDrafter's cycles through each runner, on a target of few layers: the first use, and a steady cycle."""
    bench.free()
    target = random_target(bench.scale, bench.dtype, bench.device, bench.scale.runner_layers)
    ids = [prompt(bench.scale, bench.scale.contexts[0])]
    drafter, limits = random_drafter("ReDrafter", target, bench.scale), shape_of("ReDrafter")
    figures: dict[str, Any] = {"layers": bench.scale.runner_layers}
    for name, way in runners(bench.device).items():
        for label, drafts in (("plain", ()), ("ReDrafter 4x5n15", (drafter, limits))):
            timing = timed(Engine(target, *drafts, **way), ids, bench.scale.new_tokens)
            figures[f"{label}, {name}"] = {
                "cycle_ms": 1e3 * timing.cycle_seconds,
                "first_use_s": timing.first_use_seconds,
            }
    return figures


def prefill(bench: Bench) -> dict[str, Any]:
    """Prompt tokens a second."""
    engine = Engine(bench.target, compile="off")
    figures = {}
    for context in bench.scale.contexts:
        ids = [prompt(bench.scale, context)]
        timed(engine, ids, 2)
        seconds = min(timed(engine, ids, 2).prefill_seconds for _ in range(3))
        figures[f"context {context}"] = {"ms": 1e3 * seconds, "tokens_per_s": context / seconds}
    return figures


def rows(bench: Bench) -> dict[str, Any]:
    """Tokens a second of several rows, plain and drafted. Random drafters are hardly ever right: their figure is that of cycles."""
    context, new_tokens = bench.scale.contexts[0], bench.scale.new_tokens
    drafter, limits = random_drafter("ReDrafter", bench.target, bench.scale), shape_of("ReDrafter")
    figures = {}
    for num_rows in bench.scale.rows:
        ids = [prompt(bench.scale, context, seed) for seed in range(num_rows)]
        step = timed(Engine(bench.target, **fastest_runner(bench.device)), ids, new_tokens).cycle_seconds
        drafted = Engine(bench.target, drafter, limits, **fastest_runner(bench.device))
        cycle = timed(drafted, ids, new_tokens).cycle_seconds
        figures[f"{num_rows} rows"] = {
            "plain_step_ms": 1e3 * step,
            "plain_tokens_per_s": num_rows / step,
            "cycle_ms": 1e3 * cycle,
            "tokens_per_step_to_break_even": cycle / step,
        }
    return figures


def exact(bench: Bench) -> dict[str, Any]:
    """Replies of drafts against plain decoding of the same runner, alone and in a ragged batch, in bfloat16 and float32."""
    figures: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        layers = None if dtype is bench.dtype else bench.scale.float32_layers
        if dtype is not bench.dtype:
            bench.free()
        target = bench.target if dtype is bench.dtype else random_target(bench.scale, dtype, bench.device, layers)
        figures[str(dtype).removeprefix("torch.")] = compare(target, bench)
    return figures


def compare(target: Target, bench: Bench) -> dict[str, Any]:
    """How many replies equal plain decoding's, and how far apart the target's logits are where one differs."""
    scale, way = bench.scale, fastest_runner(bench.device)
    prompts = [prompt(scale, scale.contexts[0] // 2 + 3 * row, row) for row in range(4)]
    groups = [[0], [1], list(range(4))]
    alone = [timed(Engine(target, **way), [ids], scale.new_tokens).token_ids[0] for ids in prompts]
    equal, replies, gaps = 0, 0, []
    for group in groups:
        ids = [prompts[row] for row in group]
        texts = [[*prompts[row], *alone[row]] for row in group]
        drafters = {"oracle": (Oracle(target.ends, texts), parse_shape(ORACLE_SHAPE))}
        drafters |= {family: (random_drafter(family, target, scale), shape_of(family)) for family in FAMILIES}
        for drafter, limits in drafters.values():
            answers = timed(Engine(target, drafter, limits, **way), ids, scale.new_tokens).token_ids
            for row, answer in zip(group, answers, strict=True):
                replies += 1
                equal += answer == alone[row]
                if answer != alone[row]:
                    gaps.append(relative_gap(target, prompts[row], alone[row], answer))
    return {"replies": replies, "equal": equal, "relative_gaps": gaps, "ties_only": all(gap <= TIE for gap in gaps)}


def relative_gap(target: Target, ids: Sequence[int], first: Sequence[int], second: Sequence[int]) -> float:
    """Where two replies part: the gap between the target's logits of both tokens, as a share of the largest logit."""
    place = next(place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    text = torch.tensor([[*ids, *first[:place]]], device=target.device)
    with torch.no_grad():
        logits_V = target.logits(target.prefix(text).normed[0, -1]).float()
    return float((logits_V[first[place]] - logits_V[second[place]]).abs() / logits_V.abs().max())
