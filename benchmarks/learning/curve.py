"""The learning curve of draft heads on little text, and what each lever adds.

    python -m benchmarks.learning.curve --target TARGET --cache CACHE [CACHE ...] --test TEST_CACHE --work FOLDER [--runs NAME ...]

Each CACHE holds the target's own replies (`draftsmith data extract`), the smallest first: every run is made on every one. TEST_CACHE holds
its greedy replies to held-out prompts, one reply a sample. Runs whose name begins with `text-` first read cheap text, which nobody had to
wait for: `--text CACHE`. Every run keeps its result in FOLDER, so that you can add runs later. The table compares the runs that you name.

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
from draftsmith.evaluate.drafters import names_apart
from draftsmith.files import atomic_write
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.families.eagle import EagleFamily
from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.models.target.target import TargetEnds

TOKENS_PER_BATCH = 1024
DRAFT_VOCABULARY = 8192
RESULT = "result.json"
READ = "read.json"
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
_HASS: dict[str, Any] = {"num_steps": 3, "top_k_weight": 1.0}


@dataclass(frozen=True)
class Run:
    """One training of the comparison.

    Attributes:
        what: the lever, in the words of the table.
        epochs: over the cache.
        module: settings of the training module that differ from the family's.
        options: settings of the family that differ.
        redrafter: ReDrafter instead of EAGLE-1.
        text_epochs: over cheap text, before the replies.
        after: the run whose drafter this one begins with, on the same replies; empty for none.
    """

    what: str
    epochs: int = 4
    module: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    redrafter: bool = False
    text_epochs: int = 0
    after: str = ""

    def recipe(self, init_from: Path | None = None) -> Recipe:
        """The whole recipe.

        Args:
            init_from: the drafter that training begins with; None starts with new weights.
        """
        base, options = (_REDRAFTER, {}) if self.redrafter else (_EAGLE, _NOISE)
        return Recipe(
            ReDrafterFamily if self.redrafter else EagleFamily,
            {**base, **self.module} | ({} if init_from is None else {"init_from": init_from}),
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
    "e4-more": Run("four epochs more", 4, after="e4"),
    "e4-hass": Run("then two epochs of three steps (HASS)", 2, _HASS, after="e4"),
    "e4-hass-more": Run("two epochs of three steps more", 2, _HASS, after="e4-hass"),
    "text-e4": Run("cheap text once, four epochs", 4, text_epochs=1),
    "text-e12": Run("cheap text once, twelve epochs", 12, text_epochs=1),
    "text-r4": Run("ReDrafter, cheap text once, four epochs", 4, redrafter=True, text_epochs=1),
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
        trained: steps, seconds, parameters; of cheap text and replies together.
        accepted: on the test replies.
        text_tokens: labelled ones of the cheap text; 0 without it.
        read: fingerprints of the training texts.
    """

    what: str
    labelled_tokens: int
    trained: Trained
    accepted: Acceptance
    text_tokens: int = 0
    read: tuple[str, ...] = ()


def measured(run: Run, target: str, cache: Path, test: Path, out: Path, text: Path | None = None) -> Result:
    """Trains one run and measures it, or reads what an earlier call kept.

    Args:
        run: which.
        target: of all caches.
        cache: of the replies.
        test: of held-out greedy replies.
        out: folder of this run.
        text: of cheap text; read by runs with epochs over it.

    Raises:
        ValueError: the folder has a result or a drafter of other text, or the run has epochs over cheap text and there is none.
    """
    if run.text_epochs and text is None:
        raise ValueError(
            f"{run.what}: no cheap text is named; give its cache with --text, or leave the run out of --runs"
        )
    texts = [cache] if text is None or not run.text_epochs else [text, cache]
    manifests = [HiddenStateCache(path, check="off").manifest for path in texts]
    read = tuple(manifest.identity.source for manifest in manifests)
    kept = out / RESULT
    if kept.is_file():
        result = _result(json.loads(kept.read_text()))
        if result.read and result.read != read:
            raise ValueError(f"{kept} is of other text than {cache}; name another --work, or delete {out}")
        return result
    _note_read(out, read, texts)
    if len(texts) > 1:
        _note_read(out / "text", read[:1], texts[:1])
    before, first = None, out / "text"
    if run.after:
        first = out.parent / run.after
        before = measured(RUNS[run.after], target, cache, test, first).trained
    elif run.text_epochs:
        before = _train(run, run.text_epochs, target, texts[0], first, None)
    trained = _train(run, run.epochs, target, cache, out, None if before is None else first / "drafter")
    if before is not None:
        tokens, seconds = before.assistant_tokens + trained.assistant_tokens, before.seconds + trained.seconds
        trained = Trained(before.steps + trained.steps, tokens, seconds, trained.parameters)
    result = Result(
        run.what,
        manifests[-1].num_labelled,
        trained,
        accepted(out / "drafter", target, test),
        manifests[0].num_labelled if run.text_epochs else 0,
        read,
    )
    atomic_write(kept, json.dumps(asdict(result), indent=2) + "\n")
    return result


def _note_read(out: Path, read: tuple[str, ...], texts: Sequence[Path]) -> None:
    """Writes into a run's folder what it is about to read, so that no later call takes its drafter for one of other text.

    Args:
        out: the folder.
        read: fingerprints of the texts.
        texts: their caches.

    Raises:
        ValueError: the folder has a drafter of other text, or one and does not say of which.
    """
    note = out / READ
    if note.is_file():
        if tuple(json.loads(note.read_text())) == read:
            return
        names = " and ".join(map(str, texts))
        raise ValueError(f"{note} is of other text than {names}; name another --work, or delete {out}")
    if (out / "trained.json").is_file():
        raise ValueError(
            f"{out} has a drafter and no {READ}, which says of what text; name another --work, or delete {out}"
        )
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(note, json.dumps(read) + "\n")


def _train(run: Run, epochs: int, target: str, cache: Path, out: Path, init_from: Path | None) -> Trained:
    """So many epochs over a cache, from new weights or from a drafter's."""
    steps = epochs * -(-HiddenStateCache(cache, check="off").manifest.num_tokens // TOKENS_PER_BATCH)
    return train(run.recipe(init_from), target, cache, out, steps=steps)


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
    return Result(**content | {"read": tuple(content.get("read", ()))}, trained=trained, accepted=accepted)


def table(results: Sequence[Result]) -> list[str]:
    """The comparison in Markdown.

    Args:
        results: the first one is what the others are compared with.
    """
    lines = [
        "| what | labelled tokens | of cheap text | steps | minutes of training | held-out top-1 | tokens per step 10x5n24 | more |",
        "|---" * 8 + "|",
    ]
    first = results[0].accepted.tokens_per_step if results else 1.0
    for each in results:
        accepted = each.accepted
        lines.append(
            f"| {each.what} | {each.labelled_tokens:,} | {each.text_tokens:,} | {each.trained.steps} | {each.trained.seconds / 60:.1f} | "
            f"{accepted.top1:.3f} | {accepted.tokens_per_step:.2f} | {accepted.tokens_per_step - first:+.2f} |"
        )
    return lines


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="the frozen target: a folder, a hub id or a GGUF file")
    parser.add_argument(
        "--cache",
        type=Path,
        nargs="+",
        required=True,
        help="hidden states of the target's own replies, by size of the corpus",
    )
    parser.add_argument("--text", type=Path, help="hidden states of cheap text, for runs that begin with text-")
    parser.add_argument("--test", type=Path, required=True, help="hidden states of greedy replies to held-out prompts")
    parser.add_argument("--work", type=Path, required=True, help="folder of the results")
    without_text = [name for name, run in RUNS.items() if not run.text_epochs]
    parser.add_argument("--runs", nargs="+", default=without_text, choices=list(RUNS), help="which runs, in this order")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the runs and prints the table after each.

    Args:
        arguments: of the command; None reads the process's.
    """
    options = _options(arguments)
    results = []
    # One cache keeps its runs where they always were.
    names = names_apart([str(path) for path in options.cache]) if len(options.cache) > 1 else [""]
    for cache, name in zip(options.cache, names, strict=True):
        for run in options.runs:
            out = options.work / name / run
            results.append(measured(RUNS[run], options.target, cache, options.test, out, options.text))
            print("\n".join(table(results)), flush=True)


if __name__ == "__main__":
    main()
