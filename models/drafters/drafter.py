"""The drafter seam: the one interface that the trainer, the decoder and the exporter share.

Owns what every family has in common: which features of the target it reads, and how it drafts. Its vocabulary, its heads and its bond to
one target are those of the classes it extends. Knows no family, no Lightning and no cache format.

Shape legend: B batch rows, T packed tokens, A anchors, K draft steps, N tree nodes.
D hidden, V target vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Generator
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from draftsmith.models.drafters.draft_records import Cycle, DraftState, Emitted, Opening
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.drafters.drafter_reader import read_drafter
from draftsmith.models.drafters.returned_shapes import check_features, checked_expander
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.drafters.scoring_module import ScoringModule
from draftsmith.models.target.key_values import KeyValues
from draftsmith.models.target.target import PRE_NORM, Target, TargetEnds
from draftsmith.models.tree.kept_logits import KeptLogits
from draftsmith.models.tree.kept_shapes import fitting_shapes
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.sampled_search import sampled_tree
from draftsmith.models.tree.search import Expander, search
from draftsmith.models.tree.shapes_by_rows import ShapesByRows
from draftsmith.models.tree.tree import DraftTree
from draftsmith.models.trunk.riders import Riders


class Drafter(ScoringModule):
    """A small trained module that proposes tokens from a frozen target's states.

    Saved and loaded as any ``PreTrainedModel``. The target's frozen ends (embedding, final norm, head) are borrowed through
    :meth:`attach` and are never saved with it.

    Args:
        config: of the family's own class.

    Attributes:
        loaded_from: the folder that it was loaded from; None for one that was made in memory.

    Raises:
        ValueError: the config's ``score_scale`` is not a positive number.
    """

    config: DrafterConfig
    config_class: type[DrafterConfig] = DrafterConfig
    called = "drafter"
    predicts_features: ClassVar[bool] = False
    """Whether the head's inputs are guesses of the target's normed states, which a loss can then be taken on."""
    learns_through_target: ClassVar[bool] = False
    """Whether training runs through the target's own blocks, so that it needs the whole target and not its ends alone."""

    def __init__(self, config: DrafterConfig) -> None:
        config.check(type(self).__name__)
        super().__init__(config)
        self.loaded_from: Path | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As Transformers has it; a local folder must first pass the checks of `read_drafter`.

        Args:
            pretrained_model_name_or_path: as in Transformers.
            args: as in Transformers.
            kwargs: as in Transformers.

        Returns:
            The drafter.

        Raises:
            ValueError: the folder holds no whole drafter of this family.
        """
        given = pretrained_model_name_or_path
        folder = Path(given) if isinstance(given, str | os.PathLike) and Path(given).is_dir() else None
        if folder is not None:
            read_drafter(folder, cls)
        loaded = super().from_pretrained(given, *args, **kwargs)
        drafter = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info it is a pair
        drafter.loaded_from = folder
        return loaded

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the target's layers that it reads."""
        return (PRE_NORM,)

    @property
    def riders(self) -> Riders | None:
        """What rides through the target's forward behind every token; None in most families.

        Their states come with each emitted token as the feature ``RIDERS``. What they give at draft step k may not depend on later riders.
        """
        return None

    def bound(self, ends: TargetEnds) -> Self:
        """Make a view of this drafter that is attached to a target: the same weights, with ends of its own.

        This drafter stays as it is, so several engines can share one. What a view carries from cycle to cycle belongs in its
        :class:`DraftState`: attributes that it sets on itself are not seen here.

        Args:
            ends: the target's frozen ends.

        Returns:
            The view.

        Raises:
            ValueError: as :meth:`attach`.
        """
        view = self.view()
        view.attach(ends)
        return view

    def to_decode(self, device: torch.device) -> Self:
        """Move this drafter to the target's device, to decode there and not to be trained.

        A drafter that holds a causal LM also merges matrices of it that read the same states.

        Args:
            device: the target's.

        Returns:
            This drafter.
        """
        torch.nn.Module.to(self, device)
        for part in self.parts or ():
            part.to_decode(device)
        return self

    def attach(self, ends: TargetEnds) -> Drafter:
        """Borrow the target's frozen ends.

        Args:
            ends: the target's.

        Returns:
            This drafter.

        Raises:
            ValueError: the drafter was made for another target (its weights or shapes differ).
        """
        self.check_target(ends)
        check_features(self)
        self.borrow(ends)
        return self

    def sizes_of(self, owner: Any) -> dict[str, int]:
        """See :meth:`BoundModule.sizes_of`."""
        return {"hidden size": owner.hidden_size, "vocabulary": owner.vocab_size}

    def adopt_target(self, ends: TargetEnds, draft_token_ids: Tensor | None) -> None:
        """Give a fresh drafter its draft vocabulary, and attach it to its target.

        Args:
            ends: the target's.
            draft_token_ids: int64 [Vd], increasing; None keeps the full vocabulary.

        Raises:
            ValueError: as :meth:`set_draft_ids` and :meth:`attach`.
        """
        if draft_token_ids is not None and self.d2t is not None:
            self.set_draft_ids(draft_token_ids)
        self.attach(ends)

    def embed(self, tokens: Tensor) -> Tensor:
        """Look up the target's embeddings.

        Args:
            tokens: int64 [...], target ids.

        Returns:
            [..., D] in this drafter's dtype.
        """
        return self.ends.embed(tokens).to(self.dtype)

    @property
    def skips_steps(self) -> bool:
        """Whether :meth:`teacher_forced` computes valid steps alone, so that drawing fewer of the deep ones saves work."""
        return False

    @property
    def reads_drafted(self) -> bool:
        """Whether the logits of a step depend on the tokens drafted before it; where they do not, all steps can be rescored at once."""
        return True

    @property
    def reads_choices(self) -> bool:
        """Whether :meth:`take_choices` keeps anything."""
        return False

    @property
    def reads_last_only(self) -> bool:
        """Whether :meth:`advance` reads no pair but the last emitted one. It is then given that pair alone."""
        return False

    @property
    def max_draft_steps(self) -> int | None:
        """The deepest draft that it can make; None for any depth. A family with a head for each step overrides this."""
        return None

    @abstractmethod
    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """Run the drafter over a rollout, in training.

        Args:
            batch: packed samples with the target's states.
            rollout: which tokens each anchor is fed.

        Returns:
            [K, A, E]: the inputs of the output head at every step of every anchor; [K, A, E + r] with a :attr:`correction_weight`.
        """

    @abstractmethod
    def start(self, opening: Opening) -> DraftState:
        """Begin a batch.

        Args:
            opening: its prompts and first emitted tokens.

        Returns:
            The state after them.
        """

    def start_in_steps(self, opening: Opening) -> Generator[None, None, DraftState]:
        """As :meth:`start`, but gives control back whenever a chunk of the prompts has been read and another follows.

        Args:
            opening: its prompts and first emitted tokens.

        Returns:
            The state after them.
        """
        yield from ()
        return self.start(opening)

    @abstractmethod
    def expander(self, state: DraftState, cycle: Cycle, limits: DraftLimits) -> Expander:
        """Make what continues one node after another below each row's root, for the search.

        Args:
            state: of the drafter.
            cycle: what the decoder knows of the rows.
            limits: how the draft will be made.

        Returns:
            The expander of this one draft.
        """

    @abstractmethod
    def advance(self, state: DraftState, emitted: Emitted) -> DraftState:
        """Take in what a cycle emitted.

        Args:
            state: before the cycle.
            emitted: its tokens with the target's features.

        Returns:
            The state after them.
        """

    def take_choices(self, state: DraftState, tree: DraftTree, choices_BN: Tensor) -> DraftState:
        """Take in what the target chose behind every node of a draft, rejected ones too. Called before :meth:`advance`.

        Only a drafter with :attr:`reads_choices` is called.

        Args:
            state: before the cycle.
            tree: the draft.
            choices_BN: int64, the target's choice behind each node.

        Returns:
            The state with what is kept of them; by default nothing is.
        """
        return state

    def follow(self, state: DraftState, cycle: Cycle, limits: DraftLimits) -> DraftState:
        """Stay ready for later drafts in a cycle that drafts nothing. By default a draft is begun and what it says is dropped.

        A family overrides this where less work is enough, or where it proposes without an expander.

        Args:
            state: of the drafter.
            cycle: what the decoder knows of the rows.
            limits: the most that is drafted in other cycles.

        Returns:
            The state, from which nothing is pending any more.
        """
        self.expander(state, cycle, limits).begin()
        return state

    def kept_shapes(self, target: Target) -> ShapesByRows | None:
        """The shapes that ``draftsmith tune`` kept in the folder that this drafter was loaded from, if they fit a target.

        A log line says which they are; a warning says why they do not fit.

        Args:
            target: the target that decodes.

        Returns:
            The shapes; None where there are none, or they were measured on another kind of device or with another target.

        Raises:
            ValueError: the file of shapes breaks a rule.
        """
        if self.loaded_from is None:
            return None
        known = target.fingerprint or self.config.target_fingerprint
        return fitting_shapes(self.loaded_from, target.device.type, known, self.drafts_from)

    def drafts_from(self) -> str:
        """A fingerprint of what a drafter without weights drafts from, as its folder names it; empty for any other drafter."""
        return ""

    def needs_host(self) -> str:
        """Why a draft cannot be compiled or captured: it reads tensors on the host, or switches modules. Empty where it can."""
        return ""

    def passes(self, draft_length: int) -> int:
        """How often a draft reads the drafter's weights, its head included: at every step, unless a family drafts several tokens at once.

        It serves the count of the bytes that a draft reads, nothing else.

        Args:
            draft_length: drafted tokens below the root.
        """
        return draft_length

    def weights_read_once(self) -> tuple[Tensor, ...]:
        """Weights, or views of parts of them, that a draft reads once and not at every step. Most families have none.

        It serves the count of the bytes that a draft reads, nothing else.
        """
        return ()

    @property
    def parts(self) -> tuple[Drafter, ...] | None:
        """The drafters that this one is made of, which draft one beside the other; None for a drafter with weights of its own.

        It serves the count of the bytes that a draft reads, and whatever is done to each of them, such as :meth:`to_decode`.
        """
        return None

    def limits_of_parts(self, limits: DraftLimits) -> DraftLimits:
        """How :attr:`parts` draft where this drafter drafts as the limits say: mostly alike.

        It serves the count of the bytes that a draft reads, and some families draft by it.

        Args:
            limits: of this drafter.
        """
        return limits

    def key_values(self) -> tuple[KeyValues, ...]:
        """What the drafter's own layers keep of each token in a cache, which every draft step reads. Most families keep nothing.

        It serves the count of the bytes that a draft reads, nothing else.
        """
        return ()

    def check_depth(self, limits: DraftLimits) -> None:
        """Check that this drafter can draft as deep as the limits ask for.

        Args:
            limits: how drafts will be made.

        Raises:
            ValueError: naming both depths.
        """
        most = self.max_draft_steps
        if most is not None and limits.draft_length > most:
            raise ValueError(
                f"a draft of {limits.draft_length} tokens is asked for, this {type(self).__name__} has heads for {most}; draft no deeper"
            )

    def score_scale(self, temperature: float) -> float:
        """The factor on draft logits before paths are compared, so that a path's score is about its chance of acceptance.

        Greedy targets accept their likeliest token only. The distribution that drafters learn is too flat for them, so training fits the
        factor on held-out text. At temperatures above 0 it is the factor that sharpens the target's own distribution, if that is less.
        Distributions that candidates are drawn from are never touched.

        Args:
            temperature: of the requests.

        Returns:
            The factor, above 0.
        """
        own = float(self.config.score_scale)
        return own if temperature == 0.0 else min(own, 1.0 / temperature)

    def propose(self, state: DraftState, cycle: Cycle, limits: DraftLimits) -> DraftTree:
        """Draft a tree below each row's root. On a GPU nothing is read back to the host.

        Args:
            state: of the drafter.
            cycle: what the decoder knows of the rows.
            limits: how the draft is made.

        Returns:
            The tree.

        Raises:
            ValueError: a sampled tree is asked for without draws, as at temperature 0; or a draft deeper than this drafter can make.
        """
        self.check_depth(limits)
        cut = False if cycle.fixed_shapes else None
        expander = checked_expander(self, state, cycle, limits)
        if limits.sampled is None:
            scale = self.score_scale(cycle.temperature)
            if not cycle.keep_probs:
                return search(expander, cycle.stop_below_B, limits, scale, cut, cycle.noise)
            kept = KeptLogits(expander)
            tree = search(kept, cycle.stop_below_B, limits, scale, cut, cycle.noise)
            return kept.onto(tree, self.ends.vocab_size)
        if cycle.draws is None:
            raise ValueError(
                "a sampled tree is asked for without draws, which are there at temperatures above 0 only; at temperature 0 draft with "
                "beams, a dynamic or a static tree"
            )
        return sampled_tree(expander, cycle.stop_below_B, limits, cycle.draws, self.ends.vocab_size, cut)
