"""A target that two processes hold together gives the states of a whole one, and each process holds about half of it.

Run as a script, this file is what each of the processes does.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tiny import make_tokenizer, save_target
from torch.distributed.tensor import DTensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.distributed import DistributedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from draftsmith.data.cache import sharded_extraction as together
from draftsmith.data.cache.extract import extract
from draftsmith.data.cache.extraction import StorageOptions
from draftsmith.data.cache.reader import HiddenStateCache
from draftsmith.data.chats.tokenized_samples import TokenizedSample
from draftsmith.data.shared_work import ShareOptions
from draftsmith.decode.engine import Engine
from draftsmith.decode.greedy_continuations import greedy_continuations
from draftsmith.decode.sampling import GenerationSettings
from draftsmith.models.families.redrafter import ReDrafter
from draftsmith.models.target import sharding as sharding_module
from draftsmith.models.target.options import PlacementOptions
from draftsmith.models.target.sharding import ShardedOver, load_sharded, sharded_over
from draftsmith.models.target.target import PRE_NORM, Target
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.trunk.known_models import decoder_blocks

SHARDINGS = ["fsdp2", "tp", *(["zero3"] if importlib.util.find_spec("deepspeed") else [])]
FAMILIES = ["llama", "qwen3-tied", "gemma2"]
LAYERS = ("layer.0.output", PRE_NORM)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 4,
    "pad_token_id": 0,
}


def save_families(root: Path) -> None:
    """Three families: an untied one, a tied one, and one with soft caps and a sliding window."""
    save_target(root / "llama")
    torch.manual_seed(0)
    size = len(make_tokenizer())
    Qwen3ForCausalLM(Qwen3Config(vocab_size=size, tie_word_embeddings=True, **SIZES)).save_pretrained(
        root / "qwen3-tied"
    )
    Gemma2ForCausalLM(
        Gemma2Config(vocab_size=size, query_pre_attn_scalar=8, sliding_window=4, **SIZES)
    ).save_pretrained(root / "gemma2")


def work(root: Path) -> None:
    """Loads each family in each sharding, and notes how it compares with the whole target."""
    torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {}
    for family in FAMILIES:
        whole = Target.load(str(root / family))
        for sharding in SHARDINGS:
            over = sharded_over(sharding)  # type: ignore[arg-type]
            found[f"{family} {sharding}"] = compare(
                load_sharded(str(root / family), "float32", over, torch.device("cpu")), whole
            )
    extracted(root, "tp")
    (root / f"found-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def work_in_groups(root: Path) -> None:
    """Two pairs of processes hold a target each, and run unequally many forwards over texts of their own."""
    torch.distributed.init_process_group("gloo")
    over = sharded_over("fsdp2", 2)
    target, whole = (
        load_sharded(str(root / "llama"), "float32", over, torch.device("cpu")),
        Target.load(str(root / "llama")),
    )
    off = []
    for turn in range(1 + 2 * over.group):
        ids = torch.arange(20).view(2, 10) * (3 + turn + over.group) % 290
        off.append(float((target.prefix(ids).pre_norm - whole.prefix(ids).pre_norm).abs().max()))
    found = {"off": off, "share": bytes_held(target.model) / bytes_held(whole.model), "members": [*over.members]}
    (root / f"grouped-{torch.distributed.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def extracted(root: Path, target_sharding: Literal["none", "tp"]) -> Path:
    """A cache of some replies, in several shards."""
    source, out = root / "replies.jsonl", root / f"cache-{target_sharding}"
    extract(
        str(root / "llama"),
        source,
        out,
        storage=StorageOptions(layers=LAYERS, dtype="float32", local_horizon=2, batch_tokens=48, shard_mib=0.02),
        target_sharding=target_sharding,
    )
    return out


def save_replies(path: Path) -> None:
    with path.open("w") as file:
        for number in range(24):
            reply = [(7 * number + 3 * place) % 290 + 5 for place in range(4 + number % 9)]
            row = {"id": f"s{number}", "prompt_ids": [5 + number, 6, 7], "reply_ids": reply, "finish": "length"}
            file.write(json.dumps(row) + "\n")


def compare(target: Target, whole: Target) -> dict[str, Any]:
    ids = torch.arange(24).view(2, 12) * 7 % 290 + 5
    got, expected = target.prefix(ids, LAYERS), whole.prefix(ids, LAYERS)
    prompts = ids.tolist()
    torch.manual_seed(1)
    drafter = ReDrafter.for_target(whole.ends, head_init="random")
    limits = DraftLimits(beam_width=2, draft_length=3)
    request = GenerationSettings(max_new_tokens=12)
    decoded = [
        [generation.token_ids for generation in Engine(each, drafter, limits).generate(prompts, request)]
        for each in (target, whole)
    ]
    return {
        "off": max(
            float((got.feature(name) - expected.feature(name)).abs().max() / expected.feature(name).abs().max())
            for name in LAYERS
        ),
        "logits_off": float((target.logits(got.normed) - whole.logits(expected.normed)).abs().max()),
        "plain": all(type(got.feature(name)) is torch.Tensor for name in LAYERS),
        "greedy": torch.equal(greedy_continuations(target, ids, 3), greedy_continuations(whole, ids, 3)),
        "decoded": decoded[0] == decoded[1],
        "fingerprint": target.fingerprint == whole.fingerprint,
        "share": bytes_held(target.model) / bytes_held(whole.model),
        "share_of_blocks": blocks_held(target) / blocks_held(whole),
        "records": records_modules(target),
    }


def bytes_held(module: torch.nn.Module) -> int:
    """Bytes of a sharded module's weights on this process: its own parts, and what is not divided."""
    num_bytes = 0
    for weight in module.parameters():
        local = weight.to_local() if isinstance(weight, DTensor) else getattr(weight, "ds_tensor", weight)
        num_bytes += local.numel() * local.element_size()
    return num_bytes


def blocks_held(target: Target) -> int:
    return sum(map(bytes_held, decoder_blocks(target.model)))


def records_modules(target: Target) -> bool:
    """Whether DeepSpeed still notes every module that is run."""
    if not hasattr(target.model, "zero3_engine"):
        return False
    return target.model.zero3_engine[0].optimizer.get_param_coordinator().is_record_trace()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("families")
    save_families(root)
    save_replies(root / "replies.jsonl")
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> list[dict[str, dict[str, Any]]]:
    """What each process has noted."""
    launch(root, 2, "together")
    return [json.loads((root / f"found-{rank}.json").read_text()) for rank in range(2)]


def launch(root: Path, num_processes: int, what: str) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    process = subprocess.Popen(
        [*command, __file__, str(root), what],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=500)
    finally:
        # torchrun ends its workers when it is asked to end, and not when it is killed.
        process.terminate()
        process.wait(60)
    assert process.returncode == 0, output[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_target_is_the_whole_one(found: list[dict[str, dict[str, Any]]], family: str, sharding: str) -> None:
    for rank in found:
        got = rank[f"{family} {sharding}"]
        assert got["off"] < 1e-5
        assert got["logits_off"] < 1e-4
        assert got["greedy"]
        assert got["decoded"], "speculative decoding with it gives other tokens"
        assert got["plain"], "states are spread over processes themselves"
        assert got["fingerprint"], "the fingerprint is not that of the files"
        assert not got["records"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_of_two_processes_holds_half_of_the_weights(
    found: list[dict[str, dict[str, Any]]], family: str, sharding: str
) -> None:
    for rank in found:
        got = rank[f"{family} {sharding}"]
        # Tensor parallelism leaves norms whole, which weigh more in a tiny model than in any other, and in transformers before
        # 5.23 the embedding.
        assert 0.49 < got["share_of_blocks"] < 0.52
        assert sharding == "tp" or 0.49 < got["share"] < 0.51


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("found")
def test_processes_that_hold_a_target_together_extract_the_cache_of_one(root: Path) -> None:
    expected, got = HiddenStateCache(extracted(root, "none")), HiddenStateCache(root / "cache-tp")
    assert len(got.manifest.shards) > 2
    assert got.manifest.differences(expected.manifest.identity) == []
    for own, whole in zip(got, expected, strict=True):
        assert torch.equal(own.input_ids, whole.input_ids)
        assert own.greedy_ids is not None
        assert whole.greedy_ids is not None
        assert torch.equal(own.greedy_ids, whole.greedy_ids)
        for layer in LAYERS:
            torch.testing.assert_close(own.hidden[layer], whole.hidden[layer], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    "dp_replicate_size" not in DistributedConfig.__dataclass_fields__, reason="needs transformers 5.23 for groups"
)
def test_groups_of_processes_hold_a_target_each_and_do_not_wait_for_each_other(root: Path) -> None:
    launch(root, 4, "groups")
    found = [json.loads((root / f"grouped-{rank}.json").read_text()) for rank in range(4)]
    assert [rank["members"] for rank in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [len(rank["off"]) for rank in found] == [1, 1, 3, 3]
    assert all(off < 1e-4 for rank in found for off in rank["off"])
    assert all(0.49 < rank["share"] < 0.51 for rank in found)


def test_a_group_that_does_not_divide_the_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="target_group is 2, which does not divide the run's 1 processes"):
        sharded_over("fsdp2", 2)


def test_extraction_together_needs_a_launcher_and_whole_weights(tmp_path: Path) -> None:
    for settings, complaint in (
        ({}, "start them with torchrun"),
        (
            {"where": PlacementOptions(quantization="8bit", device_map="auto")},
            "device_map, quantization cannot be combined",
        ),
        ({"share": ShareOptions(rank=0, world_size=1)}, "rank, world_size cannot be combined"),
    ):
        with pytest.raises(ValueError, match=complaint):
            extract("embedded:target", tmp_path, tmp_path / "cache", target_sharding="tp", **settings)  # type: ignore[arg-type]


def test_one_process_has_nothing_to_share() -> None:
    assert not sharded_over("fsdp2").is_sharded
    with pytest.raises(ValueError, match="start several"):
        load_sharded("embedded:target", "float32", sharded_over("tp"), torch.device("cpu"))


def test_heads_that_processes_cannot_share_are_refused(tmp_path: Path) -> None:
    folder = save_target(tmp_path / "target")
    with pytest.raises(ValueError, match="num_attention_heads = 4, which 3 processes cannot share equally"):
        load_sharded(str(folder), "float32", ShardedOver("tp", 0, 3), torch.device("cpu"))


@pytest.mark.parametrize(("sharding", "remedy"), [("tp", "use fsdp2"), ("fsdp2", "use zero3")])
def test_a_family_without_a_plan_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharding: Any, remedy: str
) -> None:
    folder = save_target(tmp_path / "target")
    monkeypatch.setattr(LlamaConfig, "base_model_tp_plan", None)
    monkeypatch.setattr(LlamaConfig, "base_model_fsdp_plan", None)
    with pytest.raises(
        ValueError, match=f"'llama', for which transformers has no base_model_{sharding.rstrip('2')}.*{remedy}"
    ):
        load_sharded(str(folder), "float32", ShardedOver(sharding, 0, 2), torch.device("cpu"))


def test_parts_are_placed_on_the_device_of_the_run_whatever_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(sharding_module, "_load_part", lambda *_: seen.append(os.environ.get("LOCAL_RANK")) or 1 / 0)
    for before in ("1", None):
        monkeypatch.setenv("LOCAL_RANK", before) if before else monkeypatch.delenv("LOCAL_RANK")
        with pytest.raises(ZeroDivisionError):
            load_sharded("embedded:target", "float32", ShardedOver("fsdp2", 1, 2), torch.device("cuda", 3))
        assert os.environ.get("LOCAL_RANK") == before
    assert seen == ["3", "3"]


def test_the_cpu_is_refused_where_parts_would_be_placed_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    with pytest.raises(ValueError, match="placed on this machine's cuda"):
        load_sharded("embedded:target", "float32", ShardedOver("tp", 0, 2), torch.device("cpu"))


def test_the_cpu_is_used_where_torch_is_built_for_a_gpu_and_none_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with PyPI's torch on a machine without a GPU, and where CUDA_VISIBLE_DEVICES is empty."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch._C._accelerator_getAccelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert torch.accelerator.current_accelerator() == torch.device("cuda")
    monkeypatch.setattr(sharding_module, "_load_part", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_sharded("embedded:target", "float32", ShardedOver("tp", 0, 2), torch.device("cpu"))


def test_states_and_logits_come_back_to_the_device_of_the_ids_wherever_layers_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trunk and the head of this target compute on the CPU what is asked for on the meta device, as accelerate has a GPU do it."""
    target = Target.load(str(save_target(tmp_path / "target")))
    head = target.ends.head.forward
    monkeypatch.setattr(target.ends.head, "forward", lambda states: head(torch.zeros(states.shape)))

    class Elsewhere(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            states = target._blocks[0](
                torch.zeros(*input_ids.shape, 32), position_embeddings=rotation(input_ids.shape[1])
            )
            return BaseModelOutputWithPast(last_hidden_state=target._norm(states))

    def rotation(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return target.model.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])

    target._base = Elsewhere()
    output = target.prefix(torch.zeros(2, 5, dtype=torch.int64, device="meta"), LAYERS[:1])
    found = [output.pre_norm, output.normed, output.feature(LAYERS[0]), target.logits(output.normed)]
    assert [states.device.type for states in found] == ["meta"] * 4


class Calls:
    """Stands for the process group of an extraction: notes what the first process sends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[list[int]] = []
        monkeypatch.setattr(together.distributed, "new_group", lambda **_: None)
        monkeypatch.setattr(together, "_send", lambda numbers, group: self.sent.append(list(numbers)))


@pytest.mark.parametrize("where", ["in a forward", "elsewhere", "nowhere"])
def test_other_processes_are_let_go_unless_they_wait_within_a_forward(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    calls = Calls(monkeypatch)
    monkeypatch.setattr(together, "features", lambda *_: 1 / 0 if where == "in a forward" else None)
    # Sending would wait for ever where the others are in a collective that this process has left.
    with contextlib.suppress(ZeroDivisionError), together.leading(None) as compute:  # type: ignore[arg-type]
        compute([TokenizedSample("a", [5, 6], [True, True])], None, print)  # type: ignore[arg-type]
        if where == "elsewhere":
            raise ZeroDivisionError
    assert calls.sent == [[2], [5, 6], *([[]] if where != "in a forward" else [])]


def test_only_tensor_parallelism_needs_the_same_texts_everywhere() -> None:
    shares = {name: ShardedOver(name, 0, 2).shares_texts for name in ("none", "fsdp2", "tp", "zero3")}  # type: ignore[arg-type]
    assert shares == {"none": False, "fsdp2": False, "tp": True, "zero3": False}


def test_an_unknown_sharding_is_refused() -> None:
    with pytest.raises(ValueError, match="use one of none, fsdp2, tp, zero3"):
        ShardedOver("rows", 0, 1)  # type: ignore[arg-type]


if __name__ == "__main__":
    if "zero3" in SHARDINGS:
        import deepspeed

        # Built by a compiler at first use, on CPUs only, and a faster way for what gloo does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    {"together": work, "groups": work_in_groups}[sys.argv[2]](Path(sys.argv[1]))
