"""What a user has before training a drafter: a target, prompts, and a cache of the target's replies to them."""

import json
from dataclasses import dataclass
from pathlib import Path

from tiny import TEXTS, save_target

from draftsmith.cli import main


@dataclass(frozen=True)
class OwnData:
    """Folders of the target and the cache, and the file of prompts."""

    target: Path
    prompts: Path
    cache: Path


def write_prompts(path: Path) -> Path:
    """Eight prompts for training."""
    rows = [
        {"id": f"p{number}", "messages": [{"role": "user", "content": f"{TEXTS[number % 3]} {number}"}]}
        for number in range(8)
    ]
    path.write_text("".join(json.dumps(row | {"split": "train", "source": "made"}) + "\n" for row in rows))
    return path


def write_own_data(folder: Path, target: Path | None = None) -> OwnData:
    """Made with the commands that a user runs, `data respond` and `data extract`, for a new target or the given one."""
    target = save_target(folder / "target") if target is None else target
    prompts = write_prompts(folder / "prompts.jsonl")
    replies, cache = folder / "replies", folder / "cache"
    asked = ["--target", str(target), "--max-new-tokens", "16", "--temperature", "0"]
    assert main(["data", "respond", *asked, "--prompts", str(prompts), "--out", str(replies)]) == 0
    assert main(["data", "extract", "--target", str(target), "--source", str(replies), "--out", str(cache)]) == 0
    return OwnData(target, prompts, cache)
