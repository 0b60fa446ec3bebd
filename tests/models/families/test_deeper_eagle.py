"""EAGLE-3 with several decoder layers, of Llama's kind or Qwen3's: by hand, in decoding as in training, and in the folders of engines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from every_family import batch_of
from heads import DRAFT_IDS, TEXT, FilesForward, deep_target, our_logits, shaken
from safetensors.torch import load_file, save_file

from draftsmith.decode.engine import Engine
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.evaluate.doctor.serving import served_logits, trained_logits
from draftsmith.evaluate.doctor.tree_serving import tree_and_chain_logits
from draftsmith.export.layouts.eagle3 import attention_notes
from draftsmith.export.layouts.layouts import load_any, write
from draftsmith.models import DraftLimits, Eagle3, Target, data_rollout
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.families import eagle_base
from draftsmith.models.families.eagle3 import Eagle3Family
from draftsmith.models.slots.attention import attend
from draftsmith.train.drafter.starting_drafter import adopt

STEPS, LAYERS, MASK = 3, 3, 63
ARCHITECTURES = {
    ("eagle3", False): "LlamaForCausalLMEagle3",
    ("eagle3", True): "Eagle3Qwen3ForCausalLM",
    ("peagle", False): "LlamaForCausalLMEagle3",
    ("peagle", True): "Eagle3Qwen3ForCausalLM",
}
LLAMA_OR_QWEN3 = pytest.mark.parametrize("head_norms", [False, True], ids=["Llama's layers", "Qwen3's layers"])
KINDS = pytest.mark.parametrize("mask_token_id", [None, MASK], ids=["step by step", "in parallel"])


@pytest.fixture(scope="module")
def target() -> Target:
    return deep_target()


def made(target: Target, mask_token_id: int | None = None, **settings: object) -> Eagle3:
    """Random everywhere."""
    family = Eagle3Family(mask_token_id=mask_token_id, num_draft_layers=LAYERS, **settings)  # type: ignore[arg-type]
    drafter = shaken(family.build(target.ends, torch.tensor(DRAFT_IDS), STEPS, ""))
    assert isinstance(drafter, Eagle3)
    return drafter


@LLAMA_OR_QWEN3
@torch.no_grad()
def test_every_step_is_that_of_transformers_own_layers(target: Target, tmp_path: Path, head_norms: bool) -> None:
    drafter, anchor = made(target, head_norms=head_norms), 5
    write(drafter, tmp_path, "eagle3", target.ends)
    files, logits = FilesForward(tmp_path, target), our_logits(target, drafter, STEPS)
    assert len(files.deeper) == LAYERS - 1
    known = files.known(TEXT[: anchor + 1])
    for step in range(STEPS):
        outputs = files.outputs(files.embedded(TEXT[1 : anchor + 2 + step]), known)
        torch.testing.assert_close(logits[step, anchor], files.logits(outputs)[-1], rtol=1e-4, atol=1e-4)
        known = torch.cat([known, outputs[:, -1:]], dim=1)


@KINDS
@LLAMA_OR_QWEN3
@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_decoding_has_the_logits_of_training_and_a_tree_those_of_its_chains(
    target: Target, mask_token_id: int | None, window: int | None, head_norms: bool
) -> None:
    drafter = made(target, mask_token_id, sliding_window=window, head_norms=head_norms)
    batch, roots = batch_of(target, drafter), [2, 7, 15]
    trained = trained_logits(drafter, batch, roots, STEPS)
    torch.testing.assert_close(served_logits(drafter, batch, roots, STEPS), trained, rtol=1e-4, atol=1e-4)
    in_tree, in_chain = tree_and_chain_logits(drafter, batch, 7)
    torch.testing.assert_close(in_tree, in_chain, rtol=1e-4, atol=1e-4)


@KINDS
@LLAMA_OR_QWEN3
def test_rows_of_different_lengths_get_the_targets_own_tokens(
    target: Target, mask_token_id: int | None, head_norms: bool
) -> None:
    drafter, prompts = (
        made(target, mask_token_id, head_norms=head_norms),
        [[1, 5, 9], [1, 7, 7, 30, 2, 8, 8, 12, 40], [3]],
    )
    for limits, temperature in (
        (DraftLimits(1, 1), 0.0),
        (DraftLimits(3, STEPS, node_budget=7), 0.0),
        (DraftLimits(2, STEPS), 1.0),
    ):
        settings = GenerationSettings(max_new_tokens=9, temperature=temperature)
        plain = [reply.token_ids for reply in Engine(target).generate(prompts, settings)]
        drafted = Engine(target, drafter, limits).generate(prompts, settings, num_rows=2)
        assert [reply.token_ids for reply in drafted] == plain
        fixed = Engine(target, drafter, limits, runner=lambda cycle: cycle).generate(prompts, settings, num_rows=2)
        assert [reply.token_ids for reply in fixed] == plain


@torch.no_grad()
def test_after_many_cycles_a_draft_is_that_of_a_fresh_start(target: Target) -> None:
    """Keys and values of all layers follow the accepted text: a reply is drafted alike from its middle on."""
    drafter, prompt = made(target), [1, 5, 9, 30]
    engine = Engine(target, drafter, DraftLimits(3, STEPS, node_budget=7))
    whole = engine.generate([prompt], GenerationSettings(max_new_tokens=24))[0]
    read = [*prompt, *whole.token_ids]
    ends = [sum(step + 1 for step in whole.accepted[:n]) for n in range(len(whole.accepted))]
    middle = ends[len(ends) // 2]
    begun = read[: len(prompt) + 1 + middle]
    again = engine.generate([begun[:-1]], GenerationSettings(max_new_tokens=24 - middle))[0]
    assert again.token_ids[: len(whole.token_ids) - middle] == whole.token_ids[middle:]
    assert again.accepted == whole.accepted[len(ends) // 2 :]


@KINDS
@LLAMA_OR_QWEN3
def test_training_reaches_every_layer(target: Target, mask_token_id: int | None, head_norms: bool) -> None:
    drafter = made(target, mask_token_id, head_norms=head_norms).train()
    batch = batch_of(target, drafter)
    drafter.teacher_forced(batch, data_rollout(batch, STEPS)).square().sum().backward()
    layers = {name: part for name, part in drafter.named_parameters() if name.startswith(("midlayer.", "layers."))}
    assert [name for name, part in layers.items() if part.grad is None or not part.grad.abs().sum()] == []
    assert sum(name.endswith(("q_norm.weight", "k_norm.weight")) for name in layers) == (
        2 * LAYERS if head_norms else 0
    )


@LLAMA_OR_QWEN3
@pytest.mark.parametrize(
    ("layout", "mask_token_id"), [("eagle3", None), ("speculators", None), ("speculators", MASK), ("peagle", MASK)]
)
@torch.no_grad()
def test_a_folder_for_engines_comes_back_with_all_layers(
    target: Target, tmp_path: Path, layout: str, mask_token_id: int | None, head_norms: bool
) -> None:
    drafter = made(target, mask_token_id, head_norms=head_norms)
    notes = write(drafter, tmp_path, layout, target.ends)
    fields = json.loads((tmp_path / "config.json").read_text())
    layer = fields.get("transformer_layer_config", fields)
    assert (layer["num_hidden_layers"], layer["model_type"]) == (LAYERS, "qwen3" if head_norms else "llama")
    if layout != "speculators":
        assert fields["architectures"] == [ARCHITECTURES[layout, head_norms]]
    assert any("attention is Qwen3's" in note for note in notes) == head_norms
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"0", "1", "2"}
    assert not [name for name in names if name.startswith("midlayer.")]
    several = "It has 3 layers. SGLang's EAGLE-3 has one."
    assert [note for note in notes if several in note] == (
        [] if layout == "speculators" else [several + ("" if head_norms else " vLLM 0.32 decodes with it.")]
    )
    del layer["num_hidden_layers"]  # as the speculators package leaves out what equals a default
    (tmp_path / "config.json").write_text(json.dumps(fields))
    again = load_any(tmp_path, target.ends)
    before, after = drafter.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_our_own_folder_keeps_all_layers(target: Target, tmp_path: Path) -> None:
    drafter = made(target)
    drafter.save_pretrained(tmp_path)
    again = load_drafter(tmp_path)
    assert isinstance(again, Eagle3)
    assert again.config.num_draft_layers == len(again.stack) == len(again.key_values()) == LAYERS
    assert all(torch.equal(part, again.state_dict()[name]) for name, part in drafter.state_dict().items())


def test_a_folder_that_counts_other_layers_than_it_holds_is_refused(target: Target, tmp_path: Path) -> None:
    write(made(target), tmp_path, "eagle3", target.ends)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    for count, message in (
        (4, r"layers\.3\.\S+ is missing"),
        (2, r"layers\.2\.\S+ is unknown"),
        (0, "num_hidden_layers"),
    ):
        file.write_text(json.dumps(fields | {"num_hidden_layers": count}))
        with pytest.raises(ValueError, match=message):
            load_any(tmp_path, target.ends)
    window = {"sliding_window": 8, "use_sliding_window": True}
    for kinds in (["sliding_attention", "full_attention", "full_attention"], ["sliding_attention"] * 4):
        file.write_text(json.dumps(fields | window | {"layer_types": kinds}))
        with pytest.raises(
            ValueError, match=f"3 layers, {len(kinds)} layer_types and {kinds.count(kinds[0])} of them with sliding"
        ):
            load_any(tmp_path, target.ends)
    file.write_text(json.dumps(fields | window | {"layer_types": ["sliding_attention"] * 3}))
    assert load_any(tmp_path, target.ends).config.sliding_window == 8  # type: ignore[union-attr]
    one_lost = {
        name: part for name, part in load_file(tmp_path / "model.safetensors").items() if "layers.1.mlp" not in name
    }
    file.write_text(json.dumps(fields))
    save_file(one_lost, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.\S+ is missing"):
        load_any(tmp_path, target.ends)


def test_an_engine_that_reads_one_layer_of_llamas_gets_no_folder(target: Target, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this drafter has several layers, which TensorRT-LLM does not read"):
        write(made(target), tmp_path, "tensorrt-llm", target.ends)
    with pytest.raises(ValueError, match="this drafter has head_norms, several layers, which TensorRT-LLM"):
        write(made(target, head_norms=True), tmp_path, "tensorrt-llm", target.ends)


def test_a_head_with_qwen3s_layers_is_trained_on(target: Target, tmp_path: Path) -> None:
    write(made(target, head_norms=True), tmp_path, "eagle3", target.ends)
    drafter = adopt(tmp_path, Eagle3Family(), target.ends, "")
    assert isinstance(drafter, Eagle3)
    assert drafter.training
    batch = batch_of(target, drafter)
    drafter.teacher_forced(batch, data_rollout(batch, STEPS)).square().sum().backward()
    norms = [part for name, part in drafter.named_parameters() if "q_norm" in name or "k_norm" in name]
    assert len(norms) == 2 * LAYERS
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in norms)
    before = [part.detach().clone() for part in norms]
    torch.optim.SGD(drafter.parameters(), 1e-3).step()
    assert not any(torch.equal(part, other) for part, other in zip(norms, before, strict=True))
    fresh = Eagle3Family(head_norms=True).build(target.ends, None, STEPS, "")
    assert fresh.config.head_norms
    assert all(torch.equal(part, torch.ones(16)) for name, part in fresh.named_parameters() if "q_norm" in name)


def test_a_folder_that_says_qwen3_is_read_with_qwen3s_defaults_and_norms(target: Target, tmp_path: Path) -> None:
    write(made(target, head_norms=True), tmp_path, "speculators", target.ends)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    fields, tensors = json.loads(config.read_text()), load_file(weights)
    layer = fields["transformer_layer_config"]

    def read_with(**changes: object) -> Eagle3:
        changed = {name: value for name, value in (layer | changes).items() if value != "absent"}
        config.write_text(json.dumps(fields | {"transformer_layer_config": changed}))
        drafter = load_any(tmp_path, target.ends)
        assert isinstance(drafter, Eagle3)
        return drafter

    window = {"use_sliding_window": True, "sliding_window": 8}
    assert read_with(**window).config.sliding_window is None, "of Qwen3's layers, those from number 28 on slide"
    assert read_with(**window, max_window_layers=0).config.sliding_window == 8
    with pytest.raises(ValueError, match="3 layers, 3 layer_types and 2 of them with sliding attention"):
        read_with(**window, max_window_layers=1)
    with pytest.raises(ValueError, match=r"q_norm\.weight is float32 \[16\], not"):
        read_with(head_dim="absent")  # 128, whatever the hidden size is
    with pytest.raises(ValueError, match="transformer_layer_config is not a Llama or Qwen3 layer's"):
        read_with(model_type="gemma")
    save_file({name: part for name, part in tensors.items() if "layers.1.self_attn.k_norm" not in name}, weights)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_norm\.weight is missing"):
        read_with()
    save_file(
        {name: part for name, part in tensors.items() if "_norm.weight" not in name.split("self_attn.")[-1]}, weights
    )
    with pytest.raises(ValueError, match=r"self_attn\.q_norm\.weight is missing"):
        read_with()


@pytest.mark.parametrize("layout", ["peagle", "speculators"])
@torch.no_grad()
def test_a_p_eagle_with_an_embedding_of_its_own_is_read_and_written(
    target: Target, tmp_path: Path, layout: str
) -> None:
    drafter = made(target, MASK)
    for name in ("borrowed", "own"):
        (tmp_path / name).mkdir()
    write(drafter, tmp_path / "borrowed", layout, target.ends)
    file = tmp_path / "borrowed" / "model.safetensors"
    tensors = load_file(file)
    torch.manual_seed(5)
    trained = target.ends.embed(torch.arange(64)) + 0.1 * torch.randn(64, 32)
    save_file(tensors | {"embed_tokens.weight": trained}, file)
    with pytest.warns(UserWarning, match="it is taken for one that was trained with this P-EAGLE"):
        own = load_any(tmp_path / "borrowed", target.ends).bound(target.ends)
    assert isinstance(own, Eagle3)
    assert torch.equal(own.embed(torch.tensor([3, MASK])), trained[[3, MASK]])
    notes = write(own, tmp_path / "own", layout, target.ends)
    assert any("embedding is its own" in note for note in notes) == (layout == "peagle")
    assert torch.equal(load_file(tmp_path / "own" / "model.safetensors")["embed_tokens.weight"], trained)
    own.save_pretrained(tmp_path / "ours")
    assert torch.equal(load_drafter(tmp_path / "ours").state_dict()["embed_tokens.weight"], trained)
    batch, roots = batch_of(target, own), [2, 7]
    logits = trained_logits(own, batch, roots, STEPS)
    torch.testing.assert_close(served_logits(own, batch, roots, STEPS), logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, trained_logits(drafter, batch, roots, STEPS), atol=1e-2)
    settings = GenerationSettings(max_new_tokens=9)
    plain = Engine(target).generate([[1, 5, 9]], settings)[0].token_ids
    assert (
        Engine(target, own, DraftLimits(3, STEPS, node_budget=7)).generate([[1, 5, 9]], settings)[0].token_ids == plain
    )


def test_an_embedding_that_is_the_targets_is_borrowed(target: Target, tmp_path: Path) -> None:
    write(made(target, MASK), tmp_path, "speculators", target.ends)
    again = load_any(tmp_path, target.ends)
    assert isinstance(again, Eagle3)
    assert again.embed_tokens is None


@KINDS
@torch.no_grad()
def test_autocast_computes_every_step_and_in_narrower_numbers(target: Target, mask_token_id: int | None) -> None:
    drafter = made(target, mask_token_id)
    batch = batch_of(target, drafter)
    rollout = data_rollout(batch, STEPS)
    exact = drafter.teacher_forced(batch, rollout)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = drafter.teacher_forced(batch, rollout)
        masks = () if mask_token_id is None else drafter.mask()
    # CUDA's autocast, unlike a CPU's, puts no rows of one dtype among those of another.
    assert all(part.dtype == torch.float32 for part in masks), "as wide as at pairs of the text"
    torch.testing.assert_close(narrow.float(), exact, rtol=0.1, atol=0.1 * float(exact.std()))
    assert not torch.equal(narrow.float(), exact)


def test_layers_read_a_prompt_over_the_slots_that_it_has_filled(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, prompt, seen = made(target), list(range(2, 12)), list[int]()

    def watched(queries: torch.Tensor, keys: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(keys.shape[2])
        return attend(queries, keys, *rest)

    monkeypatch.setattr(eagle_base, "attend", watched)
    engine = Engine(target, drafter, DraftLimits(1, STEPS), prefill_chunk=4)
    engine.generate([prompt], GenerationSettings(max_new_tokens=4))
    assert seen[: 3 * (LAYERS - 1)] == [4, 4, 8, 8, 10, 10]


def test_the_card_claims_no_engine_for_norms_of_heads_beside_biases(target: Target) -> None:
    config = made(target, head_norms=True).config
    config.attention_bias = True
    (note,) = attention_notes(config)
    assert "no bias of `o_proj`" in note
    assert "no engine was tried" in note
