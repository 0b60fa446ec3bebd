"""The real-target benchmark: cache, train, evaluate on `chat-6m`, then compare what teaches and on which text.

    python -m benchmarks.drafters.chat6m                    # everything, about half an hour on two idle cores
    python -m benchmarks.drafters.chat6m --stages train,evaluate --seconds 60

Data: the folder that `--data` names, with models/chat-6m, replies/chat-6m_{train,test}.jsonl, prompts/gsm8k_train.jsonl and
text/tinystories_valid.txt. Where it is absent the script says so and ends. What a stage left in `--work` is used again.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.drafters.recipes import Recipe, Trained
from benchmarks.drafters.recipes import train as train_recipe
from draftsmith import provenance
from draftsmith.data.cache.extract import extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.data.prompts import PromptSelection
from draftsmith.evaluate.evaluate_command import evaluate
from draftsmith.evaluate.measure import Plan
from draftsmith.files import atomic_write, read_jsonl
from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.models.files.end_tokens import end_tokens
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.train.drafter.objective import Distillation

STAGES = ("cache", "train", "evaluate", "distil")
# Apple's 1x5, 10x4 and 45x5 count the root; ours count drafted tokens. The others are the narrow ones a CPU wants.
SHAPES = ["1x4", "10x3", "45x4", "4x5n11", "4x5n15", "6x5n19"]
REPLY_TOKENS = 160


def train(
    options: argparse.Namespace, cache: Path, out: Path, distillation: Distillation, steps: int | None
) -> Trained:
    """ReDrafter with the options' settings, for `steps`, or where None for `options.seconds`."""
    recipe = Recipe(
        ReDrafterFamily,
        {"num_steps": 5, "distillation": distillation, "lr": options.lr},
        {"exit_dim": options.exit_dim, "draft_vocab_size": options.draft_vocab},
        options.tokens_per_batch,
    )
    return train_recipe(recipe, str(options.target), cache, out, steps=steps, seconds=options.seconds)


def make_cache(options: argparse.Namespace, rows: Path, out: Path, horizon: int = 0) -> float:
    """Seconds of extraction; those of an earlier run where the cache is there already."""
    note = out.parent / f"{out.name}-seconds.json"
    if not note.is_file():
        started = time.perf_counter()
        extract(str(options.target), rows, out, storage=StorageOptions(local_horizon=horizon))
        atomic_write(note, json.dumps(time.perf_counter() - started))
    return float(json.loads(note.read_text()))


def dataset_rows(data: Path, replies: Path, target: str) -> Iterator[dict[str, Any]]:
    """The data sets' own answers to the prompts of `replies`: GSM8K solutions, and the stories that begin as asked."""
    tokenizer = load_tokenizer(target)
    answers = {}
    for _, row in read_jsonl(data / "prompts" / "gsm8k_train.jsonl"):
        answers[row["question"].strip()] = re.sub(r"<<.*?>>", "", row["answer"]).strip()
    stories = [story.strip() for story in (data / "text" / "tinystories_valid.txt").read_text().split("<|endoftext|>")]
    for _, row in read_jsonl(replies):
        asked = row["messages"][0]["content"].strip()
        opening = asked.partition("begins: ")[2]
        answer = answers.get(asked) or next((story for story in stories if opening and story.startswith(opening)), None)
        if answer is not None:
            ids = [*tokenizer.encode(answer, add_special_tokens=False), *end_tokens(tokenizer=tokenizer)]
            yield {**row, "reply_ids": ids[:REPLY_TOKENS]}


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    """JSONL, written once."""
    if not path.is_file():
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_evaluation(
    options: argparse.Namespace, drafters: list[str], shapes: list[str], out: Path, lookup: int
) -> list[dict]:
    """Rows of the report on the 60 test prompts."""
    prompts = options.work / "test.jsonl"
    write_rows(
        prompts,
        (
            {"id": f"{row['kind']}-{line}", "source": row["kind"], "prompt_ids": row["prompt_ids"]}
            for line, row in read_jsonl(options.data / "replies" / "chat-6m_test.jsonl")
        ),
    )
    if not (out / "report.json").is_file():
        evaluate(
            str(options.target),
            prompts,
            out,
            drafters,
            shapes,
            selection=PromptSelection(limit=options.prompts),
            plan=Plan(
                transformers_prompts=options.prompts if lookup else 0, prompt_lookup=lookup, repeats=options.repeats
            ),
        )
    rows: list[dict] = json.loads((out / "report.json").read_text())["rows"]
    return rows


def distillation_table(options: argparse.Namespace) -> list[str]:
    """Tokens per step of the three teachings on both texts, each trained for the same number of steps."""
    own = options.data / "replies" / "chat-6m_train.jsonl"
    foreign = write_rows(options.work / "dataset.jsonl", dataset_rows(options.data, own, str(options.target)))
    drafters = []
    teachings: tuple[Distillation, ...] = ("none", "path", "local")
    for text, rows in (("own", own), ("dataset", foreign)):
        make_cache(options, rows, options.work / f"cache-{text}-local", horizon=6)
        for teaching in teachings:
            out = options.work / f"distil-{text}-{teaching}"
            train(options, options.work / f"cache-{text}-local", out, teaching, options.steps)
            drafters.append(f"{text}-{teaching}={out / 'drafter'}")
    rows_found = run_evaluation(options, drafters, ["1x4", "10x3"], options.work / "report-distil", lookup=0)
    lines = ["| text | distillation | shape | tokens per step (95 %) | GSM8K | without loops |", "|---" * 6 + "|"]
    for row in rows_found:
        if row["beam_width"] is not None:
            text, teaching = row["drafter"].split("-")
            parts = {(part["by"], part["value"]): part["tokens_per_step"] for part in row["slices"]}
            gsm, straight = parts.get(("source", "gsm")), parts.get(("looping", "no"))
            low, high = row["tokens_per_step_interval"]
            lines.append(
                f"| {'own replies' if text == 'own' else 'data sets'} | {teaching} | {row['beam_width']}x{row['draft_length']} "
                f"| {row['tokens_per_step']:.2f} ({low:.2f} to {high:.2f}) | {_two(gsm)} | {_two(straight)} |"
            )
    return lines


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main() -> int:
    options = _options()
    options.target = options.data / "models" / "chat-6m"
    if not options.target.is_dir():
        print(f"skipped: {options.target} is not there; name the data with --data")
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    name = f"{date.today().isoformat()}-chat6m"
    page = [f"# chat-6m, {date.today().isoformat()}", f"`{provenance.command_line()}`"]
    page += [
        f"Load average at the start: {os.getloadavg()[0]:.1f} (above 0.5, something else was running: mistrust speeds)."
    ]
    cache, out = options.work / "cache", options.work / "train"
    if "cache" in options.stages or "train" in options.stages:
        seconds = make_cache(options, options.data / "replies" / "chat-6m_train.jsonl", cache)
    if "train" in options.stages:
        done = train(options, cache, out, options.distillation, None)
        page += [
            f"Trained with `{options.distillation}` distillation for {done.seconds:.0f} s of wall-clock: {done.steps} steps, "
            f"{done.assistant_tokens:,} assistant tokens, **{done.rate:,.0f} a second** from the cache, which took {seconds:.0f} s "
            f"to extract ({done.assistant_tokens / (done.seconds + seconds):,.0f} a second with that included)."
        ]
    if "evaluate" in options.stages:
        run_evaluation(options, [f"redrafter={out / 'drafter'}"], options.shapes, options.work / "report", lookup=5)
        report = (options.work / "report" / "report.md").read_text().replace("](report.png)", f"]({name}.png)")
        page += [report.replace("# Evaluation", "## Decoding").strip()]
        for ending in ("json", "png"):
            shutil.copyfile(options.work / "report" / f"report.{ending}", options.out / f"{name}.{ending}")
    if "distil" in options.stages:
        heading = f"## What teaches, and on which text ({options.steps} steps each)"
        page += [heading, "\n".join(distillation_table(options))]
    atomic_write(options.out / f"{name}.md", "\n\n".join(page) + "\n")
    print(f"{options.out / name}.md")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/chat6m"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/drafters"))
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(STAGES), help=",".join(STAGES))
    parser.add_argument("--seconds", type=float, default=360.0, help="wall-clock of the training that is evaluated")
    parser.add_argument("--steps", type=int, default=800, help="steps of each training that is compared")
    parser.add_argument("--shapes", type=lambda text: text.split(","), default=SHAPES)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--distillation", choices=["none", "path"], default="path")
    parser.add_argument("--draft-vocab", type=int, default=1024, help="the training replies hold 914 distinct tokens")
    parser.add_argument("--exit-dim", type=int, default=None)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--tokens-per-batch", type=int, default=3072)
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
