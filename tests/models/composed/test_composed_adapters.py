"""Adapters of a head inside a drafter that is made of others: each request has its own, as on the head alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from doubles import BOS, VOCAB, greedy_by_hand, random_target

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.adapter_engine import AdapterEngine
from draftsmith.models import Eagle, Target
from draftsmith.models.composed.refined_drafter import RefinedConfig, RefinedDrafter
from draftsmith.models.composed.revisers import LMReviser
from draftsmith.models.composed.suffix_drafter import SuffixConfig, SuffixDrafter
from draftsmith.models.drafters.draft_lm import LMDrafter
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.files.fingerprint import module_fingerprint
from draftsmith.models.lora.adapted_drafter import adapted
from draftsmith.models.lora.lora_adapter import AdapterBond, LoraSettings, add_adapter, save_adapter
from draftsmith.models.ngrams.kneser_ney import kneser_ney
from draftsmith.models.tree.shapes import parse_shape

PROMPTS = [[BOS, 5, 9, 11, 5, 9, 11, 5], [BOS, 7], [BOS, 8, 8, 8, 30, 31], [BOS, 40, 41], [BOS, 50, 9, 3]]
NAMES = ["sums", None, "tales", "sums", "tales"]
REQUEST = GenerationSettings(max_new_tokens=20)
TEXTS = [[5, 9, 11, 4, 7, 8, 8, 30, 31], [30, 31, 32, 5, 9, 4, 7, 11, 4, 7]]
CONFIGS = {
    "suffixes": {"model_type": "draftsmith_suffix", "head": "head"},
    "phrases": {"model_type": "draftsmith_phrases", "head": "head", "phrase_length": 2},
    "table": {"model_type": "draftsmith_refined", "head": "head", "ngrams": "table", "num_candidates": 8},
    "suffixes over table": {"model_type": "draftsmith_suffix", "head": "refined"},
}


@pytest.fixture(scope="module")
def target() -> Target:
    made = random_target()
    made.ends.fingerprint = "f" * 64
    return made


@pytest.fixture(scope="module")
def folder(target: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head, two adapters of it, a table, and a refined drafter of head and table."""
    place = tmp_path_factory.mktemp("composed")
    torch.manual_seed(2)
    Eagle.for_target(target.ends).save_pretrained(place / "head")
    (place / "table").mkdir()
    kneser_ney(TEXTS, VOCAB, 3).save(place / "table")
    write_config(place / "refined", {**CONFIGS["table"], "head": "../head", "ngrams": "../table"})
    for number, name in enumerate(("sums", "tales")):
        save_shaken(place / "head", place / name, number)
    return place


def write_config(folder: Path, fields: dict[str, object]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def save_shaken(base: Path, out: Path, seed: int, target_fingerprint: str = "f" * 64) -> Path:
    """An adapter of random weights."""
    drafter = load_drafter(base)
    fingerprint = module_fingerprint(drafter)
    add_adapter(drafter, LoraSettings(rank=2), "a")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    drafter.config.score_scale = 2.0 + seed
    drafter.config.target_fingerprint = target_fingerprint
    out.mkdir()
    save_adapter(drafter, out, "a", AdapterBond.of(drafter, str(base), fingerprint))
    return out


def composed(folder: Path, kind: str) -> Drafter:
    if kind == "LM":
        config = RefinedConfig(head="head", lm="small", num_candidates=8)
        return RefinedDrafter(config, load_drafter(folder / "head"), LMReviser(LMDrafter(random_target(seed=3)))).eval()
    fields = {name: f"../{value}" if name in ("head", "ngrams") else value for name, value in CONFIGS[kind].items()}
    return load_drafter(write_config(folder / "made", fields))


@pytest.mark.parametrize("kind", [*CONFIGS, "LM"])
def test_each_request_is_drafted_for_by_its_own_adapter_of_the_head(target: Target, folder: Path, kind: str) -> None:
    limits = parse_shape("3x4n7")
    adapters = {name: folder / name for name in ("sums", "tales")}
    engine = AdapterEngine(target, composed(folder, kind), adapters, limits)
    replies = engine.generate(PROMPTS, REQUEST, NAMES, num_rows=3)
    assert [reply.token_ids for reply in replies] == [greedy_by_hand(target, prompt, 20) for prompt in PROMPTS]
    alone = {name: composed(folder, kind) for name in (None, *adapters)}
    merged = {name: drafter if name is None else adapted(drafter, folder / name) for name, drafter in alone.items()}
    accepted = {
        name: [reply.accepted for reply in Engine(target, drafter, limits).generate(PROMPTS, REQUEST)]
        for name, drafter in merged.items()
    }
    assert [reply.accepted for reply in replies] == [accepted[name][row] for row, name in enumerate(NAMES)]
    assert accepted["sums"] != accepted[None], "the adapter drafts as the head without it"


def test_the_drafter_that_is_given_stays_as_it_is_and_shares_its_weights(target: Target, folder: Path) -> None:
    drafter = composed(folder, "suffixes over table")
    before = module_fingerprint(drafter)
    engine = AdapterEngine(target, drafter, {"sums": folder / "sums"}, parse_shape("3x4n7"))
    engine.generate(PROMPTS[:2], REQUEST, ["sums", None])
    assert module_fingerprint(drafter) == before
    own = {weight.data_ptr() for weight in drafter.parameters()}
    assert own <= {weight.data_ptr() for weight in engine._switch.parameters()}


def test_an_adapter_that_no_part_was_trained_with_is_an_error(target: Target, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(9)
    Eagle.for_target(target.ends).save_pretrained(tmp_path / "other")
    other = save_shaken(tmp_path / "other", tmp_path / "adapter", 1)
    for make in (
        lambda: AdapterEngine(target, composed(folder, "suffixes"), {"sums": other}),
        lambda: adapted(composed(folder, "suffixes"), other),
    ):
        with pytest.raises(ValueError, match=r"adapts the drafter .*other.*, not this one .*; give that drafter"):
            make()
    with pytest.raises(ValueError, match=r"this SuffixDrafter has no trained head .*leave the adapter out"):
        AdapterEngine(target, SuffixDrafter(SuffixConfig()).eval(), {"sums": folder / "sums"})


def test_a_draft_lm_takes_no_adapters(folder: Path) -> None:
    with pytest.raises(ValueError, match="this LMDrafter has no trained head that takes one"):
        adapted(LMDrafter(random_target(seed=3)), folder / "sums")


def test_a_drafter_without_weights_needs_no_adapters(target: Target) -> None:
    engine = AdapterEngine(target, SuffixDrafter(SuffixConfig()).eval(), {}, parse_shape("3x4"))
    replies = engine.generate(PROMPTS[:2], REQUEST, [None, None])
    assert [reply.token_ids for reply in replies] == [greedy_by_hand(target, prompt, 20) for prompt in PROMPTS[:2]]


def test_a_head_of_the_base_model_takes_adapters_of_a_fine_tuned_target(target: Target, tmp_path: Path) -> None:
    torch.manual_seed(2)
    head = Eagle.for_target(target.ends)
    head.config.target_fingerprint = "b" * 64
    head.save_pretrained(tmp_path / "head")
    adapter = save_shaken(tmp_path / "head", tmp_path / "sums", 1)
    drafter = load_drafter(write_config(tmp_path / "made", {"model_type": "draftsmith_suffix", "head": "../head"}))
    engine = AdapterEngine(target, drafter, {"sums": adapter}, parse_shape("3x4n7"))
    [reply] = engine.generate(PROMPTS[:1], REQUEST, ["sums"])
    assert reply.token_ids == greedy_by_hand(target, PROMPTS[0], 20)
    with pytest.raises(ValueError, match="this one is of another target; name an adapter"):
        engine.generate(PROMPTS[:1], REQUEST, [None])


def test_a_shape_that_the_composed_drafter_cannot_draft_is_an_error(target: Target, folder: Path) -> None:
    engine = AdapterEngine(target, composed(folder, "suffixes"), {"sums": folder / "sums"}, parse_shape("1x4"))
    with pytest.raises(ValueError, match="together are a tree; give a shape such as 10x5n24"):
        engine.generate(PROMPTS[:1], REQUEST, ["sums"])


def test_shapes_that_were_kept_for_a_head_with_its_adapter_are_not_those_of_the_composed_drafter(folder: Path) -> None:
    drafter = adapted(composed(folder, "suffixes"), folder / "sums")
    assert drafter.loaded_from is None
