"""A small training that `draftsmith doctor` looks at, and what tests read from its findings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from draftsmith import provenance
from draftsmith.evaluate.doctor.doctor_command import NAMES
from draftsmith.models import ReDrafter, TargetEnds
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer

WORDS = ["Tom", "Ann", "has", "buys", "three", "four", "seven", "apples", "pears", "more", "now", "how", "many", "does"]
Change = Callable[[dict[str, Tensor]], None]
Found = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """Folders of one small training, from the target to the export."""

    target: Path
    prompts: Path
    held_out: Path
    replies: Path
    cache: Path
    train: Path
    exported: Path


def write_prompts(path: Path, first: int, count: int) -> Path:
    generator = torch.Generator().manual_seed(first)
    rows = []
    for number in range(first, first + count):
        words = [WORDS[place] for place in torch.randint(len(WORDS), (24,), generator=generator).tolist()]
        messages = [{"role": "user", "content": " ".join(words)}]
        rows.append({"id": f"p{number}", "messages": messages, "split": "train", "source": "made"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def skip_all_but(*names: str) -> list[str]:
    return [name for name in NAMES if name not in names]


def faults(found: Found) -> list[str]:
    return [name for name, one in found.items() if one["verdict"] == "fault"]


def save_drafter(run: Run, folder: Path, draft_ids: list[int] | None = None) -> Path:
    ends = TargetEnds.load(str(run.target))
    ids = None if draft_ids is None else torch.tensor(draft_ids)
    own = tokenizer_fingerprint(load_tokenizer(str(run.target)))
    ReDrafter.for_target(ends, draft_token_ids=ids, tokenizer_fingerprint=own).save_pretrained(folder)
    shutil.copy(run.train / "drafter" / provenance.FILE_NAME, folder)
    return folder


def labelled_ids(run: Run) -> list[int]:
    [shard] = run.cache.glob("shard-*.safetensors")
    tensors = load_file(shard)
    return tensors["input_ids"][tensors["loss_mask"]].tolist()


def with_record(run: Run, folder: Path, **changes: object) -> Path:
    """The trained drafter, its training record altered."""
    shutil.copytree(run.train / "drafter", folder)
    record = provenance.read(folder)
    record["config"] |= changes
    write_record(folder, record)
    return folder


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """In a folder whose record is another stage's, so no stage would write it."""
    (folder / provenance.FILE_NAME).write_text(json.dumps(record))
