"""Drafters of every family on one target: the same text, the same training time.

    python -m benchmarks.drafters.families                     # within an hour on two idle cores; --minutes gives more or less
    python -m benchmarks.drafters.families --plan              # what it would do, and how long each part would take; nothing runs
    python -m benchmarks.drafters.families --full              # every recipe, a third target, equal steps and static trees; many hours
    python -m benchmarks.drafters.families --targets embedded  # one target

For each target: cache the target's states over its own replies, train one drafter or two of each kind, decode held-out prompts with all of
them (and, where one shares the tokenizer, a draft LM) at T = 0 and T = 1. `families_plan.py` has the lists and the seconds.
Writes `<date>-families.md`, `.json` and one chart a target into benchmarks/results/families/, and the summary between the
marks of docs/results.md. Targets other than the embedded one need `--data`; without it the page says that they are missing.
The same command resumes a run that was stopped; `rm -r runs/families` starts again.
"""

import argparse
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.drafters.families_plan import DEFAULT, DRAWN, FULL, REPLY_TOKENS, Bench, Entry, fitted, jobs
from benchmarks.drafters.recipes import Trained, train
from benchmarks.machine import machine_section
from draftsmith import provenance
from draftsmith.data.cache.extract import extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.prompts import PromptSelection
from draftsmith.data.shards.packing import pack
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.sampling import ReplyOptions
from draftsmith.embedded import write_prompts
from draftsmith.evaluate.evaluate_command import evaluate
from draftsmith.evaluate.measure import Plan
from draftsmith.evaluate.tune.tune_command import TimingOptions, tune
from draftsmith.files import atomic_write, read_jsonl
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.families import block, eagle3
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import PRE_NORM, Target
from draftsmith.train.drafter.objective import Objective, inverse_draft_ids, prepare, run

MARKS = ("<!-- families -->", "<!-- /families -->")
STATIC_NODES = 24
PROMPTS = 24
"""For testing, at most, without --full."""

Tables = dict[str, list[dict[str, Any]]]


def make_rows(bench: Bench, work: Path, data: Path) -> tuple[Path, Path]:
    """Training rows with the target's own replies, and test prompts; made once."""
    replies, tests = work / "replies.jsonl", work / "test.jsonl"
    if bench.name == "chat-6m":
        kinds = ((row["kind"], line, row) for line, row in read_jsonl(data / "replies" / "chat-6m_test.jsonl"))
        write_rows(
            tests,
            (
                {"id": f"{kind}-{line}", "source": kind, "prompt_ids": row["prompt_ids"], "reply_ids": row["reply_ids"]}
                for kind, line, row in kinds
            ),
        )
        return data / "replies" / "chat-6m_train.jsonl", tests
    if not (replies.is_file() and tests.is_file()):
        train_prompts, test_prompts = (
            embedded_prompts(bench, work) if bench.name == "embedded" else story_prompts(bench, data)
        )
        write_rows(tests, own_replies(bench, test_prompts))
        write_rows(replies, own_replies(bench, train_prompts))
    return replies, tests


def embedded_prompts(bench: Bench, work: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Word problems of the training and of the test split, as token ids under the chat template."""
    tokenizer = load_tokenizer(bench.target)
    by_split = []
    for split, count in (("train", bench.replies), ("test", bench.prompts)):
        path = work / f"{split}-prompts.jsonl"
        write_prompts(path, split=split, count=count)
        texts = (
            str(tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False))
            for _, row in read_jsonl(path)
        )
        by_split.append([tokenizer.encode(text, add_special_tokens=False) for text in texts])
    return by_split[0], by_split[1]


def story_prompts(bench: Bench, data: Path) -> tuple[list[list[int]], list[list[int]]]:
    """The first twelve words of stories; the last ones of the file are for testing."""
    tokenizer = load_tokenizer(bench.target)
    stories = [story.split() for story in (data / "text" / "tinystories_valid.txt").read_text().split("<|endoftext|>")]
    openings = [tokenizer.encode(" ".join(words[:12])) for words in stories if len(words) >= 24][
        : bench.replies + bench.prompts
    ]
    return openings[: -bench.prompts], openings[-bench.prompts :]


def own_replies(bench: Bench, prompts: list[list[int]]) -> Iterator[dict[str, Any]]:
    """The target's greedy replies."""
    target = Target.load(bench.target)
    settings = GenerationSettings(max_new_tokens=REPLY_TOKENS, eos_token_ids=target.eos_token_ids)
    engine, order = Engine(target), sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    for start in range(0, len(order), 64):
        numbers = order[start : start + 64]
        for number, reply in zip(numbers, engine.generate([prompts[n] for n in numbers], settings), strict=True):
            yield {
                "id": str(number),
                "source": bench.name,
                "prompt_ids": prompts[number],
                "reply_ids": reply.token_ids,
            }


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """JSONL, written once."""
    if not path.is_file():
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))


def held_out_top1(drafter_folder: Path, bench: Bench, cache: HiddenStateCache) -> float:
    """Share of the held-out replies' tokens that the first draft step gets right, teacher-forced."""
    target = Target.load(bench.target)
    drafter = load_drafter(drafter_folder).attach(target.ends)
    to_draft, objective = inverse_draft_ids(drafter.draft_ids(), target.ends.vocab_size), Objective(1)
    hits = rows = 0.0
    with torch.no_grad():
        for sample in cache:
            lesson = prepare(objective, pack([sample]), to_draft)
            sums = run(objective, lesson, drafter, target.ends, torch.zeros(1), True)
            assert sums.top1 is not None
            hits, rows = hits + float(sums.top1), rows + float(sums.rows)
    return hits / rows


def cached(bench: Bench, replies: Path, out: Path) -> Path:
    """The target's states over replies: the last ones, those that EAGLE-3 fuses and those that block drafters read."""
    done = out.with_suffix(".done")
    if not done.is_file():
        num_layers = Target.load(bench.target).config.num_hidden_layers
        read = {*eagle3.default_layers(num_layers), *block.default_layers(num_layers, 2)} - {PRE_NORM}
        extract(bench.target, replies, out, storage=StorageOptions(layers=(PRE_NORM, *sorted(read))))
        done.touch()
    return out


def train_all(
    bench: Bench, cache: Path, work: Path, entries: list[Entry], *, steps: int | None, seconds: float | None
) -> dict[str, Trained]:
    """Every drafter that is trained, one after the other."""
    kind = "steps" if steps is not None else "seconds"
    done = {}
    for entry in entries:
        if entry.recipe is None:
            continue
        chosen = replace(entry.recipe, options={**entry.recipe.options, "draft_vocab_size": bench.draft_vocab})
        done[entry.name] = train(chosen, bench.target, cache, work / kind / entry.name, steps=steps, seconds=seconds)
        print(f"{bench.name}: {entry.name} trained, {kind}: {done[entry.name]}", flush=True)
    return done


def static_tree(bench: Bench, drafter: Path, replies: Path, work: Path) -> Path:
    """EAGLE's best static tree, from training prompts."""
    prompts, tree_file = work / "tune-prompts.jsonl", work / "tune" / f"static-{STATIC_NODES}.json"
    rows = (row for number, (_, row) in enumerate(read_jsonl(replies)) if number % 40 == 0)
    write_rows(
        prompts, ({"id": str(i), "source": "train", "prompt_ids": row["prompt_ids"]} for i, row in enumerate(rows))
    )
    if not tree_file.is_file():
        tune(
            bench.target,
            str(drafter),
            prompts,
            work / "tune",
            [1, 4, 8],
            [4, 5, 6],
            [8, 12, 16, STATIC_NODES],
            selection=PromptSelection(limit=24),
            timing=TimingOptions(rounds=5),
        )
    return tree_file


def run_target(bench: Bench, options: argparse.Namespace) -> tuple[list[str], Tables]:
    """The page's part on one target, and its rows by table."""
    work, entries = options.work / bench.name, options.entries
    work.mkdir(parents=True, exist_ok=True)
    replies, tests = make_rows(bench, work, options.data)
    cache = cached(bench, replies, work / "cache")
    timed = train_all(bench, cache, work, entries, steps=None, seconds=bench.seconds)
    counted = train_all(bench, cache, work, entries, steps=bench.steps, seconds=None) if options.full else {}
    held_out = HiddenStateCache(cached(bench, tests, work / "held-out"))
    top1 = {name: held_out_top1(work / "seconds" / name / "drafter", bench, held_out) for name in timed}
    static = Path()
    if options.full and "eagle" in timed:
        static = static_tree(bench, work / "seconds" / "eagle" / "drafter", replies, work)

    def named(entry: Entry, kind: str, shapes: str) -> str:
        """A drafter as `evaluate` takes it."""
        return f"{entry.name}={entry.folder or work / kind / entry.name / 'drafter'}@{shapes}"

    lm = [] if bench.draft_lm is None else [f"draft_lm={bench.draft_lm}@1x4"]
    cold = [named(entry, "seconds", entry.shapes.format(static=static)) for entry in entries]
    chosen = PromptSelection(limit=bench.prompts)
    rows = {
        "seconds": measured(bench, tests, work / "report", [*cold, *lm], 20 if options.full else 4, selection=chosen)
    }
    if options.full:
        again = [named(entry, "steps", entry.shapes.split(",")[0]) for entry in entries if entry.recipe is not None]
        rows["steps"] = measured(bench, tests, work / "report-steps", again, 0, selection=chosen)
    warm = [named(entry, "seconds", entry.warm) for entry in entries]
    if bench.draft_lm is not None:
        warm.append(f"draft_lm={bench.draft_lm}@1x4" + (f",{DRAWN}" if options.full else ""))
    halved = PromptSelection(limit=max(1, bench.prompts // 2))
    compared = 10 if options.full else 0
    rows["warm"] = measured(bench, tests, work / "report-warm", warm, compared, selection=halved, temperatures=[1.0])
    shutil.copyfile(work / "report" / "report.png", options.out / f"{options.name}-{bench.name}.png")
    return page_of(bench, rows, timed, counted, top1, options), rows


def measured(
    bench: Bench, tests: Path, out: Path, drafters: list[str], transformers_prompts: int, **settings: Any
) -> list[dict[str, Any]]:
    """Rows of one evaluation."""
    if not (out / "report.json").is_file():
        plan = Plan(transformers_prompts=transformers_prompts, prompt_lookup=0, ledger_prompts=4)
        evaluate(
            bench.target, tests, out, drafters, reply=ReplyOptions(max_new_tokens=REPLY_TOKENS), plan=plan, **settings
        )
    rows: list[dict[str, Any]] = json.loads((out / "report.json").read_text())["rows"]
    return rows


def page_of(
    bench: Bench,
    rows: Tables,
    timed: dict[str, Trained],
    counted: dict[str, Trained],
    top1: dict[str, float],
    options: argparse.Namespace,
) -> list[str]:
    """Markdown: two tables of trainings, the decoding tables, and the chart."""
    base = next(row for row in rows["seconds"] if row["drafter"] == "plain")
    equal_steps = (
        ["### The same number of optimiser steps", training_table(counted), decoding_table(rows["steps"])]
        if counted
        else []
    )
    return [
        f"## {bench.name}",
        f"Plain decoding in the engine: {base['tokens_per_second']:.0f} tokens/s, {base['engine_vs_transformers']:.2f} of "
        f"`transformers.generate`. {base['prompts']} test prompts, at most {REPLY_TOKENS} new tokens, batch 1, float32.",
        "### The same training time",
        training_table(timed),
        "Held-out top-1 of the first draft step, teacher-forced along the target's replies: "
        + ", ".join(f"{name} {hits:.3f}" for name, hits in top1.items())
        + ".",
        decoding_table(rows["seconds"]),
        f"![Speed-up, tokens per step and acceptance by depth]({options.name}-{bench.name}.png)",
        *equal_steps,
        f"### Temperature 1 ({rows['warm'][0]['prompts']} prompts)",
        "Shapes that begin with s (MCSD, no replacement), k (K-SEQ) or b (block verification) draw their candidates from the drafter and "
        "verify them by rejection: "
        "their text has the target's distribution, not the tokens of plain decoding's noise. All others are guesses of the target's draws.",
        decoding_table(rows["warm"]),
    ]


def training_table(trained: dict[str, Trained]) -> str:
    """Steps, tokens and rates."""
    lines = ["| drafter | trained parameters | steps | seconds | assistant tokens/s |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {run.parameters:,} | {run.steps:,} | {run.seconds:.0f} | {run.rate:,.0f} |"
        for name, run in trained.items()
    ]
    return "\n".join(lines)


def decoding_table(rows: list[dict[str, Any]]) -> str:
    """Tokens per step, speed-up and exactness of each row."""
    lines = [
        "| drafter | shape | tokens per step (95 %) | speed-up (95 %) | over transformers | identical |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["tokens_per_step_interval"] or (1.0, 1.0)
        slow, fast = row["speedup_interval"]
        over, shape = row["speedup_over_transformers"], row["shape"] or "-"
        sampled = shape[0] in "skb"
        lines.append(
            f"| {row['drafter']} | {shape if len(shape) < 24 else f'static, {shape_nodes(shape)} nodes'} "
            f"| {row['tokens_per_step']:.2f} ({low:.2f} to {high:.2f}) | {row['speedup']:.2f} ({slow:.2f} to {fast:.2f}) "
            f"| {'-' if over is None else f'{over:.2f}'} | {'in distribution' if sampled else share(row['exact_share'])} |"
        )
    return "\n".join(lines)


def share(exact: float) -> str:
    """Never rounds up to all."""
    return "all" if exact >= 1 else f"{min(100 * exact, 99.9):.1f} %"


def shape_nodes(shape: str) -> int:
    """Nodes of a static tree by its leaves, `paths:0.0+1`."""
    leaves = [tuple(leaf.split(".")) for leaf in shape.removeprefix("paths:").split("+")]
    return len({leaf[:depth] for leaf in leaves for depth in range(1, len(leaf) + 1)})


def summary(targets: dict[str, Tables]) -> str:
    """The table of docs/results.md: each family's best shape by speed at T = 0, trained for the same time."""
    lines = ["| target | drafter | shape | tokens per step | speed-up | identical |", "|---|---|---|---|---|---|"]
    for target, rows in targets.items():
        for family in dict.fromkeys(row["drafter"] for row in rows["seconds"] if row["drafter"] != "plain"):
            best = max((row for row in rows["seconds"] if row["drafter"] == family), key=lambda row: row["speedup"])
            figures = f"{best['tokens_per_step']:.2f} | {best['speedup']:.2f} | {share(best['exact_share'])}"
            lines.append(f"| {target} | {family} | {best['shape']} | {figures} |")
    return "\n".join(lines)


def main() -> int:
    """Runs the targets that are there and writes the page."""
    options = _options()
    benches = planned(options)
    print(plan_table(benches, options), flush=True)
    if options.plan:
        return 0
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    options.name = f"{date.today().isoformat()}-families"
    page = [f"# Every family, {date.today().isoformat()}", f"`{provenance.command_line()}`"]
    page += [
        f"Load average at the start: {os.getloadavg()[0]:.1f} (above 0.5, something else was running: mistrust speeds)."
    ]
    page += [
        f"## {name}\n\nLeft out: {options.data / 'models' / name} is not there; name the data with --data."
        for name in options.targets
        if name not in [bench.name for bench in benches]
    ]
    by_target: dict[str, Tables] = {}
    for bench in benches:
        lines, by_target[bench.name] = run_target(bench, options)
        page += lines
        publish(page, by_target, options)
    print(options.out / f"{options.name}.md")
    return 0


def planned(options: argparse.Namespace) -> list[Bench]:
    """The targets that are there, with what is done on each; seconds of a training fit into the minutes, but with --full."""
    models = options.data / "models"
    chosen = [
        Bench("embedded", "embedded:target", 200, 60.0, 40, draft_lm="embedded:draft_lm", rate=188.0),
        Bench("chat-6m", str(models / "chat-6m"), 200, 300.0, 60, draft_vocab=1024),
        Bench("stories260K", str(models / "stories260K"), 200, 30.0, 30, 1000, rate=468.0),
    ]
    chosen = [
        bench
        for bench in chosen
        if bench.name in options.targets and (bench.name == "embedded" or Path(bench.target).is_dir())
    ]
    if not options.full:
        chosen = [
            replace(bench, prompts=min(bench.prompts, PROMPTS), seconds=min(bench.seconds, 120.0)) for bench in chosen
        ]
    scaled = [
        replace(
            bench,
            steps=max(20, int(options.scale * bench.steps)),
            seconds=max(8.0, options.scale * bench.seconds),
            prompts=max(4, int(options.scale * bench.prompts)),
            replies=max(100, int(options.scale * bench.replies)),
        )
        for bench in chosen
    ]
    return scaled if options.full or options.scale < 1.0 else fitted(scaled, options.entries, options.minutes or 60.0)


def plan_table(benches: list[Bench], options: argparse.Namespace) -> str:
    """What the run does and about how long each part takes."""
    listed = jobs(benches, options.entries, options.full)
    lines = ["| target | part | seconds, about |", "|---|---|---|"]
    lines += [f"| {job.target} | {job.what} | {job.seconds:.0f} |" for job in listed]
    return "\n".join([*lines, f"| all | | {sum(job.seconds for job in listed):.0f} |"])


def publish(page: list[str], by_target: dict[str, Tables], options: argparse.Namespace) -> None:
    """Write what there is so far: the page, the rows, the table of docs/results.md."""
    record = provenance.record(provenance.command_line(), {}, {})
    atomic_write(options.out / f"{options.name}.md", "\n\n".join([*page, machine_section()]) + "\n")
    report = {key: record[key] for key in ("command", "machine", "versions")}
    report["rows"] = [row for tables in by_target.values() for rows in tables.values() for row in rows]
    atomic_write(options.out / f"{options.name}.json", json.dumps(report, indent=1) + "\n")
    update_results(options.results, summary(by_target))


def update_results(results: Path, table: str) -> None:
    """Replace what stands between the marks."""
    text = results.read_text(encoding="utf-8")
    between = re.compile(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", re.DOTALL)
    atomic_write(results, between.sub(lambda _: f"{MARKS[0]}\n{table}\n{MARKS[1]}", text))


def _options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/families"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/families"))
    parser.add_argument("--results", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--full", action="store_true", help="every recipe and target, equal steps, static trees")
    parser.add_argument(
        "--minutes",
        type=float,
        help="of the whole run, by default 60; not together with --full or a --scale below 1",
    )
    parser.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")
    parser.add_argument(
        "--targets", type=lambda text: text.split(","), help="default: embedded,chat-6m; with --full also stories260K"
    )
    parser.add_argument("--drafters", type=lambda text: text.split(","), help="by name; default: all of the plan")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of steps, seconds and prompts; 0.02 tries the script out"
    )
    options = parser.parse_args(arguments)
    options.targets = options.targets or ["embedded", "chat-6m", *(["stories260K"] if options.full else [])]
    listed = FULL if options.full else DEFAULT
    known = [entry.name for entry in listed]
    if unknown := sorted({*(options.drafters or ())} - {*known}):
        parser.error(f"--drafters has {', '.join(unknown)}; there are {', '.join(known)}")
    if options.minutes is not None and (options.full or options.scale < 1.0):
        parser.error("--minutes plans a run of the usual size; leave out --full and --scale, or --minutes")
    options.entries = [entry for entry in listed if options.drafters is None or entry.name in options.drafters]
    return options


if __name__ == "__main__":
    sys.exit(main())
