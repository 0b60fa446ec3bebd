"""Which target a draft LM learns from, and where its weights lie.

Owns: the target's settings, loading it for a run. Does not know: draft LMs, losses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from pytorch_lightning.strategies import Strategy

from draftsmith.models.files.device_and_dtype import resolved_dtype
from draftsmith.models.target.sharding import load_sharded, sharded_over
from draftsmith.models.target.target import Target


@dataclass(frozen=True)
class TargetChoice:
    """The frozen target of a run.

    Attributes:
        name: a model directory, a hub id, or `embedded:target`.
        dtype: of its weights; `auto` until `resolved`.
        revision: on the hub.
        adapter: a PEFT adapter on top.
        trust_remote_code: run Python files that come with it.
        context: most tokens that it reads; None takes it from its config.
        sharding: `none`, or `fsdp2`: each process holds a part of every weight.
        device_map: accelerate's placement over the devices of one process.
        quantization: `8bit` or `4bit` weights.

    Raises:
        ValueError: sharding together with a setting that changes or places weights.
    """

    name: str
    dtype: str
    revision: str | None
    adapter: str | None
    trust_remote_code: bool
    context: int | None
    sharding: Literal["none", "fsdp2"]
    device_map: str | None
    quantization: str | None

    def __post_init__(self) -> None:
        if self.sharding != "none" and (self.adapter or self.device_map or self.quantization):
            raise ValueError(
                f"target_sharding {self.sharding!r} places the target's weights itself and does not change them; drop adapter, "
                "device_map and quantization, or set target_sharding to none"
            )

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold the target together, so that all of them take part in each of its forwards."""
        return sharded_over(self.sharding).is_sharded

    @property
    def may_move(self) -> bool:
        """Whether the whole target can move to another device."""
        return self.device_map is None and self.quantization is None and not self.is_sharded

    def settings(self) -> dict[str, Any]:
        """What decides the target's distributions, for provenance."""
        names = ("revision", "adapter", "trust_remote_code", "context", "quantization")
        return {"target": self.name, "target_dtype": self.dtype, **{name: getattr(self, name) for name in names}}

    def resolved(self, strategy: Strategy) -> TargetChoice:
        """The same choice with the dtype that `auto` means on the run's device.

        Args:
            strategy: of the run.
        """
        dtype = resolved_dtype(self.dtype, self.name, str(strategy.root_device), self.revision, self.trust_remote_code)
        return replace(self, dtype=dtype)

    def load(self, strategy: Strategy, num_processes: int) -> Target:
        """Loads the target, or this process's part of it.

        Args:
            strategy: of the run.
            num_processes: of the run.

        Raises:
            ValueError: a device_map with several processes, or a target that cannot be loaded.
        """
        if self.device_map is not None and num_processes > 1:
            raise ValueError(
                "device_map spreads one target over all devices; use it with trainer.devices 1, or leave it out"
            )
        if self.is_sharded:
            over = sharded_over(self.sharding)
            device = strategy.root_device
            return load_sharded(
                self.name, self.dtype, over, device, self.revision, self.trust_remote_code, self.context
            )
        return Target.load(
            self.name,
            dtype=self.dtype,
            device_map=self.device_map,
            revision=self.revision,
            adapter=self.adapter,
            quantization=self.quantization,
            trust_remote_code=self.trust_remote_code,
            context=self.context,
        )
