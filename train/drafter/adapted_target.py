"""A target with a LoRA that is trained beside a drafter, and how far it has moved from the target itself (Medusa-2, arXiv:2401.10774).

Owns: the adapted model in memory, its states of a packed batch, the divergence from the target, the adapter's folder. Does not know:
drafters, optimisers, batches on disk.

Shape legend: T packed tokens, D hidden, R documents, L the longest of them, P positions with a label behind them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.models.files.adapter_files import PREFIX, WEIGHTS
from draftsmith.models.lora.lora_adapter import LoraSettings
from draftsmith.models.target.target import PRE_NORM, Target, TargetEnds

_NAME = "target"


@dataclass(frozen=True)
class TargetLora:
    """How a target is adapted beside its draft heads.

    Attributes:
        rank: of the adapter.
        alpha: the adapter counts alpha / rank.
        target_modules: names of linear layers, or the ends of names; null takes every linear layer of the decoder blocks.
        lr: the adapter's peak learning rate; the paper's is a quarter of that of the heads.
        keep_weight: of the divergence from the target, which keeps the adapted model close to it.
        heads_weight: of the heads' loss in what the adapter learns by; the paper takes 0.2.
        heads_first: in this share of the steps the heads learn alone.

    Raises:
        ValueError: a number out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: list[str] | None = None
    lr: float = 2.5e-4
    keep_weight: float = 1.0
    heads_weight: float = 0.2
    heads_first: float = 0.1

    def __post_init__(self) -> None:
        LoraSettings(self.rank, self.alpha, 0.0, self.target_modules)
        for name in ("lr", "keep_weight", "heads_weight"):
            if getattr(self, name) <= 0.0:
                raise ValueError(f"target_lora {name} is {getattr(self, name)}; it must be above 0")
        if not 0.0 <= self.heads_first < 1.0:
            raise ValueError(f"target_lora heads_first is {self.heads_first}; it must be at least 0 and below 1")


class AdaptedTarget(nn.Module):
    """The adapter's weights as a module; the frozen target below them is no part of a checkpoint.

    Args:
        target: in float32, changed in place: its decoder blocks get the adapter.
        settings: which layers, and how.

    Raises:
        ValueError: no linear layer of the blocks has a name that was asked for.
    """

    def __init__(self, target: Target, settings: TargetLora) -> None:
        super().__init__()
        model = target.model
        layers = _linear_layers(target)
        wanted = settings.target_modules
        chosen = [name for name in layers if wanted is None or any(_is_called(name, end) for end in wanted)]
        if not chosen:
            raise ValueError(
                f"target_lora target_modules names {', '.join(wanted or [])}; the linear layers of this target's blocks end in "
                f"{', '.join(sorted({name.rpartition('.')[2] for name in layers}))}"
            )
        self._config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=chosen, bias="none")  # type: ignore[arg-type]
        inject_adapter_in_model(self._config, model, _NAME)
        trained = {name: weight for name, weight in model.named_parameters() if f".{_NAME}." in name}
        model.requires_grad_(False)
        for weight in trained.values():
            weight.requires_grad_(True)
        self.weights = nn.ParameterDict({name.replace(".", "/"): weight for name, weight in trained.items()})
        # In a list, so that the frozen weights are neither parameters nor part of a checkpoint.
        self._target = [target]

    def states(self, batch: PackedBatch) -> Tensor:
        """The adapted model's states before its final norm, [T, D], of every document by itself."""
        counts = torch.unique_consecutive(batch.document_ids, return_counts=True)[1]
        documents = batch.input_ids.split(counts.tolist())
        ids_RL = pad_sequence(list(documents), batch_first=True)
        states_RLD = self._before_norm(ids_RL)
        there_RL = torch.arange(ids_RL.shape[1], device=ids_RL.device) < counts[:, None]
        return states_RLD[there_RL]

    def _before_norm(self, ids_RL: Tensor) -> Tensor:
        """[R, L, D] by the model's own causal forward, whose gradients reach the adapter; padding is behind the texts."""
        target, seen = self._target[0], list[Tensor]()
        hook = target.ends.norm.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
        try:
            target.model.base_model(input_ids=ids_RL, use_cache=False)
        finally:
            hook.remove()
        return seen[-1]

    def to_device(self, device: torch.device) -> None:
        """Move the target below the adapter."""
        self._target[0].model.to(device)

    @torch.no_grad()
    def save(self, folder: Path, target: str) -> None:
        """Write the adapter as PEFT reads it.

        Args:
            folder: it is made.
            target: what the config calls the model below.
        """
        folder.mkdir()
        model = self._target[0].model
        tensors = {
            f"{PREFIX}{name}": tensor.detach().cpu().float().contiguous()
            for name, tensor in get_peft_model_state_dict(model, adapter_name=_NAME).items()
        }
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        self._config.base_model_name_or_path = target
        self._config.inference_mode = True
        self._config.save_pretrained(str(folder))


@dataclass(frozen=True)
class Kept:
    """How close the adapted model is to the target, at the positions that predict a labelled token.

    Attributes:
        divergence: [] differentiable, mean KL(target || adapted) in nats.
        same_choice: [], the share of positions whose likeliest token is the same.
    """

    divergence: Tensor
    same_choice: Tensor


def kept(batch: PackedBatch, adapted_TD: Tensor, ends: TargetEnds, chunk_rows: int = 512) -> Kept:
    """Compare the adapted model with the target, whose states the batch holds.

    Args:
        batch: with the target's own states.
        adapted_TD: of the adapted model, before the final norm.
        ends: the target's, which are those of the adapted model too.
        chunk_rows: rows of logits in memory at a time, forward; the backward pass keeps all.
    """
    same_document = batch.document_ids[1:] == batch.document_ids[:-1]
    at_P = torch.nonzero(batch.loss_mask[1:] & same_document).squeeze(1)
    if not len(at_P):
        return Kept(0.0 * adapted_TD.sum(), adapted_TD.new_ones(()))
    own_PD, moved_PD = batch.hidden[PRE_NORM][at_P], adapted_TD[at_P]
    total, same = adapted_TD.new_zeros(()), adapted_TD.new_zeros(())
    for own, moved in zip(own_PD.split(chunk_rows), moved_PD.split(chunk_rows), strict=True):
        with torch.no_grad():
            wanted = ends.logits(ends.final_norm(own)).float().log_softmax(-1)
        log_probs = ends.logits(ends.final_norm(moved)).float().log_softmax(-1)
        total = total + (wanted.exp() * (wanted - log_probs)).nan_to_num(0.0).sum()
        same = same + (wanted.argmax(-1) == log_probs.argmax(-1)).sum()
    return Kept(total / len(at_P), same / len(at_P))


def _linear_layers(target: Target) -> list[str]:
    """Full names of the linear layers of the decoder. The head stays the target's own."""
    return [
        name
        for name, module in target.model.named_modules()
        if isinstance(module, nn.Linear) and module is not target.ends.head
    ]


def _is_called(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")
