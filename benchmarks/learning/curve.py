"""The learning curve of draft heads on little text, and what each lever adds at the smallest size.

    python -m benchmarks.learning.curve --target TARGET --cache CACHE --test TEST_CACHE --work FOLDER [--runs NAME ...]

CACHE holds the target's own replies (`draftsmith data extract`). TEST_CACHE holds its greedy replies to held-out prompts, one
reply a sample. Every run keeps its result in FOLDER, so that you can add runs later. The table compares the runs that you name.

Owns: the runs, and the table. Does not know: how a cache is made, how a drafter drafts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.drafters.recipes import Recipe, Trained, train
from benchmarks.learning.replay import Acceptance, acceptance, record_cached
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.files import atomic_write
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.families.eagle import EagleFamily
from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.models.target.target import TargetEnds

TOKENS_PER_BATCH = 1024
DRAFT_VOCABULARY = 8192
RESULT = "result.json"
_EAGLE: dict[str, Any] = {
    "num_steps": 1,
    "distillation": "path",
    "feature_weight": 1.0,
    "logit_weight": 0.1,
    "lr": 1e-3,
    "betas": (0.9, 0.95),
}
_REDRAFTER: dict[str, Any] = {"num_steps": 5, "distillation": "path", "lr": 1e-3}
_NOISE = {"feature_noise": 0.1}


@dataclass(frozen=True)
class Run:
    """One training of the comparison.

    Attributes:
        what: the lever, in the words of the table.
        epochs: over the cache.
        module: settings of the training module that differ from the family's.
        options: settings of the family that differ.
        redrafter: ReDrafter instead of EAGLE-1.
    """

    what: str
    epochs: int = 4
    module: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    redrafter: bool = False

    def recipe(self) -> Recipe:
        """The whole recipe."""
        base, options = (_REDRAFTER, {}) if self.redrafter else (_EAGLE, _NOISE)
        return Recipe(
            ReDrafterFamily if self.redrafter else EagleFamily,
            {**base, **self.module},
            {"draft_vocab_size": DRAFT_VOCABULARY, **options, **self.options},
            TOKENS_PER_BATCH,
        )


RUNS = {
    "e2": Run("two epochs", 2),
    "e4": Run("four epochs"),
    "e12": Run("twelve epochs", 12),
    "e4-prompts": Run("four epochs, prompts too", 4, {"prompt_weight": 1.0}),
    "e12-prompts": Run("twelve epochs, prompts too", 12, {"prompt_weight": 1.0}),
    "e4-rate": Run("four epochs, rate 3e-3", 4, {"lr": 3e-3}),
    "e4-tokens": Run("four epochs, tokens weigh 1.0", 4, {"logit_weight": 1.0}),
    "e4-average": Run("four epochs, averaged", 4, {"ema_decay": 0.98}),
    "e4-quiet": Run("four epochs, no noise", 4, {}, {"feature_noise": 0.0}),
    "r2": Run("ReDrafter, two epochs", 2, redrafter=True),
    "r4": Run("ReDrafter, four epochs", 4, redrafter=True),
    "r4-prompts": Run("ReDrafter, four epochs, prompts too", 4, {"prompt_weight": 1.0}, redrafter=True),
    "r12-prompts": Run("ReDrafter, twelve epochs, prompts too", 12, {"prompt_weight": 1.0}, redrafter=True),
}
"""By the name that `--runs` takes."""


@dataclass(frozen=True)
class Result:
    """What one run gave.

    Attributes:
        what: the run's words.
        labelled_tokens: of the cache.
        trained: steps, seconds, parameters.
        accepted: on the test replies.
    """

    what: str
    labelled_tokens: int
    trained: Trained
    accepted: Acceptance


def measured(run: Run, target: str, cache: Path, test: Path, out: Path) -> Result:
    """Trains one run and measures it, or reads what an earlier call kept.

    Args:
        run: which.
        target: of both caches.
        cache: of the training text.
        test: of held-out greedy replies.
        out: folder of this run.
    """
    kept = out / RESULT
    if kept.is_file():
        return _result(json.loads(kept.read_text()))
    manifest = HiddenStateCache(cache, check="off").manifest
    steps = run.epochs * -(-manifest.num_tokens // TOKENS_PER_BATCH)
    trained = train(run.recipe(), target, cache, out, steps=steps)
    result = Result(run.what, manifest.num_labelled, trained, accepted(out / "drafter", target, test))
    atomic_write(kept, json.dumps(asdict(result), indent=2) + "\n")
    return result


def accepted(drafter: Path, target: str, test: Path) -> Acceptance:
    """What a drafter's folder gains on cached greedy replies.

    Args:
        drafter: its folder.
        target: whose states the cache holds.
        test: the cache.
    """
    ends = TargetEnds.load(target)
    return acceptance(record_cached(load_drafter(drafter).bound(ends), list(HiddenStateCache(test))))


def _result(content: dict[str, Any]) -> Result:
    trained, accepted = Trained(**content.pop("trained")), Acceptance(**content.pop("accepted"))
    return Result(**content, trained=trained, accepted=accepted)


def table(results: Sequence[Result]) -> list[str]:
    """The comparison in Markdown.

    Args:
        results: the first one is what the others are compared with.
    """
    lines = [
        "| what | labelled tokens | steps | minutes of training | held-out top-1 | tokens per step 10x5n24 | more |",
        "|---" * 7 + "|",
    ]
    first = results[0].accepted.tokens_per_step if results else 1.0
    for each in results:
        accepted = each.accepted
        lines.append(
            f"| {each.what} | {each.labelled_tokens:,} | {each.trained.steps} | {each.trained.seconds / 60:.1f} | "
            f"{accepted.top1:.3f} | {accepted.tokens_per_step:.2f} | {accepted.tokens_per_step - first:+.2f} |"
        )
    return lines


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="the frozen target: a folder, a hub id or a GGUF file")
    parser.add_argument("--cache", type=Path, required=True, help="hidden states of the target's own replies")
    parser.add_argument("--test", type=Path, required=True, help="hidden states of greedy replies to held-out prompts")
    parser.add_argument("--work", type=Path, required=True, help="folder of the results")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS), help="which runs, in this order")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the runs and prints the table after each.

    Args:
        arguments: of the command; None reads the process's.
    """
    options = _options(arguments)
    results = []
    for name in options.runs:
        results.append(measured(RUNS[name], options.target, options.cache, options.test, options.work / name))
        print("\n".join(table(results)), flush=True)


if __name__ == "__main__":
    main()
