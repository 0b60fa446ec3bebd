"""A drafter adapted to another kind of text with LoRA: tokens per step before, with the adapter, with all weights trained.

    python -m benchmarks.drafters.lora                  # an hour beside other work
    python -m benchmarks.drafters.lora --scale small    # about a minute: too few prompts and steps for figures

The target (`chat-6m`, never trained) answers both kinds of prompt, stories and grade-school sums. A ReDrafter is trained on its stories. It
is then adapted to its sums twice, for equally many steps: with LoRA on every linear layer, and with all weights. All three draft for unseen
prompts of both kinds, so that what was forgotten shows too.

Data: the folder that `--data` names, with models/chat-6m, prompts/gsm8k_train.jsonl and text/tinystories_valid.txt. Where it is absent the
script says so and ends. What an earlier run left in `--work` is used again.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.drafters.recipes import RECIPES, Recipe, Trained, train
from benchmarks.machine import machine_line
from draftsmith import provenance
from draftsmith.data.cache.extract import extract
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.decode_command import prompt_ids
from draftsmith.evaluate.strata.acceptance import is_looping, tokens_per_step_interval
from draftsmith.evaluate.strata.decoded import Decoded
from draftsmith.files import atomic_write, read_jsonl
from draftsmith.models import Target, load_tokenizer
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.lora.lora_adapter import LoraSettings
from draftsmith.models.tree.shapes import parse_shape

KINDS = ("stories", "sums")
BATCH = 16


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    train_prompts: int
    test_prompts: int
    reply_tokens: int
    base_steps: int
    adapt_steps: int


SCALES = {"small": Scale(64, 12, 64, 80, 40), "full": Scale(480, 60, 128, 900, 300)}


def questions(data: Path, kind: str) -> Iterator[str]:
    """What the target is asked, each question once: openings of stories, or sums."""
    if kind == "sums":
        texts = (str(row["question"]).strip() for _, row in read_jsonl(data / "prompts" / "gsm8k_train.jsonl"))
    else:
        stories = (data / "text" / "tinystories_valid.txt").read_text(encoding="utf-8").split("<|endoftext|>")
        openings = (" ".join(story.split()[:12]) for story in stories)
        texts = (f"Please tell a story that begins: {opening}" for opening in openings if opening)
    yield from dict.fromkeys(texts)


def answer(options: argparse.Namespace, target: Target, kind: str) -> tuple[Path, list[list[int]]]:
    """The target's own replies to the training prompts as a file of rows, and the test prompts, none of which is among them."""
    scale, tokenizer = SCALES[options.scale], load_tokenizer(str(options.target))
    asked = itertools.islice(questions(options.data, kind), scale.train_prompts + scale.test_prompts)
    ids = [prompt_ids(tokenizer, question, chat=True) for question in asked]
    test, own = ids[: scale.test_prompts], ids[scale.test_prompts :]
    rows = options.work / f"{kind}.jsonl"
    # Rows of another scale would hold prompts that are tested here.
    if not rows.is_file() or [row["prompt_ids"] for _, row in read_jsonl(rows)] != own:
        settings = GenerationSettings(scale.reply_tokens, eos_token_ids=target.eos_token_ids)
        replies = [
            {"id": f"{kind}-{start + place}", "prompt_ids": prompt, "reply_ids": generation.token_ids}
            for start in range(0, len(own), BATCH)
            for place, (prompt, generation) in enumerate(
                zip(
                    own[start : start + BATCH],
                    Engine(target).generate(own[start : start + BATCH], settings),
                    strict=True,
                )
            )
        ]
        atomic_write(rows, "".join(json.dumps(row) + "\n" for row in replies))
    return rows, test


def fit(options: argparse.Namespace, name: str, kind: str, steps: int, **module: Any) -> Trained:
    """One run of the ReDrafter recipe on the replies of one kind; its folder is `work/name`."""
    usual = RECIPES["redrafter"]
    recipe = Recipe(usual.family, usual.module | module, {}, options.tokens_per_batch)
    return train(recipe, str(options.target), options.work / f"cache-{kind}", options.work / name, steps=steps)


def measure(
    options: argparse.Namespace, target: Target, folder: Path | None, prompts: list[list[int]]
) -> list[Decoded]:
    """Every test prompt decoded with a drafter, or plainly."""
    settings = GenerationSettings(SCALES[options.scale].reply_tokens, eos_token_ids=target.eos_token_ids)
    engine = Engine(target, None if folder is None else load_drafter(folder), parse_shape(options.shape))
    generations = []
    for start in range(0, len(prompts), BATCH):
        generations += engine.generate(prompts[start : start + BATCH], settings)
    return [Decoded(tuple(generation.token_ids), tuple(generation.accepted)) for generation in generations]


def figure(decoded: list[Decoded]) -> str:
    """Pooled tokens per step with its 95 % interval over prompts."""
    cycles = sum(reply.cycles for reply in decoded)
    interval = tokens_per_step_interval(decoded)
    if not cycles or interval is None:
        return "-"
    return f"{sum(reply.stepped_tokens for reply in decoded) / cycles:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def size(folder: Path) -> str:
    """Bytes of the weights in a drafter's or adapter's folder."""
    return f"{sum(path.stat().st_size for path in folder.glob('*.safetensors')) / 2**20:.2f} MiB"


def table(
    options: argparse.Namespace, target: Target, test: dict[str, list[list[int]]], runs: dict[str, Trained]
) -> list[str]:
    """One line a contender.

    Raises:
        RuntimeError: a reply is not the target's own.
    """
    plain = {kind: measure(options, target, None, prompts) for kind, prompts in test.items()}
    straight = {
        kind: [not is_looping(reply.token_ids, target.eos_token_ids) for reply in decoded]
        for kind, decoded in plain.items()
    }
    whole = runs["base"].parameters
    lines = [
        "| drafter | trained parameters | file | sums | sums without loops | stories | stories without loops |",
        "|---" * 7 + "|",
    ]
    lines.append("| none (plain decoding) | | | 1.00 | 1.00 | 1.00 | 1.00 |")
    titles = {"base": "trained on stories", "lora": "adapted to sums, LoRA", "full": "adapted to sums, all weights"}
    for name, what in titles.items():
        folder = options.work / name / "drafter"
        cells = []
        for kind in ("sums", "stories"):
            decoded = measure(options, target, folder, test[kind])
            if [reply.token_ids for reply in decoded] != [reply.token_ids for reply in plain[kind]]:
                raise RuntimeError(f"{name}: a reply to {kind} is not the target's own")
            kept = [reply for reply, keep in zip(decoded, straight[kind], strict=True) if keep]
            cells += [figure(decoded), figure(kept)]
        share = runs[name].parameters / whole
        lines.append(f"| {what} | {runs[name].parameters:,} ({share:.1%}) | {size(folder)} | {' | '.join(cells)} |")
    loops = ", ".join(
        f"{len(is_straight) - sum(is_straight)} of {len(is_straight)} {kind}" for kind, is_straight in straight.items()
    )
    return [*lines, "", f"Looping replies: {loops}. Every reply equals that of plain decoding, token for token."]


def main() -> int:
    options = _options()
    options.target = options.data / "models" / "chat-6m"
    if not options.target.is_dir():
        print(f"skipped: {options.target} is not there; name the data with --data")
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    started, load, scale = time.perf_counter(), os.getloadavg()[0], SCALES[options.scale]
    target, test = Target.load(str(options.target)), {}
    for kind in KINDS:
        rows, test[kind] = answer(options, target, kind)
        extract(str(options.target), rows, options.work / f"cache-{kind}")  # resumes a killed run
    lora = LoraSettings(options.rank, options.alpha, target_modules=options.target_modules)
    runs = {"base": fit(options, "base", "stories", scale.base_steps)}
    begun = {"init_from": options.work / "base" / "drafter"}
    runs["lora"] = fit(options, "lora", "sums", scale.adapt_steps, lr=options.lora_lr, lora=lora, **begun)
    runs["full"] = fit(options, "full", "sums", scale.adapt_steps, lr=options.full_lr, **begun)
    lines = table(options, target, test, runs)
    layers = ", ".join(lora.target_modules or ["every linear layer"])
    page = [
        f"# LoRA on a drafter, {date.today().isoformat()}",
        f"`{provenance.command_line()}`",
        f"{machine_line()}; load average at the start {load:.1f}; {time.perf_counter() - started:.0f} s in all.",
        f"Target `chat-6m`; ReDrafter, trained {scale.base_steps} steps on {scale.train_prompts} of the target's own stories, then adapted "
        f"for {scale.adapt_steps} steps on {scale.train_prompts} of its replies to sums, with LoRA of rank {options.rank} (alpha "
        f"{options.alpha:g}, learning rate {options.lora_lr:g}) on {layers}, or with all weights (learning rate {options.full_lr:g}). "
        f"Tokens per step with the draft {options.shape}, greedy, on {scale.test_prompts} unseen prompts of each kind, with the 95 % "
        "interval over prompts. Switched off, the adapter leaves the first drafter as it was; all weights once changed do not come back.",
        "\n".join(lines),
    ]
    text = "\n\n".join(page) + "\n"
    if options.out is not None:
        atomic_write(options.out, text)
    print(text)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=None, help="default: runs/lora-SCALE")
    parser.add_argument("--out", type=Path, default=None, help="write the page to this file, too")
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--target-modules", type=lambda text: text.split(","), default=None)
    parser.add_argument("--lora-lr", type=float, default=1e-2)
    parser.add_argument("--full-lr", type=float, default=2e-3, help="the recipe's own")
    parser.add_argument("--shape", default="1x4")
    parser.add_argument("--tokens-per-batch", type=int, default=1024)
    options = parser.parse_args()
    options.work = options.work or Path(f"runs/lora-{options.scale}")
    return options


if __name__ == "__main__":
    sys.exit(main())
