"""What was read back against what was written: tensors byte for byte, and the logits of the two.

Owns how two drafters are compared without their target. Knows no layout.

Shape legend: T packed tokens, K draft steps, A anchors, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.drafters.drafter_reader import assemble
from draftsmith.models.drafters.returned_shapes import checked_head_inputs
from draftsmith.models.drafters.rollout import PackedBatch, data_rollout
from draftsmith.models.target.target import TargetEnds

_NUM_STEPS = 4


def tensors_of(drafter: Drafter) -> dict[str, Tensor]:
    """Its tensors by name, on the CPU."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}


def refuse_difference(written: Drafter, reread: Drafter, folder: Path) -> None:
    """Compare every byte of every tensor, and the logits.

    Raises:
        ValueError: they differ; naming the tensors.
    """
    before, after = tensors_of(written), tensors_of(reread)
    changed = sorted(
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not torch.equal(before[name], after[name])
    )
    if changed or not torch.equal(probe_logits(written), probe_logits(reread)):
        raise ValueError(
            f"{folder}: read back, {', '.join(changed) or 'the logits'} differ from what was written; check the disk"
        )


class _ProbeEnds:
    """Replaces a target of any size: fixed waves as embeddings, no norm. Enough to compare two drafters."""

    def __init__(self, config: DrafterConfig) -> None:
        self.name, self.fingerprint = config.target_name, config.target_fingerprint
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [...] -> float32 [..., D]."""
        return torch.sin((ids[..., None] + 1) * torch.arange(1, self.hidden_size + 1) / self.hidden_size)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """[..., D], unchanged."""
        return hidden


@torch.no_grad()
def probe_logits(drafter: Drafter, num_tokens: int = 12) -> Tensor:
    """Logits [K, A, Vd] over a fixed random text, without the target: equal bit for bit for equal drafters.

    Of a drafter that is scored by the target's own head they are what goes into that head, [K, A, D], and of riders what enters the target.
    """
    config = drafter.config
    probe = assemble(type(drafter), config, tensors_of(drafter))
    generator = torch.Generator().manual_seed(0)
    if probe.riders is not None:
        states = torch.randn(1, num_tokens, config.hidden_size, generator=generator)
        return torch.cat([probe.riders.vectors(rider, states) for rider in range(len(probe.riders.entries))])
    probe.attach(cast(TargetEnds, _ProbeEnds(config)))
    batch = PackedBatch(
        input_ids=torch.randint(config.vocab_size, (num_tokens,), generator=generator),
        loss_mask=torch.ones(num_tokens, dtype=torch.bool),
        document_ids=torch.zeros(num_tokens, dtype=torch.int64),
        positions=torch.arange(num_tokens),
        hidden={name: torch.randn(num_tokens, config.hidden_size, generator=generator) for name in probe.features},
    )
    num_steps = min(_NUM_STEPS, probe.max_draft_steps or _NUM_STEPS)
    inputs = checked_head_inputs(probe, batch, data_rollout(batch, num_steps))
    return inputs if probe.borrows_head or probe.predicts_features else probe.rollout_logits(inputs)
