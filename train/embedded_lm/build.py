"""Builds the embedded models: tokenizer, then target and draft LM phase by phase, exported as bf16 Hugging Face
directories.

    python -m draftsmith.train.embedded_lm.build            # all of it, over an hour on two cores
    python -m draftsmith.train.embedded_lm.build --model draft_lm

Owns the order of the phases and the export. The phases themselves are configs/embedded/*.yaml. A phase whose
directory is already under ``work`` is not run again.
"""

import itertools
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import LightningCLI
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaForCausalLM

from draftsmith import configs, embedded, files
from draftsmith.embedded.tokenizer import train_tokenizer
from draftsmith.models.files.end_tokens import end_tokens
from draftsmith.models.files.pretrained import read_model, read_tokenizer
from draftsmith.ownership import check_replaceable
from draftsmith.train.embedded_lm.data import Mixture, conversations
from draftsmith.train.embedded_lm.module import LmModule

ModelName = Literal["target", "draft_lm"]
_PHASES: dict[ModelName, tuple[str, ...]] = {
    "target": ("target_wordings", "target_house", "target_sturdy"),
    "draft_lm": ("draft_wordings", "draft_house"),
}
_TOKENIZER_TEXTS = 20_000
_MAX_NEW_TOKENS = 160
STAGE = "draftsmith embedded build"


def build(
    model: ModelName | Literal["all"] = "all",
    work: Path = Path("runs/embedded"),
    destination: Path | None = None,
    seed: int = 0,
) -> None:
    """Trains and exports the embedded models.

    Args:
        model: Which model to build.
        work: Where the tokenizer and each phase's fp32 weights go; delete a phase's directory to run it again.
        destination: Where the finished model directories go; by default into the package itself.
        seed: Seed of the weights and of the tokenizer's texts; the corpus's seeds are in the configs.
    """
    destination = embedded.path("target").parent if destination is None else destination
    names: list[ModelName] = ["target", "draft_lm"] if model == "all" else [model]
    for name in names:
        check_replaceable(destination / name, STAGE)
    tokenizer = _build_tokenizer(work / "tokenizer", seed)
    for name in names:
        trained: Path | None = None
        for phase in _PHASES[name]:
            trained = _run_phase(phase, work, tokenizer, trained, seed)
        assert trained is not None
        export_lm(trained, tokenizer, destination / name)


def export_lm(trained: Path, tokenizer: Path, destination: Path) -> None:
    """Writes a trained LM as a bf16 Hugging Face directory, at once or not at all.

    Args:
        trained: directory of the trained weights.
        tokenizer: directory of the tokenizer.
        destination: the directory to write.
    """
    lm = read_model(LlamaForCausalLM, trained, dtype=torch.bfloat16)
    lm.config.dtype = torch.bfloat16
    words = read_tokenizer(tokenizer)
    lm.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=_MAX_NEW_TOKENS,
        eos_token_id=end_tokens(tokenizer=words)[0],
        pad_token_id=words.pad_token_id,
    )
    with files.atomic_directory(destination, STAGE) as partial:
        lm.config.save_pretrained(partial)
        lm.generation_config.save_pretrained(partial)
        words.save_pretrained(partial)
        # The output matrix is the embedding; a file with both would double what ships.
        weights = {name: weight.contiguous() for name, weight in lm.state_dict().items() if name != "lm_head.weight"}
        save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone


def _build_tokenizer(directory: Path, seed: int) -> Path:
    if not directory.is_dir():
        drawn = itertools.islice(conversations(Mixture(graded_share=0.5), "train", seed), _TOKENIZER_TEXTS)
        words = train_tokenizer(conversation.text for conversation in drawn)
        with files.atomic_directory(directory, STAGE) as partial:
            words.save_pretrained(partial)
    return directory


def _run_phase(config: str, work: Path, tokenizer: Path, init_from: Path | None, seed: int) -> Path:
    """Runs one config under Lightning's CLI and keeps its weights in ``work/embedded_CONFIG``."""
    directory = work / f"embedded_{config}"
    if directory.is_dir():
        print(f"{directory} is there; phase not run again")
        return directory
    arguments = [
        "fit",
        f"--config={Path(configs.__file__).parent / 'embedded' / (config + '.yaml')}",
        f"--seed_everything={seed}",
        f"--model.init_args.tokenizer={tokenizer}",
        f"--data.init_args.tokenizer={tokenizer}",
    ]
    if init_from is not None:
        arguments.append(f"--model.init_args.init_from={init_from}")
    cli = LightningCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        args=arguments,
    )
    assert isinstance(cli.model, LmModule)
    with files.atomic_directory(directory, STAGE) as partial:
        cli.model.lm.save_pretrained(partial)
    return directory


if __name__ == "__main__":
    auto_cli(build, as_positional=False)
