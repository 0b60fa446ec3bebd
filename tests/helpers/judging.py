"""What tests of judges share: labelled rows whose labels follow from the cached states, and runs over in a second."""

from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor
from training import PROMPT, make_trainer

from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.label.token_labels import IGNORED
from draftsmith.label.token_rows import LabelledRow, write_rows
from draftsmith.models.target.target import PRE_NORM
from draftsmith.train.judge.data import JudgeDataModule
from draftsmith.train.judge.module import JudgeModule

LENGTHS = [9 + 3 * (number % 7) for number in range(60)]
ANSWERS = 2  # a question


def rows_of(cache: Path, noise: float = 0.5) -> list[LabelledRow]:
    """A row a sample, two samples a question; a token is correct where a fixed direction of its state says so, noise aside.

    Every fifth reply token has no label.
    """
    generator = torch.Generator().manual_seed(5)
    samples = list(HiddenStateCache(cache, finite=False))
    states = torch.cat([sample.hidden[PRE_NORM].float() for sample in samples])
    direction = torch.randn(states.shape[1], generator=generator)
    rows = []
    for number, sample in enumerate(samples):
        ids = sample.input_ids.tolist()
        reply = sample.hidden[PRE_NORM][PROMPT:].float()
        value = ((reply - states.mean(0)) / states.std(0)) @ direction
        value = value / len(direction) ** 0.5 + noise * torch.randn(len(value), generator=generator) + 0.5
        labels = [IGNORED if index % 5 == 4 else int(one > 0) for index, one in enumerate(value.tolist())]
        question = f"q{number // ANSWERS}"
        rows.append(LabelledRow(sample.id, question, "tests", "rule", ids[:PROMPT], ids[PROMPT:], labels))
    return rows


def save_rows(folder: Path, rows: Sequence[LabelledRow], name: str = "rows.jsonl") -> Path:
    write_rows(folder / name, rows)
    return folder / name


def judge_data(cache: Path, rows: Path, **settings: object) -> JudgeDataModule:
    return JudgeDataModule(cache, rows, **({"val_fraction": 0.3} | settings))  # type: ignore[arg-type]


def judge_module(target: Path, **settings: object) -> JudgeModule:
    """Reads the state alone, unless the settings say something else."""
    chosen: dict[str, object] = {"feature": PRE_NORM, "l2": [1e-3, 1e-1], "num_replicates": 50, "tolerance": 1e-9}
    return JudgeModule(str(target), **(chosen | settings))  # type: ignore[arg-type]


def fit(root: Path, module: JudgeModule, data: JudgeDataModule, epochs: int = 10, **settings: object) -> pl.Trainer:
    trainer = make_trainer(root, max_epochs=epochs, log_every_n_steps=1, **settings)
    trainer.fit(module, data)
    return trainer


def labelled_states(cache: Path, rows: Sequence[LabelledRow]) -> tuple[Tensor, Tensor]:
    """Float states and labels of all labelled tokens, token by token."""
    samples = {sample.id: sample for sample in HiddenStateCache(cache)}
    states, labels = [], []
    for row in rows:
        for index, label in enumerate(row.labels):
            if label != IGNORED:
                states.append(samples[row.id].hidden[PRE_NORM][len(row.prompt_ids) + index].float())
                labels.append(bool(label))
    return torch.stack(states), torch.tensor(labels)
