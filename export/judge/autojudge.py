"""AutoJudge's numbers: what `JudgeConfig` of its vLLM fork is made of, from a judge of ours.

Owns that conversion and its two files. Knows no card and no command. Nothing here is pickled: upstream's own files are pickles, but the
fork's `JudgeConfig` takes arrays, and safetensors hold those.

Shape legend: D the target's hidden size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith.models.judge import NO_GATE, POST_NORM, Judge

TENSORS, NUMBERS = "autojudge.safetensors", "autojudge.json"


def convert(judge: Judge) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`weights`, `mean`, `scale` float32 [D] and `bias` float32 [1]; `threshold` and `thresholds` with the bond to the target.

    AutoJudge (arXiv:2504.20039) predicts that a token is *important* and rejects from the threshold on; a judge of ours predicts that
    it is correct and accepts above it. So weights and bias change their signs, and a threshold t becomes 1 - t.

    Raises:
        ValueError: the judge reads anything but the target's states after the final norm, which is all that the fork has; or it has a gate.
    """
    config = judge.config
    if config.feature != POST_NORM:
        raise ValueError(
            f"this judge reads {config.feature}, AutoJudge's fork of vLLM has the states after the final norm, and no weights turn one "
            f"into the other; train a judge with feature {POST_NORM}"
        )
    if judge.reads_draft:
        raise ValueError(
            f"this judge reads {config.draft_hidden_size} numbers of the draft model too, AutoJudge's fork of vLLM has the target's states "
            "only; train a judge without draft_cache"
        )
    if config.gate != NO_GATE:
        raise ValueError(
            f"this judge has the gate {config.gate!r}, AutoJudge's fork of vLLM judges each token alone; tune it with --gates none"
        )
    tensors = {
        "weights": -judge.weight.detach(),
        "mean": judge.mean,
        "scale": judge.scale,
        "bias": -judge.bias.detach()[None],
    }
    numbers = {
        "threshold": 1.0 - config.threshold,
        "thresholds": sorted(1.0 - point["threshold"] for point in config.curve),
        "meaning": "sigmoid(weights . ((state - mean) / scale) + bias) is the chance that a token is important; reject from threshold on",
        "feature": config.feature,
        "target_name": config.target_name,
        "target_fingerprint": config.target_fingerprint,
    }
    return {name: tensor.cpu().float().contiguous() for name, tensor in tensors.items()}, numbers


def write(judge: Judge, folder: Path) -> None:
    """Both files into an existing folder, read back and compared.

    Raises:
        ValueError: as :func:`convert`, or what is read back differs.
    """
    tensors, numbers = convert(judge)
    save_file(tensors, folder / TENSORS)
    (folder / NUMBERS).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    again = load_file(folder / TENSORS)
    changed = sorted(name for name in tensors if not torch.equal(tensors[name], again[name]))
    if changed:
        raise ValueError(f"{folder}: read back, {', '.join(changed)} differ from what was written; check the disk")
