import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from every_family import EVERY_FAMILY, OUR_FAMILIES, for_two_layers
from safetensors.torch import load_file

from draftsmith import provenance
from draftsmith.export.export_command import RecordOptions, export
from draftsmith.export.layouts.layout import Layout
from draftsmith.export.layouts.layouts import layouts_of, other_software_layouts
from draftsmith.models import Family, TargetEnds
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.families.redrafter import ReDrafter
from draftsmith.models.files.fingerprint import module_fingerprint, tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.tree.kept_shapes import SHAPES_FILE, KeptShapes, read_kept_shapes
from draftsmith.models.tree.shapes import parse_shape
from draftsmith.models.tree.shapes_by_rows import ShapesByRows

DRAFT_IDS = torch.arange(0, 280, 3)
# Settings of drafters that a layout can hold, where the family's usual ones are others: family, layout, whether with a draft vocabulary.
MASK: dict[str, Any] = {"mask_token_id": 299}
FOR_LAYOUT: dict[tuple[str, str], tuple[dict[str, Any], bool]] = {
    ("blockdrafter", "dflash"): (MASK, True),
    ("blockdrafter", "dflash2"): (MASK | {"convolution": True, "correction": "selector"}, False),
    ("eagle3", "peagle"): (MASK, True),
    ("blockdrafter", "dspark"): (MASK | {"sample_from_anchor": True, "correction": "vanilla"}, True),
    ("blockdrafter", "domino"): (MASK | {"sample_from_anchor": True, "correction": "gru"}, False),
    ("blockdrafter", "speculators"): (MASK, True),
    ("headsdrafter", "medusa"): ({"head": "per_step"}, True),
    ("headsdrafter", "mlp_speculator"): ({"network": "mlp"}, False),
    ("mtphead", "mtp"): ({}, False),
}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory, drafter: Path, target: Path) -> dict[str, Path]:
    """A saved drafter of each family over a draft vocabulary, as training leaves it. Apple's layout holds none, so ReDrafter's has none."""
    ends, fingerprint = TargetEnds.load(str(target)), tokenizer_fingerprint(load_tokenizer(str(target)))
    folders = {family.name: tmp_path_factory.mktemp(family.name) for family in EVERY_FAMILY}
    for family in EVERY_FAMILY:
        torch.manual_seed(5)
        for_two_layers(family).build(ends, DRAFT_IDS, 3, fingerprint).save_pretrained(folders[family.name])
    for (name, layout), (chosen, has_ids) in FOR_LAYOUT.items():
        family = next(family for family in OUR_FAMILIES if family.name == name)
        folders[f"{name} for {layout}"] = tmp_path_factory.mktemp(layout)
        built = for_two_layers(family, **chosen).build(ends, DRAFT_IDS if has_ids else None, 3, fingerprint)
        built.save_pretrained(folders[f"{name} for {layout}"])
    return folders | {"redrafter": drafter}


def suited(heads: dict[str, Path], family: str, layout: str) -> Path:
    """A saved drafter of a family that a layout can hold."""
    return heads.get(f"{family} for {layout}", heads[family])


def in_layouts(layouts: Callable[[Family], Iterable[Layout]]) -> list[tuple[str, str]]:
    """Names of each of the package's families with those of some of its layouts."""
    return [(family.name, layout.name) for family in OUR_FAMILIES for layout in layouts(family)]


def row_for(drafter: Path, **changes: object) -> dict:
    fields = {
        "target": "tiny",
        "drafter": "mine",
        "drafter_fingerprint": module_fingerprint(ReDrafter.from_pretrained(drafter)),
        "temperature": 0.0,
        "prompts": 200,
        "exact_share": 1.0,
        "tokens_per_step": 3.217,
        "tokens_per_step_interval": [3.1, 3.3],
        "speedup": 1.734,
        "beam_width": 2,
        "draft_length": 4,
        "dtype": "float32",
        "batch_size": 1,
        "suspicious": False,
    }
    return fields | changes


def write_report(path: Path, *rows: dict) -> Path:
    report = {"command": "draftsmith evaluate --x", "machine": {"cpu": "Test CPU"}, "versions": {}, "rows": rows}
    path.write_text(json.dumps(report))
    return path


def run_card_example(folder: Path) -> str:
    """Executes the code block of a card as a reader would, in its folder."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# A card of `custom_generate` shows a program of Transformers, which the tests of that layout run.
@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), in_layouts(lambda family: layouts_of(family)[:-1]))
def test_the_cards_example_runs(tmp_path: Path, heads: dict[str, Path], target: Path, family: str, layout) -> None:
    export(suited(heads, family, layout), tmp_path / "out", target=str(target), layout=layout)
    assert re.search(r"\d+ tokens in \d+ target forwards", run_card_example(tmp_path / "out"))


@pytest.mark.parametrize(
    ("family", "layout", "told"),
    [
        (
            "redrafter",
            "draftsmith",
            ["# A ReDrafter draft head", "tags: [speculative-decoding, draft-head, redrafter]"],
        ),
        ("eagle", "draftsmith", ["# An EAGLE-1 draft head", "a draft vocabulary of 94 of"]),
        (
            "eagle",
            "eagle",
            [
                "over the target's whole vocabulary of 300",
                '"method": "eagle"',
                "--speculative-algorithm EAGLE ",
                "draft vocabulary of 94 tokens could not come along",
                "No figure on this page is from one of these engines",
            ],
        ),
        ("eagle3", "draftsmith", ["# An EAGLE-3 draft head", "(`layer.0.output`, `last.pre_norm`)"]),
        ("eagle3", "eagle3", ['"method": "eagle3"', "--speculative-algorithm EAGLE3 "]),
        ("eagle3", "tensorrt-llm", ["Eagle3DecodingConfig", "`eagle3_layers_to_capture={0, 1}`"]),
        ("eagle3", "speculators", ["with the target's embedding", "put the target's hub id into"]),
        ("blockdrafter", "dflash", ['"method": "dflash"', "--speculative-algorithm DFLASH "]),
        ("blockdrafter", "dspark", ['"method": "dspark"', "SGLang drops the head of a DSpark"]),
        ("headsdrafter", "medusa", ['"method": "medusa"', "vLLM 0.32 is the last release with Medusa"]),
    ],
)
def test_the_card_knows_the_family_and_the_layout(
    tmp_path: Path, heads: dict[str, Path], target: Path, family: str, layout, told: list[str]
) -> None:
    export(suited(heads, family, layout), tmp_path / "out", target=str(target), layout=layout)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in told:
        assert text in card, text
    assert ("## Serve" in card) == (layout not in ("draftsmith", "apple"))


def test_the_card_has_an_engine_draft_no_deeper_than_the_drafter_can(tmp_path: Path, target: Path) -> None:
    ends, family = TargetEnds.load(str(target)), next(each for each in OUR_FAMILIES if each.name == "blockdrafter")
    for_two_layers(family, **MASK).build(ends, None, 2, "").save_pretrained(tmp_path / "block")
    export(tmp_path / "block", tmp_path / "out", target=str(target), layout="dflash")
    assert '"num_speculative_tokens": 2' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("family", [family.name for family in EVERY_FAMILY])
def test_what_is_exported_in_our_layout_is_what_decoding_loads(
    tmp_path: Path, heads: dict[str, Path], target: Path, family: str
) -> None:
    export(heads[family], tmp_path / "out", target=str(target))
    before, after = load_drafter(heads[family]), load_drafter(tmp_path / "out")
    assert type(before) is type(after)
    assert module_fingerprint(before) == module_fingerprint(after)
    assert torch.equal(before.draft_ids(), after.draft_ids())


def holds_the_draft_vocabulary(family: Family) -> Iterator[Layout]:
    """Other layouts than these lose it, so what comes back from them is another drafter."""
    return (layout for layout in other_software_layouts(family) if not layout.whole_vocabulary)


@pytest.mark.parametrize(("family", "layout"), in_layouts(holds_the_draft_vocabulary))
def test_an_engines_layout_and_back_is_the_same_drafter(
    tmp_path: Path, heads: dict[str, Path], target: Path, other_target: Path, family: str, layout
) -> None:
    drafter = suited(heads, family, layout)
    export(drafter, tmp_path / "engine", target=str(target), layout=layout)
    export(tmp_path / "engine", tmp_path / "back", target=str(target))
    before, after = load_drafter(drafter), load_drafter(tmp_path / "back")
    assert module_fingerprint(before) == module_fingerprint(after)
    assert before.config.target_fingerprint == after.config.target_fingerprint
    assert before.config.tokenizer_fingerprint == after.config.tokenizer_fingerprint
    with pytest.raises(ValueError, match="was exported for target"):
        export(tmp_path / "engine", tmp_path / "other", target=str(other_target))


def test_a_layout_of_another_family_is_refused(tmp_path: Path, heads: dict[str, Path]) -> None:
    with pytest.raises(
        ValueError, match=r"'apple' is for ReDrafter, this drafter is EAGLE-3; use draftsmith or peagle or eagle3 or"
    ):
        export(heads["eagle3"], tmp_path / "out", layout="apple")
    assert not (tmp_path / "out").exists()


def test_what_a_user_must_know_is_printed_too(
    tmp_path: Path, heads: dict[str, Path], target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(heads["eagle"], tmp_path / "out", target=str(target), layout="eagle")
    assert "note: The draft vocabulary of 94 tokens could not come along" in capsys.readouterr().out


def test_our_layout_keeps_every_tensor_and_the_bond(tmp_path: Path, drafter: Path, target: Path) -> None:
    export(drafter, tmp_path / "out", target=str(target))
    before, after = load_file(drafter / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    bond = ReDrafter.from_pretrained(drafter).config.target_fingerprint
    assert bond
    assert ReDrafter.from_pretrained(tmp_path / "out").config.target_fingerprint == bond


def test_apples_layout_and_back_is_the_same_drafter(tmp_path: Path, drafter: Path, target: Path) -> None:
    export(drafter, tmp_path / "apple", target=str(target), layout="apple")
    export(tmp_path / "apple", tmp_path / "back", target=str(target))
    first, back = load_file(drafter / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert first.keys() == back.keys()
    assert all(torch.equal(first[name], back[name]) for name in first)
    own, config = ReDrafter.from_pretrained(drafter).config, ReDrafter.from_pretrained(tmp_path / "back").config
    assert config.target_fingerprint == own.target_fingerprint
    assert config.tokenizer_fingerprint == own.tokenizer_fingerprint


def test_another_target_is_refused_in_both_layouts(
    tmp_path: Path, drafter: Path, target: Path, other_target: Path
) -> None:
    with pytest.raises(ValueError, match="was trained for target"):
        export(drafter, tmp_path / "out", target=str(other_target))
    export(drafter, tmp_path / "apple", target=str(target), layout="apple")
    with pytest.raises(ValueError, match="was exported for target"):
        export(tmp_path / "apple", tmp_path / "back", target=str(other_target))


def test_apples_layout_needs_a_target(tmp_path: Path, drafter: Path) -> None:
    export(drafter, tmp_path / "apple", layout="apple")
    with pytest.raises(ValueError, match="names no target; say which one it is for with --target"):
        export(tmp_path / "apple", tmp_path / "back")


def test_the_card_shows_what_the_report_measured(tmp_path: Path, drafter: Path) -> None:
    report = write_report(tmp_path / "report.json", row_for(drafter), row_for(drafter, drafter_fingerprint="other"))
    export(drafter, tmp_path / "out", records=RecordOptions(report=report))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("| 2x4 | 0 | 3.22 (3.10 to 3.30) | 1.73 | all | 200 |") == 1
    assert "Test CPU" in card
    assert "draftsmith evaluate --x" in card


def test_the_card_does_not_round_up_to_all(tmp_path: Path, drafter: Path) -> None:
    report = write_report(tmp_path / "report.json", row_for(drafter, exact_share=0.9998))
    export(drafter, tmp_path / "out", records=RecordOptions(report=report))
    assert "| 99.9 % | 200 |" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_invents_nothing(tmp_path: Path, drafter: Path) -> None:
    export(drafter, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not measured with these weights" in card
    assert "was not recorded" in card


def test_a_report_of_other_weights_is_refused(tmp_path: Path, drafter: Path) -> None:
    report = write_report(tmp_path / "report.json", row_for(drafter, drafter_fingerprint="0" * 64))
    with pytest.raises(ValueError, match=r"holds no row of these weights.*only of mine"):
        export(drafter, tmp_path / "out", records=RecordOptions(report=report))
    assert not (tmp_path / "out").exists()


def test_a_missing_report_is_refused(tmp_path: Path, drafter: Path) -> None:
    with pytest.raises(ValueError, match="no such report"):
        export(drafter, tmp_path / "out", records=RecordOptions(report=tmp_path / "report.json"))


def test_the_training_record_is_handed_on(tmp_path: Path, drafter: Path) -> None:
    record = provenance.record("draftsmith train fit", {"data": {"cache": "c", "tokens": 77}, "lr": 1e-3}, {"c": "ab"})
    provenance.write(tmp_path / "run", record)
    export(drafter, tmp_path / "once", records=RecordOptions(training=tmp_path / "run"))
    export(tmp_path / "once", tmp_path / "twice")
    for name in ("once", "twice"):
        card = (tmp_path / name / "README.md").read_text()
        assert "cache c, tokens 77" in card
        assert "draftsmith train fit" in card
        assert provenance.read(tmp_path / name)["training"]["config"]["lr"] == 1e-3


def test_a_training_record_that_is_not_there_is_refused(tmp_path: Path, drafter: Path) -> None:
    with pytest.raises(ValueError, match=r"provenance.json does not exist"):
        export(drafter, tmp_path / "out", records=RecordOptions(training=tmp_path))


def test_an_export_replaces_an_earlier_one_but_nothing_else(tmp_path: Path, drafter: Path) -> None:
    export(drafter, tmp_path / "out")
    export(drafter, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes.txt, which `draftsmith export` did not write and would delete"):
        export(drafter, tmp_path / "out")
    with pytest.raises(ValueError, match=r"reads .*, and would delete it"):
        export(drafter, drafter)


def test_a_failed_export_leaves_the_earlier_one(tmp_path: Path, drafter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(drafter, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("draftsmith.models.files.checkpoint_files.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export(drafter, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KEPT = KeptShapes(
    ShapesByRows(((2, parse_shape("2x3n4")), (8, None))), (1, 8), "tiny", "", "cpu", "a processor", "float32"
)


def test_shapes_that_tune_kept_go_along_to_where_this_decoder_runs(tmp_path: Path, drafter: Path, target: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(drafter, source)
    KEPT.write(source)
    for layout in ("draftsmith", "custom_generate"):
        export(source, tmp_path / layout, target=str(target), layout=layout)
        assert read_kept_shapes(tmp_path / layout) == KEPT
    export(source, tmp_path / "apple", target=str(target), layout="apple")
    assert not (tmp_path / "apple" / SHAPES_FILE).exists()
    export(drafter, tmp_path / "without", target=str(target))
    assert not (tmp_path / "without" / SHAPES_FILE).exists()


def test_an_export_with_shapes_that_were_kept_in_it_can_be_replaced(tmp_path: Path, drafter: Path) -> None:
    out = tmp_path / "out"
    export(drafter, out)
    KEPT.write(out)
    KEPT.write(out)
    export(drafter, out)
    assert not (out / SHAPES_FILE).exists()
    KEPT.write(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which"):
        export(drafter, out)
