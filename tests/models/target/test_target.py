"""The target seam: its doors give the model's own numbers, and the error for what has no support names it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from doubles import BOS, VOCAB, family_configs, random_model, random_target
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize

from draftsmith.models import PRE_NORM, Target, TargetEnds, tree_from_paths
from draftsmith.models.files.device_and_dtype import as_device, as_dtype
from draftsmith.models.files.fingerprint import checkpoint_fingerprint
from draftsmith.models.files.model_folder import resolve
from draftsmith.models.slots.slot_cache import SlotCache
from draftsmith.models.tree.mask import slot_mask, slot_positions


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    random_model(family_configs()["llama"]).save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.mark.parametrize("family", sorted(family_configs()))
def test_doors_give_the_models_own_states_and_logits(family: str) -> None:
    target = random_target(family)
    ids = torch.tensor([[BOS, 4, 9, 30, 7, 8, 12, 40, 3, 5, 6]])
    output = target.prefix(ids, layers=("layer.1.output",))
    with torch.inference_mode():
        reference = target.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(target.logits(output.normed), reference.logits)
    torch.testing.assert_close(output.layers["layer.1.output"], reference.hidden_states[2])
    torch.testing.assert_close(target.ends.final_norm(output.pre_norm), reference.hidden_states[-1])


@pytest.mark.parametrize("family", sorted(family_configs()))
def test_packed_tree_logits_equal_per_path_logits(family: str) -> None:
    target = random_target(family)
    prefix = [BOS, 11, 12, 13, 14, 15, 16, 17]
    paths = torch.tensor([[[20, 21, 22, 23], [20, 21, 24, 25], [30, 31, 32, 33]]])
    tree = tree_from_paths(torch.tensor([19]), paths)
    cache = SlotCache(40, num_layers=3)
    positions = torch.arange(len(prefix))[None]
    cache.aim(positions, len(prefix), first=0)
    causal = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    target(torch.tensor([prefix]), cache=cache, positions=positions, mask=causal, key_positions=positions)
    lengths = torch.tensor([len(prefix)])
    cache.aim(lengths[:, None] + torch.arange(tree.num_nodes), len(prefix) + tree.num_nodes)
    mask = slot_mask(tree.ancestors(), lengths, cache.window)
    key_positions = slot_positions(tree.depths_BN, lengths, cache.window)
    packed = target(
        tree.tokens_BN, cache=cache, positions=lengths[:, None] + tree.depths_BN, mask=mask, key_positions=key_positions
    )
    logits = target.logits(packed.normed)[0]
    for path in paths[0].tolist():
        with torch.inference_mode():
            alone = target.model(input_ids=torch.tensor([[*prefix, 19, *path]]), use_cache=False).logits[
                0, len(prefix) :
            ]
        node = 0
        torch.testing.assert_close(logits[0], alone[0], rtol=1e-4, atol=1e-4)
        for depth, token in enumerate(path):
            below = (tree.parents_BN[0] == node) & (tree.tokens_BN[0] == token)
            node = int(below.nonzero()[0])
            torch.testing.assert_close(logits[node], alone[depth + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1), "Mamba.*recurrent state"),
        (transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4), "Bloom.*ALiBi"),
        (transformers.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True), "ALiBi"),
    ],
    ids=["mamba", "bloom", "falcon-alibi"],
)  # fmt: skip
def test_families_that_cannot_decode_trees_are_refused_by_name(
    config: transformers.PreTrainedConfig, reason: str
) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=reason):
        Target.from_model(model)


def test_ends_load_without_the_trunk_and_equal_the_targets(saved: Path) -> None:
    ends, target = TargetEnds.load(str(saved)), Target.load(str(saved))
    assert ends.fingerprint == target.fingerprint
    states = torch.randn(3, ends.hidden_size)
    torch.testing.assert_close(ends.logits(ends.final_norm(states)), target.logits(target.ends.final_norm(states)))
    ids = torch.tensor([3, 4])
    torch.testing.assert_close(ends.embed(ids), target.ends.embed(ids))
    trunk = sum(parameter.numel() for parameter in target.model.model.layers.parameters())
    assert sum(parameter.numel() for parameter in ends.parameters()) < trunk


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 caps its logits
@pytest.mark.parametrize("head", ["plain", "scaled", "with a bias", "wrapped"])
@torch.no_grad()
def test_the_logits_of_some_tokens_are_those_of_all(family: str, head: str) -> None:
    ends = random_target(family).ends
    if head == "scaled":
        ends.logit_scale = 0.5
    elif head == "with a bias":
        ends.head.bias = torch.nn.Parameter(torch.randn(ends.vocab_size))
    elif head == "wrapped":
        parametrize.register_parametrization(ends.head, "weight", Doubled())
    ids, normed = torch.tensor([2, 3, 40]), torch.randn(2, 5, ends.hidden_size)
    torch.testing.assert_close(ends.logits_of(ids)(normed), ends.logits(normed)[..., ids])


class Doubled(torch.nn.Module):
    """Makes a head that is no plain matrix."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2.0 * weight


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_ends_know_the_targets_whole_config(tmp_path: Path, family: str) -> None:
    random_model(family_configs()[family]).save_pretrained(tmp_path)
    whole = Target.load(str(tmp_path))
    for config in (TargetEnds.load(str(tmp_path)).config, whole.ends.config):
        assert config.num_hidden_layers == 3
        assert getattr(config, "layer_types", None) == getattr(whole.config, "layer_types", None)
        assert config.num_attention_heads == 4
        assert config.to_dict().get("rope_parameters") == whole.config.to_dict().get("rope_parameters")


def test_ends_of_a_family_that_cannot_decode_trees_are_refused_with_an_adapter_too(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "bloom")
    get_peft_model(model, LoraConfig(r=2, target_modules=["query_key_value"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="ALiBi"):
        TargetEnds.load(str(tmp_path / "bloom"), adapter=str(tmp_path / "adapter"))


def test_end_tokens_are_those_of_the_generation_config_else_of_the_config() -> None:
    target = random_target()
    generation = target.model.generation_config
    generation.eos_token_id = [7, 9]
    assert target.eos_token_ids == (7, 9)
    generation.eos_token_id = None
    assert target.eos_token_ids == (2,)
    target.config.eos_token_id = None
    assert target.eos_token_ids == ()


def test_a_fingerprint_changes_with_one_weight(saved: Path) -> None:
    before = checkpoint_fingerprint(saved)
    weights = load_file(saved / "model.safetensors")
    weights["model.norm.weight"][3] += 0.01
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_fingerprint(saved) != before


def test_a_lora_adapter_is_merged_and_part_of_the_fingerprint(saved: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = Target.load(str(saved))
    model = transformers.AutoModelForCausalLM.from_pretrained(saved)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    target = Target.load(str(saved), adapter=str(tmp_path / "adapter"))
    ids = torch.tensor([[BOS, 5, 6]])
    with torch.inference_mode():
        expected = tuned(input_ids=ids).logits
    torch.testing.assert_close(target.logits(target.prefix(ids).normed), expected, rtol=1e-4, atol=1e-4)
    assert target.fingerprint != base.fingerprint
    assert not torch.allclose(base.logits(base.prefix(ids).normed), expected)


def test_unknown_layers_are_refused_with_those_there_are() -> None:
    target = random_target()
    with pytest.raises(ValueError, match=r"layer\.9\.output.*i from 0 to 2"):
        target.prefix(torch.tensor([[BOS]]), layers=("layer.9.output",))
    assert PRE_NORM not in target.prefix(torch.tensor([[BOS]]), layers=(PRE_NORM,)).layers


def test_bad_paths_devices_and_dtypes_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        resolve(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"without config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(ValueError, match="no embedded model"):
        resolve("embedded:nothing")
    with pytest.raises(ValueError, match="is not there: this machine has"):
        as_device("cuda:63")
    with pytest.raises(ValueError, match="is not a device"):
        as_device("gpu")
    with pytest.raises(ValueError, match="'int8' is not one of"):
        as_dtype("int8")


def test_a_pickled_checkpoint_is_never_loaded(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    torch.save({}, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled checkpoints are never loaded"):
        checkpoint_fingerprint(saved)
    with pytest.raises((ValueError, OSError)):
        Target.load(str(saved))


def test_a_window_that_is_longer_than_the_proofs_stays_the_models_own() -> None:
    config = family_configs()["mistral"]
    config.sliding_window = 40
    target = Target.from_model(random_model(config))
    assert target.window == 40
