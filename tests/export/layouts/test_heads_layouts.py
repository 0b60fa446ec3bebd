"""Draft heads in Medusa's and the MLP speculator's layouts: a forward from the files alone, round trips, and what cannot be held."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from every_family import batch_of
from heads import deep_target
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from draftsmith.evaluate.doctor.serving import trained_logits
from draftsmith.export.layouts.layouts import load_any, write
from draftsmith.export.layouts.readback import tensors_of
from draftsmith.models import Target
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.families.heads import HeadsDrafter, HeadsFamily
from draftsmith.models.target.target import PRE_NORM

STEPS, ROOT = 3, 9
DRAFT_IDS = torch.tensor([0, 3, 9, 10, 40, 63])
MEDUSA: dict[str, dict[str, Any]] = {
    "its own heads": {"head": "per_step", "num_blocks": 2},
    "the target's head and differences": {"rank": 4},
    "a shared head": {"head": "shared"},
}
MLP: dict[str, dict[str, Any]] = {
    "tied": {"inner_size": 24, "scale_input": True},
    "not tied": {"inner_size": 24, "tied": False},
    "tied but for its heads": {"inner_size": 24, "rank": 3},
    "one step": {"inner_size": 24},
}


@pytest.fixture(scope="module")
def target() -> Target:
    return deep_target()


def made(target: Target, ids: Tensor | None = None, num_steps: int = STEPS, **settings: Any) -> HeadsDrafter:
    """Random everywhere."""
    drafter = HeadsFamily(**settings).build(target.ends, ids, num_steps, "")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return drafter.eval()


def state_and_tokens(target: Target, drafter: HeadsDrafter) -> tuple[Tensor, list[int]]:
    """The target's normed state before ROOT, and the tokens from ROOT on."""
    batch = batch_of(target, drafter)
    return target.ends.final_norm(batch.hidden[PRE_NORM][ROOT - 1]), batch.input_ids[ROOT:].tolist()


def ours(target: Target, drafter: HeadsDrafter) -> Tensor:
    """[K, Vd]."""
    with torch.no_grad():
        return trained_logits(drafter, batch_of(target, drafter), [ROOT], drafter.config.num_draft_steps)[0]


def fields_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = fields_of(folder)
    change(fields)
    (folder / "config.json").write_text(json.dumps(fields))


def medusa_of_files(folder: Path, h: Tensor) -> Tensor:
    """[K, Vd]: W_k of h + SiLU(A h + a), once or more (arXiv:2401.10774, section 2.1.1)."""
    fields, w = fields_of(folder), load_file(folder / "model.safetensors")
    logits = []
    for head in range(fields["medusa_num_heads"]):
        x = h
        for block in range(fields["medusa_num_layers"]):
            x = x + F.silu(w[f"{head}.{block}.linear.weight"] @ x + w[f"{head}.{block}.linear.bias"])
        logits.append(w[f"{head}.{fields['medusa_num_layers']}.weight"] @ x)
    return torch.stack(logits)


def mlp_of_files(folder: Path, h: Tensor, tokens: list[int]) -> Tensor:
    """[K, V]: the MLP speculator's forward (arXiv:2404.19124, section 3)."""
    fields, w = fields_of(folder), load_file(folder / "model.safetensors")

    def rms(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean() + 1e-6)

    steps, logits = fields["n_predict"], []
    state = rms(h) / 2**0.5 if fields["scale_input"] else h
    state_weight = 0.5 ** (0.5 / steps)
    token_weight = ((1 - state_weight**2) * (fields["inner_dim"] / 2)) ** 0.5
    for step in range(steps):
        part = {
            name: w.get(f"speculator.{name}.{step}.weight", torch.zeros(())) for name in ("emb", "proj", "ln", "head")
        }
        mixed = part["proj"] @ state + part["emb"][tokens[step]] * (token_weight / state_weight)
        state = F.gelu(rms(mixed) * part["ln"] + w[f"speculator.ln.{step}.bias"])
        logits.append(part["head"] @ state)
    return torch.stack(logits)


@pytest.mark.parametrize("ids", [None, DRAFT_IDS], ids=["", "6 tokens"])
@pytest.mark.parametrize("name", MEDUSA)
def test_a_medusa_from_the_files_alone_has_our_logits(
    target: Target, tmp_path: Path, name: str, ids: Tensor | None
) -> None:
    drafter = made(target, ids, **MEDUSA[name])
    write(drafter, tmp_path, "medusa", target.ends)
    logits, again = ours(target, drafter), load_any(tmp_path, target.ends)
    assert isinstance(again, HeadsDrafter)
    torch.testing.assert_close(medusa_of_files(tmp_path, state_and_tokens(target, drafter)[0]), logits)
    torch.testing.assert_close(ours(target, again), logits)
    assert torch.equal(again.draft_ids(), drafter.draft_ids())


def test_a_medusas_card_says_that_vllm_stops_at_a_draft_vocabulary(target: Target, tmp_path: Path) -> None:
    for number, ids in enumerate((None, DRAFT_IDS)):
        (tmp_path / str(number)).mkdir()
        notes = write(made(target, ids, head="per_step"), tmp_path / str(number), "medusa", target.ends)
        assert any("vLLM 0.32 stops with an error" in note for note in notes) == (ids is not None)


@pytest.mark.parametrize("name", MLP)
def test_an_mlp_speculator_from_the_files_alone_has_our_logits(target: Target, tmp_path: Path, name: str) -> None:
    drafter = made(target, None, 1 if name == "one step" else STEPS, network="mlp", **MLP[name])
    write(drafter, tmp_path, "mlp_speculator", target.ends)
    logits, again = ours(target, drafter), load_any(tmp_path, target.ends)
    assert isinstance(again, HeadsDrafter)
    torch.testing.assert_close(mlp_of_files(tmp_path, *state_and_tokens(target, drafter)), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(target, again), logits, rtol=1e-4, atol=1e-4)
    if name in ("tied", "not tied"):
        before, after = tensors_of(drafter), tensors_of(again)
        assert all(torch.equal(before[each], after[each]) for each in before | after)


def test_medusas_config_avoids_what_vllm_misreads(target: Target, tmp_path: Path) -> None:
    [note] = write(made(target, head="per_step"), tmp_path, "medusa", target.ends)
    assert "medusa_lm_head.pt" in note
    fields = fields_of(tmp_path)
    assert (fields["medusa_fc_bias"], fields["hidden_size"], fields["vocab_size"]) == (True, 32, 64)
    assert [name for name in fields if "num" in name] == ["medusa_num_heads", "medusa_num_layers"]


def test_what_medusas_training_wrote_is_read(target: Target, tmp_path: Path) -> None:
    drafter = made(target, head="per_step")
    write(drafter, tmp_path, "medusa", target.ends)
    (tmp_path / "model.safetensors").rename(tmp_path / "medusa_lm_head.safetensors")
    official = {"medusa_num_heads": STEPS, "medusa_num_layers": 1, "base_model_name_or_path": "org/name"}
    (tmp_path / "config.json").write_text(json.dumps(official))
    again = load_drafter(tmp_path, target=TargetBond(target.ends))
    torch.testing.assert_close(ours(target, again), ours(target, drafter))  # type: ignore[arg-type]


def test_heads_that_a_config_of_medusa_does_not_count_are_read_and_named(target: Target, tmp_path: Path) -> None:
    drafter = made(target, head="per_step")
    write(drafter, tmp_path, "medusa", target.ends)
    rewritten(tmp_path, lambda fields: fields.update(medusa_num_heads=STEPS - 1))
    with pytest.warns(UserWarning, match=r"names 2 heads, and the weights hold 3: all of them are read"):
        again = load_any(tmp_path, target.ends)
    torch.testing.assert_close(ours(target, again), ours(target, drafter))  # type: ignore[arg-type]


def test_fields_of_an_mlp_speculator_that_are_null_have_their_defaults(target: Target, tmp_path: Path) -> None:
    drafter = made(target, network="mlp", tied=False)
    write(drafter, tmp_path, "mlp_speculator", target.ends)
    rewritten(tmp_path, lambda fields: fields.update(tie_weights=None, scale_input=None, inner_dim=None))
    again = load_any(tmp_path, target.ends)
    torch.testing.assert_close(ours(target, again), ours(target, drafter))  # type: ignore[arg-type]
    rewritten(tmp_path, lambda fields: fields.update(emb_dim=None))
    with pytest.raises(ValueError, match="lacks emb_dim"):
        load_any(tmp_path, target.ends)


def test_heads_that_were_cut_out_of_a_whole_medusa_are_read(target: Target, tmp_path: Path) -> None:
    drafter = made(target, head="per_step")
    write(drafter, tmp_path, "medusa", target.ends)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"medusa_head.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    again = load_any(tmp_path, target.ends)
    torch.testing.assert_close(ours(target, again), ours(target, drafter))  # type: ignore[arg-type]


def test_vllms_own_names_of_medusa_are_read_and_its_lost_biases_are_zero(target: Target, tmp_path: Path) -> None:
    drafter = made(target, head="per_step")
    write(drafter, tmp_path, "medusa", target.ends)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {
        **{f"blocks.{h}.layers.0.weight": tensors[f"{h}.0.linear.weight"] for h in range(STEPS)},
        **{f"lm_heads.{h}.weight": tensors[f"{h}.1.weight"] for h in range(STEPS)},
    }
    save_file(renamed, tmp_path / "model.safetensors")
    rewritten(tmp_path, lambda fields: fields.pop("medusa_fc_bias"))
    again = load_any(tmp_path, target.ends)
    biases = [tensor for name, tensor in again.state_dict().items() if name.endswith("bias")]
    assert len(biases) == STEPS
    assert not any(bias.any() for bias in biases)
    assert torch.equal(again.step_weight(2), drafter.step_weight(2))


@pytest.mark.parametrize(
    ("layout", "settings", "ids", "message"),
    [
        ("medusa", {"network": "hydra"}, None, "network is 'hydra', and Medusa's layout holds only 'medusa'"),
        ("mlp_speculator", {}, None, "network is 'medusa', and the MLP speculator's layout holds only 'mlp'"),
        ("mlp_speculator", {"network": "mlp"}, DRAFT_IDS, "a draft vocabulary of 6 of 64 tokens"),
        ("medusa", {"prefix_layer": True}, None, "has a prefix_layer, which Medusa's layout does not hold"),
        ("mlp_speculator", {"network": "mlp", "prefix_layer": True}, None, "has a prefix_layer"),
    ],
)
def test_what_a_layout_cannot_hold_is_an_error(
    target: Target, tmp_path: Path, layout: str, settings: dict[str, Any], ids: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(made(target, ids, **settings), tmp_path, layout, target.ends)


def test_heads_of_the_target_are_written_out_with_the_target_only(target: Target, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="scores with the target's head, which Medusa's layout holds for each step; add"
    ):
        write(made(target), tmp_path, "medusa")


@pytest.mark.parametrize(
    ("layout", "field", "value", "message"),
    [
        ("medusa", "medusa_num_heads", "3", "medusa_num_heads is '3', it must be a whole number"),
        ("medusa", "medusa_num_heads", None, "it needs medusa_num_heads"),
        ("medusa", "medusa_num_heads", 4, r"3\.1\.weight is missing"),
        ("medusa", "original_lm_head", True, "has original_lm_head, one head for all steps"),
        ("mlp_speculator", "n_predict", None, "lacks n_predict"),
        ("mlp_speculator", "tie_weights", True, "has tie_weights true, but speculator.emb.0.weight differs"),
        ("mlp_speculator", "inner_dim", 23, r"speculator\.emb\.0\.weight is float32 \[64, 24\], not float \[64, 23\]"),
    ],
)
def test_a_folder_that_is_not_whole_is_an_error(
    target: Target, tmp_path: Path, layout: str, field: str, value: object, message: str
) -> None:
    settings = {"head": "per_step"} if layout == "medusa" else {"network": "mlp", "inner_size": 24, "tied": False}
    write(made(target, **settings), tmp_path, layout, target.ends)
    rewritten(tmp_path, lambda fields: fields.update({field: value}) if value is not None else fields.pop(field))
    with pytest.raises(ValueError, match=message):
        load_any(tmp_path, target.ends)


def test_a_tensor_that_is_there_with_and_without_the_prefix_is_refused(target: Target, tmp_path: Path) -> None:
    write(made(target, network="mlp", inner_size=24, tied=False), tmp_path, "mlp_speculator", target.ends)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"emb.0.weight": torch.zeros_like(tensors["speculator.emb.0.weight"])}, file)
    with pytest.raises(ValueError, match=r"holds speculator\.emb\.0\.weight twice"):
        load_any(tmp_path, target.ends)
