"""Drafts refined by a second opinion (arXiv:2404.09221): tokens per step of heads alone, with n-gram tables and LMs, on cached replies.

    python -m benchmarks.drafters.refinement --target TARGET --rows ROWS.jsonl --tests TESTS.jsonl --work FOLDER [--seconds 120]
    python -m benchmarks.drafters.refinement --target TARGET --cache CACHE --heads medusa=FOLDER eagle=FOLDER \\
      --tables 2-gram=FOLDER 4-gram=FOLDER [--lms LM=FOLDER] [--paths 16] [--shape 4x4n16] [--alphas 0.1 0.2 0.5 1]

The first form trains what it compares, each part for the same seconds, and makes one table: none, 0-gram, 2-gram, 4-gram, the best whole
paths, a neural LM, a Markov correction, look-around, and look-around with 2-grams. A second table has them by `category` or `kind` of the
tests, where these have one. Alpha is chosen for each row on the first quarter of the
replies; the figures are those of the others. ROWS and TESTS are JSONL with `prompt_ids` and the target's greedy `reply_ids`.

The second form takes heads and tables that exist, and gives a table for each head. CACHE holds greedy replies of the target to held-out
prompts, of one turn each, with the layers that the heads read. Replies do not depend on drafts, so the target does not run.

Alpha 0, the *0-gram*, is the control: the same candidates without the second opinion. *Oracle*: chains that hold the reply's next token
wherever it is among the head's candidates. *Repeats*: adjacent equal tokens in the likeliest path of a draft. *Paths*: the best whole paths
by the table, of heads whose steps read no drafted token. *CPU ms*: the process's time in a draft, of eight rows at once, divided by their
number.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.drafters.refinement_training import Plan, made
from benchmarks.learning.replay import drafts_of
from benchmarks.machine import machine_line
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.shards.packing import pack
from draftsmith.data.shards.shards import CachedSample
from draftsmith.evaluate.strata.acceptance import tokens_per_step, tokens_per_step_interval
from draftsmith.evaluate.strata.decoded import Decoded
from draftsmith.evaluate.strata.words import ranged
from draftsmith.evaluate.tune.recording import Drafted, traced
from draftsmith.evaluate.tune.simulate import replay
from draftsmith.files import read_jsonl
from draftsmith.models import Drafter, DraftLimits
from draftsmith.models.composed.refined_drafter import RefinedConfig, RefinedDrafter
from draftsmith.models.composed.revisers import LMReviser, NgramReviser
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.drafters.draft_records import Cycle, DraftState
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.rollout import data_rollout
from draftsmith.models.ngrams.table import load_ngrams
from draftsmith.models.target.target import TargetEnds
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.models.tree.tree import DraftTree


@dataclass(frozen=True)
class Gain:
    """What a drafter gains.

    Attributes:
        steps: tokens per step, the bonus token counted.
        interval: 95 % bootstrap over prompts.
        repeats: share of adjacent equal tokens in the likeliest path of a draft.
        milliseconds: the process's time in a row's draft.
        decoded: each reply with its cycles.
    """

    steps: float
    interval: tuple[float, float]
    repeats: float
    milliseconds: float
    decoded: list[Decoded]

    def cells(self, control: float) -> str:
        """Of a table's row."""
        low, high = self.interval
        over = f"{100 * (self.steps / control - 1):+.1f} %"
        return f"{self.steps:.2f} ({low:.2f} to {high:.2f}) | {over} | {100 * self.repeats:.1f} % | {self.milliseconds:.2f}"

    def task_cells(self, tasks: Sequence[str], control: Gain) -> str:
        """Tokens per step of each task, and how much more than the control's; of a table's row.

        Args:
            tasks: of each reply.
            control: the candidates alone, on the same replies.
        """
        cells = []
        for task in dict.fromkeys(tasks):
            own, others = (
                [each for each, of in zip(gain.decoded, tasks, strict=True) if of == task] for gain in (self, control)
            )
            steps, base = tokens_per_step(own), tokens_per_step(others)
            over = f"{100 * (steps / base - 1):+.1f} %" if steps and base else "-"
            cells.append(f"{ranged(steps, tokens_per_step_interval(own))} | {over}")
        return " | ".join(cells)


@dataclass(frozen=True)
class Headroom:
    """What a head's candidates would allow.

    Attributes:
        oracle: tokens per step of chains that always choose right among the candidates.
        entropies: of each step's distribution, in nats.
    """

    oracle: float
    entropies: list[float]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drafters.refinement", description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--rows", type=Path, help="replies to learn from; the parts are then trained here")
    parser.add_argument("--tests", type=Path, help="greedy replies to held-out prompts")
    parser.add_argument("--work", type=Path, default=Path("runs/refinement"), help="what is trained is kept here")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each training")
    parser.add_argument("--draft-layers", type=int, default=1)
    parser.add_argument("--lm-layers", type=int, default=1, help="of the target, which the LM keeps")
    parser.add_argument("--replies", type=int, help="of the test replies, the first ones; all by default")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--heads", nargs="+", default=[], help="NAME=FOLDER")
    parser.add_argument("--tables", nargs="+", default=[], help="NAME=FOLDER")
    parser.add_argument("--lms", nargs="*", default=[], help="NAME=FOLDER")
    parser.add_argument(
        "--paths", type=int, default=0, help="best whole paths; 0 for none, and for 16 where parts are trained"
    )
    parser.add_argument("--shape", default="4x4n16", help="a chain or a dynamic tree")
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.1, 0.2, 0.5, 1.0])
    parser.add_argument("--candidates", type=int, default=16)
    options = parser.parse_args(arguments)
    options.words = list(sys.argv[1:] if arguments is None else arguments)
    own, given = (options.rows, options.tests), (options.cache, options.heads, options.tables)
    if all(own) == all(given) or (any(own) and any(given)):
        parser.error("give --rows and --tests, or --cache, --heads and --tables")
    return options


def gain_of(drafter: Drafter, samples: Sequence[CachedSample], limits: DraftLimits) -> Gain:
    """Draft behind every token of the replies, and replay the cycles.

    Args:
        drafter: attached to the target.
        samples: cached replies.
        limits: the shape.
    """
    decoded: list[Decoded] = []
    repeats = pairs = rows = 0
    seconds = 0.0
    propose = drafter.propose

    def timed(state: DraftState, cycle: Cycle, limits: DraftLimits) -> DraftTree:
        nonlocal rows, seconds
        started = time.process_time()
        tree = propose(state, cycle, limits)
        seconds += time.process_time() - started
        rows += len(cycle.host_lengths)
        return tree

    view = drafter.bound(drafter.ends)
    view.propose = timed  # type: ignore[method-assign]
    for prompt, reply, trees in drafts_of(view, samples, limits):
        decoded.append(replay(traced(prompt, reply, trees, limits.draft_length), limits))
        for tree in trees[limits.beam_width]:
            path = likeliest_path(tree)
            repeats += sum(first == second for first, second in pairwise(path))
            pairs += len(path) - 1
    steps, interval = tokens_per_step(decoded), tokens_per_step_interval(decoded)
    assert steps is not None
    assert interval is not None
    return Gain(steps, interval, repeats / max(1, pairs), 1000.0 * seconds / max(1, rows), decoded)


def likeliest_path(tree: Drafted) -> list[int]:
    """Tokens from the root down, each the best-scored child of the one before."""
    at, path = 0, [int(tree.tokens[0])]
    while len(children := (tree.parents == at).nonzero()[0]):
        at = int(children[tree.scores[children].argmax()])
        path.append(int(tree.tokens[at]))
    return path


@torch.no_grad()
def headroom(drafter: Drafter, samples: Sequence[CachedSample], num_candidates: int, depth: int) -> Headroom:
    """How often the reply's tokens are among a head's candidates, along the replies.

    Args:
        drafter: attached to the target.
        samples: cached replies.
        num_candidates: of a step.
        depth: steps K.
    """
    decoded, entropy_sums, rows = [], torch.zeros(depth), torch.zeros(depth)
    for sample in samples:
        batch = pack([sample])
        rollout = data_rollout(batch, depth)
        logits_KAV = drafter.rollout_logits(drafter.teacher_forced(batch, rollout)).float()
        ids = drafter.to_target_ids(logits_KAV.topk(num_candidates, dim=-1).indices)
        hits_AK = (ids == rollout.targets.T[..., None]).any(-1).T & rollout.valid
        decoded.append(_chains(hits_AK))
        log_probs = logits_KAV.log_softmax(-1)
        entropies_KA = -(log_probs.exp() * log_probs).sum(-1)
        entropy_sums += (entropies_KA * rollout.valid.T).sum(1)
        rows += rollout.valid.sum(0)
    oracle = tokens_per_step(decoded)
    assert oracle is not None
    return Headroom(oracle, (entropy_sums / rows).tolist())


def _chains(hits_AK: Tensor) -> Decoded:
    """The cycles of chains that accept as many tokens as the first steps are right; A counts the reply's tokens, each a root."""
    accepted = hits_AK.int().cumprod(1).sum(1).tolist()
    cycles, place = [], 0
    while place < len(accepted) - 1:
        cycles.append(min(accepted[place], len(accepted) - place - 2))
        place += cycles[-1] + 1
    return Decoded((0,) * len(accepted), tuple(cycles))


@dataclass(frozen=True)
class Row:
    """A row of the one table.

    Attributes:
        name: of the refinement.
        head: of those in :data:`CORRECTIONS`.
        opinion: ``2``, ``4`` (n-grams), ``lm``, ``candidates`` (alpha 0), or empty for the head alone.
        paths: the best whole paths are drafted.
    """

    name: str
    head: str
    opinion: str = ""
    paths: bool = False


ROWS = (
    Row("none", "none"),
    Row("0-gram: the candidates alone", "none", "candidates"),
    Row("2-gram", "none", "2"),
    Row("4-gram", "none", "4"),
    Row("2-gram, {paths} best paths", "none", "2", paths=True),
    Row("neural LM", "none", "lm"),
    Row("Markov correction", "Markov"),
    Row("look-around", "look-around"),
    Row("look-around + 2-gram", "look-around", "2"),
)


def one_table(options: argparse.Namespace) -> Iterator[str]:
    """The page of parts that are trained here, line by line."""
    parts = made(
        Plan(
            options.target,
            options.rows,
            options.tests,
            options.work,
            options.seconds,
            options.draft_layers,
            options.lm_layers,
        )
    )
    samples, limits = list(HiddenStateCache(parts.cache))[: options.replies], parse_shape(options.shape)
    first = max(1, len(samples) // 4)
    ends = TargetEnds.load(options.target)
    heads = {name: load_drafter(folder).bound(ends) for name, folder in parts.heads.items()}
    opinions: dict[str, NgramReviser | LMReviser] = {
        str(order): NgramReviser(load_ngrams(folder)) for order, folder in parts.tables.items()
    }
    opinions |= {"lm": LMReviser(_lm(str(parts.lm))), "candidates": opinions["2"]}
    yield (
        f"Block drafters of {options.draft_layers} layers, each trained for {options.seconds:g} s, as was the LM of {options.lm_layers} "
        f"layers. Alpha: the best of {', '.join(f'{alpha:g}' for alpha in options.alphas)} on {first} replies; figures: on the other "
        f"{len(samples) - first}. Shape {options.shape}, {options.candidates} candidates."
    )
    yield ""
    yield "| refinement | alpha | tokens per step (95 %) | over the 0-gram | repeats | CPU ms |"
    yield "|---|---|---|---|---|---|"
    chosen_on, counted = samples[:first], samples[first:]
    gains = dict[str, Gain]()
    control = gain_of(refined(heads["none"], ends, opinions["candidates"], 0.0, options), counted, limits)
    for row in ROWS:
        num_paths = (options.paths or 16) if row.paths else 0
        alpha = ""
        if row.opinion == "candidates":
            gain, alpha = control, "0"
        elif not row.opinion:
            gain = gain_of(heads[row.head], counted, limits)
        else:
            tried = {
                alpha: refined(heads[row.head], ends, opinions[row.opinion], alpha, options, num_paths)
                for alpha in options.alphas
            }
            best = options.alphas[0]
            if len(tried) > 1:
                best = max(tried, key=lambda alpha: gain_of(tried[alpha], chosen_on, limits).steps)
            gain, alpha = gain_of(tried[best], counted, limits), f"{best:g}"
        name = row.name.format(paths=num_paths)
        gains[name] = gain
        yield f"| {name} | {alpha} | {gain.cells(control.steps)} |"
    yield from _by_task(gains, control, _tasks(options.tests, counted))


def _by_task(gains: dict[str, Gain], control: Gain, tasks: Sequence[str]) -> Iterator[str]:
    """A second table, where there are tasks."""
    names = list(dict.fromkeys(tasks))
    if len(names) < 2:
        return
    yield ""
    titles = (f"{name}, {tasks.count(name)} replies: tokens per step (95 %) | over the 0-gram" for name in names)
    yield f"| refinement | {' | '.join(titles)} |"
    yield f"|---{'|---' * 2 * len(names)}|"
    yield from (f"| {name} | {gain.task_cells(tasks, control)} |" for name, gain in gains.items())


def _tasks(tests: Path, samples: Sequence[CachedSample]) -> list[str]:
    """The `category` or `kind` of each sample's row; empty where it has neither."""
    named = {
        (*row["prompt_ids"], *row["reply_ids"]): str(row.get("category") or row.get("kind") or "")
        for _, row in read_jsonl(tests)
    }
    return [named[tuple(sample.input_ids.tolist())] for sample in samples]


def report(options: argparse.Namespace) -> Iterator[str]:
    """The page, line by line."""
    yield f"`{shlex.join(['python', '-m', 'benchmarks.drafters.refinement', *options.words])}`"
    yield ""
    yield f"{machine_line()}, float32."
    yield ""
    yield from one_table(options) if options.rows else tables_of_heads(options)


def tables_of_heads(options: argparse.Namespace) -> Iterator[str]:
    """The page of heads and tables that exist, line by line."""
    samples, limits = list(HiddenStateCache(options.cache))[: options.replies], parse_shape(options.shape)
    tables = {name: NgramReviser(load_ngrams(Path(folder))) for name, folder in _named(options.tables)}
    lms = {name: LMReviser(_lm(folder)) for name, folder in _named(options.lms)}
    ends = TargetEnds.load(options.target)
    yield f"{len(samples)} greedy replies, shape {options.shape}, {options.candidates} candidates."
    for name, folder in _named(options.heads):
        head = load_drafter(Path(folder)).bound(ends)
        room = headroom(head, samples, options.candidates, limits.draft_length)
        entropies = ", ".join(f"{entropy:.2f}" for entropy in room.entropies)
        yield ""
        yield f"**{name}**: oracle {room.oracle:.2f} tokens per step of a chain; entropies of its steps {entropies}."
        yield ""
        yield "| second opinion | alpha | tokens per step (95 %) | over alpha 0 | repeats | CPU ms |"
        yield "|---|---|---|---|---|---|"
        control = gain_of(refined(head, ends, next(iter(tables.values())), 0.0, options), samples, limits)
        yield f"| none | | {gain_of(head, samples, limits).cells(control.steps)} |"
        yield f"| none, the candidates alone | 0 | {control.cells(control.steps)} |"
        for opinion, reviser, num_paths in _opinions(head, tables, lms, options.paths):
            for alpha in options.alphas:
                drafter = refined(head, ends, reviser, alpha, options, num_paths)
                yield f"| {opinion} | {alpha:g} | {gain_of(drafter, samples, limits).cells(control.steps)} |"


def _named(pairs: Sequence[str]) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        name, _, folder = pair.partition("=")
        yield name, folder


def _lm(folder: str) -> LMDrafter:
    lm = load_drafter(Path(folder))
    if not isinstance(lm, LMDrafter):
        raise ValueError(f"--lms has {folder}, which is no causal LM; name one with the target's tokenizer")
    return lm


def _opinions(
    head: Drafter, tables: dict[str, NgramReviser], lms: dict[str, LMReviser], num_paths: int
) -> Iterator[tuple[str, NgramReviser | LMReviser, int]]:
    """Each second opinion: its words, what gives it, and how many whole paths it chooses."""
    yield from ((name, table, 0) for name, table in tables.items())
    yield from ((name, lm, 0) for name, lm in lms.items())
    if num_paths and not head.reads_drafted:
        yield from ((f"{name}, {num_paths} best paths", table, num_paths) for name, table in tables.items())


def refined(
    head: Drafter,
    ends: TargetEnds,
    reviser: NgramReviser | LMReviser,
    alpha: float,
    options: argparse.Namespace,
    num_paths: int = 0,
) -> Drafter:
    """A head with a second opinion."""
    names = {"lm": "lm"} if isinstance(reviser, LMReviser) else {"ngrams": "table"}
    config = RefinedConfig(head="head", alpha=alpha, num_candidates=options.candidates, num_paths=num_paths, **names)
    return RefinedDrafter(config, head, reviser).eval().bound(ends)


if __name__ == "__main__":
    for line in report(parse()):
        print(line, flush=True)
