"""A target that is a base and a PEFT adapter, through every command: its own caches, its own drafters, exact replies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import EOS, save_drafter
from training import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from draftsmith.cli import main
from draftsmith.data.shards.manifest import Manifest
from draftsmith.decode import Engine, GenerationSettings
from draftsmith.models import Target, TargetEnds
from draftsmith.models.drafters.drafter_folder import load_drafter
from draftsmith.models.files.loading import target_fingerprint

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def save_lora(target: Path, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A PEFT adapter of random weights, as PEFT saves it."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(target), LoraConfig(**(LORA | settings)))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lora(target, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def chain(target: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each command left: replies, cache, run/drafter, drafter, report; all of it with --adapter."""
    out = tmp_path_factory.mktemp("chain")
    questions = [{"id": f"q{number}", "prompt": f"Tom has {number} apples. How many?"} for number in range(12)]
    (out / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    assert call("data prompts", source=out / "questions.jsonl", out=out / "prompts") == 0
    own = {"target": target, "adapter": lora}
    assert call("data respond", prompts=out / "prompts", out=out / "replies", max_new_tokens=12, **own) == 0
    assert call("data extract", source=out / "replies", out=out / "cache", dtype="float32", **own) == 0
    config = tiny_config(out, target, out / "cache", f"    adapter: {lora}")
    assert main(["train", "fit", f"--config={config}"]) == 0
    assert call("export", drafter=out / "run" / "drafter", out=out / "drafter", **own) == 0
    given = {"prompts": out / "prompts", "out": out / "report", "drafters": out / "drafter", "shapes": "2x3"}
    assert call("evaluate", **given, **own, max_new_tokens=12, limit=4, transformers_prompts=2, ledger_prompts=0) == 0
    return out


def call(command: str, **options: object) -> int:
    return main([*command.split(), *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())])


def test_the_fingerprint_tells_base_adapter_and_the_adapters_settings_apart(
    target: Path, lora: Path, tmp_path: Path
) -> None:
    stronger = tmp_path / "stronger"
    stronger.mkdir()
    (stronger / "adapter_model.safetensors").write_bytes((lora / "adapter_model.safetensors").read_bytes())
    fields = json.loads((lora / "adapter_config.json").read_text())
    (stronger / "adapter_config.json").write_text(json.dumps(fields | {"lora_alpha": 16}))
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "adapter_model.safetensors").write_bytes((lora / "adapter_model.safetensors").read_bytes())
    shuffled = {"target_modules": fields["target_modules"][::-1], "base_model_name_or_path": "elsewhere"}
    (moved / "adapter_config.json").write_text(json.dumps(fields | shuffled))
    found = [Target.load(str(target), adapter=one and str(one)).fingerprint for one in (None, lora, stronger, moved)]
    assert len(set(found[:3])) == 3
    assert found[3] == found[1]
    assert TargetEnds.load(str(target), adapter=str(lora)).fingerprint == found[1]


def test_every_command_speaks_of_the_adapted_target(target: Path, lora: Path, chain: Path) -> None:
    own = Target.load(str(target), adapter=str(lora))
    assert Manifest.load(chain / "cache").identity.target_fingerprint == own.fingerprint
    assert load_drafter(chain / "drafter").config.target_fingerprint == own.fingerprint
    assert str(lora) in (chain / "drafter" / "README.md").read_text()
    [row, *_] = json.loads((chain / "report" / "report.json").read_text())["rows"]
    assert row["exact_share"] == 1.0


def test_replies_and_decoding_are_the_adapted_targets_own(target: Path, lora: Path, chain: Path) -> None:
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(target), LoraConfig(**LORA))
    adapted.load_adapter(str(lora), "default")
    base = Target.load(str(target))
    own = Target.load(str(target), adapter=str(lora))
    drafter = load_drafter(chain / "drafter")
    rows = [json.loads(line) for line in (chain / "replies" / "responses.jsonl").read_text().splitlines()]
    prompts = [first_ids(row) for row in rows[:4]]
    request = GenerationSettings(max_new_tokens=12, eos_token_ids=(EOS,))
    drafted = [one.token_ids for one in Engine(own, drafter).generate(prompts, request)]
    expected = [
        adapted.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=EOS)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]
    assert drafted == expected
    assert drafted != [one.token_ids for one in Engine(base).generate(prompts, request)]


def first_ids(row: dict[str, Any]) -> list[int]:
    """Token ids of a reply row's first prompt."""
    return list(row["prompt_ids"] if "prompt_ids" in row else row["turns"][0]["prompt_ids"])


def test_decode_takes_the_adapter(target: Path, lora: Path, chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"prompt": "Tom", "target": target, "drafter": chain / "drafter", "max_new_tokens": 6}
    assert call("decode", adapter=lora, **given) == 0
    assert "tokens per step" in capsys.readouterr().out
    assert call("decode", **given) == 1
    assert "this drafter was trained for target" in capsys.readouterr().err


def test_what_is_of_the_base_is_refused_for_the_adapted_target_and_the_reverse(
    target: Path, lora: Path, chain: Path, drafter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"target": target, "adapter": lora}
    assert call("data extract", source=chain / "replies", out=tmp_path / "base", dtype="float32", target=target) == 0
    for cache, extra in ((chain / "cache", ""), (tmp_path / "base", f"    adapter: {lora}")):
        config = tiny_config(tmp_path, target, cache, extra)
        assert main(["train", "fit", f"--config={config}"]) == 1
        assert "extract a cache with this target" in capsys.readouterr().err
    assert call("export", drafter=chain / "run" / "drafter", out=tmp_path / "out", target=target) == 1
    assert call("export", drafter=drafter, out=tmp_path / "out", **own) == 1
    assert capsys.readouterr().err.count("this drafter was trained for target") == 2
    assert call("export", drafter=drafter, out=tmp_path / "out", adapter=lora) == 1
    assert "give the target, too" in capsys.readouterr().err
    assert call("evaluate", prompts=chain / "prompts", out=tmp_path / "report", drafters=drafter, limit=1, **own) == 1
    assert "this drafter was trained for target" in capsys.readouterr().err


def test_an_adapter_of_the_trunk_alone_leaves_the_ends_to_be_loaded_without_it(
    target: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Target.load(str(target), adapter=str(lora)).ends
    monkeypatch.setattr("draftsmith.models.target.ends.load_causal_lm", None)
    ends = TargetEnds.load(str(target), adapter=str(lora))
    assert ends.fingerprint == whole.fingerprint
    assert ends.config.num_hidden_layers == whole.config.num_hidden_layers
    states = torch.randn(3, ends.hidden_size)
    torch.testing.assert_close(ends.logits(ends.final_norm(states)), whole.logits(whole.final_norm(states)))


def test_an_adapter_that_reaches_the_ends_is_merged_there_too(target: Path, tmp_path: Path) -> None:
    folder = save_lora(target, tmp_path / "ends", target_modules=["q_proj", "lm_head"])
    ends, whole = TargetEnds.load(str(target), adapter=str(folder)), Target.load(str(target), adapter=str(folder))
    assert torch.equal(ends.head_weight, whole.ends.head_weight)
    assert not torch.equal(ends.head_weight, TargetEnds.load(str(target)).head_weight)


TIED = {
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 9]}},
}


@pytest.mark.parametrize("settings", TIED.values(), ids=TIED)
def test_where_embedding_and_head_share_a_weight_the_merged_target_is_the_adapted_one(
    target: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """An adapter of one of the two must not act on the other."""
    config = AutoConfig.from_pretrained(target, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapted = get_peft_model(model, LoraConfig(**(LORA | settings))).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                weight.add_(torch.randn(weight.shape))
    adapted.save_pretrained(tmp_path / "lora")
    ids = torch.tensor([[5, 9, 40, 41]])
    with torch.no_grad():
        expected = adapted(ids).logits
    whole = Target.load(str(tmp_path / "tied"), adapter=str(tmp_path / "lora"))
    torch.testing.assert_close(whole.logits(whole.prefix(ids).normed), expected, rtol=1e-4, atol=1e-4)
    ends = TargetEnds.load(str(tmp_path / "tied"), adapter=str(tmp_path / "lora"))
    assert torch.equal(ends.head_weight, whole.ends.head_weight)
    assert torch.equal(ends.embed(ids), whole.ends.embed(ids))


def test_messages_tell_the_adapted_target_from_its_base(target: Path, lora: Path) -> None:
    base, own = target_fingerprint(str(target)), target_fingerprint(str(target), adapter=str(lora))
    assert base[:12] != own[:12]


def test_an_adapter_given_as_a_target_is_refused_with_the_remedy(lora: Path) -> None:
    for load in (Target.load, TargetEnds.load):
        with pytest.raises(ValueError, match=r"holds a PEFT adapter and no model .*give its base model here and this"):
            load(str(lora))


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def _rename_tensors(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {key.replace("layers.1", "layers.7"): one for key, one in tensors.items()}, folder / "adapter_model.safetensors"
    )


def _spoil_number(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, folder / "adapter_model.safetensors")


def _remove_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_pickle, "adapter_model.bin and no adapter_model.safetensors; pickled adapters are never loaded"),
        (_rename_tensors, r"does not fit the model \(missing: .*layers.1.*unexpected: .*layers.7"),
        (_remove_config, "cannot be had|holds no adapter"),
        (_spoil_number, "holds NaN or infinity"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 40), "no safetensors file"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), "is cut off or no safetensors file"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused(
    target: Path, lora: Path, tmp_path: Path, spoil: Callable[[Path], object], complaint: str
) -> None:
    folder = tmp_path / "spoilt"
    folder.mkdir()
    for path in lora.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    spoil(folder)
    with pytest.raises(ValueError, match=complaint):
        Target.load(str(target), adapter=str(folder))
    if spoil not in (_spoil_number, _rename_tensors):  # those are of the trunk, which ends are loaded without
        with pytest.raises(ValueError, match=complaint):
            TargetEnds.load(str(target), adapter=str(folder))


def test_an_adapter_that_is_missing_or_of_another_model_is_refused(target: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter .*nowhere.* cannot be had"):
        Target.load(str(target), adapter=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no adapter"):
        Target.load(str(target), adapter=str(target))
    foreign = save_lora(target, tmp_path / "foreign")
    fields = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps(fields | {"target_modules": ["c_attn"]}))
    with pytest.raises(ValueError, match="does not fit the model; give one that was trained on it"):
        Target.load(str(target), adapter=str(foreign))
    tensors = load_file(lora / "adapter_model.safetensors")
    bad = save_lora(target, tmp_path / "bad")
    save_file({key: one.repeat(2, 1) for key, one in tensors.items()}, bad / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="does not fit the model"):
        Target.load(str(target), adapter=str(bad))


def test_a_drafter_of_the_base_with_its_adapter_serves_the_adapted_target(
    target: Path, lora: Path, chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The drafter of the base, adapted with a few tensors; exported it is an ordinary drafter of the adapted target."""
    base = save_drafter(tmp_path / "base", target)
    extra = f"    adapter: {lora}\n    init_from: {base}\n    allow_other_target: true\n    lora: {{rank: 2}}"
    config = tiny_config(tmp_path, target, chain / "cache", extra)
    assert main(["train", "fit", f"--config={config}"]) == 0
    adapter = tmp_path / "run" / "drafter"
    given = {"prompt": "Tom", "target": target, "adapter": lora, "max_new_tokens": 6}
    assert call("decode", drafter=base, drafter_adapter=adapter, **given) == 0
    assert call("decode", drafter_adapter=adapter, **given) == 0
    assert capsys.readouterr().out.count("tokens per step") == 2
    own = {"target": target, "adapter": lora, "out": tmp_path / "merged"}
    assert call("export", drafter=base, drafter_adapter=adapter, **own) == 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"the drafter `{base}` with its adapter `{adapter}` merged" in card
    assert "lora" in card, "the training of the adapter is recorded"
    merged, adapted = load_drafter(tmp_path / "merged").state_dict(), load_drafter(adapter).state_dict()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, adapted[name], rtol=1e-5, atol=1e-5)
    assert call("export", drafter=adapter, out=tmp_path / "x") == 1
    assert "is an adapter; give its drafter, and this folder as --drafter-adapter" in capsys.readouterr().err
