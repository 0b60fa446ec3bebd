"""ReDrafter: a recurrent draft head searched with a beam (arXiv:2403.09919).

Owns the head's architecture, its teacher-forced run, the step of its draft, its settings and its record. Parameter names and shapes are
those of Apple's checkpoints: ``lm_head.{i}.linear``, ``lm_head.{N}``, ``rnn_u``, ``rnn_w``, ``input_proj``. A draft vocabulary and a head
that starts from the target's are additions. Knows nothing of verification: what it proposes is exact because of the walk, not of this file.

Shape legend: B batch rows, M beams, L drafted depth, A anchors, K draft steps, D target hidden, E exit dimension, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from draftsmith.models.drafters.draft_records import Cycle, Emitted, Opening, RootState
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.drafters.family import About, DrafterFamily, Family
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.families.head_steps import ResidualBlock
from draftsmith.models.files.field_rules import COUNT_OR_NULL, COUNT_OR_ZERO, FLAG, Rule
from draftsmith.models.target.target import PRE_NORM, TargetEnds
from draftsmith.models.tree.limits import DraftLimits


class ReDrafterConfig(DrafterConfig):
    """Apple's fields and the common ones.

    Attributes:
        exit_dim: width E of the residual blocks and of the output head's input. Apple uses 2 D; D makes the head as small as the
            target's and lets it start from the target's.
        num_draft_layers: residual blocks before the head.
        rnn: True for the gated sum s' = SiLU(W e + U s); False for a plain sum of embeddings.
    """

    model_type = "recurrent_drafting_drafter"
    rules: ClassVar[Mapping[str, Rule]] = {
        **DrafterConfig.rules,
        "exit_dim": COUNT_OR_NULL,
        "num_draft_layers": COUNT_OR_ZERO,
        "rnn": FLAG,
    }

    def __init__(self, exit_dim: int | None = None, num_draft_layers: int = 2, rnn: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.exit_dim = self.hidden_size if exit_dim is None else exit_dim
        self.num_draft_layers = num_draft_layers
        self.rnn = rnn


ReDrafterState = RootState


class ReDrafter(Drafter):
    """The recurrent head: s' = SiLU(W e(token) + U s + b), logits = head(blocks([context; s']))."""

    config_class: type[DrafterConfig] = ReDrafterConfig
    config: ReDrafterConfig

    def __init__(self, config: ReDrafterConfig) -> None:
        super().__init__(config)
        D, E = config.hidden_size, config.exit_dim
        if E != 2 * D:
            self.input_proj = nn.Linear(2 * D, E)
        self.lm_head = nn.Sequential(
            *(ResidualBlock(E) for _ in range(config.num_draft_layers)),
            nn.Linear(E, config.num_draft_tokens, bias=False),
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
        """Make a fresh head for one target, attached to it.

        Args:
            ends: the target's frozen ends.
            exit_dim: E; None takes D.
            num_draft_layers: residual blocks.
            rnn: see the config.
            draft_token_ids: int64 [Vd], increasing; None keeps the full vocabulary.
            head_init: ``target`` begins training at the target's own next-token guess. The output head starts from the target's rows, the
                blocks from the identity, and the projection from "the context alone". It needs E = D or E = 2 D.
            freeze_head: keep the output head as it starts (smaller optimiser state, faster steps).
            num_draft_steps: the horizon K it will be trained for, stored in its config.
            tokenizer_fingerprint: stored, and checked by those who decode with text.

        Returns:
            The drafter.

        Raises:
            ValueError: sizes that do not fit together.
        """
        config = ReDrafterConfig.for_target(
            ends,
            draft_token_ids,
            num_draft_steps,
            tokenizer_fingerprint,
            exit_dim=exit_dim,
            num_draft_layers=num_draft_layers,
            rnn=rnn,
        )
        drafter = cls(config)
        drafter.adopt_target(ends, draft_token_ids)
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
        """See :meth:`Drafter.teacher_forced`: Apple's training loop, at supervised anchors only."""
        context_AD = self.ends.final_norm(batch.hidden[PRE_NORM][rollout.anchors]).to(self.dtype)
        state_AD = torch.zeros_like(context_AD)
        states = []
        for step in range(rollout.tokens.shape[1]):
            state_AD = self._recur(state_AD, self.embed(rollout.tokens[:, step]))
            states.append(state_AD)
        return self._exit(self._exit_context(context_AD), torch.stack(states), self._exit_parts())

    def weights_read_once(self) -> tuple[Tensor, ...]:
        """See :meth:`Drafter.weights_read_once`: the context's share of the projection."""
        if self.config.exit_dim == 2 * self.config.hidden_size:
            return ()
        return self.input_proj.weight[:, : self.config.hidden_size], self.input_proj.bias

    def start(self, opening: Opening) -> ReDrafterState:
        """The context and root after the prompt."""
        return self._at(opening.prompt)

    @property
    def reads_last_only(self) -> bool:
        """See :attr:`Drafter.reads_last_only`."""
        return True

    def advance(self, state: ReDrafterState, emitted: Emitted) -> ReDrafterState:  # type: ignore[override]
        """Only the last emitted token and the state that predicted it matter."""
        return self._at(emitted)

    def _at(self, emitted: Emitted) -> ReDrafterState:
        root_B, state_BD = emitted.last(PRE_NORM)
        return ReDrafterState(self.ends.final_norm(state_BD).to(self.dtype), root_B)

    def expander(self, state: ReDrafterState, cycle: Cycle, limits: DraftLimits) -> Recurrence:  # type: ignore[override]
        """See :class:`Recurrence`."""
        return Recurrence(self, state)

    def follow(self, state: ReDrafterState, cycle: Cycle, limits: DraftLimits) -> ReDrafterState:  # type: ignore[override]
        """See :meth:`Drafter.follow`: nothing is ever pending."""
        return state

    def _recur(self, state: Tensor, embedded: Tensor) -> Tensor:
        return F.silu(self.rnn_w(embedded) + self.rnn_u(state)) if self.config.rnn else embedded + state

    def step_logits(self, context: Tensor, state: Tensor) -> Tensor:
        """Score one step.

        Args:
            context: [..., D], the target's normed state.
            state: [..., D], the recurrent state.

        Returns:
            Draft logits [..., Vd].
        """
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


class Recurrence:
    """One draft: every node's recurrent state comes from its parent's, the context stays (section 3.1)."""

    def __init__(self, drafter: ReDrafter, state: ReDrafterState) -> None:
        self.root_B = state.root_B
        self.target_ids = drafter.to_target_ids
        self._drafter = drafter
        # Looked up once a draft: on a small target each look-up costs as much as a product.
        self._parts = drafter._exit_parts()
        self._shared_B1E = drafter._exit_context(state.context_BD[:, None])
        self._shared_BME = self._shared_B1E
        self._state_BMD: Tensor | None = None  # zeros before the first step

    def begin(self) -> Tensor:
        """See :class:`Expander`: the first step is fed the root."""
        return self._step(self.root_B[:, None])

    def extend(self, tokens_BM: Tensor, above_BM: Tensor) -> Tensor:
        """See :class:`Expander`: one more step for nodes that continue those of the last call."""
        assert self._state_BMD is not None
        if self._state_BMD.shape[1] > 1:
            D = self._state_BMD.shape[-1]
            self._state_BMD = self._state_BMD.gather(1, above_BM[..., None].expand(-1, -1, D))
        return self._step(tokens_BM)

    def _step(self, tokens_BM: Tensor) -> Tensor:
        self._state_BMD = self._next_state(self._drafter.embed(tokens_BM))
        x_BME = self._joined(self._state_BMD)
        for block in self._parts.blocks:
            x_BME = block(x_BME)
        return self._parts.head(x_BME)

    def _next_state(self, embedded_BMD: Tensor) -> Tensor:
        """As :meth:`ReDrafter._recur`, with as few operations as can be."""
        drafter, state_BMD = self._drafter, self._state_BMD
        if not drafter.config.rnn:
            return embedded_BMD if state_BMD is None else embedded_BMD + state_BMD
        if state_BMD is None:
            return F.silu(F.linear(embedded_BMD, drafter.rnn_w.weight, drafter.rnn_u.bias))
        recurred_BMD = drafter.rnn_u(state_BMD).expand_as(embedded_BMD)
        return F.silu(plus_product(recurred_BMD, embedded_BMD, drafter.rnn_w.weight))

    def _joined(self, state_BMD: Tensor) -> Tensor:
        """As the beginning of :meth:`ReDrafter._exit`."""
        if self._parts.of_state is None:
            return torch.cat([self._shared_B1E.expand_as(state_BMD), state_BMD], dim=-1)
        B, M, _ = state_BMD.shape
        if self._shared_BME.shape[1] != M:
            self._shared_BME = self._shared_B1E.expand(B, M, -1).contiguous()
        return plus_product(self._shared_BME, state_BMD, self._parts.of_state)


def plus_product(added: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Add a linear layer's product as one operation.

    Args:
        added: [..., O], of the shape of the product.
        x: [..., I].
        weight: [O, I].

    Returns:
        [..., O].
    """
    return torch.addmm(added.flatten(0, -2), x.flatten(0, -2), weight.t()).view_as(added)


@dataclass(frozen=True)
class _ExitParts:
    """The head's parts as a draft step calls them."""

    of_state: Tensor | None
    blocks: tuple[nn.Module, ...]
    head: nn.Module


class ReDrafterFamily(DrafterFamily):
    """ReDrafter's recurrent head (arXiv 2403.09919).

    Args:
        exit_dim: width of the residual blocks and of the head's input; null takes the target's hidden size, Apple's
            checkpoints have twice that.
        num_draft_layers: residual blocks before the head.
        rnn: the gated recurrence; false sums embeddings instead.
        draft_vocab_size: keep this many tokens, the most frequent labelled ones of the training samples; null keeps
            all.
        head_init: start the output head from the target's own head, or at random.
        freeze_head: leave the output head as it starts.
    """

    kind = ReDrafter

    def __init__(
        self,
        exit_dim: int | None = None,
        num_draft_layers: int = 2,
        rnn: bool = True,
        draft_vocab_size: int | None = None,
        head_init: Literal["random", "target"] = "target",
        freeze_head: bool = False,
    ) -> None:
        self.exit_dim = exit_dim
        self.num_draft_layers = num_draft_layers
        self.rnn = rnn
        self.draft_vocab_size = draft_vocab_size
        self.head_init = head_init
        self.freeze_head = freeze_head

    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> ReDrafter:
        """See DrafterFamily.build.

        Raises:
            ValueError: sizes that do not fit the target.
        """
        return ReDrafter.for_target(
            ends,
            exit_dim=self.exit_dim,
            num_draft_layers=self.num_draft_layers,
            rnn=self.rnn,
            draft_token_ids=draft_token_ids,
            head_init=self.head_init,
            freeze_head=self.freeze_head,
            num_draft_steps=num_steps,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )

    def configure(self, drafter: Drafter) -> None:
        """See DrafterFamily.configure."""
        assert isinstance(drafter, ReDrafter)
        if self.freeze_head:
            drafter.lm_head[-1].requires_grad_(False)


FAMILY = Family(
    name="redrafter",
    drafter=ReDrafter,
    config=ReDrafterConfig,
    settings=ReDrafterFamily,
    about=About(title="ReDrafter", what="A recurrent draft head ([ReDrafter](https://arxiv.org/abs/2403.09919))"),
    layouts=("draftsmith.export.layouts.apple",),
)
