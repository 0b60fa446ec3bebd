"""MTP heads: read from targets' folders as the report's equations have them, drafted with, written back, and errors where they differ."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from doubles import random_model
from every_family import batch_of
from mtp_targets import LINES, mtp_tensors, report_logits, save_glm_with_mtp, save_target_with_mtp, target_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.evaluate.doctor.serving import served_logits, trained_logits
from draftsmith.evaluate.doctor.tree_serving import tree_and_chain_logits
from draftsmith.export.layouts.heads import mtp
from draftsmith.export.layouts.layouts import load_any, write
from draftsmith.models import (
    PRE_NORM,
    Drafter,
    DraftLimits,
    LMDrafter,
    MtpHead,
    SampledChildren,
    Target,
    TargetEnds,
)
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.families.riders.mtp import MtpFamily
from draftsmith.models.files.fingerprint import checkpoint_fingerprint

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
}  # fmt: skip
STEPS, ROOTS = 3, [2, 7, 15]
every_line = pytest.mark.parametrize("line", LINES)


def read(line: str, ends: TargetEnds, tensors: dict[str, Tensor] | None = None) -> MtpHead:
    drafter = mtp.read({}, mtp_tensors(line) if tensors is None else tensors, ends, "the folder")
    drafter.attach(ends)
    return drafter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a target with its MTP layer."""
    return save_target_with_mtp(tmp_path_factory.mktemp("with_mtp"))


@every_line
def test_every_step_is_that_of_the_reports_equations(line: str) -> None:
    target = target_of(line)
    drafter = read(line, target.ends)
    batch = batch_of(target, drafter)
    trained = trained_logits(drafter, batch, ROOTS, STEPS)
    for number, root in enumerate(ROOTS):
        expected = report_logits(line, target, batch.input_ids.tolist(), root - 1, STEPS)
        torch.testing.assert_close(trained[number], expected, rtol=1e-4, atol=1e-4)


@every_line
def test_decoding_has_the_logits_of_training_and_a_tree_those_of_its_chains(line: str) -> None:
    target = target_of(line)
    drafter = read(line, target.ends)
    batch = batch_of(target, drafter)
    trained = trained_logits(drafter, batch, ROOTS, STEPS)
    torch.testing.assert_close(served_logits(drafter, batch, ROOTS, STEPS), trained, rtol=1e-4, atol=1e-4)
    in_tree, in_chain = tree_and_chain_logits(drafter, batch, 7)
    torch.testing.assert_close(in_tree, in_chain, rtol=1e-4, atol=1e-4)


def test_a_target_is_its_own_drafter_and_the_tokens_stay_its_own(folder: Path) -> None:
    target = Target.load(str(folder))
    drafter = load_drafter(folder, target=TargetBond(target.ends))
    assert isinstance(drafter, MtpHead)
    assert drafter.config.target_fingerprint == target.fingerprint
    prompts = [[1, 5, 9], [1, 7, 7, 30, 2], [3]]
    for limits, temperature in (
        (DraftLimits(1, 2), 0.0),
        (DraftLimits(3, STEPS, node_budget=7), 0.0),
        (DraftLimits(2, STEPS), 1.0),
    ):
        settings = GenerationSettings(max_new_tokens=8, temperature=temperature)
        plain = Engine(target).generate(prompts, settings)
        drafted = Engine(target, drafter, limits).generate(prompts, settings)
        assert [reply.token_ids for reply in drafted] == [reply.token_ids for reply in plain]
    sampled = DraftLimits(sampled=SampledChildren((2, 1)))
    assert len(Engine(target, drafter, sampled).generate(prompts, settings)) == len(prompts)


def test_a_layer_under_the_number_behind_the_trunks_is_found(tmp_path: Path) -> None:
    ends = TargetEnds.load(str(save_glm_with_mtp(tmp_path)))
    drafter = load_drafter(tmp_path, target=TargetBond(ends))
    assert isinstance(drafter, MtpHead)
    assert torch.equal(drafter.eh_proj.weight, mtp_tensors("DeepSeek's")["model.layers.2.eh_proj.weight"])


def test_without_its_target_such_a_folder_is_a_draft_lm(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(load_drafter(folder), LMDrafter)
    assert not caplog.records
    other = target_of("MiMo's").ends
    assert checkpoint_fingerprint(folder) != other.fingerprint
    assert isinstance(load_drafter(folder, target=TargetBond(other)), LMDrafter)
    assert len([record for record in caplog.records if "drafts as a draft LM" in record.message]) == 1


@pytest.mark.parametrize("suffix", ["qweight", "weight_packed", "weight.absmax"])
@every_line
def test_a_quantised_projection_is_refused_by_name(line: str, suffix: str) -> None:
    tensors = mtp_tensors(line)
    name = LINES[line].names[2]
    tensors[f"{name.removesuffix('.weight')}.{suffix}"] = tensors.pop(name)
    with pytest.raises(ValueError, match=rf"quantised weights .*{suffix}"):
        read(line, target_of(line).ends, tensors)


@every_line
def test_a_target_loads_with_a_layer_that_its_class_does_not_know(line: str, tmp_path: Path) -> None:
    random_model(transformers.LlamaConfig(**SMALL)).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    save_file(whole | mtp_tensors(line), path, {"format": "pt"})
    Target.load(str(tmp_path))
    save_file(whole | mtp_tensors(line) | {"stray.weight": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"unexpected keys: stray\.weight\)"):
        Target.load(str(tmp_path))


@every_line
def test_what_is_written_for_a_target_has_the_tensors_that_its_checkpoint_had(line: str, tmp_path: Path) -> None:
    ends = target_of(line).ends
    drafter = read(line, ends)
    notes = write(drafter, tmp_path, "mtp", ends)
    written, before = load_file(tmp_path / "model.safetensors"), mtp_tensors(line)
    assert written.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in written.items())
    assert line in notes[0]
    again = load_any(tmp_path, ends)
    assert isinstance(again, MtpHead)
    assert {name: getattr(again.config, name) for name in mtp.MtpConfig.rules} == {
        name: getattr(drafter.config, name) for name in mtp.MtpConfig.rules
    }


@every_line
def test_our_own_layout_holds_every_switch(line: str, tmp_path: Path) -> None:
    ends = target_of(line).ends
    drafter: Drafter = read(line, ends)
    write(drafter, tmp_path, "draftsmith", ends)
    again = load_drafter(tmp_path)
    assert type(again) is MtpHead
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in drafter.state_dict().items())


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def with_tensor(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        ("DeepSeek's", with_tensor("model.layers.2.mlp.experts.0.up_proj.weight", 4, 32), "n_routed_experts"),
        ("DeepSeek's", with_tensor("model.layers.2.mlp.gate.weight", 4, 32), r"mlp\.gate\.weight"),
        ("DeepSeek's", with_tensor("model.layers.2.self_attn.kv_a_proj_with_mqa.weight", 8, 32), "kv_lora_rank"),
        ("DeepSeek's", with_tensor("model.layers.2.eh_proj.weight_scale_inv", 1, 1), "quantization_config"),
        ("DeepSeek's", with_tensor("model.layers.3.eh_proj.weight", 32, 64), "several MTP layers"),
        ("Qwen's", with_tensor("mtp.layers.1.mlp.up_proj.weight", 48, 32), "mtp_num_hidden_layers"),
        ("Qwen's", with_tensor("mtp.layers.0.mlp.experts.gate_up_proj", 2, 4, 32), "num_experts"),
        ("MiMo's", with_tensor("model.mtp_layers.0.self_attn.q_a_proj.weight", 8, 32), "q_lora_rank"),
        ("MiMo's", with_tensor("model.mtp_layers.0.sinks", 4), "sinks is unknown"),
        ("MiMo's", without("model.mtp_layers.0.final_layernorm.weight"), r"norm\.weight is missing"),
        ("DeepSeek's", with_tensor("model.layers.2.shared_head.head.weight", 61, 32), "shares the target's"),
        ("DeepSeek's", with_tensor("model.layers.2.embed_tokens.weight", 61, 32), "shares the target's"),
    ],
)
def test_a_layer_of_another_kind_is_refused_by_name(
    line: str, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = mtp_tensors(line)
    change(tensors)
    with pytest.raises(ValueError, match=message):
        read(line, target_of(line).ends, tensors)


def test_copies_of_the_targets_ends_are_passed_over() -> None:
    ends = target_of("DeepSeek's").ends
    copies = {"embed_tokens.weight": ends.embedding.weight, "shared_head.head.weight": ends.head_weight}
    tensors = mtp_tensors("DeepSeek's") | {f"model.layers.2.{name}": copy.clone() for name, copy in copies.items()}
    own = read("DeepSeek's", ends).state_dict()
    again = read("DeepSeek's", ends, tensors).state_dict()
    assert again.keys() == own.keys()


def test_a_copy_in_more_digits_than_the_target_was_loaded_in_is_passed_over() -> None:
    config = LINES["DeepSeek's"].config()
    precise = random_model(config)
    embedding = precise.get_input_embeddings().weight.detach().clone()
    ends = Target.from_model(precise.to(torch.bfloat16), name="rounded").ends
    assert not torch.equal(ends.embedding.weight.float(), embedding)
    name = "model.layers.2.embed_tokens.weight"
    read("DeepSeek's", ends, mtp_tensors("DeepSeek's") | {name: embedding})
    with pytest.raises(ValueError, match="shares the target's"):
        read("DeepSeek's", ends, mtp_tensors("DeepSeek's") | {name: embedding * 1.1})


@torch.no_grad()
@pytest.mark.parametrize("state_first", [False, True])
def test_a_new_layer_begins_with_the_tokens_of_the_target_at_a_width_of_real_targets(state_first: bool) -> None:
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=8, pad_token_id=0
    )  # fmt: skip
    target = Target.from_model(random_model(config), name="wide")
    drafter = MtpFamily(state_first=state_first).build(target.ends, None, 1, "").eval()
    batch = batch_of(target, drafter)
    places = torch.arange(1, len(batch.input_ids) - 1)
    ours = trained_logits(drafter, batch, (places + 1).tolist(), 1)[:, 0]
    states = target.ends.final_norm(batch.hidden[PRE_NORM][places])
    assert torch.equal(ours.argmax(-1), target.ends.logits(states).argmax(-1))


def test_what_no_checkpoint_can_say_is_refused(tmp_path: Path) -> None:
    ends = target_of("MiMo's").ends
    for family, message in (
        (MtpFamily(state_first=True), "feeds_normed False"),
        (MtpFamily(sliding_window=8), "sliding"),
    ):
        drafter = family.build(ends, None, STEPS, "")
        with pytest.raises(ValueError, match=message):
            write(drafter, tmp_path, "mtp", ends)
    with pytest.raises(ValueError, match="--target"):
        write(drafter, tmp_path, "mtp", None)
