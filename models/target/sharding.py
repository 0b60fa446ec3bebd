"""A target whose weights lie on several processes, each of which holds a part of them.

Owns the ways in which processes share a target, and what the way asks of the forwards. Owns also how each is loaded so that no process
ever holds the whole. Does not know: samples, drafters, training.

FSDP2 and tensor parallelism are transformers' own (``DistributedConfig``), ZeRO-3 is DeepSpeed's.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from draftsmith.extras import install_command
from draftsmith.models.files.device_and_dtype import as_dtype
from draftsmith.models.files.end_tokens import read_end_tokens
from draftsmith.models.files.loading import load_causal_lm
from draftsmith.models.files.model_folder import resolve, resolve_model
from draftsmith.models.files.pretrained import check_tensors, language_model_class, read_config
from draftsmith.models.target.ends import TargetEnds
from draftsmith.models.target.extension_locks import check_extension_locks
from draftsmith.models.target.target import Target

TargetSharding = Literal["none", "fsdp2", "tp", "zero3"]


@dataclass(frozen=True)
class ShardedOver:
    """How a target lies on the processes of a run, and so what its forwards have to agree on.

    Attributes:
        sharding: with `none` each process holds a whole target. With `fsdp2` and `zero3` each holds a part of every weight, gathered layer
            by layer while each runs texts of its own. With `tp` each computes a part of every layer, of the same text.
        rank: of this process, among those that hold a target with it.
        num_ranks: processes that hold one target together.
        group: which of the targets of the run it holds a part of.
        num_groups: targets of the run.

    Raises:
        ValueError: an unknown sharding.
    """

    sharding: TargetSharding
    rank: int
    num_ranks: int
    group: int = 0
    num_groups: int = 1

    def __post_init__(self) -> None:
        if self.sharding not in get_args(TargetSharding):
            raise ValueError(f"target_sharding is {self.sharding!r}; use one of {', '.join(get_args(TargetSharding))}")

    @property
    def is_sharded(self) -> bool:
        """Whether processes wait for each other in a forward."""
        return self.sharding != "none" and self.num_ranks > 1

    @property
    def members(self) -> range:
        """Ranks, in the run, of the processes that hold a target with this one."""
        return range(self.group * self.num_ranks, (self.group + 1) * self.num_ranks)

    @property
    def shares_texts(self) -> bool:
        """Whether all processes must run a forward on the same texts; with other shardings they must run equally many."""
        return self.is_sharded and self.sharding == "tp"


def sharded_over(sharding: TargetSharding, group_size: int | None = None) -> ShardedOver:
    """The processes of this run as holders of a target; one process where no process group is there.

    With ``group_size``, so many consecutive processes hold a target, and the next ones another: as on several machines, where weights
    should not travel between them.

    Args:
        sharding: how a target is shared.
        group_size: processes for each target; None for all.

    Returns:
        This process's place.

    Raises:
        ValueError: groups for another sharding than `fsdp2`, of a size that does not divide the processes, or with a transformers that
            does not know them.
    """
    joined = distributed.is_available() and distributed.is_initialized()
    rank, num_ranks = (distributed.get_rank(), distributed.get_world_size()) if joined else (0, 1)
    size = num_ranks if group_size is None else group_size
    if size < 1 or num_ranks % size:
        raise ValueError(
            f"target_group is {size}, which does not divide the run's {num_ranks} processes; set one that does"
        )
    if size < num_ranks and sharding != "fsdp2":
        raise ValueError(
            f"target_group {size} of {num_ranks} processes goes with target_sharding fsdp2, not with {sharding!r}; leave it out"
        )
    if size < num_ranks and "dp_replicate_size" not in DistributedConfig.__dataclass_fields__:
        raise ValueError(
            f"target_group {size} of {num_ranks} processes needs transformers 5.23; leave it out, or upgrade"
        )
    return ShardedOver(sharding, rank % size, size, rank // size, num_ranks // size)


@torch.no_grad()
def load_sharded(
    path: str,
    dtype: str,
    over: ShardedOver,
    device: torch.device,
    revision: str | None = None,
    trust_remote_code: bool = False,
    context: int | None = None,
) -> Target:
    """Load the part of a target that this process holds; every process of the group must call it.

    Each process holds the target's ends (embedding, final norm, head) whole beside its part. So drafters and verification use
    them without waiting for anybody. The fingerprint is that of the files, as for a whole target.

    Args:
        path: directory or hub id.
        dtype: of the weights, such as bfloat16.
        over: the processes.
        device: where this process computes.
        revision: the hub's revision.
        trust_remote_code: whether Python files that come with the target may run.
        context: the longest text in tokens where the config's own is wrong.

    Returns:
        The target; its forwards wait for the other processes.

    Raises:
        ValueError: a single process, a bad path or dtype, weights that do not fit the config, or code that may not run. Also for a family
            without a plan of the kind in transformers, for the CPU where there is an accelerator, without DeepSpeed, and for an operation
            of DeepSpeed that a killed process left locked.
    """
    if not over.is_sharded:
        raise ValueError(
            f"target_sharding is {over.sharding!r} with {over.num_ranks} process(es); start several (trainer.devices or torchrun), "
            "or load it whole (target_sharding none)"
        )
    with _as_local_rank(device):
        model, fingerprint = _load_part(path, as_dtype(dtype), over, revision, trust_remote_code)
    ends = read_end_tokens(path, revision, trust_remote_code=trust_remote_code)
    target = Target(model, path, fingerprint, ends, context)
    _free_whole_weights(model)
    if over.sharding == "zero3":
        # A second whole forward ends DeepSpeed's record of modules, which would grow with every forward of ours.
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=target.device), use_cache=False)
    target.ends = TargetEnds.load(path, as_dtype(dtype), "cpu", revision, trust_remote_code=trust_remote_code).to(
        device
    )
    return target


@contextmanager
def _as_local_rank(device: torch.device) -> Iterator[None]:
    """Has transformers, which goes by LOCAL_RANK, place parts on this device.

    SLURM sets no such variable, and where a run takes some of a machine's GPUs it says another number.
    """
    # One that is there: a torch built for CUDA names CUDA on every machine.
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device.type == "cpu" and accelerator is not None and "DS_ACCELERATOR" not in os.environ:
        raise ValueError(
            f"device is cpu, but a sharded target is placed on this machine's {accelerator.type}; use that, or hide it "
            "(CUDA_VISIBLE_DEVICES='')"
        )
    before = os.environ.get("LOCAL_RANK")
    if device.index is not None:
        os.environ["LOCAL_RANK"] = str(device.index)
    try:
        yield
    finally:
        if device.index is not None:
            del os.environ["LOCAL_RANK"]
            os.environ.update({} if before is None else {"LOCAL_RANK": before})


def _load_part(
    path: str, dtype: torch.dtype, over: ShardedOver, revision: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, str]:
    if over.sharding == "zero3":
        return _load_zero3(path, dtype, revision, trust_remote_code)
    config = read_config(resolve(path, revision), trust_remote_code).get_text_config()
    _check_plan(path, over.sharding, config)
    if over.sharding == "tp":
        _check_heads(path, over.num_ranks, config)
        shares = DistributedConfig(tp_size=over.num_ranks)
    elif over.num_groups > 1:
        shares = DistributedConfig(fsdp_size=over.num_ranks, dp_replicate_size=over.num_groups)
    else:
        shares = DistributedConfig(fsdp_size=over.num_ranks)
    return load_causal_lm(path, dtype, revision=revision, distributed=shares, trust_remote_code=trust_remote_code)


def _check_plan(path: str, sharding: TargetSharding, config: PreTrainedConfig) -> None:
    """Without a plan of its own, a family's layers would not be divided, or not be gathered."""
    plan, other = ("base_model_tp_plan", "fsdp2") if sharding == "tp" else ("base_model_fsdp_plan", "zero3")
    if not getattr(config, plan, None):
        raise ValueError(
            f"{path} is of the family {config.model_type!r}, for which transformers has no {plan}, so target_sharding {sharding!r} "
            f"does not know how to divide it; use {other}"
        )


def _check_heads(path: str, num_ranks: int, config: PreTrainedConfig) -> None:
    """Each process computes some attention heads of every layer, and all equally many."""
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if heads is not None and heads % num_ranks:
            raise ValueError(
                f"{path} has {name} = {heads}, which {num_ranks} processes cannot share equally in tensor parallelism; use as many "
                "processes as divide it, or target_sharding fsdp2"
            )


def _load_zero3(
    path: str, dtype: torch.dtype, revision: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, str]:
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"target_sharding 'zero3' needs DeepSpeed, which is not installed; run: {install_command('deepspeed')}; or use fsdp2, which "
            "needs no other package"
        )
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    check_extension_locks()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        # Nothing is fetched ahead: DeepSpeed learns an order of modules from whole forwards, and ours end before the head.
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
        },
    }
    # Before anything is divided: transformers then neither loads without weights nor reports unknown keys.
    folder = resolve_model(path, revision)
    check_tensors(language_model_class(read_config(folder, trust_remote_code), folder), folder, trust_remote_code)
    # While it lives, every model that transformers loads is divided.
    dividing = HfDeepSpeedConfig(config)
    model, fingerprint = load_causal_lm(path, dtype, revision=revision, trust_remote_code=trust_remote_code)
    del dividing
    engine = deepspeed.initialize(model=model.requires_grad_(False), config=config)[0]
    # Its hooks gather the weights for as long as it lives; in a list, or it would be a part of the model that it holds.
    model.__dict__["zero3_engine"] = [engine]
    return model, fingerprint


def _free_whole_weights(model: PreTrainedModel) -> None:
    """Lets no FSDP unit keep its gathered weights from one forward to the next."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
