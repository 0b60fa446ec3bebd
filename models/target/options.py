"""What commands ask about a target: one group of options for each thing that can be loaded of it.

Owns names, defaults and help. Each group adds to the one above it. Does not know how a target is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from transformers import PreTrainedTokenizerBase

from draftsmith.models.files.device_and_dtype import AUTO, resolved_device, resolved_dtype
from draftsmith.models.files.end_tokens import read_end_tokens
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import Target, TargetEnds


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """How the files of a target are found and read.

    Args:
        revision: Revision of a hub id.
        trust_remote_code: Run Python files that come with the target, its tokenizer or a draft LM. Read them first.
    """

    revision: str | None = None
    trust_remote_code: bool = False

    def tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        """The tokenizer of the target at `path`. Raises what `load_tokenizer` raises."""
        return load_tokenizer(path, self.revision, self.trust_remote_code)

    def end_tokens(self, path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """The ids that end the target's replies; empty where nothing names one."""
        return read_end_tokens(path, self.revision, tokenizer, self.trust_remote_code)


@dataclass(frozen=True, kw_only=True)
class EndsOptions(TokenizerOptions):
    """Which target is meant, beside its name.

    Args:
        adapter: PEFT adapter to merge into the target.
        context: Most tokens of prompt and reply together; default: from the target's config, as serving engines derive it.
    """

    adapter: str | None = None
    context: int | None = None

    def load_ends(self, path: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TargetEnds:
        """The ends of the target at `path`. Raises what `TargetEnds.load` raises."""
        return TargetEnds.load(path, dtype, device, self.revision, self.adapter, self.trust_remote_code, self.context)


@dataclass(frozen=True, kw_only=True)
class PlacementOptions(EndsOptions):
    """Where a target runs.

    Args:
        device: Where the target runs, such as cpu or cuda:1; auto: CUDA where there is one, else the CPU. Under torchrun, cuda is each
            process's own GPU.
        device_map: Placement of a large target over several devices, such as auto.
        quantization: 8bit or 4bit weights for the target.
    """

    device: str = AUTO
    device_map: str | None = None
    quantization: str | None = None

    def placed(self) -> Self:
        """The same options with the device that `auto` means on this machine."""
        return replace(self, device=resolved_device(self.device))

    def resolve_dtype(self, path: str, dtype: str = AUTO) -> str:
        """The dtype that a name means for the target at `path` where these options place it.

        Raises:
            ValueError: no such dtype, or a bad path.
        """
        # accelerate spreads a target over the GPUs that there are.
        device = resolved_device(self.device if self.device_map in (None, "cpu") else AUTO)
        return resolved_dtype(dtype, path, device, self.revision, self.trust_remote_code)

    def load(self, path: str, dtype: str = AUTO) -> Target:
        """The target at `path`. Raises what `Target.load` raises."""
        return Target.load(
            path,
            self.resolve_dtype(path, dtype),
            resolved_device(self.device),
            self.device_map,
            self.revision,
            self.adapter,
            self.quantization,
            self.trust_remote_code,
            self.context,
        )


@dataclass(frozen=True, kw_only=True)
class TargetOptions(PlacementOptions):
    """Where a target runs and how, beside its name.

    Args:
        dtype: What the target runs in: float32, bfloat16 or float16; auto: its checkpoint's own on CUDA, float32 on a CPU.
        generation_config: model, to honour what the target's generation config asks for (suppressed tokens, least lengths ...); none, to
            read only its end tokens.
    """

    dtype: str = AUTO
    generation_config: Literal["model", "none"] = "model"

    def resolved(self, path: str) -> Self:
        """The same options with what `auto` means for the target at `path` on this machine: what a record should hold.

        Raises:
            ValueError: no such dtype, or a bad path.
        """
        return replace(self.placed(), dtype=self.resolve_dtype(path, self.dtype))

    def load(self, path: str, dtype: str | None = None) -> Target:
        """The target at `path`, in `dtype` where one is given. Raises what `Target.load` raises."""
        target = super().load(path, dtype or self.dtype)
        if self.generation_config == "none":
            target.forget_settings()
        return target


OWN_FILES = TokenizerOptions()
DEFAULTS = TargetOptions()
