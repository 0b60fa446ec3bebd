"""ReDrafter: a recurrent draft head searched with a beam (arXiv:2403.09919).

Owns the head's architecture, its teacher-forced run and its beam search. Parameter names and shapes are those of Apple's
checkpoints (``lm_head.{i}.linear``, ``lm_head.{N}``, ``rnn_u``, ``rnn_w``, ``input_proj``); a draft vocabulary and a head that starts
from the target's are additions. Knows nothing of verification: what it proposes is exact because of the walk, not of this file.

Shape legend: B batch rows, M beams, L drafted depth, A anchors, K draft steps, D target hidden, E exit dimension, Vd draft vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from draftsmith.models.drafter import Drafter, DrafterConfig, DraftLimits, Emitted, PackedBatch, Rollout
from draftsmith.models.target import PRE_NORM, TargetEnds
from draftsmith.models.tree import DraftTree, pack, prune, tree_from_layers, tree_from_paths


class ReDrafterConfig(DrafterConfig):
    """Apple's fields and the common ones.

    Attributes:
        exit_dim: width E of the residual blocks and of the output head's input. Apple uses 2 D; D makes the head as small as the
            target's and lets it start from the target's.
        num_draft_layers: residual blocks before the head.
        rnn: True for the gated sum s' = SiLU(W e + U s); False for a plain sum of embeddings.
    """

    model_type = "recurrent_drafting_drafter"

    def __init__(self, exit_dim: int | None = None, num_draft_layers: int = 2, rnn: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.exit_dim = self.hidden_size if exit_dim is None else exit_dim
        self.num_draft_layers = num_draft_layers
        self.rnn = rnn


@dataclass(frozen=True)
class ReDrafterState:
    """What ReDrafter carries between cycles.

    Attributes:
        context_BD: the target's normed state of the last cached token, constant over a draft.
        root_B: int64, the last emitted token.
    """

    context_BD: Tensor
    root_B: Tensor

    def select_rows(self, rows: Tensor) -> ReDrafterState:
        """The state of some batch rows only."""
        return replace(self, context_BD=self.context_BD[rows], root_B=self.root_B[rows])


class ResidualBlock(nn.Module):
    """x + SiLU(A x + a); starts as the identity when its weights are zero."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        return x + F.silu(self.linear(x))


class ReDrafter(Drafter):
    """The recurrent head: s' = SiLU(W e(token) + U s + b), logits = head(blocks([context; s']))."""

    config_class: type[DrafterConfig] = ReDrafterConfig
    config: ReDrafterConfig

    def __init__(self, config: ReDrafterConfig) -> None:
        super().__init__(config)
        D, E = config.hidden_size, config.exit_dim
        head_size = (
            config.vocab_size if config.draft_vocab_size is None else min(config.draft_vocab_size, config.vocab_size)
        )
        if E != 2 * D:
            self.input_proj = nn.Linear(2 * D, E)
        self.lm_head = nn.Sequential(
            *(ResidualBlock(E) for _ in range(config.num_draft_layers)), nn.Linear(E, head_size, bias=False)
        )
        if config.rnn:
            self.rnn_u = nn.Linear(D, D)
            self.rnn_w = nn.Linear(D, D, bias=False)
        self.post_init()

    @classmethod
    def for_target(
        cls,
        ends: TargetEnds,
        *,
        exit_dim: int | None = None,
        num_draft_layers: int = 2,
        rnn: bool = True,
        draft_token_ids: Tensor | None = None,
        head_init: Literal["random", "target"] = "target",
        freeze_head: bool = False,
        num_draft_steps: int = 5,
        tokenizer_fingerprint: str = "",
    ) -> ReDrafter:
        """A fresh head for one target, attached to it.

        Args:
            ends: the target's frozen ends.
            exit_dim: E; None takes D.
            num_draft_layers: residual blocks.
            rnn: see the config.
            draft_token_ids: int64 [Vd], increasing; None keeps the full vocabulary.
            head_init: ``target`` starts the output head from the target's own rows, the blocks from the identity and the projection
                from "the context alone", so that training begins at the target's own next-token guess; needs E = D or E = 2 D.
            freeze_head: keep the output head as it starts (smaller optimiser state, faster steps).
            num_draft_steps: the horizon K it will be trained for, stored in its config.
            tokenizer_fingerprint: stored, and checked by those who decode with text.

        Raises:
            ValueError: sizes that do not fit together.
        """
        config = ReDrafterConfig(
            exit_dim=exit_dim,
            num_draft_layers=num_draft_layers,
            rnn=rnn,
            hidden_size=ends.hidden_size,
            vocab_size=ends.vocab_size,
            draft_vocab_size=None if draft_token_ids is None else int(draft_token_ids.shape[0]),
            num_draft_steps=num_draft_steps,
            target_name=ends.name,
            target_fingerprint=ends.fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )
        drafter = cls(config)
        if drafter.d2t is not None and draft_token_ids is not None:
            drafter.set_draft_ids(draft_token_ids)
        drafter.attach(ends)
        if head_init == "target":
            drafter._start_from_target(ends)
        drafter.lm_head[-1].weight.requires_grad_(not freeze_head)
        return drafter

    @torch.no_grad()
    def _start_from_target(self, ends: TargetEnds) -> None:
        D, E = self.config.hidden_size, self.config.exit_dim
        if E not in (D, 2 * D):
            raise ValueError(
                f"head_init 'target' needs exit_dim {D} or {2 * D} for this target, not {E}; use one, or head_init 'random'"
            )
        rows_VD = ends.head_weight[self.draft_ids().to(ends.device)].to(self.lm_head[-1].weight.dtype)
        self.lm_head[-1].weight.zero_()[:, :D].copy_(rows_VD)
        for block in self.lm_head[:-1]:
            block.linear.weight.zero_()
            block.linear.bias.zero_()
        if E == D:
            self.input_proj.weight[:, :D].copy_(torch.eye(D))
            self.input_proj.bias.zero_()

    @property
    def head_weight(self) -> Tensor:
        """[Vd, E]."""
        return self.lm_head[-1].weight

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """[K, A, E]: the head's inputs at every step of every anchor (Apple's training loop, at supervised anchors only)."""
        context_AD = self.ends.final_norm(batch.hidden[PRE_NORM][rollout.anchors]).to(self.head_weight.dtype)
        state_AD = torch.zeros_like(context_AD)
        states = []
        for step in range(rollout.tokens.shape[1]):
            state_AD = self._recur(state_AD, self._embed(rollout.tokens[:, step]))
            states.append(state_AD)
        return self._exit(self._exit_context(context_AD), torch.stack(states), self._exit_parts())

    def start(self, prompt: Emitted) -> ReDrafterState:
        """The context and root after the prompt."""
        last_B = prompt.counts_B - 1
        rows_B = torch.arange(last_B.shape[0], device=last_B.device)
        context_BD = self.ends.final_norm(prompt.features[PRE_NORM][rows_B, last_B]).to(self.head_weight.dtype)
        return ReDrafterState(context_BD, prompt.tokens_BE[rows_B, last_B])

    def advance(self, state: ReDrafterState, emitted: Emitted) -> ReDrafterState:  # type: ignore[override]
        """Only the last emitted token and the state that predicted it matter."""
        return self.start(emitted)

    def propose(self, state: ReDrafterState, limits: DraftLimits) -> DraftTree:  # type: ignore[override]
        """Beam search (section 3.2), merged into a tree by shared prefixes (section 3.3)."""
        tokens_BLM, above_BLM, scores_BLM = self._beam_search(state, limits.beam_width, limits.draft_length)
        if limits.node_budget is None and limits.beam_width > 1:
            tree = _surviving(state.root_B, tokens_BLM, above_BLM, scores_BLM)
        else:
            tree = tree_from_layers(state.root_B, tokens_BLM, above_BLM, scores_BLM)
        if limits.min_probability > 0.0 and tree.scores_BN is not None:
            likely_BN = tree.scores_BN >= math.log(limits.min_probability)
            tree = pack(replace(tree, valid_BN=tree.valid_BN & likely_BN))
        return tree if limits.node_budget is None else prune(tree, limits.node_budget)

    def _beam_search(self, state: ReDrafterState, width: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, continued candidate and cumulative log-probability of each kept candidate, [B, L, M] each."""
        B, D = state.context_BD.shape
        size = self.head_weight.shape[0]
        if width > size:
            raise ValueError(f"beam_width {width} is larger than the draft vocabulary of {size}; narrow the beam")
        parts = self._exit_parts()
        shared_B1E = self._exit_context(state.context_BD[:, None])
        state_BMD = state.context_BD.new_zeros(B, 1, D)
        token_BM = state.root_B[:, None]
        score_BM = torch.zeros(B, 1, dtype=torch.float32, device=token_BM.device)
        layers: list[tuple[Tensor, Tensor, Tensor]] = []
        for _ in range(length):
            state_BMD = self._recur(state_BMD, self._embed(token_BM))
            logits_BMV = parts.head(self._exit(shared_B1E, state_BMD, parts)).float()
            score_BM, above_BM, draft_BM = _best(score_BM, logits_BMV, width)
            if width > 1:
                state_BMD = state_BMD.gather(1, above_BM[..., None].expand(-1, -1, D))
            token_BM = self.to_target_ids(draft_BM)
            layers.append((token_BM, above_BM, score_BM))
        tokens, above, scores = zip(*layers, strict=True)
        return torch.stack(tokens, 1), torch.stack(above, 1), torch.stack(scores, 1)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.ends.embed(tokens).to(self.head_weight.dtype)

    def _recur(self, state: Tensor, embedded: Tensor) -> Tensor:
        return F.silu(self.rnn_w(embedded) + self.rnn_u(state)) if self.config.rnn else embedded + state

    def step_logits(self, context: Tensor, state: Tensor) -> Tensor:
        """Draft logits [..., Vd] of one step from the normed context [..., D] and the recurrent state [..., D]."""
        parts = self._exit_parts()
        return parts.head(self._exit(self._exit_context(context), state, parts))

    def _exit_context(self, context: Tensor) -> Tensor:
        """The context's share of the projection, the same for every step of a draft: [..., D] -> [..., E] (or [..., D] without one)."""
        if self.config.exit_dim == 2 * self.config.hidden_size:
            return context
        return F.linear(context, self.input_proj.weight[:, : self.config.hidden_size], self.input_proj.bias)

    def _exit(self, shared: Tensor, state: Tensor, parts: _ExitParts) -> Tensor:
        """Blocks over [context; state]: what :meth:`_exit_context` gave broadcasts against the state [..., D] -> [..., E]."""
        x = (
            torch.cat([shared.expand_as(state), state], -1)
            if parts.of_state is None
            else shared + F.linear(state, parts.of_state)
        )
        for block in parts.blocks:
            x = block(x)
        return x

    def _exit_parts(self) -> _ExitParts:
        of_state = None
        if self.config.exit_dim != 2 * self.config.hidden_size:
            of_state = self.input_proj.weight[:, self.config.hidden_size :]
        *blocks, head = self.lm_head
        return _ExitParts(of_state, tuple(blocks), head)


@dataclass(frozen=True)
class _ExitParts:
    """What a draft step calls, looked up once a draft: on a small target each look-up costs as much as a product."""

    of_state: Tensor | None
    blocks: tuple[nn.Module, ...]
    head: nn.Module


def _best(score_BM: Tensor, logits_BMV: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``width`` best continuations: cumulative log-probability, candidate continued, draft token id, [B, width] each."""
    # The best of all lie among the best of each beam, so that no [M * V] sort is needed.
    top_BMk, token_BMk = logits_BMV.log_softmax(-1).topk(width, dim=-1)
    if score_BM.shape[1] == 1:  # one beam to continue: its best are the best
        token_Bk = token_BMk[:, 0]
        return score_BM + top_BMk[:, 0], torch.zeros_like(token_Bk), token_Bk
    score_Bk, flat_Bk = (score_BM[..., None] + top_BMk).flatten(1).topk(width, dim=-1)
    return score_Bk, flat_Bk // width, token_BMk.flatten(1).gather(1, flat_Bk)


def _surviving(root_B: Tensor, tokens_BLM: Tensor, above_BLM: Tensor, scores_BLM: Tensor) -> DraftTree:
    """Trace the beams back from the last layer and merge their shared prefixes."""
    beam_BM = torch.arange(tokens_BLM.shape[2], device=tokens_BLM.device).expand(tokens_BLM.shape[0], -1)
    tokens, scores = [], []
    for layer in reversed(range(tokens_BLM.shape[1])):
        tokens.append(tokens_BLM[:, layer].gather(1, beam_BM))
        scores.append(scores_BLM[:, layer].gather(1, beam_BM))
        beam_BM = above_BLM[:, layer].gather(1, beam_BM)
    return tree_from_paths(root_B, torch.stack(tokens[::-1], -1), torch.stack(scores[::-1], -1))


AutoConfig.register(ReDrafterConfig.model_type, ReDrafterConfig)
AutoModel.register(ReDrafterConfig, ReDrafter)
