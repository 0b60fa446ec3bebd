"""What several commands ask about their target alike, said once: their options and their help.

Owns names, defaults and words. Does not know how a target is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from draftsmith.models.target.target import Target, TargetEnds


@dataclass(frozen=True)
class TargetOptions:
    """Where a target runs and what it is made of, beside its name and dtype.

    Args:
        device: Where the target runs, such as cpu or cuda:1.
        device_map: Placement of a large target over several devices, such as auto.
        revision: Revision of a hub id.
        adapter: PEFT adapter to merge into the target.
        quantization: 8bit or 4bit weights for the target.
        trust_remote_code: Run Python files that come with the target, its tokenizer or a draft LM. Read them first.
        context: Most tokens of prompt and reply together; default: from the target's config, as serving engines derive it.
        generation_config: model, to honour what the target's generation config asks for (suppressed tokens, least lengths ...); none, to
            read only its end tokens.
    """

    device: str = "cpu"
    device_map: str | None = None
    revision: str | None = None
    adapter: str | None = None
    quantization: str | None = None
    trust_remote_code: bool = False
    context: int | None = None
    generation_config: Literal["model", "none"] = "model"

    def load(self, path: str, dtype: str) -> Target:
        """The target at `path`. Raises what `Target.load` raises."""
        target = Target.load(
            path,
            dtype,
            self.device,
            self.device_map,
            self.revision,
            self.adapter,
            self.quantization,
            self.trust_remote_code,
            self.context,
        )
        if self.generation_config == "none":
            target.forget_settings()
        return target

    def load_ends(self, path: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TargetEnds:
        """The ends of the target at `path`. Raises what `TargetEnds.load` raises."""
        return TargetEnds.load(path, dtype, device, self.revision, self.adapter, self.trust_remote_code, self.context)


DEFAULTS = TargetOptions()
