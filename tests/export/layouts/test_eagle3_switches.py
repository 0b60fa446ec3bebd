"""EAGLE-3.1's switches: what each computes, in training as in decoding, and which layouts hold them."""

import json
from pathlib import Path

import pytest
import torch
from heads import DRAFT_IDS, eagle3, logits_of_files, our_logits, second_step_of_files

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.evaluate.doctor.serving import served_logits, trained_logits
from draftsmith.evaluate.doctor.tree_serving import tree_and_chain_logits
from draftsmith.export.layouts.layouts import load_any, write
from draftsmith.export.layouts.readback import tensors_of
from draftsmith.models import DraftLimits, Eagle3Config, PackedBatch, Target
from draftsmith.models.families.eagle3 import SWITCHES

SETS = [
    {"norm_before_residual": True},
    {"norm_before_fc": True},
    {"fc_norm": True},
    {"norm_output": True},
    {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True},
]
BIASES = {"attention_bias": True}
IDS = ["+".join(switches) for switches in SETS]


@pytest.mark.parametrize("switches", SETS, ids=IDS)
@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_the_files_mean_to_the_formulas_what_the_module_meant(
    tmp_path: Path, deep: Target, layout: str, switches: dict[str, bool]
) -> None:
    drafter = eagle3(deep.ends, DRAFT_IDS, **switches)
    write(drafter, tmp_path, layout, deep.ends)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert {name: fields.get(name, False) for name in SWITCHES} == dict.fromkeys(SWITCHES, False) | switches
    first, second = our_logits(deep, drafter, 2)
    torch.testing.assert_close(first, logits_of_files(tmp_path, deep), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second[4], second_step_of_files(tmp_path, deep, 4), rtol=1e-4, atol=1e-4)
    reread = load_any(tmp_path, deep.ends)
    before, after = tensors_of(drafter), tensors_of(reread)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(our_logits(deep, reread, 2), our_logits(deep, drafter, 2))


@pytest.mark.parametrize("switches", SETS, ids=IDS)
def test_every_switch_changes_the_second_step(deep: Target, switches: dict[str, bool]) -> None:
    plain, switched = (our_logits(deep, eagle3(deep.ends, **chosen), 2)[1] for chosen in ({}, switches))
    assert (plain - switched).abs().max() > 0.1


@pytest.mark.parametrize("switches", [*SETS, BIASES], ids=[*IDS, "biases"])
@torch.no_grad()
def test_decoding_computes_what_training_computes(deep: Target, switches: dict[str, bool]) -> None:
    drafter = eagle3(deep.ends, **switches)
    ids = torch.tensor([1, 5, 6, 20, 21, 22, 23, 24, 5, 60])
    states = deep.prefix(ids[None], layers=drafter.features)
    batch = PackedBatch(
        input_ids=ids,
        loss_mask=torch.ones(len(ids), dtype=torch.bool),
        document_ids=torch.zeros(len(ids), dtype=torch.int64),
        positions=torch.arange(len(ids)),
        hidden={name: states.feature(name)[0].clone() for name in drafter.features},
    )
    trained, served = trained_logits(drafter, batch, [2, 5], 3), served_logits(drafter, batch, [2, 5], 3)
    torch.testing.assert_close(served, trained, rtol=1e-4, atol=1e-4)
    in_tree, in_chain = tree_and_chain_logits(drafter, batch, 5)
    torch.testing.assert_close(in_tree, in_chain, rtol=1e-4, atol=1e-4)


def test_a_drafter_with_switches_stays_lossless(deep: Target) -> None:
    drafter = eagle3(deep.ends, **SETS[-1])
    settings = GenerationSettings(max_new_tokens=12)
    prompts = [[1, 5, 6, 20], [1, 7]]
    plain = [reply.token_ids for reply in Engine(deep).generate(prompts, settings)]
    drafted = Engine(deep, drafter, DraftLimits(3, 3, node_budget=6)).generate(prompts, settings)
    assert [reply.token_ids for reply in drafted] == plain


def test_layouts_that_cannot_hold_a_switch_say_so(tmp_path: Path, deep: Target) -> None:
    drafter = eagle3(deep.ends, norm_before_residual=True)
    [note] = write(drafter, tmp_path, "eagle3", deep.ends)
    assert "vLLM computes that; SGLang and the official code do not" in note
    with pytest.raises(ValueError, match="has norm_before_residual, which TensorRT-LLM does not read"):
        write(drafter, tmp_path, "tensorrt-llm", deep.ends)


def test_switches_among_the_engines_own_settings_count(tmp_path: Path, deep: Target) -> None:
    write(eagle3(deep.ends, norm_output=True), tmp_path, "eagle3", deep.ends)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["norm_output"]
    (tmp_path / "config.json").write_text(json.dumps(fields | {"eagle_config": {"norm_output": True}}))
    assert load_any(tmp_path, deep.ends).config.norm_output
    (tmp_path / "config.json").write_text(json.dumps(fields | {"eagle_config": {"norm_output": "true"}}))
    with pytest.raises(ValueError, match="eagle_config: norm_output is 'true', it must be true or false"):
        load_any(tmp_path, deep.ends)


def test_an_earlier_config_has_all_switches_off() -> None:
    fields = {"hidden_size": 4, "vocab_size": 9, "layers": ["layer.0.output"]}
    assert Eagle3Config(**fields).switches == dict.fromkeys(SWITCHES, False)
