"""Each recipe of configs/recipes does run, from questions to a report, on a tiny model of the architecture that it is for."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from pages import ROOT
from tiny import EOS, make_tokenizer

from draftsmith import cli, embedded
from draftsmith.models.families.eagle3 import default_layers

RECIPES = ROOT / "configs" / "recipes"
BLOCKS = 4
# Blocks of the models themselves, as their config.json has it.
OWN_BLOCKS = {
    "gemma-3-4b": 34,
    "gpt-oss-20b": 24,
    "llama-3.1-8b": 32,
    "llama-3.3-70b": 80,
    "qwen3-30b-a3b": 48,
    "qwen3-8b": 36,
}
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "eos_token_id": EOS,
    "bos_token_id": None,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2}
_LLAMA_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def llama(vocab_size: int) -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(**_TEXT, vocab_size=vocab_size, rope_parameters=_LLAMA_ROPE)


def gemma3(vocab_size: int) -> transformers.PreTrainedConfig:
    text = _TEXT | {"vocab_size": vocab_size, "sliding_window": 16, "query_pre_attn_scalar": 8}
    return transformers.Gemma3Config(text_config=text, vision_config=_VISION, eos_token_id=EOS)


def qwen_vl(vocab_size: int) -> transformers.PreTrainedConfig:
    text = {name: value for name, value in _TEXT.items() if name != "head_dim"}
    return transformers.Qwen2_5_VLConfig(
        text_config=text | {"vocab_size": vocab_size, "rope_parameters": _MROPE},
        vision_config=_QWEN_VISION | {"fullatt_block_indexes": [0]},
    )


# What each recipe is tried on; a recipe also fits other models of its kind, such as a multimodal one.
MODELS: dict[str, tuple[str, Callable[[int], transformers.PreTrainedConfig]]] = {
    "llama-3.1-8b": ("llama-3.1-8b", llama),
    "llama-3.3-70b": ("llama-3.3-70b", llama),
    "qwen3-8b": ("qwen3-8b", lambda size: transformers.Qwen3Config(**_TEXT, vocab_size=size)),
    "qwen3-30b-a3b": (
        "qwen3-30b-a3b",
        lambda size: transformers.Qwen3MoeConfig(**_TEXT, **_EXPERTS, vocab_size=size, num_experts=4, moe_intermediate_size=16),
    ),
    "gpt-oss-20b": (
        "gpt-oss-20b",
        lambda size: transformers.GptOssConfig(**_TEXT, **_EXPERTS, vocab_size=size, num_local_experts=4, sliding_window=16),
    ),
    "gemma-3-4b": ("gemma-3-4b", gemma3),
    "qwen2.5-vl by the recipe of qwen3-8b": ("qwen3-8b", qwen_vl),
}  # fmt: skip
# What a command of a recipe asks of vLLM and of GPUs.
ONLY_THERE = re.compile(r" --(engine vllm|(tensor-parallel|batch-rows|batch-tokens) \d+|device-map auto)")
SMALL = {
    "data respond": "--max-new-tokens 24",
    "data extract": "--max-length 128",
    "train": (
        "--trainer.max_steps 3 --trainer.accelerator cpu --trainer.devices 1 --trainer.strategy auto --trainer.precision 32-true "
        "--trainer.enable_progress_bar false --data.init_args.tokens_per_batch 512 --data.init_args.val_fraction 0.2 "
        "--model.init_args.num_steps 3 --model.init_args.drafter.init_args.draft_vocab_size 200"
    ),
    "evaluate": "--max-new-tokens 12 --limit 2 --transformers-prompts 1 --ledger-prompts 1",
}


def commands(recipe: Path) -> list[str]:
    """The commands in a recipe's head, one a line."""
    comment = re.sub(r"\\\n#\s*", "", recipe.read_text(encoding="utf-8").partition("base:")[0])
    return [line.removeprefix("#   ") for line in comment.splitlines() if line.startswith("#   draftsmith ")]


def save(config: transformers.PreTrainedConfig, folder: Path) -> None:
    torch.manual_seed(0)
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    model = next(kind for kind in kinds if type(config) in kind._model_mapping).from_config(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@pytest.mark.parametrize("name", MODELS)
def test_every_stage_of_a_recipe_runs_on_its_architecture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, config = MODELS[name]
    monkeypatch.chdir(tmp_path)
    save(config(len(make_tokenizer())), tmp_path / "model")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    questions = [problem.question for problem in embedded.distinct_problems("train", 16, seed=5)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
    target = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())["model"]["init_args"]["target"]
    for line in commands(RECIPES / f"{recipe}.yaml"):
        line = ONLY_THERE.sub("", line).replace(target, "model")
        line = re.sub(r"--layers '\S.*?'", f"--layers '[last.pre_norm, {', '.join(default_layers(BLOCKS))}]'", line)
        words = shlex.split(line)[1:]
        group = " ".join(words[:2]) if words[0] in cli.GROUPS else words[0]
        more = "--model.init_args.target model" if words[0] == "train" else ""
        assert cli.main([*words, *SMALL.get(group.removesuffix(" fit"), "").split(), *more.split()]) == 0, line
    assert "tokens per step" in (tmp_path / "runs" / recipe / "report" / "report.md").read_text()


@pytest.mark.parametrize("recipe", OWN_BLOCKS)
def test_a_recipe_stores_the_layers_that_its_drafter_reads(recipe: str) -> None:
    [extract] = [line for line in commands(RECIPES / f"{recipe}.yaml") if line.startswith("draftsmith data extract")]
    words = shlex.split(extract)
    stored = yaml.safe_load(words[words.index("--layers") + 1])
    assert stored == ["last.pre_norm", *default_layers(OWN_BLOCKS[recipe])]


def test_every_recipe_is_tried() -> None:
    assert (
        {path.stem for path in RECIPES.glob("*.yaml")} == {recipe for recipe, _ in MODELS.values()} == set(OWN_BLOCKS)
    )
