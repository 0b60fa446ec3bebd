"""Every command works with a target that keeps a recurrent state: drafts are chains, and a tree is an error that names the target."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from doctor_runs import write_prompts
from recurrent_models import recurrent_model
from tiny import EOS, make_tokenizer, save_drafter, save_target
from training import make_trainer
from transformers import AutoModelForCausalLM, Lfm2ForCausalLM

from draftsmith.cli import main
from draftsmith.decode.hugging_face.hf_generate import generate
from draftsmith.models.families.redrafter import ReDrafterFamily
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.drafter.module import DraftModule
from draftsmith.train.drafter_callbacks.keep_best_drafter import KeepBestDrafter
from draftsmith.train.drafter_callbacks.tree_decode_validation import TreeDecodeValidation

KEEPS = "keeps a recurrent state, which follows one branch only"
LOOKUP = "Prompt lookup is left out"
CHECKER = """
from draftsmith.label.checkers.checkers import Checked

def check(row, response):
    return Checked("correct" if len(response) % 2 else "wrong")
"""


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that keeps a recurrent state, with prompts, and the cache of its replies to them."""
    folder = tmp_path_factory.mktemp("recurrent")
    tokenizer = make_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    recurrent_model("Lfm2", **sizes, eos_token_id=EOS, bos_token_id=None).save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    write_prompts(folder / "prompts.jsonl", 0, 4)
    write_prompts(folder / "held_out.jsonl", 100, 2)
    reply = ("--max-new-tokens", 8, "--temperature", 0)
    asked = ("--target", folder / "target", "--prompts", folder / "prompts.jsonl", "--out", folder / "replies")
    assert run("data", "respond", *asked, *reply) == 0
    cached = ("--target", folder / "target", "--source", folder / "replies", "--out", folder / "cache")
    assert run("data", "extract", *cached) == 0
    return folder


@pytest.fixture(scope="module")
def drafter(folder: Path) -> Path:
    return save_drafter(folder / "drafter", folder / "target")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A drafter as a run leaves it that validates with beams, if its target follows them."""
    validation = TreeDecodeValidation(num_prompts=1, max_new_tokens=6, beam_width=4)
    module = DraftModule(str(folder / "target"), ReDrafterFamily(), num_steps=2)
    data = CacheDataModule(folder / "cache", val_fraction=0.2, tokens_per_batch=400)
    torch.manual_seed(0)
    make_trainer(folder / "run", callbacks=[validation, KeepBestDrafter()]).fit(module, data)
    assert validation.limits_for(module).is_chain
    return folder / "run" / "drafter"


@pytest.fixture
def no_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers refuses prompt lookup for this model, as it does for most with a recurrent state."""
    monkeypatch.setattr(Lfm2ForCausalLM, "_is_stateful", True)


def evaluated(folder: Path, out: Path, *words: object) -> int:
    asked = ("--target", folder / "target", "--prompts", folder / "held_out.jsonl", "--out", out)
    return run(*words[:1], *asked, "--max-new-tokens", 6, *words[1:])


def token_ids(replies: Path) -> dict[str, list[int]]:
    rows = [json.loads(line) for line in (replies / "responses.jsonl").read_text().splitlines()]
    return {row["id"]: row["turns"][0]["reply_ids"] for row in rows}


def test_replies_extraction_and_verification(folder: Path) -> None:
    assert run("data", "verify", "--cache", folder / "cache", "--samples", 1) == 0


def test_the_plain_replies_are_those_of_a_drafter(folder: Path, drafter: Path, tmp_path: Path) -> None:
    asked = ("--target", folder / "target", "--prompts", folder / "prompts.jsonl", "--out", tmp_path, "--limit", 2)
    chains = ("--drafter", drafter, "--limits.draft_length", 3)
    assert run("data", "respond", *asked, "--max-new-tokens", 8, "--temperature", 0, *chains) == 0
    own = token_ids(tmp_path)
    assert len(own) == 2
    assert own.items() <= token_ids(folder / "replies").items()


@pytest.mark.usefixtures("no_lookup")
def test_evaluation_leaves_prompt_lookup_out_and_says_why_once(
    folder: Path, drafter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--transformers-prompts", 1, "--ledger-prompts", 1, "--limit", 1)
    assert evaluated(folder, tmp_path, "evaluate", "--drafters", drafter, *few) == 0
    assert capsys.readouterr().out.count(LOOKUP) == 1
    assert (tmp_path / "report.md").read_text().count(LOOKUP) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["drafter"] for row in report["rows"]] == ["plain", "drafter"]
    assert LOOKUP in report["left_out"][0]
    assert report["rows"][1]["exact_share"] == 1.0


@pytest.mark.usefixtures("no_lookup")
def test_tune_weighs_chains_alone(
    folder: Path, drafter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--depths", 2, "--rounds", 1, "--rows", 1, "--keep", "false")
    assert evaluated(folder, tmp_path / "out", "tune", "--drafter", drafter, *few) == 0
    said = capsys.readouterr().out
    assert f"{KEEPS}: chains are weighed" in said
    assert LOOKUP in said
    assert LOOKUP in (tmp_path / "out" / "tune.md").read_text()
    shapes = json.loads((tmp_path / "out" / "tune.json").read_text())["shapes"]
    assert {each["shape"] for each in shapes} == {"1x2"}


@pytest.mark.parametrize("words", [("evaluate", "--shapes", "2x3"), ("tune", "--widths", 1, 2)])
def test_trees_that_are_asked_for_are_an_error(
    folder: Path, drafter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...]
) -> None:
    option = "--drafters" if words[0] == "evaluate" else "--drafter"
    assert evaluated(folder, tmp_path / "out", words[0], option, drafter, *words[1:]) == 1
    assert KEEPS in capsys.readouterr().err


def test_the_doctor_examines_a_drafter(folder: Path, trained: Path, tmp_path: Path) -> None:
    few = ("--samples", 3, "--overfit-steps", 2, "--prompts", folder / "held_out.jsonl")
    run("doctor", "--drafter", trained, "--out", tmp_path / "findings.json", *few)
    findings = json.loads((tmp_path / "findings.json").read_text())["findings"]
    verdicts = {finding["name"]: finding["verdict"] for finding in findings}
    for name in ("fingerprints", "states", "re-projection", "own-text", "train-serve", "acceptance"):
        assert verdicts[name] in ("ok", "warning"), name


def test_custom_generate_decodes_a_chain_where_a_tree_is_the_default(
    folder: Path, drafter: Path, tmp_path: Path
) -> None:
    served = ("--drafter", drafter, "--target", folder / "target", "--layout", "custom_generate")
    assert run("export", *served, "--out", tmp_path / "served") == 0
    model = AutoModelForCausalLM.from_pretrained(folder / "target", dtype=torch.float32)
    ids = torch.tensor([[9, 8, 7, 20, 21, 22]])
    plain = model.generate(ids, do_sample=False, max_new_tokens=8)
    with pytest.warns(UserWarning, match=f"{KEEPS}: the draft is the chain 1x5, not the tree 4x5n11"):
        reply = generate(model, ids, drafter=tmp_path / "served", do_sample=False, max_new_tokens=8)
    assert torch.equal(reply, plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reply = generate(model, ids, drafter=tmp_path / "served", do_sample=False, max_new_tokens=8, beam_width=1)
    assert torch.equal(reply, plain)
    with pytest.raises(ValueError, match=rf"{KEEPS}.*beam_width 1"):
        generate(model, ids, drafter=tmp_path / "served", do_sample=False, max_new_tokens=8, beam_width=4)


def test_labels_are_mined_and_generated(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) | {"reference": "7"} for line in (folder / "held_out.jsonl").read_text().splitlines()]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "checker.py").write_text(CHECKER)
    checker = (
        "--checker",
        f"{tmp_path / 'checker.py'}:check",
        "--prompts",
        prompts,
        "--max-new-tokens",
        8,
        "--licence",
        "mine",
    )
    draft = save_target(tmp_path / "draft")
    mine = ("--target", folder / "target", "--draft", draft, "--out", tmp_path / "mined", "--against", "reference")
    assert run("label", "mine", *mine, *checker) == 0
    mined = json.loads((tmp_path / "mined" / "report.json").read_text())
    assert mined["labels"]["correct"] + mined["labels"]["wrong"] > 0
    models = ("--models", folder / "target", "--out", tmp_path / "generated")
    assert run("label", "generate", *models, *checker) == 0


def test_decode_takes_a_chain_by_default(folder: Path, drafter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--target", folder / "target", "--drafter", drafter, "--prompt", "Tom has", "--max-new-tokens", 6)
    assert run("decode", *asked) == 0
    assert "tokens per step" in capsys.readouterr().out
    assert run("decode", *asked, "--shape", "2x3") == 1
    assert KEEPS in capsys.readouterr().err
