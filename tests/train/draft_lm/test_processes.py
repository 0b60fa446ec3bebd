"""Distilling a draft LM from the command line: the shipped configuration with tiny models, in one process and in two."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distilling import REPLY, save_draft_lm, save_replies
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.target.target import Target

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def draft_lm(tmp_path_factory: pytest.TempPathFactory, target_dir: Path) -> Path:
    return save_draft_lm(tmp_path_factory.mktemp("draft"), target_dir)


@pytest.fixture(scope="module")
def replies(tmp_path_factory: pytest.TempPathFactory, target_dir: Path) -> Path:
    return save_replies(tmp_path_factory.mktemp("replies") / "replies.jsonl", Target.load(str(target_dir)))


def train(run: Path, target: Path, draft_lm: Path, replies: Path, *more: str) -> Path:
    """The shipped configuration, with these models and rows."""
    arguments = [
        f"--config={ROOT / 'configs' / 'draft_lm.yaml'}",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2",
        "--trainer.val_check_interval=1.0",
        f"--trainer.default_root_dir={run}",
        f"--trainer.logger.init_args.save_dir={run}",
        "--trainer.callbacks=[{class_path: ChainDecodeValidation, init_args: {num_prompts: 4, max_new_tokens: 8}}, "
        "{class_path: KeepBestDraftLM}]",
        "--trainer.enable_checkpointing=false",
        "--trainer.log_every_n_steps=1",
        f"--model.init_args.target={target}",
        f"--model.init_args.draft_lm={draft_lm}",
        f"--model.init_args.max_new_tokens={REPLY}",
        "--model.init_args.lr=0.003",
        f"--data.init_args.replies={replies}",
        "--data.init_args.on_policy=0.5",
        "--data.init_args.val_fraction=0.2",
        *more,
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "fit", *arguments], capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def scalars(run: Path, name: str) -> list[float]:
    events = EventAccumulator(str(run))
    events.Reload()
    return [event.value for event in events.Scalars(name)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "engine",
    [
        ["--trainer.strategy=ddp"],
        ["--trainer.strategy=ddp", "--model.init_args.target_sharding=fsdp2"],
    ],
    ids=["ddp", "sharded target"],
)
def test_two_processes_train_as_one_does_on_the_joint_batch(
    target_dir: Path, draft_lm: Path, replies: Path, tmp_path: Path, engine: list[str]
) -> None:
    given = (target_dir, draft_lm, replies)
    alone = train(tmp_path / "1", *given, "--data.init_args.batch_size=4")
    together = train(tmp_path / "2", *given, "--data.init_args.batch_size=2", "--trainer.devices=2", *engine)
    names = (
        "train/loss",
        "train/acceptance",
        "train/reply_tokens",
        "val/loss",
        "val/acceptance",
        "val/tokens_per_step",
    )
    for name in names:
        wanted = scalars(alone, name)
        assert len(wanted) >= 2
        assert scalars(together, name) == pytest.approx(wanted, rel=1e-4), name
    load_drafter(alone / "draft_lm")
    one, two = (load_drafter(run / "draft_lm").lm.model.state_dict() for run in (alone, together))  # type: ignore[union-attr]
    assert all(weight.allclose(two[name], atol=1e-5) for name, weight in one.items())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_checkpoint_of_two_processes_holds_the_targets_replies_to_all_held_out_prompts(
    target_dir: Path, draft_lm: Path, replies: Path, tmp_path: Path
) -> None:
    words = [{"role": "user", "content": "w3 w4"}, {"role": "user", "content": "w5"}]
    rows = [{"id": f"p{row}", "messages": [words[row % 2]], "split": "train", "source": "s"} for row in range(20)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = []
    for devices in (1, 2):
        run = train(
            tmp_path / str(devices),
            target_dir,
            draft_lm,
            replies,
            "--data.init_args.replies=null",
            f"--data.init_args.prompts={prompts}",
            "--data.init_args.template=none",
            "--data.init_args.on_policy=1.0",
            f"--data.init_args.batch_size={4 // devices}",
            "--trainer.enable_checkpointing=true",
            "--trainer.max_epochs=1",
            f"--trainer.devices={devices}",
            *(["--trainer.strategy=ddp"] if devices > 1 else []),
        )
        # The other one there is the last, which was written before the validation.
        [checkpoint] = run.rglob("epoch=*.ckpt")
        kept.append(torch.load(checkpoint, weights_only=True)["val_replies"])
    assert len(kept[0]["replies"]) == 4
    assert kept[0] == kept[1]
