"""Batches for training drafters whose hidden states are never written: the target computes them in the loop.

Owns: the target of a run in memory, what it is loaded with, and how batches get their states. Does not know: drafters, losses, how
text becomes token ids (`token_corpus.py`), the forwards themselves (`target_states.py`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from draftsmith.data.chats.token_kinds import TrainedOn
from draftsmith.models.files.device_and_dtype import resolved_dtype
from draftsmith.models.target.prompt_template import TemplateOptions
from draftsmith.models.target.sharding import ShardedOver, TargetSharding, load_sharded, sharded_over
from draftsmith.models.target.target import Target, TargetEnds
from draftsmith.train.batches.data_module import CacheDataModule
from draftsmith.train.batches.look_ahead import LookAheadLoader
from draftsmith.train.batches.target_states import Rounds, RoundSampler, StatesInTheLoop
from draftsmith.train.batches.token_corpus import TargetFiles, TextSource, write_tokens


class OnlineDataModule(CacheDataModule):
    """Training and validation batches of a text, with states from the frozen target as they are needed.

    Samples, their order, the held-out share and the resuming of an interrupted epoch work as in `CacheDataModule`. The first run writes
    the text as token ids into a folder. The module names the target (`target`, `revision`, `adapter`).

    Args:
        source: what `draftsmith data extract` takes: replies of the target, conversations or documents, a folder or a JSONL file.
        tokens: folder for the text as token ids (5 bytes a token), which all processes read; a later run of the same text uses it again.
        split: keep only samples of this split.
        val_source: a second text for validation; without it and without `val_split`, the run holds out `val_fraction` of the samples.
        val_split: keep only samples of this split for validation; without `val_source`, of `source`, which needs another `split`.
        template: Jinja file for conversations, or `none` for plain text; null: the tokenizer's own.
        max_length: cut samples to this many tokens; null: the target's context.
        val_fraction: the share held out, at least one sample.
        tokens_per_batch: tokens of a batch on each process, prompt tokens included, on average over batches.
        max_samples: train on at most this many samples (the same ones with the same seed).
        shuffle: a new order every epoch.
        seed: fixes the held-out samples and every epoch's order.
        target_dtype: of the target's weights and states; `auto` is its checkpoint's own on CUDA, float32 elsewhere.
        target_sharding: `none`: every process holds the whole target; `fsdp2`, `tp` (tensor parallel) or `zero3`: all processes share one.
        target_group: with `fsdp2`, this many consecutive processes share a target, such as those of one machine; null: all share one.
        target_device_map: placement of a target over the devices of one process, such as auto.
        target_quantization: 8bit or 4bit weights for the target.
        forward_tokens: tokens of one forward of the target, padding included.
        look_ahead: run the target on the next batch before this one's step, on CUDA at the same time. null does so on CUDA, unless the
            target is sharded. true is an error with a sharded target.
        template_name: which of a tokenizer's several chat templates to use; null: the one called default.
        template_args: variables of the chat template, such as {enable_thinking: false}.
        train_replies: train on the words of replies.
        train_tool_calls: train on tool calls.
        train_thoughts: train on thoughts.
        last_turn_only: train on the last assistant turn of each conversation alone; for validation too.

    Raises:
        ValueError: settings that do not work together, a source that `data extract` cannot read, or the folder of another text.
    """

    def __init__(
        self,
        source: Path,
        tokens: Path,
        split: str | None = None,
        val_source: Path | None = None,
        val_split: str | None = None,
        template: str | None = None,
        max_length: int | None = None,
        val_fraction: float = 0.02,
        tokens_per_batch: int = 4096,
        max_samples: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        target_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        target_sharding: TargetSharding = "none",
        target_group: int | None = None,
        target_device_map: str | None = None,
        target_quantization: str | None = None,
        forward_tokens: int = 8192,
        look_ahead: bool | None = None,
        template_name: str | None = None,
        template_args: dict[str, Any] | None = None,
        train_replies: bool = True,
        train_tool_calls: bool = True,
        train_thoughts: bool = True,
        last_turn_only: bool = False,
    ) -> None:
        second = val_source is not None or val_split is not None
        super().__init__(
            cache=Path(tokens) / "train",
            val_cache=Path(tokens) / "val" if second else None,
            val_fraction=val_fraction,
            tokens_per_batch=tokens_per_batch,
            max_samples=max_samples,
            shuffle=shuffle,
            seed=seed,
        )
        self.prepare_data_per_node = False  # the folder is one for all nodes, as a cache is
        rendering = TemplateOptions(template_name, template_args)
        trained_on = TrainedOn(
            train_replies=train_replies,
            train_tool_calls=train_tool_calls,
            train_thoughts=train_thoughts,
            last_turn_only=last_turn_only,
        )
        text = TextSource(Path(source), split, template, max_length, rendering, trained_on)
        self.texts = {Path(tokens) / "train": text}
        if second:
            self.texts[Path(tokens) / "val"] = replace(text, source=Path(val_source or source), split=val_split)
        if forward_tokens < 1:
            raise ValueError(f"forward_tokens is {forward_tokens}; a forward needs at least 1 token")
        _check_splits(val_source, split, val_split)
        _check_sharding(target_sharding, look_ahead, bool(target_device_map or target_quantization))
        self.target_dtype, self.target_sharding, self.target_group = target_dtype, target_sharding, target_group
        self.target_device_map, self.target_quantization = target_device_map, target_quantization
        self.forward_tokens, self.look_ahead = forward_tokens, look_ahead
        # In a list, like the module's ends, so that Lightning does not see it as a submodule.
        self._target: list[Target] = []
        self._wanted: tuple[tuple[str, ...], int] = ((), 0)

    def prepare_data(self) -> None:
        """Makes the folder of token ids, on one process; Lightning calls this before setup()."""
        for folder, text in self.texts.items():
            write_tokens(folder, text, self._files())

    def setup(self, stage: str = "fit") -> None:
        """Opens the text, divides the samples, loads the target: each process all of it or its part.

        Raises:
            ValueError: settings that do not fit the number of processes or the target, or a target that cannot be loaded.
        """
        super().setup(stage)
        if self._target:
            return
        files, device = self._files(), self._device()
        if self.target_device_map is not None and self._world()[1] > 1:
            raise ValueError(
                f"target_device_map {self.target_device_map!r} spreads a target over the devices of one process, and there are "
                f"{self._world()[1]}, which would use the same ones; train with one process, or set target_sharding instead"
            )
        over = sharded_over(self.target_sharding, self.target_group)
        dtype = resolved_dtype(self.target_dtype, files.name, str(device), files.revision, files.trust_remote_code)
        if over.sharding != "none":
            if files.adapter is not None:
                raise ValueError(
                    f"target_sharding {over.sharding!r} reads weights part by part and cannot merge the adapter {files.adapter}; "
                    "save the merged model and train for that"
                )
            target = load_sharded(files.name, dtype, over, device, files.revision, files.trust_remote_code)
        else:
            target = Target.load(
                files.name,
                dtype,
                str(device),
                self.target_device_map,
                files.revision,
                files.adapter,
                self.target_quantization,
                files.trust_remote_code,
                files.context,
            )
        self._target, self._over = [target], over

    @property
    def target(self) -> Target:
        """The frozen target, in memory.

        Raises:
            ValueError: setup() has not run.
        """
        if not self._target:
            raise ValueError("the data module is not set up; call setup() first")
        return self._target[0]

    @property
    def over(self) -> ShardedOver:
        """The processes that hold the target together."""
        assert self.target is not None
        return self._over

    def ends(self, dtype: torch.dtype) -> TargetEnds | None:
        """The target's ends, whole and on this process's device, or None where it has none of that dtype.

        Args:
            dtype: of the ends.
        """
        if self.target_device_map is not None or self.target_quantization is not None or self.target.dtype != dtype:
            return None
        return self.target.ends

    def check_whole(self, kind: str) -> None:
        """Check that the target is whole on one device, for drafters that learn through its own blocks.

        Args:
            kind: what errors call the drafter.

        Raises:
            ValueError: it is divided, spread or quantised.
        """
        for name in ("target_sharding", "target_device_map", "target_quantization"):
            value = getattr(self, name)
            if value not in (None, "none"):
                raise ValueError(
                    f"{name} is {value!r}, and a {kind} learns through the target's own blocks, which every process needs whole on one "
                    "device; leave that option out, or choose a family that drafts beside the target"
                )

    def compute(self, layers: tuple[str, ...], num_greedy: int) -> None:
        """Batches that are made after this call come with these states.

        Args:
            layers: names of layers whose states are wanted.
            num_greedy: the target's greedy tokens after each position.

        Raises:
            ValueError: the target has no such layer.
        """
        for name in layers:
            self.target.check_layer(name)
        self._wanted = (layers, num_greedy)

    def train_dataloader(self) -> Any:
        """Batches of this rank, from where a resumed run stopped."""
        ahead = self.look_ahead
        if ahead is None:
            ahead = self._device().type == "cuda" and not self.over.is_sharded
        return self._in_the_loop(self._train_loader(), ahead)

    def val_dataloader(self) -> Any:
        """Batches of the held-out samples in a fixed order; none when nothing is held out."""
        loader = self._val_loader()
        # Not ahead: a training batch may be waiting with its states meanwhile.
        return [] if loader is None else self._in_the_loop(loader, ahead=False)

    def _in_the_loop(self, loader: DataLoader, ahead: bool) -> LookAheadLoader:
        rounds = DataLoader(
            Rounds(loader.dataset),
            batch_size=None,
            sampler=RoundSampler(loader.sampler, self.over.members if self.over.is_sharded else None),  # type: ignore[arg-type]
        )
        states = StatesInTheLoop(self.target, self.over, *self._wanted, self.forward_tokens, self._device())
        return LookAheadLoader(rounds, states, ahead, self._device())

    def _files(self) -> TargetFiles:
        module = None if self.trainer is None else self.trainer.lightning_module
        name = getattr(module, "target", None)
        if not isinstance(name, str):
            raise ValueError(
                f"OnlineDataModule takes its target from the module that is trained, and {type(module).__name__} names none; "
                "train DraftModule with it, through a Trainer"
            )
        return TargetFiles(
            name,
            getattr(module, "revision", None),
            getattr(module, "adapter", None),
            getattr(module, "trust_remote_code", False),
            getattr(module, "context", None),
        )

    def _device(self) -> torch.device:
        assert self.trainer is not None
        return self.trainer.strategy.root_device


def _check_splits(val_source: Path | None, split: str | None, val_split: str | None) -> None:
    """Refuse to train on the validation samples of one source."""
    if val_source is None and val_split is not None and split in (None, val_split):
        raise ValueError(
            f"val_split is {val_split!r} and split {split!r} of the same source, so training would use the validation samples; "
            "set split to the other samples, or val_source to another text"
        )


def _check_sharding(target_sharding: str, look_ahead: bool | None, is_placed: bool) -> None:
    """Stops with an error for settings that a target divided among processes cannot have."""
    if target_sharding == "none":
        return
    if look_ahead:
        raise ValueError(
            f"look_ahead is true and target_sharding {target_sharding!r}: their collectives and the gradients' could wait "
            "for each other for ever; leave it null"
        )
    if is_placed:
        raise ValueError(
            f"target_sharding {target_sharding!r} places the target's weights itself and does not quantize them; "
            "drop target_device_map and target_quantization, or set target_sharding to none"
        )
