"""Parallel heads (Medusa, arXiv:2401.10774): every draft step has a head of its own, and all of them read the same state.

Shape legend: B batch rows, M nodes of a layer, A anchors, K draft steps, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftsmith.models import (
    PRE_NORM,
    About,
    Cycle,
    Drafter,
    DrafterConfig,
    DrafterFamily,
    DraftLimits,
    Emitted,
    Expander,
    Family,
    KeptRows,
    Opening,
    PackedBatch,
    Rollout,
    TargetEnds,
)
from draftsmith.models.files.field_rules import COUNT


class ParallelHeadsConfig(DrafterConfig):
    """The common fields, and one of its own.

    Attributes:
        num_blocks: residual blocks before each head.
    """

    model_type = "parallel_heads"
    rules: ClassVar = {**DrafterConfig.rules, "num_blocks": COUNT}

    def __init__(self, num_blocks: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_blocks = num_blocks


@dataclass(frozen=True)
class ParallelState:
    """What passes from cycle to cycle: the last token of each row, int64 [B], and the target's state before it, [B, D]."""

    root_B: Tensor
    context_BD: Tensor

    def select_rows(self, kept: KeptRows) -> ParallelState:
        """The state of some batch rows only."""
        return ParallelState(self.root_B[kept.index], self.context_BD[kept.index])


class Block(nn.Module):
    """x + SiLU(A x)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return x + F.silu(self.linear(x))


class ParallelHeads(Drafter):
    """Step k: head_k(blocks_k(state))."""

    config_class = ParallelHeadsConfig
    config: ParallelHeadsConfig

    def __init__(self, config: ParallelHeadsConfig) -> None:
        super().__init__(config)
        size, steps = config.hidden_size, range(config.num_draft_steps)
        self.blocks = nn.ModuleList(self.make_blocks(step) for step in steps)
        self.heads = nn.ModuleList(nn.Linear(size, config.num_draft_tokens, bias=False) for _ in steps)
        self.post_init()

    def make_blocks(self, step: int) -> nn.Module:
        """What is between the input of one step and its head, [..., D] -> [..., D]."""
        return nn.Sequential(*(Block(self.config.hidden_size) for _ in range(self.config.num_blocks)))

    @property
    def max_draft_steps(self) -> int:
        """As many as there are heads."""
        return len(self.heads)

    def step_weight(self, step: int) -> Tensor:
        """[Vd, D]: the head of one step."""
        return self.heads[step].weight

    def normed(self, state: Tensor) -> Tensor:
        """The target's state [..., D] as the heads read it."""
        return self.ends.final_norm(state).to(self.dtype)

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """[K, A, D]: what each step's head is applied to, at every anchor."""
        context_AD = self.normed(batch.hidden[PRE_NORM][rollout.anchors])
        return torch.stack([self.blocks[step](context_AD) for step in range(rollout.tokens.shape[1])])

    def start(self, opening: Opening) -> ParallelState:
        """After the prompt."""
        return self.advance(None, opening.prompt)

    def advance(self, state: ParallelState | None, emitted: Emitted) -> ParallelState:
        """After a cycle: only the last token and the state before it matter."""
        root_B, state_BD = emitted.last(PRE_NORM)
        return ParallelState(root_B, self.normed(state_BD))

    def expander(self, state: ParallelState, cycle: Cycle, limits: DraftLimits) -> Expander:
        """One draft."""
        return ParallelDraft(self, state)


class ParallelDraft:
    """One draft: the nodes of a layer all have the same continuations, since no head reads what was drafted."""

    def __init__(self, drafter: ParallelHeads, state: ParallelState) -> None:
        self.root_B, self.target_ids = state.root_B, drafter.to_target_ids
        self._drafter, self._context_BD, self._step = drafter, state.context_BD, 0

    def begin(self) -> Tensor:
        """[B, 1, Vd]: what follows the root."""
        return self._logits()

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """[B, M, Vd]: what follows the nodes of the next layer."""
        self._step += 1
        return self._logits().expand(-1, tokens_BM.shape[1], -1)

    def _logits(self) -> Tensor:
        inputs_BD = self._drafter.blocks[self._step](self._context_BD)
        return self._drafter.logits(inputs_BD, self._step)[:, None]


class ParallelHeadsFamily(DrafterFamily):
    """Parallel heads (arXiv 2401.10774), one for each draft step.

    Args:
        num_blocks: residual blocks before each head.
        draft_vocab_size: keep this many tokens, the most frequent labelled ones; null keeps all.
    """

    kind: ClassVar[type[ParallelHeads]] = ParallelHeads

    def __init__(self, num_blocks: int = 1, draft_vocab_size: int | None = None) -> None:
        self.num_blocks, self.draft_vocab_size = num_blocks, draft_vocab_size

    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> ParallelHeads:
        """A fresh drafter whose heads begin as the target's own."""
        config = self.kind.config_class.for_target(
            ends, draft_token_ids, num_steps, tokenizer_fingerprint, num_blocks=self.num_blocks
        )
        drafter = self.kind(config)
        if draft_token_ids is not None:
            drafter.set_draft_ids(draft_token_ids)
        rows_VD = ends.head_weight[drafter.draft_ids().to(ends.device)]
        with torch.no_grad():
            for head in drafter.heads:
                head.weight.copy_(rows_VD)
        drafter.attach(ends)
        return drafter


FAMILY = Family(
    name="medusa",
    drafter=ParallelHeads,
    config=ParallelHeadsConfig,
    settings=ParallelHeadsFamily,
    about=About(
        title="Medusa",
        what="Parallel draft heads, one for each step ([Medusa](https://arxiv.org/abs/2401.10774))",
    ),
    limits=DraftLimits(paths=((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0))),
)
