"""A small drafter in every layout that vLLM reads, for the embedded target.

Owns which drafters, layouts and settings of vLLM are compared, and makes the folders: a few steps of training are enough for drafts of
which some are accepted and some are not. A folder that is there is not made again. Knows nothing of decoding and pages.

MTP heads lie in the target's own folder. For them the embedded target is written once more as a MiMo: a Qwen2 whose biases are zero
computes what the Llama computes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.drafters.families import cached, make_rows
from benchmarks.drafters.families_plan import Bench
from benchmarks.drafters.recipes import ALL_RECIPES, CLOSE_RECIPES, Recipe, train
from draftsmith.export.layouts.layouts import write
from draftsmith.files import atomic_directory
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.families.eagle3 import default_layers
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.files.model_folder import openable_name
from draftsmith.models.files.pretrained import read_model
from draftsmith.models.target.target import PRE_NORM, TargetEnds

TARGET, NUM_BLOCKS = "embedded:target", 8
LENGTH = 4  # drafted tokens of a cycle
MASK = 0  # the embedded target's padding, which it never writes
STEPS, REPLIES = 30, 320  # of training
VOCABULARY = 256  # tokens, where a drafter has a draft vocabulary
MIMO = "mimo"  # stands for the target that is written as a MiMo


def _recipe(name: str, module: Mapping[str, Any] | None = None, **options: Any) -> Recipe:
    """A recipe of the benchmarks for drafts of LENGTH tokens, with further settings of the family."""
    known = {**ALL_RECIPES, **CLOSE_RECIPES}[name]
    return replace(
        known,
        module={**known.module, "num_steps": LENGTH, **(module or {})},
        options={**known.options, **options},
    )


_LOW, _MIDDLE, _ = default_layers(NUM_BLOCKS)
_SELECTOR: dict[str, Any] = {"convolution": True, "correction": "selector", "correction_rank": 32}
DRAFTERS: dict[str, Recipe] = {
    "EAGLE-1": _recipe("eagle", {"num_steps": 1}),
    "EAGLE-3, draft vocabulary": _recipe("eagle3", draft_vocab_size=VOCABULARY),
    "EAGLE-3, two draft layers": _recipe("eagle3", num_draft_layers=2),
    "EAGLE-3, norm_before_residual, fc_norm, norm_output": _recipe("eagle3"),
    "EAGLE-3, norm_before_fc": _recipe("eagle3"),
    "EAGLE-3, attention_bias": _recipe("eagle3"),
    "EAGLE-3, reads the last block": _recipe("eagle3", layers=[_LOW, _MIDDLE, PRE_NORM]),
    "P-EAGLE": _recipe("eagle3", mask_token_id=MASK),
    "P-EAGLE, two draft layers, draft vocabulary": _recipe(
        "eagle3", mask_token_id=MASK, num_draft_layers=2, draft_vocab_size=VOCABULARY
    ),
    "P-EAGLE, embedding of its own": _recipe("eagle3", mask_token_id=MASK),
    "Medusa": _recipe("medusa"),
    "Medusa, two blocks a head": _recipe("medusa", num_blocks=2),
    "Medusa, draft vocabulary": _recipe("medusa", draft_vocab_size=VOCABULARY),
    "MLP speculator": _recipe("mlp"),
    "DFlash": _recipe("dflash", mask_token_id=MASK),
    "DFlash, draft vocabulary": _recipe("dflash", mask_token_id=MASK, draft_vocab_size=VOCABULARY),
    "DFlash, window of 24 tokens": _recipe("dflash", mask_token_id=MASK, sliding_window=24),
    "JetSpec": _recipe("jetspec", mask_token_id=MASK),
    "DFlash 2": _recipe("dflash", mask_token_id=MASK, **_SELECTOR),
    "DSpark": _recipe("dspark", mask_token_id=MASK),
    "MTP head": _recipe("mtp", state_first=True),
}
"""How each drafter is trained."""
CHANGED: dict[str, dict[str, Any]] = {
    "EAGLE-3, norm_before_residual, fc_norm, norm_output": dict.fromkeys(
        ("norm_before_residual", "fc_norm", "norm_output"), True
    ),
    "EAGLE-3, norm_before_fc": {"norm_before_fc": True},
    "EAGLE-3, attention_bias": {"attention_bias": True},
    "P-EAGLE, embedding of its own": {"own_embedding": True},
    "MTP head": {"reads_normed": False, "feeds_normed": True, "attention_bias": True},
}
"""Fields of the config that no setting of a family has: training begins with such a drafter."""


@dataclass(frozen=True, eq=False)
class Case:
    """One drafter in one layout.

    Attributes:
        drafter: one of DRAFTERS, or what a folder without training holds.
        layout: as ``draftsmith export --layout`` names it.
        method: vLLM's name of the way to draft.
        settings: further keys of ``--speculative-config``.
        names: ``vllm`` where the tensors get vLLM's own names.
        target: of the drafter.
    """

    drafter: str
    layout: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    names: str = ""
    target: str = TARGET

    @property
    def key(self) -> str:
        """A file's name for it."""
        words = f"{self.drafter} {self.layout} {self.names}".lower()
        return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


_PARALLEL = {"parallel_drafting": True}
CASES = (
    Case("EAGLE-1", "eagle", "eagle"),
    *(Case(drafter, "eagle3", "eagle3") for drafter in DRAFTERS if drafter.startswith("EAGLE-3")),
    Case("EAGLE-3, draft vocabulary", "speculators", "eagle3"),
    Case("EAGLE-3, two draft layers", "speculators", "eagle3"),
    Case("EAGLE-3, norm_before_residual, fc_norm, norm_output", "speculators", "eagle3"),
    *(Case(drafter, "peagle", "eagle3", _PARALLEL) for drafter in DRAFTERS if drafter.startswith("P-EAGLE")),
    Case("P-EAGLE", "speculators", "eagle3", _PARALLEL),
    *(Case(drafter, "medusa", "medusa") for drafter in DRAFTERS if drafter.startswith("Medusa")),
    Case("Medusa", "medusa", "medusa", names="vllm"),
    Case("DFlash", "dflash", "dflash"),
    Case("DFlash", "speculators", "dflash"),
    Case("DFlash, draft vocabulary", "dflash", "dflash"),
    Case("DFlash, draft vocabulary", "speculators", "dflash"),
    Case("DFlash, window of 24 tokens", "dflash", "dflash"),
    Case("JetSpec", "dflash", "dflash"),
    Case("DFlash 2", "dflash2", "dflash"),
    Case("DFlash 2", "speculators", "dflash"),
    Case("DSpark", "dspark", "dspark"),
    Case("DSpark", "speculators", "dspark"),
    Case("MTP head", "mtp", "mtp", target=MIMO),
    Case("MLP speculator", "mlp_speculator", "mlp_speculator"),
    Case("embedded:draft_lm", "a causal LM's own", "draft_model"),
)
"""Every layout that vLLM reads of those that we write; a draft LM is in none of ours."""


@dataclass(frozen=True)
class Folders:
    """Where a case lies.

    Attributes:
        case: which.
        target: the target's folder.
        drafter: what is exported, for draftsmith; of an MTP head the target's own folder.
    """

    case: Case
    target: str
    drafter: str


def prompts_and_replies(work: Path, prompts: int) -> tuple[Path, Path]:
    """Rows to train on, and rows whose prompts are decoded; made once.

    Args:
        work: where all of it lies.
        prompts: how many to decode.
    """
    work.mkdir(parents=True, exist_ok=True)
    return make_rows(_bench(TARGET, prompts), work, work)


def folders(work: Path, cases: Sequence[Case], prompts: int) -> Iterator[Folders]:
    """The folders of these cases, one after the other.

    Args:
        work: where all of it lies.
        cases: which.
        prompts: see :func:`prompts_and_replies`.
    """
    replies, _ = prompts_and_replies(work, prompts)
    for case in cases:
        if case.drafter not in DRAFTERS:
            yield Folders(case, openable_name(case.target), openable_name(case.drafter))
            continue
        target = mimo(work / MIMO) if case.target == MIMO else case.target
        cache = cached(_bench(target, prompts), replies, work / f"cache-{case.target.replace(':', '-')}")
        drafter = trained(case.drafter, target, cache, work / "drafters")
        folder = exported(case, drafter, target, work / "exported" / case.key)
        if case.target == MIMO:
            served = str(with_layer(Path(target), folder, work / "exported" / f"{case.key}-served"))
            yield Folders(case, served, served)
        else:
            yield Folders(case, openable_name(target), str(folder))


def _bench(target: str, prompts: int) -> Bench:
    return Bench("embedded", target, STEPS, 0.0, prompts, REPLIES)


def trained(name: str, target: str, cache: Path, work: Path) -> Path:
    """The folder of one drafter of DRAFTERS.

    Args:
        name: which.
        target: a folder, or embedded:target.
        cache: of its states.
        work: where drafters lie.
    """
    recipe, folder = DRAFTERS[name], work / re.sub(r"\W+", "-", name.lower())
    if name in CHANGED:
        beginning = folder / "beginning"
        if not beginning.is_dir():
            with atomic_directory(beginning) as unfinished:
                changed(name, target).save_pretrained(unfinished)
        recipe = replace(recipe, module={**recipe.module, "init_from": beginning})
    train(recipe, target, cache, folder, steps=STEPS)
    return folder / "drafter"


def changed(name: str, target: str) -> Any:
    """A fresh drafter with the fields of CHANGED."""
    recipe, ends = DRAFTERS[name], TargetEnds.load(target)
    tokenizer = tokenizer_fingerprint(load_tokenizer(target))
    fresh: Any = recipe.family(**recipe.options).build(ends, None, LENGTH, tokenizer)
    drafter = type(fresh)(type(fresh).config_class.from_dict(fresh.config.to_dict() | CHANGED[name]))
    drafter.load_state_dict(fresh.state_dict(), strict=False)
    if CHANGED[name].get("own_embedding"):
        drafter.embed_tokens.load_state_dict(ends.embedding.state_dict())
    drafter.adopt_target(ends, None)
    return drafter


def exported(case: Case, drafter: Path, target: str, folder: Path) -> Path:
    """A drafter in the case's layout, as ``draftsmith export`` writes it."""
    if not folder.is_dir():
        with atomic_directory(folder) as unfinished:
            ends = TargetEnds.load(target)
            write(load_drafter(drafter).attach(ends), unfinished, case.layout, ends)
            if case.names == "vllm":
                rename_as_vllm(unfinished)
    return folder


def rename_as_vllm(folder: Path) -> None:
    """Give a Medusa vLLM's own names in place of the official ones: ``0.0.linear.bias`` -> ``blocks.0.layers.0.bias``."""
    fields = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    block = re.compile(r"(\d+)\.(\d+)\.linear\.")
    named = {
        block.sub(r"blocks.\1.layers.\2.", name)
        if block.match(name)
        else re.sub(r"^(\d+)\.\d+\.", r"lm_heads.\1.", name): tensor
        for name, tensor in tensors.items()
    }
    fields["num_heads"], fields["num_hidden_layers"] = fields.pop("medusa_num_heads"), fields.pop("medusa_num_layers")
    save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))


def mimo(folder: Path) -> str:
    """The embedded target as a Qwen2, which MiMo's class is but for its MTP layer; made once.

    Args:
        folder: where it lies.

    Returns:
        the folder's name.

    Raises:
        SystemExit: the two classes differ in more than biases.
    """
    if not folder.is_dir():
        source = openable_name(TARGET)
        llama = read_model(AutoModelForCausalLM, Path(source), dtype=torch.float32)
        shared = {name: value for name, value in llama.config.to_dict().items() if name not in ("model_type", "dtype")}
        model = Qwen2ForCausalLM(Qwen2Config(**shared)).float()
        fitted = model.load_state_dict(llama.state_dict(), strict=False)
        if fitted.unexpected_keys or not all(name.endswith("_proj.bias") for name in fitted.missing_keys):
            raise SystemExit(f"a Llama is no Qwen2 without biases: {fitted}")
        with torch.no_grad():
            for name in fitted.missing_keys:
                model.get_parameter(name).zero_()
        with atomic_directory(folder) as unfinished:
            model.save_pretrained(unfinished)
            load_tokenizer(TARGET).save_pretrained(unfinished)
    return str(folder)


def with_layer(target: Path, layer: Path, folder: Path) -> Path:
    """The target with an MTP layer beside it, as MiMo's folders are."""
    if not folder.is_dir():
        with atomic_directory(folder) as unfinished:
            shutil.copytree(target, unfinished, dirs_exist_ok=True)
            weights = "model.safetensors"
            save_file(load_file(target / weights) | load_file(layer / weights), unfinished / weights, {"format": "pt"})
            fields = json.loads((target / "config.json").read_text())
            fields |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
            (unfinished / "config.json").write_text(json.dumps(fields))
    return folder
