"""What tests of lossy decoding share: prompts, a judge that says this and that, and the target's own word on a whole text."""

from __future__ import annotations

import torch
from doubles import BOS
from torch import Tensor

from draftsmith.models import Target
from draftsmith.models.judge import Judge, JudgeConfig
from draftsmith.models.target.target import PRE_NORM

PROMPTS = [[BOS, 7, 9, 3], [BOS, 30, 5], [BOS, 11, 12, 13, 14, 15]]


def random_judge(target: Target, threshold: float, feature: str = PRE_NORM) -> Judge:
    """A judge with random weights, about as often for as against."""
    judge = Judge(JudgeConfig(target.ends.hidden_size, feature, threshold=threshold))
    with torch.no_grad():
        judge.weight.copy_(torch.randn(judge.weight.shape, generator=torch.Generator().manual_seed(2)))
    return judge.eval()


@torch.inference_mode()
def reread(target: Target, prompt: list[int], reply: list[int]) -> tuple[Tensor, Tensor]:
    """The target's logits before each reply token [T, V], and its pre-norm state of each [T, D], by its own forward over the whole text."""
    seen: list[Tensor] = []
    last = target.model.model.layers[-1]
    hook = last.register_forward_hook(
        lambda module, inputs, output: seen.append(output if isinstance(output, Tensor) else output[0])
    )
    logits = target.model(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[0]
    hook.remove()
    return logits[len(prompt) - 1 : -1], seen[0][0, len(prompt) :]
