"""Block drafters in z-lab's and the speculators package's layouts: a forward from the files alone, and every trap of the engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from block_files import BlockFiles
from every_family import batch_of
from heads import deep_config, deep_target
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.evaluate.doctor.serving import trained_logits
from draftsmith.export.layouts.block import speculators
from draftsmith.export.layouts.layouts import load_any, write
from draftsmith.export.layouts.readback import tensors_of
from draftsmith.models import DraftLimits, Target
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.drafters.other_layouts import TargetBond
from draftsmith.models.families.block import BlockDrafter

STEPS, MASK = 3, 63
HEAD = "confidence_head.proj.weight"
WINDOWS: dict[str, Any] = {"sliding_window": 5, "sliding_layers": [0, 1]}
OF_PACKAGE = WINDOWS | {"window_from_root": True}
WITHOUT_MARKOV: dict[str, Any] = {"confidence": True, "confidence_with_markov": False}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "DFlash": ("dflash", {}),
    "DFlash, 6 tokens": ("dflash", {"draft_token_ids": torch.tensor([0, 3, 9, 10, 40, 63])}),
    "DFlash, one window": ("dflash", {"sliding_window": 5, "sliding_layers": [1], "sliding_causal": True}),
    "DFlash, windows": ("dflash", {"sliding_window": 5, "sliding_layers": [0, 1]}),
    "DFlash, biases": ("dflash", {"attention_bias": True}),
    "JetSpec": ("dflash", {"causal": True}),
    "DSpark": ("dspark", {"correction": "vanilla"}),
    "DSpark, 6 tokens": ("dspark", {"correction": "vanilla", "draft_token_ids": torch.tensor([0, 3, 9, 10, 40, 63])}),
    "DSpark, gated": ("dspark", {"correction": "gated"}),
    "DSpark, recurrent": ("dspark", {"correction": "recurrent", "confidence": True}),
    "DSpark, a head without Markov": ("dspark", {"correction": "vanilla", **WITHOUT_MARKOV}),
    "Domino": ("domino", {"correction": "gru"}),
    "DFlash 2": ("dflash2", {"correction": "selector"}),
    "DFlash of speculators": ("speculators", {}),
    "DFlash 2 of speculators": ("speculators", {"correction": "selector"}),
    "DSpark of speculators": ("speculators", {"correction": "recurrent"}),
    "a head without Markov of speculators": ("speculators", {"correction": "gated", **WITHOUT_MARKOV}),
    "6 tokens of speculators": ("speculators", {"draft_token_ids": torch.tensor([0, 3, 9, 10, 40, 63])}),
    "causal windows of speculators": ("speculators", OF_PACKAGE | {"sliding_causal": True}),
    "windows of speculators": ("speculators", OF_PACKAGE | {"correction": "vanilla"}),
}


@pytest.fixture(scope="module")
def target() -> Target:
    return deep_target()


def made(target: Target, **chosen: Any) -> BlockDrafter:
    """Two layers over three of the target's, random everywhere, with a token for its masks."""
    settings = {"mask_token_id": MASK, "correction_rank": 5, "correction_state": 6} | chosen
    if chosen.get("correction") == "selector":
        settings = {"sample_from_anchor": False, "convolution": True, "candidates": 5} | settings
    settings.setdefault("sample_from_anchor", "correction" in chosen)
    drafter = BlockDrafter.for_target(
        target.ends,
        layers=["layer.1.output", "layer.3.output", "layer.5.output"],
        num_draft_layers=2,
        num_draft_steps=STEPS,
        **settings,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return drafter.eval()


def rewritten(folder: Path, **changes: Any) -> None:
    """Changes fields of a config, at the top or, where they are there, in `dflash_config`; None takes one away."""
    fields = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        place = fields["dflash_config"] if name in fields.get("dflash_config", {}) and name not in fields else fields
        place[name] = value
        if value is None:
            del place[name]
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_from_the_files_alone_has_our_logits(target: Target, tmp_path: Path, kind: str) -> None:
    layout, chosen = KINDS[kind]
    drafter = made(target, **chosen)
    write(drafter, tmp_path, layout, target.ends)
    batch, root = batch_of(target, drafter), 9
    ids = batch.input_ids.tolist()
    of_files = BlockFiles(tmp_path, target).logits(ids[: root + 1], ids[root + 1 : root + STEPS])
    with torch.no_grad():
        ours = trained_logits(drafter, batch, [root], STEPS)[0]
    torch.testing.assert_close(of_files, ours, rtol=1e-4, atol=1e-4)
    again = load_any(tmp_path, target.ends)
    assert isinstance(again, BlockDrafter)
    before, after = tensors_of(drafter), tensors_of(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.config.num_draft_steps == STEPS
    for name in (
        "layers",
        "block_size",
        "causal",
        "sample_from_anchor",
        "mask_token_id",
        "correction",
        "confidence",
        "confidence_with_markov",
        "candidates",
        "sliding_window",
        "sliding_layers",
        "sliding_causal",
        "window_from_root",
        "attention_bias",
    ):
        assert getattr(again.config, name) == getattr(drafter.config, name), name


def test_a_public_folder_decodes_the_targets_own_tokens(target: Target, tmp_path: Path) -> None:
    write(made(target, causal=True), tmp_path, "dflash", target.ends)
    drafter = load_drafter(tmp_path, target=TargetBond(target.ends))
    settings, prompts = GenerationSettings(max_new_tokens=6), [[1, 5, 9], [1, 7]]
    plain = Engine(target).generate(prompts, settings)
    drafted = Engine(target, drafter, DraftLimits(2, STEPS)).generate(prompts, settings)
    assert [reply.token_ids for reply in drafted] == [reply.token_ids for reply in plain]


def test_both_engines_are_told_layers_masks_and_causality(target: Target, tmp_path: Path) -> None:
    write(made(target, causal=True), tmp_path, "dflash", target.ends)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == ["DFlashDraftModel"]
    assert (fields["model_type"], fields["num_hidden_layers"]) == ("qwen3", 2)
    assert (fields["layer_types"], fields["num_target_layers"]) == (["full_attention"] * 2, 8)
    assert fields["is_causal"] is True
    assert fields["dflash_config"] == {
        "mask_token_id": MASK,
        "target_layer_ids": [1, 3, 5],
        "block_size": STEPS + 1,
        "causal": True,
    }
    assert not {"lm_head.weight", "embed_tokens.weight", "d2t"} & load_file(tmp_path / "model.safetensors").keys()


def test_vllm_finds_what_it_asks_of_a_dspark_at_the_top(target: Target, tmp_path: Path) -> None:
    write(made(target, correction="vanilla", confidence=True), tmp_path, "dspark", target.ends)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["architectures"] == ["Qwen3DSparkModel"]
    wanted = {"target_layer_ids": [1, 3, 5], "mask_token_id": MASK, "block_size": STEPS, "markov_rank": 5}
    assert {name: fields[name] for name in wanted} == wanted
    assert (fields["sample_from_anchor"], fields["markov_head_type"]) == (True, "vanilla")
    assert (fields["enable_confidence_head"], fields["confidence_head_with_markov"]) == (True, True)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["confidence_head.proj.weight"].shape == (1, 32 + 5)


@pytest.mark.parametrize("layout", ["dspark", "speculators"])
def test_a_confidence_head_that_reads_no_token_says_so(target: Target, tmp_path: Path, layout: str) -> None:
    drafter = made(target, correction="vanilla", confidence=True, confidence_with_markov=False)
    notes = write(drafter, tmp_path, layout, target.ends)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["enable_confidence_head"], fields["confidence_head_with_markov"]) == (True, False)
    assert load_file(tmp_path / "model.safetensors")["confidence_head.proj.weight"].shape == (1, 32)
    assert any("reads no token" in note for note in notes)


@pytest.mark.parametrize("with_markov", [True, False])
@pytest.mark.parametrize("layout", ["dspark", "speculators"])
def test_the_width_of_a_confidence_head_says_whether_it_reads_a_token(
    target: Target, tmp_path: Path, layout: str, with_markov: bool
) -> None:
    drafter = made(target, correction="vanilla", confidence=True, confidence_with_markov=with_markov)
    write(drafter, tmp_path, layout, target.ends)
    for named in (with_markov, None):  # with the field, and without it
        rewritten(tmp_path, confidence_head_with_markov=named)
        again = load_any(tmp_path, target.ends)
        assert again.config.confidence_with_markov is with_markov
        assert torch.equal(tensors_of(again)[HEAD], tensors_of(drafter)[HEAD])
    rewritten(tmp_path, confidence_head_with_markov=not with_markov)
    width = 32 + 5 if with_markov else 32
    message = rf"confidence_head_with_markov {not with_markov}, and {HEAD} is \[1, {width}\], as with {with_markov}"
    with pytest.raises(ValueError, match=message):
        load_any(tmp_path, target.ends)


def test_a_confidence_head_of_neither_width_is_an_error(target: Target, tmp_path: Path) -> None:
    write(made(target, correction="vanilla", confidence=True), tmp_path, "dspark", target.ends)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, HEAD: torch.zeros(1, 35)}, tmp_path / "model.safetensors")
    for named in (True, False, None):
        rewritten(tmp_path, confidence_head_with_markov=named)
        with pytest.raises(ValueError, match=rf"{HEAD} is float32 \[1, 35\]"):
            load_any(tmp_path, target.ends)


def test_speculators_layers_see_the_whole_block_in_vllm_too(target: Target, tmp_path: Path) -> None:
    write(made(target), tmp_path, "speculators", target.ends)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["speculators_model_type"], fields["sliding_window_non_causal"]) == ("dflash", True)
    assert (fields["aux_hidden_state_layer_ids"], fields["sample_from_anchor"]) == ([2, 4, 6], False)
    assert fields["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == STEPS
    assert fields["speculators_config"]["algorithm"] == "dflash"


@pytest.mark.parametrize(
    ("layout", "chosen", "message"),
    [
        ("dflash", {"mask_token_id": None}, r"learned a vector .* train it with mask_token_id, an unused token"),
        ("dspark", {"mask_token_id": None, "correction": "vanilla"}, "learned a vector"),
        ("dflash", {"sample_from_anchor": True}, "vLLM refuses such a DFlash; train it with sample_from_anchor false"),
        ("dspark", {"correction": "gated", "sample_from_anchor": False}, "'gated' without sample_from_anchor"),
        ("dflash", {"correction": "vanilla"}, "'vanilla', which --layout dflash does not hold; use --layout dspark"),
        ("dspark", {}, "'none', which --layout dspark does not hold; use --layout dflash"),
        ("domino", {"correction": "gru", "draft_token_ids": torch.arange(9)}, "a draft vocabulary of 9 tokens"),
        ("speculators", {"causal": True}, r"see the whole block .* --layout dflash"),
        ("speculators", {"causal": True, "sliding_window": 5, "sliding_layers": [1]}, r"see the whole block .* dflash"),
        ("speculators", WINDOWS, r"counts from each slot, and the .* counts it from the root; .* --layout dflash"),
        ("speculators", WINDOWS | {"correction": "gated"}, "--layout dspark, or train it with window_from_root true"),
        (
            "dflash",
            OF_PACKAGE,
            r"counts from the root .* --layout speculators, or train it with window_from_root false",
        ),
        ("domino", OF_PACKAGE | {"correction": "gru"}, "from each slot; train it with window_from_root false"),
        ("speculators", {"correction": "gru"}, "export it with --layout domino"),
        ("dflash2", {"correction": "selector", "convolution": False}, "this drafter has False, 'selector' and False"),
        ("dflash", {"correction": "selector"}, "--layout dflash does not hold; use --layout dflash2"),
        (
            "dflash2",
            {"correction": "selector", "draft_token_ids": torch.arange(9)},
            "a DFlash 2 with a draft vocabulary",
        ),
        ("dflash", {"confidence": True}, "a confidence head and the correction 'none', and engines read such a head"),
    ],
)
def test_a_drafter_that_engines_would_compute_differently_is_an_error(
    target: Target, tmp_path: Path, layout: str, chosen: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(made(target, **chosen), tmp_path, layout, target.ends)


def test_some_exports_need_the_target(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows of a draft vocabulary beside the drafter; add --target"):
        write(made(target, draft_token_ids=torch.arange(9)), tmp_path, "dflash")
    with pytest.raises(ValueError, match="names the target and its architecture; add --target"):
        write(made(target), tmp_path, "speculators")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": None}, "lacks mask_token_id"),
        ({"target_layer_ids": None}, "names no target_layer_ids"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}, "target_layer_ids count blocks from 0, the others from 1"),
        ({"is_causal": True}, "has is_causal True and causal False"),
        ({"block_size": 5}, r"has block_size 5, and 4 in dflash_config, between which engines differ"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "sliding_window None and use_sliding_window False; give",
        ),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types with chunked attention"),
        ({"layer_types": ["sliding_attention"]}, "has 1 layer_types and num_hidden_layers 2"),
        ({"attention_bias": True}, r"self_attn\.q_proj\.bias is missing"),
        ({"attention_sink_bias": True}, "attention_sink_bias True"),
        ({"projector_type": "xpress"}, "projector_type 'xpress'"),
        ({"use_swa": False, "dflash_config": {"use_swa": True}}, "use_swa False, and True in dflash_config"),
        (
            {"use_sliding_window": False, "dflash_config": {"use_sliding_window": True, "sliding_window": 5}},
            "use_sliding_window False, and True in dflash_config",
        ),
        (
            {"use_sliding_window": None, "dflash_config": {"use_sliding_window": True, "sliding_window": 5}},
            "has sliding_window 5, use_sliding_window True in dflash_config and not at the top",
        ),
        (
            {"layer_types": None, "dflash_config": {"layer_types": ["sliding_attention"] * 2}},
            r"has layer_types \['sliding_attention', .* in dflash_config and not at the top",
        ),
        ({"input_embedding_scale": 5.5}, "rows of the target's embedding matrix times 5.5"),
        ({"enable_confidence_head": True}, r"confidence_head\.proj\.weight is missing"),
        ({"enable_confidence_head": True, "confidence_head_with_markov": True}, "markov True with markov_rank 0"),
        ({"num_hidden_layers": 3}, r"layers\.2\.input_layernorm\.weight is missing"),
        ({"target_hidden_size": 64}, "target_hidden_size 64"),
    ],
)
def test_reading_a_folder_that_computes_something_else_is_an_error(
    target: Target, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(made(target), tmp_path, "dflash", target.ends)
    rewritten(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_any(tmp_path, target.ends)


def test_a_head_or_embedding_of_its_own_is_an_error(target: Target, tmp_path: Path) -> None:
    write(made(target), tmp_path, "dflash", target.ends)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    own = {name: torch.zeros(64, 32) for name in ("lm_head.weight", "embed_tokens.weight")}
    for name, message in (("lm_head.weight", "head of"), ("embed_tokens.weight", "embedding of")):
        save_file({**tensors, name: own[name]}, file)
        with pytest.raises(ValueError, match=f"{name} differs from the {message}"):
            load_any(tmp_path, target.ends)
    save_file({**tensors, "lm_head.weight": target.ends.head_weight.clone()}, file)
    assert isinstance(load_any(tmp_path, target.ends), BlockDrafter)


def test_a_domino_says_which_slots_predict_and_which_are_corrected(target: Target, tmp_path: Path) -> None:
    write(made(target, correction="gru"), tmp_path, "domino", target.ends)
    for name in ("shift_label", "pure_draft_prefix_len"):
        before = (tmp_path / "config.json").read_text()
        rewritten(tmp_path, **{name: None})
        with pytest.raises(
            ValueError, match=f"does not say {name}, whose defaults differ between the trainers of Domino"
        ):
            load_any(tmp_path, target.ends)
        (tmp_path / "config.json").write_text(before)
    rewritten(tmp_path, shift_label=False)
    assert load_any(tmp_path, target.ends).config.first_slot == 1


def test_rows_of_the_targets_head_need_not_come_along(target: Target, tmp_path: Path) -> None:
    drafter = made(target, draft_token_ids=torch.tensor([0, 3, 9, 10, 40, 63]))
    write(drafter, tmp_path, "dflash", target.ends)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: part for name, part in tensors.items() if name != "lm_head.weight"}, tmp_path / "model.safetensors"
    )
    again = load_any(tmp_path, target.ends)
    assert isinstance(again, BlockDrafter)
    assert torch.equal(again.head_weight, drafter.head_weight)


def test_a_dspark_of_speculators_says_which_slot_predicts_first(target: Target, tmp_path: Path) -> None:
    write(made(target, correction="vanilla"), tmp_path, "speculators", target.ends)
    rewritten(tmp_path, sample_from_anchor=None)
    message = "does not say sample_from_anchor, whose default differs between versions"
    with pytest.raises(ValueError, match=message):
        load_any(tmp_path, target.ends)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"sample_from_anchor": None}))
    with pytest.raises(ValueError, match=message):
        load_any(tmp_path, target.ends)


def test_layers_of_a_window_see_no_later_slot_unless_the_folder_says_so(target: Target, tmp_path: Path) -> None:
    of_windows: dict[str, Any] = {"sliding_window": 5, "use_sliding_window": True}
    kinds = ["full_attention", "sliding_attention"]
    write(made(target), tmp_path, "dflash", target.ends)
    rewritten(tmp_path, **of_windows, layer_types=kinds)
    config = load_any(tmp_path, target.ends).config
    assert (config.sliding_layers, config.causal, config.sliding_causal) == ([1], False, False)
    rewritten(tmp_path, is_causal=None, causal=None)
    config = load_any(tmp_path, target.ends).config
    assert (config.sliding_window, config.causal, config.sliding_causal) == (5, False, True)
    rewritten(tmp_path, layer_types=None, max_window_layers=1)
    assert load_any(tmp_path, target.ends).config.sliding_layers == [1]
    rewritten(tmp_path, use_sliding_window=False)
    assert load_any(tmp_path, target.ends).config.sliding_layers == []


def test_a_correction_beside_other_logits_is_refused(target: Target, tmp_path: Path) -> None:
    for number, (chosen, layout) in enumerate((({"correction": "selector"}, "dflash2"), ({}, "dflash"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(made(target, **chosen), folder, layout, target.ends)
        fields = json.loads((folder / "config.json").read_text())
        for name, value, message in (
            ("final_logit_softcapping", 20.0, "final_logit_softcapping 20.0, and its correction"),
            (
                "output_multiplier",
                0.25,
                "output_multiplier 0.25, and 'deep' multiplies its logits by 1, and its correction",
            ),
            ("output_multiplier", 1.0, ""),
        ):
            nested = fields["dflash_config"] | {name: value}
            (folder / "config.json").write_text(json.dumps(fields | {"dflash_config": nested}))
            if message and chosen:
                with pytest.raises(ValueError, match=message):
                    load_any(folder, target.ends)
            else:
                assert isinstance(load_any(folder, target.ends), BlockDrafter)


def test_the_card_says_that_few_engines_mix_windows_and_none(target: Target, tmp_path: Path) -> None:
    notes = write(made(target, sliding_window=5, sliding_layers=[1]), tmp_path, "dflash", target.ends)
    assert "only with its second model runner" in notes[-1]
    notes = write(made(target, **WINDOWS), tmp_path, "dflash", target.ends)
    assert "It is counted from each slot. vLLM 0.32 has the same window." in notes[-1]


def test_windows_of_the_speculators_package_are_causal_by_default(target: Target, tmp_path: Path) -> None:
    for chosen, non_causal, seen in (
        ({"sliding_causal": True}, False, "No engine was tried"),
        ({"causal": True}, False, "No engine was tried"),
        ({}, True, "No engine was tried"),
    ):
        notes = write(made(target, **OF_PACKAGE, **chosen), tmp_path, "speculators", target.ends)
        assert "layers [0, 1] have a sliding window of 5" in notes[-1]
        assert seen in notes[-1]
        assert "so many tokens before the root" in notes[-1]
        fields = json.loads((tmp_path / "config.json").read_text())
        assert fields["sliding_window_non_causal"] is non_causal
        assert fields["transformer_layer_config"]["layer_types"] == ["sliding_attention"] * 2
    rewritten(tmp_path, sliding_window_non_causal=None)
    assert load_any(tmp_path, target.ends).config.sliding_causal
    write(made(target, correction="selector", **OF_PACKAGE), tmp_path, "speculators", target.ends)
    rewritten(tmp_path, sliding_window_non_causal=None)
    assert not load_any(tmp_path, target.ends).config.sliding_causal, "of a DFlash 2"


def test_the_speculators_package_may_leave_out_sizes_and_write_null(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = made(target)
    write(drafter, tmp_path, "speculators", target.ends)
    fields = json.loads((tmp_path / "config.json").read_text())
    layer = {**fields["transformer_layer_config"], "sliding_window": None}
    sizes = {name: layer.pop(name) for name in ("hidden_size", "vocab_size")}
    nulls = {"transformer_layer_config": layer, "target_hidden_size": None, "sliding_window_non_causal": None}
    (tmp_path / "config.json").write_text(json.dumps(fields | nulls))
    with pytest.raises(ValueError, match=r"fc\.weight is "):
        load_any(tmp_path, target.ends)  # Qwen3's own sizes are larger
    monkeypatch.setattr(speculators, "Qwen3Config", lambda: Qwen3Config(**sizes))
    before, after = tensors_of(drafter), tensors_of(load_any(tmp_path, target.ends))
    assert all(torch.equal(before[name], after[name]) for name in before | after)


def test_maps_of_a_whole_vocabulary_and_of_32_bits_are_read(target: Target, tmp_path: Path) -> None:
    ids = torch.tensor([0, 3, 9, 10, 40, 63])
    for number, drafter in enumerate((made(target), made(target, draft_token_ids=ids))):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(drafter, folder, "dflash", target.ends)
        tensors = load_file(folder / "model.safetensors")
        maps = {"d2t": torch.zeros(64, dtype=torch.int32), "t2d": torch.ones(64, dtype=torch.bool)}
        added = {"d2t": tensors["d2t"].to(torch.int32)} if "d2t" in tensors else maps
        save_file({**tensors, **added}, folder / "model.safetensors")
        assert torch.equal(load_any(folder, target.ends).draft_ids(), drafter.draft_ids())


def test_what_a_qwen3_config_leaves_out_is_its_default(target: Target, tmp_path: Path) -> None:
    write(made(target), tmp_path, "dflash", target.ends)
    rewritten(tmp_path, head_dim=None)
    with pytest.raises(ValueError, match=r"q_proj\.weight is float32 \[64, 32\], not float \[512, 32\]"):
        load_any(tmp_path, target.ends)
    assert deep_config().head_dim == 16, "of another size than Qwen3's default of 128"
