"""What the engine emits against the target's exact joint law of the first tokens, by a chi-square test."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from draftsmith.decode import Engine, GenerationSettings
from draftsmith.decode.sampling import process
from draftsmith.models import Target


@torch.inference_mode()
def joint_law(target: Target, prompt: list[int], request: GenerationSettings) -> dict[tuple[int, ...], float]:
    """Probability of every text of ``request.max_new_tokens`` tokens after the prompt, by the model's own forward."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(request.max_new_tokens):
        grown = {}
        for text, weight in law.items():
            whole = torch.tensor([prompt + list(text)])
            logits = target.model(input_ids=whole, use_cache=False).logits[:, -1:]
            seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(2, whole[:, None], True)
            probs = process(logits, request, seen).softmax(-1)[0, 0].double()
            grown |= {(*text, int(token)): weight * float(probs[token]) for token in probs.nonzero().squeeze(1)}
        law = grown
    return law


def chi_square_pvalue(engine: Engine, prompt: list[int], request: GenerationSettings, num_draws: int) -> float:
    """How well replies to one prompt, each with noise of its own, fit the exact law; 0 where one is impossible.

    Texts too rare to count share a bin.
    """
    law = joint_law(engine.target, prompt, request)
    outcomes: dict[tuple[int, ...], int] = dict.fromkeys(law, 0)
    for generation in engine.generate([prompt] * num_draws, request):
        text = tuple(generation.token_ids)
        if text not in outcomes:
            return 0.0
        outcomes[text] += 1
    likely = [text for text, weight in law.items() if weight * num_draws >= 5]
    rest = sum(weight * num_draws for text, weight in law.items() if text not in likely)
    expected = np.array([law[text] * num_draws for text in likely] + [rest + 1e-9])
    observed = np.array([outcomes[text] for text in likely] + [sum(c for t, c in outcomes.items() if t not in likely)])
    return float(stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)
