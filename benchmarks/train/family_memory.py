"""Memory that a training step of each drafter family takes on a CPU, as texts and vocabularies grow.

    python -m benchmarks.train.family_memory

The target has random weights, and a step trains on one text of random tokens. Each figure is of a process of its own: its largest resident
size during the first step less its size before, while glibc gives freed memory back at once (Linux alone). A step is forward, backward and
the optimiser.
`all logits` is what the logits of one draft step would take for all tokens of the text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.drafters.recipes import ALL_RECIPES, QUIET
from benchmarks.machine import machine_section
from draftsmith import provenance
from draftsmith.data.cache.extract import extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.models.families import block, eagle3
from draftsmith.models.target.target import PRE_NORM
from draftsmith.train.batches.cache_subset import CacheBatch
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.module import DraftModule

WIDTH, LAYERS, HEADS, PROMPT = 64, 8, 4, 8
SIZES = ((1024, 32768), (4096, 32768), (16384, 32768), (4096, 131072))
"""Length of the text, and vocabulary."""


class Growth(pl.Callback):
    """By how many MiB the process grew at most during the first step."""

    def __init__(self) -> None:
        self.before = self.mebibytes = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: CacheBatch, *_: int) -> None:
        """Just before the first step: the kernel begins to note the largest size anew."""
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _resident("VmRSS")

    def on_train_batch_end(self, *_: object) -> None:
        """Just behind it."""
        self.mebibytes = _resident("VmHWM") - self.before


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def make_texts(folder: Path, length: int, vocabulary: int) -> None:
    """A random target and the states of two random texts: one to train on, one held out.

    Args:
        folder: new; gets `target`, `rows.jsonl` and `cache`.
        length: of each text, tokens.
        vocabulary: of the target.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=2 * SIZES[2][0],
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "target")
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder / "target")
    ids = torch.randint(vocabulary, (2, length)).tolist()
    rows = [
        {"id": str(number), "prompt_ids": row[:PROMPT], "reply_ids": row[PROMPT:]} for number, row in enumerate(ids)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    layers = {*eagle3.default_layers(LAYERS), *block.default_layers(LAYERS, 2)}
    storage = StorageOptions(layers=(PRE_NORM, *sorted(layers)))
    extract(str(folder / "target"), folder / "rows.jsonl", folder / "cache", storage=storage)


def run(name: str, folder: Path) -> None:
    """One step of one family; prints the MiB that it took."""
    recipe, growth = ALL_RECIPES[name], Growth()
    pl.seed_everything(0)
    module = DraftModule(str(folder / "target"), recipe.family(**recipe.options), **recipe.module)
    data = CacheDataModule(folder / "cache", val_fraction=0.5, tokens_per_batch=SIZES[2][0], check="lazy")
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, limit_val_batches=0, num_sanity_val_steps=0, callbacks=[growth], **QUIET
    )
    trainer.fit(module, data)
    print(growth.mebibytes)


def measured(name: str, folder: Path) -> float:
    """MiB of one figure, in a process whose freed memory goes back at once."""
    command = [sys.executable, "-m", "benchmarks.train.family_memory", "--one", name, str(folder)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Prints the table, or with two arguments measures one figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("FAMILY", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--families", nargs="+", choices=list(ALL_RECIPES), default=list(ALL_RECIPES))
    options = parser.parse_args()
    if options.one:
        run(options.one[0], Path(options.one[1]))
        return
    print(f"`{provenance.command_line()}`\n\n{machine_section()}\n", flush=True)
    print(f"A target of width {WIDTH}, {LAYERS} layers and {HEADS} heads with random weights, float32. MiB.\n")
    with tempfile.TemporaryDirectory(prefix="family-memory-") as work:
        folders = [Path(work) / f"{length}-{vocabulary}" for length, vocabulary in SIZES]
        for folder, (length, vocabulary) in zip(folders, SIZES, strict=True):
            make_texts(folder, length, vocabulary)
        titles = [f"{length:,} tokens, {vocabulary:,} words" for length, vocabulary in SIZES]
        print(f"| family | {' | '.join(titles)} |\n|---{'|---' * len(SIZES)}|", flush=True)
        for name in options.families:
            cells = [f"{measured(name, folder):,.0f}" for folder in folders]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    logits = [f"{length * vocabulary * 4 / 2**20:,.0f}" for length, vocabulary in SIZES]
    print(f"| all logits | {' | '.join(logits)} |")


if __name__ == "__main__":
    main()
