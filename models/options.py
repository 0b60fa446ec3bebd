"""What several commands ask about their target alike, said once: their options and their help.

Owns names, defaults and words. Does not know how a target is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from draftsmith.models.target import Target


@dataclass(frozen=True)
class TargetOptions:
    """Where a target runs and what it is made of, beside its name and dtype.

    Args:
        device: Where the target runs, such as cpu or cuda:1.
        device_map: Placement of a large target over several devices, such as auto.
        revision: Revision of a hub id.
        adapter: PEFT adapter to merge into the target.
        quantization: 8bit or 4bit weights for the target.
    """

    device: str = "cpu"
    device_map: str | None = None
    revision: str | None = None
    adapter: str | None = None
    quantization: str | None = None

    def load(self, path: str, dtype: str) -> Target:
        """The target at `path`. Raises what `Target.load` raises."""
        return Target.load(path, dtype, self.device, self.device_map, self.revision, self.adapter, self.quantization)


DEFAULTS = TargetOptions()
