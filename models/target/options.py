"""What commands ask about a target: one group of options for each thing that can be loaded of it.

Owns names, defaults and help. Each group adds to the one above it. Does not know how a target is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from transformers import PreTrainedTokenizerBase

from draftsmith.hub_options import HubOptions
from draftsmith.models.files.device_and_dtype import AUTO, resolved_device, resolved_dtype
from draftsmith.models.files.end_tokens import read_end_tokens
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.target.target import Target, TargetEnds


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions(HubOptions):
    """How the files of a target are found and read, and what is read of its tokenizer."""

    def tokenizer(self, path: str) -> PreTrainedTokenizerBase:
        """Load the tokenizer of a target.

        Args:
            path: directory or hub id.

        Returns:
            The tokenizer.

        Raises:
            ValueError: as `load_tokenizer`.
        """
        return load_tokenizer(path, self.revision, self.trust_remote_code)

    def end_tokens(self, path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Find the ids that end the target's replies.

        Args:
            path: directory or hub id.
            tokenizer: the target's.

        Returns:
            The ids; empty where nothing names one.

        Raises:
            ValueError: as `read_end_tokens`.
        """
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
        """Load the ends of a target.

        Args:
            path: directory or hub id.
            dtype: of the weights.
            device: where to put them.

        Returns:
            The ends.

        Raises:
            ValueError: as `TargetEnds.load`.
        """
        return TargetEnds.load(path, dtype, device, self.revision, self.adapter, self.trust_remote_code, self.context)


@dataclass(frozen=True, kw_only=True)
class PlacementOptions(EndsOptions):
    """Where a target runs.

    Args:
        device: Where the target runs, such as cpu or cuda:1; auto: CUDA where there is one, else the CPU. Under torchrun, cuda is each
            process's own GPU.
        device_map: Placement of a large target over several devices, such as auto: they work one after another. Default: one device.
        quantization: 8bit or 4bit weights for the target, made by bitsandbytes while loading; default: the checkpoint's own.
    """

    device: str = AUTO
    device_map: str | None = None
    quantization: str | None = None

    def placed(self) -> Self:
        """Replace `auto` by the device that it means on this machine.

        Returns:
            The same options otherwise.
        """
        return replace(self, device=resolved_device(self.device))

    def resolve_dtype(self, path: str, dtype: str = AUTO) -> str:
        """The dtype that a name means for a target where these options place it.

        Args:
            path: directory or hub id.
            dtype: auto, or a dtype's name.

        Returns:
            The dtype's name.

        Raises:
            ValueError: no such dtype, or a bad path.
        """
        # accelerate spreads a target over the GPUs that there are.
        device = resolved_device(self.device if self.device_map in (None, "cpu") else AUTO)
        return resolved_dtype(dtype, path, device, self.revision, self.trust_remote_code)

    def load(self, path: str, dtype: str = AUTO) -> Target:
        """Load a target.

        Args:
            path: directory or hub id.
            dtype: auto, or a dtype's name.

        Returns:
            The target.

        Raises:
            ValueError: as `Target.load`.
        """
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
        """Replace `auto` by what it means for a target on this machine: what a record should hold.

        Args:
            path: directory or hub id.

        Returns:
            The same options otherwise.

        Raises:
            ValueError: no such dtype, or a bad path.
        """
        return replace(self.placed(), dtype=self.resolve_dtype(path, self.dtype))

    def load(self, path: str, dtype: str | None = None) -> Target:
        """Load a target.

        Args:
            path: directory or hub id.
            dtype: a dtype's name; None takes the option's.

        Returns:
            The target.

        Raises:
            ValueError: as `Target.load`.
        """
        target = super().load(path, dtype or self.dtype)
        if self.generation_config == "none":
            target.forget_settings()
        return target

    def load_to_decode(self, path: str) -> Target:
        """Load a target that only decodes: matrices that read the same states are merged.

        Args:
            path: directory or hub id.

        Returns:
            The target.

        Raises:
            ValueError: as `Target.load`.
        """
        target = self.load(path)
        target.merge()
        return target


OWN_FILES = TokenizerOptions()
DEFAULTS = TargetOptions()
