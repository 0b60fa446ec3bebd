"""Why a lossless rule gains or does not: what any rule could accept of a head's first drafted token, beside what the walk accepts.

    python -m benchmarks.learning.rule_bounds --target TARGET --heads eagle=FOLDER --set 1 CACHE

CACHE is what `draftsmith data extract` made of replies at that temperature, each a prompt and one reply. With the draft distribution q and
the target's p behind every token of the replies, two chances say how far a rule can get with n candidates:

- the walk accepts p of the n likeliest tokens of q, and no rule with these candidates accepts more;
- n tokens that are drawn from q by themselves give at most the sum of min(p, 1 - (1 - q)^n) (SpecTr, arXiv:2310.15141).

K-SEQ draws so. MCSD draws without putting back, and so has more distinct candidates. For one candidate both rules reach the sum of
min(p, q). The target does not run.

Shape legend: B replies of a batch, P positions, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.drafters.counting import Counted, paired_ratio
from benchmarks.learning.replay import draft_everywhere, prompt_length
from draftsmith import provenance
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.shards.shards import CachedSample
from draftsmith.evaluate.drafters import parse_entries
from draftsmith.evaluate.strata.words import table
from draftsmith.evaluate.tune.recording import Recording, RecordingState
from draftsmith.models import Cycle, Drafter, DraftLimits, DraftTree, root_tree
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.target.target import PRE_NORM, TargetEnds

ONE_TOKEN = DraftLimits(1, 1)
CANDIDATES = (1, 2, 3, 4, 6)


class FirstToken(Recording):
    """Records the distribution of the first drafted token, and proposes nothing.

    Args:
        inner: the drafter.
        temperature: of the requests.
    """

    def __init__(self, inner: Drafter, temperature: float) -> None:
        super().__init__(inner, [1], 1)
        self.temperature = temperature
        self.steps: list[Tensor] = []

    def propose(self, state: RecordingState, cycle: Cycle, limits: DraftLimits) -> DraftTree:  # type: ignore[override]
        """Keeps q over the target's vocabulary, float32 [B, V]."""
        expander = self.inner.expander(state.inner, cycle, limits)
        probs_BD = (expander.begin()[:, 0].float() / self.temperature).softmax(-1)
        ids_D = expander.target_ids(torch.arange(probs_BD.shape[1]))
        of_target_BV = probs_BD.new_zeros(len(probs_BD), self.inner.ends.vocab_size)
        self.steps.append(of_target_BV.index_add_(1, ids_D, probs_BD))
        return root_tree(expander.root_B)


def walk_chance(p_PV: Tensor, q_PV: Tensor, num_candidates: int) -> Tensor:
    """What the walk accepts of the likeliest candidates.

    Args:
        p_PV: float [P, V], the target's distribution.
        q_PV: float [P, V], the drafter's.
        num_candidates: n.

    Returns:
        float [P], chances.
    """
    return p_PV.gather(1, q_PV.topk(num_candidates, dim=1).indices).sum(1)


def drawn_chance(p_PV: Tensor, q_PV: Tensor, num_candidates: int) -> Tensor:
    """What the best rule accepts of candidates that are drawn by themselves (SpecTr, arXiv:2310.15141).

    Args:
        p_PV: float [P, V], the target's distribution.
        q_PV: float [P, V], the drafter's.
        num_candidates: n.

    Returns:
        float [P], upper bounds of chances.
    """
    return torch.minimum(p_PV, 1.0 - (1.0 - q_PV) ** num_candidates).sum(1)


def chances(
    drafter: Drafter, ends: TargetEnds, samples: Sequence[CachedSample], temperature: float, batch_size: int = 8
) -> dict[tuple[str, int], Counted]:
    """Sums of both chances over each reply.

    Args:
        drafter: attached to the target of the cache.
        ends: of that target.
        samples: each a prompt, then one reply to the end of the sample.
        temperature: of the requests.
        batch_size: B.

    Returns:
        By ``("walk", n)`` and ``("drawn", n)``; `cycles` counts positions.
    """
    sums = dict[tuple[str, int], list[float]]()
    positions = list[float]()
    recording = FirstToken(drafter.eval(), temperature)
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        with torch.no_grad():
            recording.steps.clear()
            draft_everywhere(recording, batch, ONE_TOKEN)
            for row, sample in enumerate(batch):
                prompt = prompt_length(sample)
                q_PV = torch.stack([step_BV[row] for step_BV in recording.steps[: len(sample.input_ids) - prompt - 1]])
                behind = sample.hidden[PRE_NORM][prompt:-1].to(ends.dtype)
                p_PV = (ends.logits(ends.final_norm(behind)).float() / temperature).softmax(-1)
                positions.append(float(len(p_PV)))
                for number in CANDIDATES:
                    sums.setdefault(("walk", number), []).append(float(walk_chance(p_PV, q_PV, number).sum()))
                    sums.setdefault(("drawn", number), []).append(float(drawn_chance(p_PV, q_PV, number).sum()))
    return {name: Counted(tuple(of_replies), tuple(positions)) for name, of_replies in sums.items()}


def page(target: str, sets: Sequence[tuple[float, Path]], heads: Sequence[str]) -> str:
    """A table for each head and temperature.

    Args:
        target: whose states the caches hold.
        sets: temperatures and caches.
        heads: ``NAME=FOLDER`` each.

    Returns:
        Markdown.
    """
    ends = TargetEnds.load(target)
    parts = [f"`{provenance.command_line()}`"]
    for temperature, cache in sets:
        samples = list(HiddenStateCache(cache))
        for entry in parse_entries(heads, ["1x1"]):
            of_head = chances(load_drafter(entry.path).bound(ends), ends, samples, temperature)
            lines = []
            for number in CANDIDATES:
                walk, drawn = of_head["walk", number], of_head["drawn", number]
                ratio, low, high = paired_ratio(drawn, walk)
                lines.append([str(number), walk.cell(), drawn.cell(), f"{ratio:.2f} ({low:.2f} to {high:.2f})"])
            head = ["candidates", "the walk accepts", "the best rule with drawn candidates", "ratio"]
            parts.append(f"{entry.name}, T = {temperature:g}, {len(samples)} replies:\n\n{table(head, lines)}")
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables.

    Args:
        arguments: of the command; None reads the process's.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--heads", nargs="+", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--set", nargs=2, action="append", required=True, metavar=("TEMPERATURE", "CACHE"), dest="sets")
    options = parser.parse_args(arguments)
    sets = [(float(temperature), Path(cache)) for temperature, cache in options.sets]
    print(page(options.target, sets, options.heads), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
