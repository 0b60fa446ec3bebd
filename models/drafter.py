"""The drafter seam: the one interface that the trainer, the decoder and the exporter share.

Owns what every family has in common: which features of the target it reads, the draft vocabulary, the bond to one target, and the
rollouts on which it is trained. Knows no family, no Lightning and no cache format.

Shape legend: B batch rows, T packed tokens, A anchors, K draft steps, E emitted tokens, D hidden, V target vocabulary,
Vd draft vocabulary, N tree nodes.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from draftsmith.models.target import TargetEnds
from draftsmith.models.tree import DraftTree


@dataclass(frozen=True)
class PackedBatch:
    """Several training samples end to end, without padding.

    Attributes:
        input_ids: int64 [T].
        loss_mask: bool [T], True at tokens that the target (or the data set's assistant) wrote.
        document_ids: int64 [T], which sample a token belongs to.
        positions: int64 [T], position inside the sample.
        hidden: layer name -> [T, D], the target's states.
        greedy_ids: int64 [T, G] or None; ``[t, j]`` is the target's j-th greedy token after the prefix that ends at t.
    """

    input_ids: Tensor
    loss_mask: Tensor
    document_ids: Tensor
    positions: Tensor
    hidden: dict[str, Tensor]
    greedy_ids: Tensor | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            loss_mask=self.loss_mask.to(device),
            document_ids=self.document_ids.to(device),
            positions=self.positions.to(device),
            hidden={name: states.to(device) for name, states in self.hidden.items()},
            greedy_ids=None if self.greedy_ids is None else self.greedy_ids.to(device),
        )


@dataclass(frozen=True)
class Rollout:
    """What a drafter simulates in training, from each anchor position t: exactly what decoding does from that state.

    At an anchor the drafter holds the target's state of token x_t and the root x_{t+1}; at step k it is fed ``tokens[:, k]`` and
    must predict ``targets[:, k]``.

    Attributes:
        anchors: int64 [A], positions t in the packed batch.
        tokens: int64 [A, K], target token ids fed at each step; column 0 is the root.
        targets: int64 [A, K], target token ids to predict.
        valid: bool [A, K], False where the prediction is not supervised (another sample, a prompt token, past the end).
    """

    anchors: Tensor
    tokens: Tensor
    targets: Tensor
    valid: Tensor


def data_rollout(batch: PackedBatch, num_steps: int) -> Rollout:
    """Roll out along the batch's own text: step k is fed x_{t+1+k} and predicts x_{t+2+k}.

    An anchor is any t whose root x_{t+1} is supervised, since decoding always starts from an emitted root. A step is valid while
    every token from the root to the predicted one is supervised and of the same sample.

    Example:
        ids ``[p, a, b, c]`` with mask ``[0, 1, 1, 1]`` and two steps give the anchors 0, 1, 2 with tokens
        ``[[a, b], [b, c], [c, -]]``, targets ``[[b, c], [c, -], [-, -]]``; ``-`` is not valid.
    """
    total = batch.input_ids.shape[0]
    same_T = batch.document_ids[1:] == batch.document_ids[:-1]
    anchors = torch.nonzero(batch.loss_mask[1:] & same_T).squeeze(1)
    ahead_AK = anchors[:, None] + 2 + torch.arange(num_steps, device=anchors.device)
    inside_AK = ahead_AK < total
    ahead_AK = ahead_AK.clamp(max=max(total - 1, 0))
    supervised_AK = (
        inside_AK & batch.loss_mask[ahead_AK] & (batch.document_ids[ahead_AK] == batch.document_ids[anchors, None])
    )
    return Rollout(
        anchors=anchors,
        tokens=batch.input_ids[(ahead_AK - 1).clamp(min=0)],
        targets=batch.input_ids[ahead_AK],
        valid=supervised_AK.int().cumprod(1).bool(),
    )


def local_rollout(batch: PackedBatch, num_steps: int) -> Rollout:
    """Roll out along the target's own greedy continuation from every position (ReDrafter's local distillation, section 4.2).

    Anchors are those of :func:`data_rollout`; step k is fed ``greedy_ids[t, k]`` and predicts ``greedy_ids[t, k + 1]``.

    Raises:
        ValueError: the batch holds no greedy continuations, or fewer than ``num_steps + 1`` a position.
    """
    horizon = 0 if batch.greedy_ids is None else batch.greedy_ids.shape[1]
    if batch.greedy_ids is None or horizon < num_steps + 1:
        raise ValueError(
            f"local distillation over {num_steps} steps needs {num_steps + 1} greedy tokens a position, the cache holds {horizon}; "
            f"extract it with --local-horizon {num_steps + 1}"
        )
    anchors = data_rollout(batch, 1).anchors
    greedy_AG = batch.greedy_ids[anchors]
    return Rollout(
        anchors=anchors,
        tokens=greedy_AG[:, :num_steps],
        targets=greedy_AG[:, 1 : num_steps + 1],
        valid=torch.ones(anchors.shape[0], num_steps, dtype=torch.bool, device=anchors.device),
    )


@dataclass(frozen=True)
class DraftLimits:
    """How much to draft in one cycle.

    Attributes:
        beam_width: candidates kept in each layer of the draft.
        draft_length: drafted tokens below the root (Apple's ``beam_length`` counts the root too, so it is one more).
        node_budget: at most so many drafted nodes are verified, the best by cumulative probability among all candidates expanded;
            None verifies the nodes of the surviving beams, as ReDrafter does.
        min_probability: nodes whose cumulative draft probability is below this are not verified.
    """

    beam_width: int = 1
    draft_length: int = 4
    node_budget: int | None = None
    min_probability: float = 0.0

    def __post_init__(self) -> None:
        for name in ("beam_width", "draft_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.node_budget is not None and self.node_budget < 1:
            raise ValueError(f"node_budget is {self.node_budget}; it must be at least 1, or null for no budget")
        if not 0.0 <= self.min_probability < 1.0:
            raise ValueError(f"min_probability is {self.min_probability}; it must be in [0, 1)")

    @property
    def max_nodes(self) -> int:
        """The largest tree these limits allow, the root included."""
        drafted = self.beam_width * self.draft_length
        return 1 + (drafted if self.node_budget is None else min(drafted, self.node_budget))


@dataclass(frozen=True)
class Emitted:
    """Tokens that became final, each with the target's features at the position that predicted it.

    Attributes:
        tokens_BE: int64 [B, E]; the last counted one of a row is the new root.
        features: layer name -> [B, E, D]; ``[b, i]`` is the target's state of the token before ``tokens_BE[b, i]``.
        counts_B: int64 [B], how many of the E are real in each row, at least 1.
    """

    tokens_BE: Tensor
    features: dict[str, Tensor]
    counts_B: Tensor


class DraftState(Protocol):
    """What a drafter carries from cycle to cycle; its content is the family's own."""

    def select_rows(self, rows: Tensor) -> DraftState:
        """The state of some batch rows only. ``rows``: int64 [B']."""
        ...


class DrafterConfig(PreTrainedConfig):
    """Fields common to every drafter: which target and tokenizer it belongs to, and its vocabulary.

    Attributes:
        hidden_size: the target's hidden size D.
        vocab_size: the target's vocabulary size V.
        draft_vocab_size: Vd; None or V means the full vocabulary.
        num_draft_steps: the horizon it was trained for.
        target_name, target_fingerprint, tokenizer_fingerprint: the bond to one target; empty strings mean unknown.
    """

    model_type = "draftsmith_drafter"

    def __init__(
        self,
        hidden_size: int = 0,
        vocab_size: int = 0,
        draft_vocab_size: int | None = None,
        num_draft_steps: int = 5,
        target_name: str = "",
        target_fingerprint: str = "",
        tokenizer_fingerprint: str = "",
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.draft_vocab_size = draft_vocab_size
        self.num_draft_steps = num_draft_steps
        self.target_name = target_name
        self.target_fingerprint = target_fingerprint
        self.tokenizer_fingerprint = tokenizer_fingerprint
        super().__init__(**kwargs)


class Drafter(PreTrainedModel):
    """A small trained module that proposes tokens from a frozen target's states.

    Saved and loaded as any ``PreTrainedModel``. The target's frozen ends (embedding, final norm, head) are borrowed through
    :meth:`attach` and are never saved with it.
    """

    config: DrafterConfig
    config_class: type[DrafterConfig] = DrafterConfig
    base_model_prefix = ""
    features: ClassVar[tuple[str, ...]] = ("last.pre_norm",)

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self._borrowed: list[TargetEnds] = []
        if config.draft_vocab_size is not None and config.draft_vocab_size < config.vocab_size:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        else:
            self.d2t: Tensor | None = None

    @property
    def ends(self) -> TargetEnds:
        """The target's frozen ends.

        Raises:
            ValueError: :meth:`attach` was not called.
        """
        if not self._borrowed:
            raise ValueError("this drafter is attached to no target; call drafter.attach(target.ends) first")
        return self._borrowed[0]

    def attach(self, ends: TargetEnds) -> Drafter:
        """Borrow the target's frozen ends.

        Raises:
            ValueError: the drafter was made for another target (its weights or shapes differ).
        """
        own = self.config.target_fingerprint
        if own and ends.fingerprint and own != ends.fingerprint:
            raise ValueError(
                f"this drafter was trained for target {self.config.target_name!r} (fingerprint {own[:12]}), not for {ends.name!r} "
                f"({ends.fingerprint[:12]}); use that target, or train a drafter for this one"
            )
        if (self.config.hidden_size, self.config.vocab_size) != (ends.hidden_size, ends.vocab_size):
            raise ValueError(
                f"this drafter expects hidden size {self.config.hidden_size} and vocabulary {self.config.vocab_size}, the target "
                f"{ends.name!r} has {ends.hidden_size} and {ends.vocab_size}; use the target it was trained for"
            )
        self._borrowed[:] = [ends]
        return self

    def check_tokenizer(self, fingerprint: str) -> None:
        """Refuse a tokenizer that is not the one of training.

        Raises:
            ValueError: both fingerprints are known and differ.
        """
        own = self.config.tokenizer_fingerprint
        if own and fingerprint and own != fingerprint:
            raise ValueError(
                f"this drafter was trained with another tokenizer ({own[:12]}) than this one ({fingerprint[:12]}); token ids would "
                "not mean the same; use the tokenizer of the drafter's target"
            )

    def draft_ids(self) -> Tensor:
        """int64 [Vd]: the target token id of each draft token id."""
        size = self.config.vocab_size if self.d2t is None else self.d2t.shape[0]
        ids = torch.arange(size, device=self.device)
        return ids if self.d2t is None else ids + self.d2t

    def to_target_ids(self, draft_token_ids: Tensor) -> Tensor:
        """Map draft ids to target ids, any shape, int64."""
        return draft_token_ids if self.d2t is None else draft_token_ids + self.d2t[draft_token_ids]

    def set_draft_ids(self, target_ids: Tensor) -> None:
        """Choose the draft vocabulary. ``target_ids``: int64 [Vd], strictly increasing.

        Raises:
            ValueError: the ids are not increasing, out of range, or of another number than ``config.draft_vocab_size``.
        """
        if self.d2t is None:
            raise ValueError("this drafter has the full vocabulary; set draft_vocab_size in its config first")
        if target_ids.shape != self.d2t.shape:
            raise ValueError(f"{tuple(target_ids.shape)} draft ids given, draft_vocab_size is {self.d2t.shape[0]}")
        if (
            bool((target_ids.diff() <= 0).any())
            or int(target_ids[0]) < 0
            or int(target_ids[-1]) >= self.config.vocab_size
        ):
            raise ValueError(f"draft ids must be strictly increasing and within [0, {self.config.vocab_size})")
        self.d2t.copy_(target_ids.to(self.d2t.device) - torch.arange(target_ids.shape[0], device=self.d2t.device))

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """[Vd, E]: the output head applied to what :meth:`teacher_forced` returns."""

    @abstractmethod
    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """[K, A, E]: the inputs of the output head at every step of every anchor, in training."""

    @abstractmethod
    def start(self, prompt: Emitted) -> DraftState:
        """The state after the prompt and the first emitted token."""

    @abstractmethod
    def propose(self, state: DraftState, limits: DraftLimits) -> DraftTree:
        """Draft a tree below each row's root without reading anything back to the host."""

    @abstractmethod
    def advance(self, state: DraftState, emitted: Emitted) -> DraftState:
        """The state after a cycle's emitted tokens."""
