"""The section about training: steps of a ReDrafter and an EAGLE drafter at the target's width, from random states."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.decode_sections import Bench
from benchmarks.gpu.subject import FAMILIES, median_seconds
from draftsmith.models.drafters.rollout import PackedBatch
from draftsmith.models.target.target import PRE_NORM

NUM_SAMPLES = 8
STEPS = {"ReDrafter": (5, "none"), "EAGLE": (1, "path")}  # draft steps, distillation


def train(bench: Bench) -> dict[str, Any]:
    """Seconds of a training step, forward, backward and optimiser, and its tokens a second."""
    return {
        f"{family}, {steps} step{'s' if steps > 1 else ''}, {distillation}": training_figures(
            bench, family, steps, distillation
        )
        for family, (steps, distillation) in STEPS.items()
    }


def training_figures(bench: Bench, family: str, num_steps: int, distillation: str) -> dict[str, Any]:
    """Of one family."""
    # Imported here: where Lightning is missing, the other sections run all the same.
    from draftsmith.train.drafter.objective import Objective, inverse_draft_ids, prepare, run

    ids = torch.arange(0, bench.scale.sizes["vocab_size"], bench.scale.draft_every)
    drafter = FAMILIES[family][0].for_target(bench.target.ends, draft_token_ids=ids)
    torch.nn.Module.to(drafter, device=bench.device, dtype=torch.float32).train()
    objective = Objective(num_steps, distillation, feature_weight=1.0 if family == "EAGLE" else 0.0)
    weights = [weight for weight in drafter.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=1e-5, fused=bench.device.type == "cuda")
    to_draft = inverse_draft_ids(drafter.draft_ids(), bench.scale.sizes["vocab_size"])
    batch = packed_batch(bench)
    losses = []

    def step() -> None:
        with torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=bench.device.type == "cuda"):
            lesson = prepare(objective, batch, to_draft)
            horizon = objective.horizon_weights(bench.device) / lesson.loss_rows.clamp(min=1)
            total = run(objective, lesson, drafter, bench.target.ends, horizon, False).total
        total.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(total.detach())

    seconds = median_seconds(step, bench.device, repeats=3, warm=2)
    finite = bool(torch.stack(losses).isfinite().all())
    return {"step_ms": 1e3 * seconds, "tokens_per_s": len(batch.input_ids) / seconds, "finite": finite}


def packed_batch(bench: Bench) -> PackedBatch:
    """Samples of equal lengths, packed, with random tokens and states; the last two thirds of each are learned from."""
    length = bench.scale.train_tokens // NUM_SAMPLES
    total, device = length * NUM_SAMPLES, bench.device
    positions = torch.arange(length, device=device).repeat(NUM_SAMPLES)
    return PackedBatch(
        input_ids=torch.randint(1, bench.scale.sizes["vocab_size"], (total,), device=device),
        loss_mask=positions > length // 3,
        document_ids=torch.arange(NUM_SAMPLES, device=device).repeat_interleave(length),
        positions=positions,
        hidden={PRE_NORM: torch.randn(total, bench.scale.sizes["hidden_size"], dtype=bench.dtype, device=device)},
    )
