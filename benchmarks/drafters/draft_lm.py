"""A draft LM distilled towards its target: which text and which divergence, on the embedded pair.

    python -m benchmarks.drafters.draft_lm                  # 7 minutes on two cores with other work beside it
    python -m benchmarks.drafters.draft_lm --scale small    # about a minute: whether it runs, not what it is worth

All runs begin with `embedded:draft_lm`, take the same number of steps of the same number of rows, and are judged on the same unseen
problems: tokens per step of greedy chains of 4 and 8 and of sampled chains of 4 at temperature 1, the acceptance along the target's own
greedy replies, and right answers of the draft LM alone. What a run of the same settings left in `--work` is used again.
"""

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks.drafters.recipes import QUIET
from benchmarks.machine import machine_line
from draftsmith import provenance
from draftsmith.data.replies.reply_plan import BatchOptions
from draftsmith.data.replies.respond import respond
from draftsmith.decode import Engine, Generation, GenerationSettings
from draftsmith.decode.sampling import ReplyOptions
from draftsmith.embedded.problems import Problem, distinct_problems
from draftsmith.embedded.sums import check, write_prompts
from draftsmith.evaluate.strata.acceptance import ratio_interval
from draftsmith.files import atomic_write
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import Target
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.train.draft_lm.callbacks import KeepBestDraftLM
from draftsmith.train.draft_lm.data import DistilDataModule
from draftsmith.train.draft_lm.losses import acceptance, shared_log_probs
from draftsmith.train.draft_lm.module import DraftLMModule
from draftsmith.train.drafter.starting_drafter import LoraSettings

TARGET, DRAFT_LM = "embedded:target", "embedded:draft_lm"
MAX_NEW_TOKENS = 160
SHAPES = (("1x4", 0.0), ("1x8", 0.0), ("s1.1.1.1", 1.0))


@dataclass(frozen=True)
class Scale:
    """How large a run of this script is: prompts to learn from, steps of each training, rows of a step, unseen problems."""

    prompts: int
    steps: int
    rows: int
    problems: int


SCALES = {"small": Scale(48, 8, 8, 16), "full": Scale(960, 64, 16, 150)}


@dataclass(frozen=True)
class Run:
    """One way to train."""

    name: str
    divergence: str
    on_policy: float
    lora: LoraSettings | None = None


RUNS = (
    Run("cross-entropy, target's replies", "cross_entropy", 0.0),
    Run("forward KL, target's replies", "forward_kl", 0.0),
    Run("forward KL, own replies", "forward_kl", 1.0),
    Run("total variation, own replies", "total_variation", 1.0),
    Run("forward KL, own replies, LoRA", "forward_kl", 1.0, LoraSettings(rank=8, alpha=16)),
)


@dataclass(frozen=True)
class Ratio:
    """A pooled ratio and its 95 % interval over problems."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> "Ratio":
        """From one pair a problem."""
        low, high = ratio_interval(numerators, denominators)
        return cls(sum(numerators) / sum(denominators), low, high)

    def text(self, percent: bool = False) -> str:
        """Example: 3.89 (3.71 to 4.02), or 75 % (66 to 83)."""
        if percent:
            return f"{100 * self.value:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


class Examination:
    """What is measured of a draft LM, on the same problems each time."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.target, self.tokenizer = Target.load(TARGET), load_tokenizer(TARGET)
        self.prompts = [self._prompt(problem) for problem in problems]
        self.replies = [generation.token_ids for generation in self._decode(Engine(self.target), 0.0)]

    def _prompt(self, problem: Problem) -> list[int]:
        chat = [{"role": "user", "content": problem.question}]
        rendered = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return [int(token) for token in self.tokenizer.encode(str(rendered), add_special_tokens=False)]

    def _decode(self, engine: Engine, temperature: float) -> list[Generation]:
        settings = GenerationSettings(
            MAX_NEW_TOKENS, temperature=temperature, eos_token_ids=self.target.eos_token_ids, seed=1
        )
        generations: list[Generation] = []
        for start in range(0, len(self.prompts), 50):
            part = slice(start, start + 50)
            numbers = list(range(len(self.prompts)))[part]
            generations += engine.generate(self.prompts[part], settings, request_ids=numbers)
        return generations

    def measure(self, drafter: LMDrafter) -> dict[str, Ratio]:
        """Every column of the table.

        Raises:
            ValueError: a greedy chain does not give the target's own reply.
        """
        columns: dict[str, Ratio] = {}
        for shape, temperature in SHAPES:
            decoded = self._decode(Engine(self.target, drafter, parse_shape(shape)), temperature)
            if temperature == 0.0 and [generation.token_ids for generation in decoded] != self.replies:
                raise ValueError(f"chains {shape} did not give the target's own replies; the decoder is at fault")
            columns[shape] = Ratio.of(
                [len(generation.token_ids) - 1 for generation in decoded],
                [len(generation.accepted) for generation in decoded],
            )
        sums = [self._accepted(drafter, *pair) for pair in zip(self.prompts, self.replies, strict=True)]
        columns["acceptance"] = Ratio.of(sums, [len(reply) for reply in self.replies])
        alone = [
            str(self.tokenizer.decode(generation.token_ids, skip_special_tokens=True))
            for generation in self._decode(Engine(drafter.lm), 0.0)
        ]
        right = [float(check(*pair).correct) for pair in zip(self.problems, alone, strict=True)]
        columns["right"] = Ratio.of(right, [1.0] * len(right))
        return columns

    @torch.inference_mode()
    def _accepted(self, drafter: LMDrafter, prompt: list[int], reply: list[int]) -> float:
        """The acceptance summed over a reply's tokens."""
        ids = torch.tensor([prompt + reply])
        rows = slice(len(prompt) - 1, -1)
        draft, target, mass = shared_log_probs(
            drafter.lm.logits(drafter.lm.prefix(ids).normed)[0, rows],
            self.target.logits(self.target.prefix(ids).normed)[0, rows],
        )
        return float(acceptance(target + mass, draft).sum())


def train(run: Run, replies: Path, out: Path, scale: Scale, lr: float, lora_lr: float) -> float:
    """Trains into `out/draft_lm`; seconds from call to saved weights, those of an earlier run with the same settings where it is there."""
    note, lr = out / "trained.json", lr if run.lora is None else lora_lr
    settings = {"run": asdict(run), "scale": asdict(scale), "lr": lr}
    if note.is_file() and (earlier := json.loads(note.read_text())).get("settings") == settings:
        return float(earlier["seconds"])
    started = time.perf_counter()
    pl.seed_everything(0, verbose=False)
    module = DraftLMModule(
        TARGET,
        DRAFT_LM,
        divergence=run.divergence,  # type: ignore[arg-type]
        max_new_tokens=MAX_NEW_TOKENS,
        lora=run.lora,
        lr=lr,
    )
    data = DistilDataModule(replies, on_policy=run.on_policy, batch_size=scale.rows, val_fraction=0.0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=scale.steps,
        default_root_dir=out,
        gradient_clip_val=1.0,
        callbacks=[KeepBestDraftLM(replace=True)],
        **QUIET,
    )
    trainer.fit(module, data)
    seconds = time.perf_counter() - started
    atomic_write(note, json.dumps({"settings": settings, "seconds": seconds}))
    return seconds


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the table."""
    lines = [
        "| draft LM | tokens per step, chain of 4 | chain of 8 | sampled chain of 4, T = 1 | acceptance | right answers alone | seconds |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        columns: dict[str, Ratio] = row["found"]
        cells = [columns[shape].text() for shape, _ in SHAPES]
        cells += [columns["acceptance"].text(percent=True), columns["right"].text(percent=True)]
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        lines.append("| " + " | ".join([row["name"], *cells, seconds]) + " |")
    return lines


def main() -> int:
    options = _options()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    scale, work = SCALES[options.scale], options.work / options.scale
    out = options.out or (Path("benchmarks/results/drafters") if options.scale == "full" else work)
    load, begun = os.getloadavg()[0], time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    write_prompts(work / "prompts.jsonl", "train", scale.prompts)
    respond(
        TARGET,
        work / "prompts.jsonl",
        work / "replies",
        reply=ReplyOptions(max_new_tokens=MAX_NEW_TOKENS),
        batches=BatchOptions(batch_rows=64),
    )
    examination = Examination(distinct_problems("test", scale.problems, seed=3))
    rows: list[dict[str, Any]] = []
    for run in (None, *RUNS):
        name, seconds, folder = "as shipped", None, Path(DRAFT_LM)
        if run is not None:
            name = run.name
            place = work / "".join(letter if letter.isalnum() else "-" for letter in name)
            seconds = train(run, work / "replies", place, scale, options.lr, options.lora_lr)
            folder = place / "draft_lm"
        drafter = load_drafter(folder)
        assert isinstance(drafter, LMDrafter)
        rows.append({"name": name, "seconds": seconds, "found": examination.measure(drafter)})
        print("\n".join(table(rows)[-1:]), flush=True)
    seconds_all = time.perf_counter() - begun
    page = [
        f"# A draft LM distilled towards its target, {date.today().isoformat()}",
        f"`{provenance.command_line()}`, {seconds_all:.0f} s. {machine_line()}; load average at the start "
        f"{load:.1f}. Embedded pair, float32; {scale.steps} steps of {scale.rows} rows each, lr {options.lr:g} ({options.lora_lr:g} with "
        f"LoRA of rank 8), {scale.prompts} training prompts, {scale.problems} unseen problems; 95 % intervals over these.",
        "\n".join(table(rows)),
        "Greedy chains gave the target's own replies token for token in every row.",
    ]
    stem = f"{date.today().isoformat()}-draft-lm"
    atomic_write(out / f"{stem}.md", "\n\n".join(page) + "\n")
    kept = [{**row, "found": {name: asdict(ratio) for name, ratio in row["found"].items()}} for row in rows]
    atomic_write(
        out / f"{stem}.json",
        json.dumps(
            {"scale": asdict(scale), "machine": provenance.machine(), "versions": provenance.versions(), "rows": kept},
            indent=2,
        )
        + "\n",
    )
    print(f"{out / stem}.md")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    parser.add_argument("--work", type=Path, default=Path("runs/draft-lm"))
    parser.add_argument(
        "--out", type=Path, default=None, help="default: benchmarks/results/drafters, or the work folder at small scale"
    )
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--lora-lr", type=float, default=5e-3)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
