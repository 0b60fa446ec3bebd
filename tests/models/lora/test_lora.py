"""LoRA on drafters: every linear layer is adapted wherever its weight is used, and a folder of another drafter is an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from doubles import BOS, first_cycle, opening, random_target
from every_family import EVERY_FAMILY, batch_of
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith.models import Drafter, DraftLimits, ReDrafter, Target, TargetEnds, data_rollout
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.files.fingerprint import module_fingerprint
from draftsmith.models.lora.adapted_drafter import adapted
from draftsmith.models.lora.lora_adapter import (
    AdapterBond,
    LoraSettings,
    activate,
    adapted_layers,
    add_adapter,
    linear_layers,
    load_adapter,
    merge_adapter,
    save_adapter,
)

NUM_STEPS = 3
DRAFT_IDS = torch.arange(3, 43)


@pytest.fixture(scope="module")
def target() -> Target:
    return random_target()


def wide(ends: TargetEnds) -> Drafter:
    """A drafter with the projection that is there where its head is wider than the target's states."""
    return ReDrafter.for_target(ends, exit_dim=64, head_init="random")


MAKERS: dict[str, Callable[[TargetEnds], Drafter]] = {
    **{
        family.name: lambda ends, family=family: family.settings().build(ends, DRAFT_IDS, NUM_STEPS, "")
        for family in EVERY_FAMILY
    },
    "wide": wide,
}


def make(name: str, target: Target) -> Drafter:
    """A drafter of random weights: of a family with its usual settings, or the wide one. A matrix that begins at zero would hide others."""
    torch.manual_seed(5)
    drafter = MAKERS[name](target.ends).eval()
    with torch.no_grad():
        for weight in drafter.parameters():
            if not weight.any():
                weight.normal_(std=0.1)
    return drafter


def shake(drafter: Drafter, seed: int = 7) -> None:
    """Turns a fresh adapter, which changes nothing, into one that changes much."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def in_training(drafter: Drafter, target: Target) -> Tensor:
    """Logits [K, A, Vd] of the teacher-forced run over a fixed text."""
    batch = batch_of(target, drafter)
    inputs_KAE = drafter.teacher_forced(batch, data_rollout(batch, NUM_STEPS))
    return torch.stack([drafter.logits(inputs_KAE[step], step) for step in range(NUM_STEPS)])


def in_decoding(drafter: Drafter, target: Target) -> Tensor:
    """Draft logits [K, Vd] of a chain below a prompt, through the doors that the engine uses."""
    limits = DraftLimits(1, NUM_STEPS)
    start = opening(target, [[BOS, 5, 9, 11, 4, 7]], limits, drafter.features, drafter.riders)
    with torch.inference_mode():
        expander = drafter.expander(drafter.start(start), first_cycle(start), limits)
        logits = [expander.begin()]
        for token in (20, 31):
            logits.append(expander.extend(torch.tensor([[token]]), torch.zeros(1, 1, dtype=torch.int64)))
    return torch.cat(logits)[:, 0]


@pytest.mark.parametrize("name", MAKERS)
def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained(name: str, target: Target) -> None:
    drafter = make(name, target)
    before = in_training(drafter, target)
    add_adapter(drafter, LoraSettings(rank=2), "a")
    torch.testing.assert_close(in_training(drafter, target), before)
    trained = [name for name, parameter in drafter.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)


@pytest.mark.parametrize("name", MAKERS)
def test_each_linear_layer_alone_is_adapted_wherever_its_weight_is_used(name: str, target: Target) -> None:
    for layer in linear_layers(make(name, target)):
        drafter = make(name, target)
        before, below = in_training(drafter, target), in_decoding(drafter, target)
        add_adapter(drafter, LoraSettings(rank=2, target_modules=[layer]), "a")
        shake(drafter)
        trained, decoded = in_training(drafter, target), in_decoding(drafter, target)
        assert not torch.allclose(trained, before, atol=1e-3), layer
        assert not torch.allclose(decoded, below, atol=1e-3), layer
        plain = merge_adapter(drafter, "a")
        assert not list(adapted_layers(plain))
        torch.testing.assert_close(in_training(plain, target), trained, rtol=1e-4, atol=1e-4, msg=layer)
        torch.testing.assert_close(in_decoding(plain, target), decoded, rtol=1e-4, atol=1e-4, msg=layer)


@pytest.mark.parametrize("name", MAKERS)
def test_every_adapted_layer_gets_a_gradient(name: str, target: Target) -> None:
    drafter = make(name, target)
    add_adapter(drafter, LoraSettings(rank=2), "a")
    shake(drafter)
    in_training(drafter, target).square().mean().backward()
    silent = [
        name
        for name, parameter in drafter.named_parameters()
        if ".lora_" in name and (parameter.grad is None or not parameter.grad.any())
    ]
    assert silent == []
    assert len(list(adapted_layers(drafter))) == len(linear_layers(drafter))


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 12), alpha=st.floats(0.1, 64.0), seed=st.integers(0, 1000))
def test_a_weight_that_is_read_is_base_plus_scaled_product(rank: int, alpha: float, seed: int) -> None:
    drafter = make("redrafter", random_target())
    base = drafter.get_parameter("rnn_w.weight").detach().clone()
    add_adapter(drafter, LoraSettings(rank, alpha, target_modules=["rnn_w"]), "a")
    shake(drafter, seed)
    [(_, layer)] = adapted_layers(drafter)
    product = layer.lora_B["a"].weight @ layer.lora_A["a"].weight
    torch.testing.assert_close(layer.weight, base + alpha / rank * product)


def test_a_frozen_head_is_left_out_unless_it_is_named(target: Target) -> None:
    drafter = make("redrafter", target)
    drafter.lm_head[-1].requires_grad_(False)
    add_adapter(drafter, LoraSettings(rank=2), "a")
    assert "lm_head.2" not in [path for path, _ in adapted_layers(drafter)]
    named = make("redrafter", target)
    add_adapter(named, LoraSettings(rank=2, target_modules=["lm_head.2"]), "a")
    assert [path for path, _ in adapted_layers(named)] == ["lm_head.2"]


def test_layers_are_named_whole_or_by_their_end(target: Target) -> None:
    drafter = make("eagle3", target)
    add_adapter(drafter, LoraSettings(rank=2, target_modules=["q_proj", "mlp.up_proj", "fc"]), "a")
    found = {path for path, _ in adapted_layers(drafter)}
    assert found == {"midlayer.self_attn.q_proj", "midlayer.mlp.up_proj", "fc"}
    with pytest.raises(ValueError, match="names 'w_proj'; the linear layers of this Eagle3 are fc, lm_head"):
        add_adapter(make("eagle3", target), LoraSettings(target_modules=["w_proj"]), "a")


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"rank": 0}, "at least 1"),
        ({"alpha": 0.0}, "above 0"),
        ({"dropout": 1.0}, "below 1"),
        ({"target_modules": []}, "empty"),
    ],
)
def test_settings_out_of_range_are_refused(changed: dict, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        LoraSettings(**changed)


@pytest.fixture
def base_folder(tmp_path: Path, target: Target) -> Path:
    make("redrafter", target).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def folder(tmp_path: Path, target: Target, base_folder: Path) -> Path:
    """A saved adapter of the drafter in `base_folder`."""
    return save_trained(base_folder, tmp_path / "adapter", target)


def save_trained(base: Path, out: Path, target: Target, seed: int = 7) -> Path:
    drafter = load_drafter(base)
    drafter.attach(target.ends)
    fingerprint = module_fingerprint(drafter)
    add_adapter(drafter, LoraSettings(rank=2, alpha=3.0), "a")
    shake(drafter, seed)
    drafter.config.score_scale = 1.75
    out.mkdir()
    save_adapter(drafter, out, "a", AdapterBond.of(drafter, str(base), fingerprint))
    return out


def test_a_saved_adapter_loads_back_and_is_small(base_folder: Path, folder: Path, target: Target) -> None:
    drafter = load_drafter(base_folder)
    below = in_training(drafter.attach(target.ends), target)
    bond = load_adapter(drafter, folder, "it", module_fingerprint(drafter))
    assert bond.score_scale == 1.75
    torch.testing.assert_close(in_training(drafter, target), below)  # beside the others; none acts yet
    activate(drafter, "it")
    kept = in_training(drafter, target)
    whole = load_drafter(folder)  # the folder alone names its drafter
    torch.testing.assert_close(in_training(whole.attach(target.ends), target), kept, rtol=1e-4, atol=1e-4)
    assert whole.config.score_scale == 1.75
    assert (folder / "adapter_model.safetensors").stat().st_size < (base_folder / "model.safetensors").stat().st_size


def test_peft_itself_reads_the_folder(base_folder: Path, folder: Path) -> None:
    merged = PeftModel.from_pretrained(load_drafter(base_folder), str(folder)).merge_and_unload()
    own = adapted(load_drafter(base_folder), folder).state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, own[name])


@pytest.mark.parametrize("training", [True, False])
def test_a_loaded_adapter_is_in_training_or_not_as_its_drafter_is(
    base_folder: Path, folder: Path, training: bool
) -> None:
    _say(folder, lora_dropout=0.5)
    drafter = load_drafter(base_folder).train(training)
    load_adapter(drafter, folder, "it", module_fingerprint(drafter))
    found = {module.training for _, layer in adapted_layers(drafter) for module in layer.modules()}
    assert found == {training}


def test_a_weight_kept_for_decoding_follows_the_adapter_that_acts(base_folder: Path, folder: Path) -> None:
    drafter = load_drafter(base_folder)
    load_adapter(drafter, folder, "it", module_fingerprint(drafter))
    with torch.no_grad():
        plain = drafter.head_weight.clone()
        activate(drafter, "it")
        first = drafter.head_weight
        assert drafter.head_weight is first, "computed anew at each reading"
        assert not torch.equal(first, plain)
        activate(drafter, None)
        assert torch.equal(drafter.head_weight, plain)


def test_a_narrow_drafter_is_adapted_in_its_own_dtype(base_folder: Path, folder: Path, target: Target) -> None:
    drafter = load_drafter(base_folder)
    fingerprint = module_fingerprint(drafter)
    load_adapter(drafter.bfloat16(), folder, "it", fingerprint)
    activate(drafter, "it")
    assert drafter.head_weight.dtype == torch.bfloat16
    assert all(
        one.weight.dtype == torch.float32 for _, layer in adapted_layers(drafter) for one in layer.lora_A.values()
    )
    narrow = in_decoding(drafter.attach(target.ends), target)
    wide = in_decoding(load_drafter(folder).attach(target.ends), target)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), wide, rtol=0.05, atol=0.3)


def test_an_adapter_of_another_drafter_is_refused(folder: Path, target: Target) -> None:
    other = make("redrafter", target)
    with torch.no_grad():
        other.get_parameter("rnn_w.weight")[0, 0] += 1.0
    with pytest.raises(ValueError, match=r"adapts the drafter .*base.*not this one .*give that drafter"):
        adapted(other, folder)


def test_a_folder_whose_drafter_is_gone_says_so(folder: Path, base_folder: Path) -> None:
    base_folder.rename(base_folder.parent / "moved")
    with pytest.raises(
        ValueError, match=r"adapter of the drafter .*cannot be had; give that drafter and the adapter apart"
    ):
        load_drafter(folder)


def _forget(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _pickle(folder: Path) -> None:
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors["base_model.model.rnn_w.lora_B.weight"]
    save_file(tensors, folder / "adapter_model.safetensors")


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def _spoil_number(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.rnn_w.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")


def _make_whole_numbers(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: tensor.long() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def _bind(folder: Path, **fields: object) -> None:
    path = folder / "bond.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _say(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_pickle, r"adapter_model.bin and no adapter_model.safetensors; pickled adapters are never loaded"),
        (_cut, "is cut off or no safetensors file"),
        (_spoil_number, r"holds NaN or infinity \(in: base_model.model.rnn_w.lora_B.weight\)"),
        (_drop_tensor, r"does not fit its adapter_config.json \(missing: base_model.model.rnn_w.lora_B.weight\)"),
        (lambda folder: _forget(folder, "bond.json"), "holds no adapter of a drafter"),
        (lambda folder: _forget(folder, "adapter_config.json"), "adapter_config.json is missing"),
        (lambda folder: _say(folder, r=3), "of another shape"),
        (lambda folder: _say(folder, target_modules=["fc"]), "adapts fc, which this ReDrafter has not"),
        (lambda folder: _say(folder, peft_type="IA3"), "of the kind 'IA3'"),
        (lambda folder: _say(folder, use_dora=True), "asks for use_dora"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not valid JSON"),
        (lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe"), "is not valid JSON"),
        (lambda folder: _say(folder, r="x"), r"adapter_config.json: r is 'x', it must be a whole number of at least 1"),
        (lambda folder: _say(folder, lora_alpha=None), r"lora_alpha is None, it must be a finite number above 0"),
        (
            lambda folder: _say(folder, lora_dropout=1.5),
            r"lora_dropout is 1.5, it must be a number of at least 0 and below",
        ),
        (lambda folder: _say(folder, target_modules="fc"), r"target_modules is 'fc', it must be a list of names"),
        (_make_whole_numbers, r"holds tensors that are not of floats"),
        (lambda folder: (folder / "bond.json").write_text('{"drafter": "x"}'), "is not a bond of this version"),
        (lambda folder: _bind(folder, num_draft_steps="3"), r"bond.json: num_draft_steps is '3', it must be a whole"),
        (lambda folder: _bind(folder, drafter=None), r"bond.json: drafter is None, it must be text"),
        (lambda folder: _bind(folder, score_scale=-1.0), r"bond.json: score_scale is -1.0"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(base_folder: Path, folder: Path, spoil, complaint: str) -> None:  # type: ignore[no-untyped-def]
    spoil(folder)
    with pytest.raises(ValueError, match=complaint):
        adapted(load_drafter(base_folder), folder)
