import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from draftsmith import provenance
from draftsmith.export.layouts.layouts import load_any, write
from draftsmith.export.layouts.readback import probe_logits
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.drafter_reader import module_table
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.families.redrafter import ReDrafter, ReDrafterConfig
from draftsmith.models.target.target import Target, TargetEnds

APPLE_CONFIG_KEYS = {
    "model_type",
    "vocab_size",
    "hidden_size",
    "exit_dim",
    "num_draft_layers",
    "num_lookback_tokens",
    "rnn",
}


@pytest.fixture(scope="module")
def ends() -> TargetEnds:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return Target.from_model(LlamaForCausalLM(config), name="tiny").ends


def shake(drafter: ReDrafter) -> ReDrafter:
    """Random weights everywhere, biases included, so that no test passes by zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return drafter.eval()


def make(
    ends: TargetEnds, exit_dim: int = 32, rnn: bool = True, layers: int = 2, draft_ids: Tensor | None = None
) -> ReDrafter:
    return shake(
        ReDrafter.for_target(
            ends, exit_dim=exit_dim, rnn=rnn, num_draft_layers=layers, draft_token_ids=draft_ids, head_init="random"
        )
    )


@pytest.mark.parametrize(("exit_dim", "rnn", "layers"), [(32, True, 2), (16, True, 1), (24, False, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_layout_gives_the_same_logits_back(
    tmp_path: Path, ends: TargetEnds, exit_dim: int, rnn: bool, layers: int, dtype: torch.dtype
) -> None:
    drafter = make(ends, exit_dim, rnn, layers).to(dtype)
    write(drafter, tmp_path, "draftsmith")
    reread = load_any(tmp_path)
    assert reread.dtype == dtype
    assert torch.equal(probe_logits(reread), probe_logits(drafter))
    assert reread.config.target_fingerprint == ends.fingerprint
    reread.attach(ends)


def test_a_draft_vocabulary_survives_in_our_layout(tmp_path: Path, ends: TargetEnds) -> None:
    write(make(ends, draft_ids=torch.tensor([0, 3, 9, 40, 63])), tmp_path, "draftsmith")
    assert load_any(tmp_path).draft_ids().tolist() == [0, 3, 9, 40, 63]


def test_what_save_pretrained_wrote_loads_with_the_same_logits(tmp_path: Path, ends: TargetEnds) -> None:
    drafter = make(ends, draft_ids=torch.arange(3, 40))
    drafter.save_pretrained(tmp_path)
    assert torch.equal(probe_logits(load_any(tmp_path)), probe_logits(drafter))


def test_what_we_write_loads_with_from_pretrained(tmp_path: Path, ends: TargetEnds) -> None:
    drafter = make(ends, draft_ids=torch.arange(3, 40))
    write(drafter, tmp_path, "draftsmith")
    assert torch.equal(probe_logits(ReDrafter.from_pretrained(tmp_path)), probe_logits(drafter))


def apple_logits(tensors: dict[str, Tensor], fields: dict, context: Tensor, embedded: list[Tensor]) -> list[Tensor]:
    """Apple's forward from its description (arXiv:2403.09919 section 3.1), on nothing but the file's tensors."""
    state, logits = torch.zeros_like(context), []
    for token in embedded:
        if fields["rnn"]:
            inner = token @ tensors["rnn_w.weight"].T + state @ tensors["rnn_u.weight"].T + tensors["rnn_u.bias"]
            state = inner * torch.sigmoid(inner)
        else:
            state = state + token
        x = torch.cat([context, state], dim=-1)
        if fields["exit_dim"] != 2 * fields["hidden_size"]:
            x = x @ tensors["input_proj.weight"].T + tensors["input_proj.bias"]
        for block in range(fields["num_draft_layers"]):
            inner = x @ tensors[f"lm_head.{block}.linear.weight"].T + tensors[f"lm_head.{block}.linear.bias"]
            x = x + inner * torch.sigmoid(inner)
        logits.append(x @ tensors[f"lm_head.{fields['num_draft_layers']}.weight"].T)
    return logits


@pytest.mark.parametrize(("exit_dim", "rnn", "layers"), [(32, True, 2), (16, True, 1), (32, False, 2)])
def test_apples_layout_means_to_apples_formula_what_the_drafter_meant(
    tmp_path: Path, ends: TargetEnds, exit_dim: int, rnn: bool, layers: int
) -> None:
    drafter = make(ends, exit_dim, rnn, layers)
    write(drafter, tmp_path, "apple")
    fields = json.loads((tmp_path / "config.json").read_text())
    assert set(fields) == APPLE_CONFIG_KEYS
    context, ids = torch.randn(3, 16), torch.randint(64, (2, 3))
    embedded = [ends.embed(step) for step in ids]
    expected = apple_logits(load_file(tmp_path / "model.safetensors"), fields, context, embedded)
    state = torch.zeros_like(context)
    for token, wanted in zip(embedded, expected, strict=True):
        state = drafter._recur(state, token)
        torch.testing.assert_close(drafter.step_logits(context, state), wanted, rtol=1e-4, atol=1e-5)


def test_apples_layout_goes_both_ways_bit_for_bit(tmp_path: Path, ends: TargetEnds) -> None:
    write(make(ends), tmp_path, "apple")
    first = (tmp_path / "model.safetensors").read_bytes()
    imported = load_any(tmp_path, ends, tokenizer_fingerprint="abc")
    assert (imported.config.target_name, imported.config.target_fingerprint) == ("tiny", ends.fingerprint)
    assert imported.config.tokenizer_fingerprint == "abc"
    (tmp_path / "again").mkdir()
    write(imported, tmp_path / "again", "apple")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == first


def test_apples_layout_takes_a_drafter_trained_for_another_number_of_steps(tmp_path: Path, ends: TargetEnds) -> None:
    drafter = make(ends)
    drafter.config.num_draft_steps = 3
    write(drafter, tmp_path, "apple")
    assert torch.equal(probe_logits(load_any(tmp_path, ends)), probe_logits(drafter))


def test_a_drafter_written_by_apples_names_alone_is_read(tmp_path: Path, ends: TargetEnds) -> None:
    tensors = {
        "lm_head.0.linear.weight": torch.randn(32, 32),
        "lm_head.0.linear.bias": torch.randn(32),
        "lm_head.1.linear.weight": torch.randn(32, 32),
        "lm_head.1.linear.bias": torch.randn(32),
        "lm_head.2.weight": torch.randn(64, 32),
        "rnn_u.weight": torch.randn(16, 16),
        "rnn_u.bias": torch.randn(16),
        "rnn_w.weight": torch.randn(16, 16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    fields = {"vocab_size": 64, "hidden_size": 16, "exit_dim": 32, "num_draft_layers": 2, "rnn": True}
    extra = {"model_type": "recurrent_drafting_drafter", "num_lookback_tokens": -1, "transformers_version": "4.38.2"}
    (tmp_path / "config.json").write_text(json.dumps(fields | extra))
    assert set(module_table(ReDrafter, load_any(tmp_path, ends).config).specs) == set(tensors)


def test_a_draft_vocabulary_cannot_go_into_apples_layout(tmp_path: Path, ends: TargetEnds) -> None:
    with pytest.raises(ValueError, match="draft vocabulary of 5 of 64 tokens, which Apple's layout cannot express"):
        write(make(ends, draft_ids=torch.tensor([0, 3, 9, 40, 63])), tmp_path, "apple")


def test_apples_layout_for_a_target_of_another_size_is_refused(tmp_path: Path, ends: TargetEnds) -> None:
    config = ReDrafterConfig(hidden_size=8, vocab_size=64, exit_dim=16)
    write(shake(ReDrafter(config)), tmp_path, "apple")
    with pytest.raises(ValueError, match="expects hidden size 8"):
        load_any(tmp_path, ends)


def test_apples_layout_is_not_taken_for_ours(tmp_path: Path, ends: TargetEnds) -> None:
    write(make(ends), tmp_path, "apple")
    with pytest.raises(ValueError, match="Apple's layout, which names no target"):
        load_any(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("rnn_w.weight"), "rnn_w.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "extra is unknown"),
        (lambda t: t.update({"rnn_u.bias": torch.zeros(17)}), r"rnn_u.bias is float32 \[17\], not float \[16\]"),
        (lambda t: t.update({"rnn_u.bias": torch.zeros(16, dtype=torch.int64)}), "rnn_u.bias is int64"),
        (lambda t: t["rnn_u.bias"].fill_(float("nan")), "rnn_u.bias holds NaN or infinity"),
        (lambda t: t["d2t"].fill_(-1), "d2t does not map to increasing token ids below 64"),
        (lambda t: t["d2t"].fill_(40), "d2t does not map to increasing token ids below 64"),
        (lambda t: t.update(d2t=t["d2t"].int()), r"d2t is int32 \[30\], not int64 \[30\]"),
    ],
)
def test_a_checkpoint_that_breaks_the_table_is_refused(tmp_path: Path, ends: TargetEnds, change, message: str) -> None:
    write(make(ends, draft_ids=torch.arange(30)), tmp_path, "draftsmith")
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_any(tmp_path)


def test_weights_that_diverged_in_training_are_not_written(tmp_path: Path, ends: TargetEnds) -> None:
    drafter = make(ends)
    with torch.no_grad():
        drafter.rnn_u.bias[3] = float("inf")
    with pytest.raises(
        ValueError, match=r"the drafter in memory is not a whole ReDrafter.*rnn_u.bias holds NaN or infinity"
    ):
        write(drafter, tmp_path, "draftsmith")


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path: Path, ends: TargetEnds, name: str) -> None:
    write(make(ends), tmp_path, "draftsmith")
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} but no model.safetensors.*weights_only=True"):
        load_any(tmp_path)


def test_a_cut_off_file_is_refused(tmp_path: Path, ends: TargetEnds) -> None:
    write(make(ends), tmp_path, "draftsmith")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cut off or no safetensors file"):
        load_any(tmp_path)


def test_another_family_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config.json"):
        load_any(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a JSON object but list"):
        load_any(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no drafter that is known here \(model_type 'llama'\)"):
        load_any(tmp_path)


def test_apples_folder_that_was_exported_for_another_target_of_the_same_sizes_is_refused(
    tmp_path: Path, ends: TargetEnds
) -> None:
    write(make(ends), tmp_path, "apple")
    assert load_drafter(tmp_path, target=TargetBond(ends)).config.target_fingerprint == ends.fingerprint
    provenance.write(tmp_path, {"config": {"target_name": "other", "target_fingerprint": "0" * 64}})
    with pytest.raises(ValueError, match="was exported for target 'other'"):
        load_drafter(tmp_path, target=TargetBond(ends))
