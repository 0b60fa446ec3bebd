"""Drafters whose guesses ride through the target's own forward, so that a draft costs further rows of it and no forward of its own.

Behind every token that the target verifies ride K rows (`models/trunk/riders.py`). Rider k stands for the k-th token after it, and the
target's own norm and head read from its state what follows. What a rider enters with is all that is learned:

- ``prompt`` (prompt tokens, PPD, arXiv:2405.18628): a learned vector, at the embedding.
- ``hidden_transfer`` (arXiv:2404.12022): W_k z + b_k of the token's state z before the block at which the rider enters; later riders enter
  higher up.
- ``firp`` (arXiv:2410.20488): the same, and all riders enter at one block.

Neither of the last two has public code. Entries, the identity as the start of W, and distillation from the target are choices made here.

Owns the drafter, its draft, its settings and its record. Knows nothing of losses, trees or verification.

Shape legend: B batch rows, M nodes of a layer or carriers, T packed tokens, A anchors, K riders, D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from draftsmith.models.drafters.draft_records import Cycle, Emitted, Opening, RootState
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.drafters.family import About, DrafterFamily, Family
from draftsmith.models.drafters.parallel_draft import ParallelDraft
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.families.from_fields import FromFields
from draftsmith.models.families.target_head import TargetHead
from draftsmith.models.files.field_rules import Rule
from draftsmith.models.target.target import TargetEnds
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.trunk.riders import RIDERS, Riders
from draftsmith.models.trunk.text_riders import ride_behind, rider_fault

RiderKind = Literal["prompt", "hidden_transfer", "firp"]


def _is_entries(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0 for entry in value)
        and list(value) == sorted(value)
    )


class RiderConfig(DrafterConfig):
    """The fields of drafters that ride.

    Attributes:
        riders: what enters: ``prompt``, ``hidden_transfer`` or ``firp``.
        entries: of each rider, the block of the target that it enters at; 0 is where embeddings do.
    """

    model_type = "draftsmith_rider_drafter"
    rules: ClassVar[Mapping[str, Rule]] = {
        **DrafterConfig.rules,
        "riders": (lambda value: value in get_args(RiderKind), f"one of {', '.join(get_args(RiderKind))}"),
        "entries": (_is_entries, "a list of block numbers from 0 on that do not fall, one for each draft step"),
    }

    def __init__(self, riders: RiderKind = "hidden_transfer", entries: list[int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.riders = riders
        self.entries = [0] * self.num_draft_steps if entries is None else list(entries)

    def fault(self) -> str:
        """See :meth:`DrafterConfig.fault`."""
        if len(self.entries) != self.num_draft_steps:
            return (
                f"{len(self.entries)} entries and num_draft_steps {self.num_draft_steps}: give an entry for each step"
            )
        if self.riders == "firp" and len(set(self.entries)) > 1:
            return (
                f"riders 'firp' and entries {self.entries}: all of its riders enter at one block; use hidden_transfer"
            )
        return super().fault()


class RiderDrafter(TargetHead, FromFields):
    """What rides through the target's blocks behind each of its tokens."""

    config_class = RiderConfig
    config: RiderConfig
    learns_through_target = True

    def __init__(self, config: RiderConfig) -> None:
        super().__init__(config)
        K, D = config.num_draft_steps, config.hidden_size
        is_prompt = config.riders == "prompt"
        self.prompt = nn.Parameter(torch.zeros(K, D)) if is_prompt else None
        self.transfers = nn.ModuleList(nn.Linear(D, D) for _ in range(0 if is_prompt else K))
        self.post_init()

    @torch.no_grad()
    def begin_fresh(self) -> None:
        """Prompts as wide as the target's embeddings; transfers that change nothing, so a rider begins as its token's own state."""
        if self.prompt is not None:
            few = torch.arange(min(self.config.vocab_size, 1024), device=self.ends.device)
            self.prompt.normal_(std=float(self.ends.embed(few).float().std()))
        for transfer in self.transfers:
            assert isinstance(transfer, nn.Linear)
            nn.init.eye_(transfer.weight)
            nn.init.zeros_(transfer.bias)

    @property
    def riders(self) -> Riders:
        """See :attr:`Drafter.riders`."""
        return Riders(tuple(self.config.entries), self.vectors)

    @property
    def max_draft_steps(self) -> int:
        """As many as there are riders."""
        return self.config.num_draft_steps

    def attach(self, ends: TargetEnds) -> Drafter:
        """See :meth:`Drafter.attach`.

        Raises:
            ValueError: also for a target that takes no riders.
        """
        super().attach(ends)
        if ends.trunk is not None:
            if fault := rider_fault(ends.trunk, self.riders):
                raise ValueError(
                    f"the target {ends.name!r} takes no riders of this {type(self).__name__}: {fault}; change that, or take a "
                    "family that drafts beside the target"
                )
            ends.trunk.let_riders_in()
        return self

    def passes(self, draft_length: int) -> int:
        """See :meth:`Drafter.passes`: the head reads all riders at once."""
        return 1

    def vectors(self, rider: int, states_BMD: Tensor) -> Tensor:
        """What a rider enters with.

        Args:
            rider: its number, from 0.
            states_BMD: of the tokens that it rides behind, before the block that it enters at.

        Returns:
            [B, M, D], in the states' dtype.
        """
        if self.prompt is not None:
            return self.prompt[rider].to(states_BMD.dtype).expand_as(states_BMD)
        moved: Tensor = self.transfers[rider](states_BMD.to(self.dtype))
        return moved.to(states_BMD.dtype)

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """See :meth:`Drafter.teacher_forced`. What is fed is not read: a rider stands for it.

        Raises:
            ValueError: the ends are those of a target without its blocks.
        """
        trunk = self.ends.trunk
        if trunk is None:
            raise ValueError(
                f"a {type(self).__name__} learns through the target's own blocks, and only the ends of {self.ends.name!r} are loaded; load "
                "the whole target and attach its ends"
            )
        riders = self.riders.first(rollout.tokens.shape[1])
        states_KAD = ride_behind(trunk, riders, batch.input_ids, batch.positions, batch.document_ids, rollout.anchors)
        return states_KAD.to(self.dtype)

    def start(self, opening: Opening) -> RootState:
        """What rode behind the prompt's last token.

        Raises:
            ValueError: nothing rode there.
        """
        return self._at(opening.prompt)

    @property
    def reads_drafted(self) -> bool:
        """See :attr:`Drafter.reads_drafted`: a rider stands for a token that is not known."""
        return False

    @property
    def reads_last_only(self) -> bool:
        """See :attr:`Drafter.reads_last_only`."""
        return True

    def advance(self, state: RootState, emitted: Emitted) -> RootState:  # type: ignore[override]
        """What rode behind the last accepted token."""
        return self._at(emitted)

    def follow(self, state: RootState, cycle: Cycle, limits: DraftLimits) -> RootState:  # type: ignore[override]
        """See :meth:`Drafter.follow`: nothing is pending."""
        return state

    def expander(self, state: RootState, cycle: Cycle, limits: DraftLimits) -> RiderDraft:  # type: ignore[override]
        """See :class:`RiderDraft`."""
        return RiderDraft(self, state)

    def _at(self, emitted: Emitted) -> RootState:
        if RIDERS not in emitted.features:
            raise ValueError(
                f"a {type(self).__name__} drafts with what rode through the target, and nothing did; read with riders=drafter.riders"
            )
        root_B, states_BE = emitted.last(RIDERS)
        return RootState(states_BE, root_B)


class RiderDraft(ParallelDraft):
    """One draft: riders read no drafted token, so all nodes of one depth have the same continuations.

    Args:
        drafter: whose head.
        state: the last emitted tokens, and the states [B, K D] that rode behind the tokens before them.
    """

    def __init__(self, drafter: RiderDrafter, state: RootState) -> None:
        super().__init__(drafter, state.root_B)
        self._states_BKD = state.context_BD.unflatten(1, (-1, drafter.config.hidden_size)).to(drafter.dtype)

    def slot_logits(self) -> Tensor:
        """See :meth:`ParallelDraft.slot_logits`."""
        return self._drafter.rollout_logits(self._states_BKD.transpose(0, 1)).transpose(0, 1)


class RiderFamily(DrafterFamily):
    """Guesses that ride through the target's own forward behind each token. `num_steps` sets how many. Trained with the whole target.

    Args:
        riders: what enters. `prompt` (arXiv 2405.18628): a learned vector for each step, at the embedding; `hidden_transfer`
            (arXiv 2404.12022) and `firp` (arXiv 2410.20488): a linear map of the token's own state before an inner block.
        entries: the block of the target that each rider enters at, not falling; null takes the embedding for `prompt`, a third of the
            target's depth for `firp`, and from one third to two for `hidden_transfer`.
        draft_vocab_size: score only this many tokens, the most frequent labelled ones of the training samples; null scores all.
    """

    kind = RiderDrafter

    def __init__(
        self,
        riders: RiderKind = "hidden_transfer",
        entries: list[int] | None = None,
        draft_vocab_size: int | None = None,
    ) -> None:
        self.riders, self.entries, self.draft_vocab_size = riders, entries, draft_vocab_size

    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> RiderDrafter:
        """See DrafterFamily.build.

        Raises:
            ValueError: settings that do not go together, or a target that takes no riders.
        """
        return RiderDrafter.for_target(
            ends,
            riders=self.riders,
            entries=self.entries or usual_entries(self.riders, ends.config.num_hidden_layers, num_steps),
            draft_token_ids=draft_token_ids,
            num_draft_steps=num_steps,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )


def usual_entries(riders: RiderKind, num_blocks: int, num_steps: int) -> list[int]:
    """Where riders enter if nobody says.

    Example: of 12 blocks, three riders of ``hidden_transfer`` enter at 4, 6 and 8; of ``firp``, all at 4.

    Args:
        riders: what enters.
        num_blocks: of the target.
        num_steps: K.
    """
    if riders == "prompt":
        return [0] * num_steps
    first = num_blocks // 3
    if riders == "firp":
        return [first] * num_steps
    higher = [first + (num_blocks - 2 * first) * step // max(1, num_steps - 1) for step in range(num_steps)]
    return [min(entry, num_blocks - 1) for entry in higher]


FAMILY = Family(
    name="riderdrafter",
    drafter=RiderDrafter,
    config=RiderConfig,
    settings=RiderFamily,
    about=About(
        title="Rider drafter",
        what="Guesses that ride through the target's own forward ([prompt tokens](https://arxiv.org/abs/2405.18628), "
        "[Hidden Transfer](https://arxiv.org/abs/2404.12022), [FIRP](https://arxiv.org/abs/2410.20488))",
        reads="further rows of its forward",
    ),
)
