"""What drafters that are made of others share: the head that drafts, whose affairs are passed on to it, and a part that reads the text.

Owns the config's common field, the state of both, and how a folder becomes such a drafter. Knows no head and no rule of drafting.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from draftsmith.models.drafters.draft_records import Cycle, DraftState, Emitted, Opening
from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.drafters.drafter_folder import drafter_fingerprint
from draftsmith.models.drafters.rollout import PackedBatch, Rollout
from draftsmith.models.files.field_rules import TEXT, Rule
from draftsmith.models.slots.slot_cache import KeptRows
from draftsmith.models.target.target import TargetEnds
from draftsmith.models.tree.limits import DraftLimits
from draftsmith.models.tree.tree import DraftTree
from draftsmith.models.trunk.riders import Riders

_OF_OTHERS = {
    "shared_pool": "name this drafter as the head of one that does (model_type draftsmith_suffix or draftsmith_phrases)",
    "ngrams": "name the table in a refined drafter (model_type draftsmith_refined), and that drafter as the head here",
    "lm": "name the LM in a refined drafter (model_type draftsmith_refined), and that drafter as the head here",
}
"""What a config may name and not every drafter reads -> what to do where this drafter does not."""


class ComposedConfig(DrafterConfig):
    """What drafters made of others have in common. Their folder is this config, without weights.

    Attributes:
        head: folder of a trained drafter, relative to the config's own; empty for none.
    """

    rules: ClassVar[Mapping[str, Rule]] = {"head": TEXT}

    def __init__(self, head: str = "", **kwargs: Any) -> None:
        self.head = head
        super().__init__(**kwargs)


@dataclass(frozen=True)
class ComposedState:
    """What is kept between cycles.

    Attributes:
        own: what the composed drafter keeps itself.
        head: of the head, where there is one.
    """

    own: Any
    head: DraftState | None

    def select_rows(self, kept: KeptRows) -> ComposedState:
        """Keep some batch rows only.

        Args:
            kept: which rows, and where they go.

        Returns:
            The state of these rows.
        """
        return ComposedState(self.own.select_rows(kept), None if self.head is None else self.head.select_rows(kept))


@dataclass(frozen=True)
class MadeOfReplies:
    """What a composed drafter reads beside its head and `draftsmith data` made of a target's replies.

    Attributes:
        kind: pool or table.
        called: for messages, with the name in the config.
        vocab_size: of the target.
        tokenizer_fingerprint: of the tokenizer; empty if unknown.
    """

    kind: str
    called: str
    vocab_size: int
    tokenizer_fingerprint: str


class ComposedDrafter(Drafter):
    """A drafter made of a head and of something that reads the text alone.

    Args:
        config: of the drafter's own class.
        head: drafts; None where the text alone does.

    Raises:
        ValueError: a field of the config breaks its rule.
    """

    config: ComposedConfig
    config_class: type[ComposedConfig] = ComposedConfig
    untrained: ClassVar[str]
    """What the error says where it is trained."""

    def __init__(self, config: ComposedConfig, head: Drafter | None) -> None:
        super().__init__(config)
        self.head = head

    @classmethod
    def from_folder(cls, folder: Path, fields: Mapping[str, Any], load: Callable[[str], Drafter]) -> Self:
        """Make the drafter that a folder's config describes.

        Args:
            folder: where it lies.
            fields: of its config.
            load: gives a drafter by its name, relative to the folder.

        Returns:
            The drafter in evaluation mode.

        Raises:
            ValueError: a field breaks its rule, what it names cannot be had or does not fit, or this kind of drafter does not read it.
        """
        for name in sorted(_OF_OTHERS.keys() - cls.config_class.rules.keys()):
            if fields.get(name):
                raise ValueError(
                    f"{folder / 'config.json'} has {name} {fields[name]!r:.80}, which a {cls.config_class.model_type} does not read; "
                    f"{_OF_OTHERS[name]}"
                )
        config = cls.config_class(**{name: fields[name] for name in cls.config_class.rules if name in fields})
        config.check(str(folder / "config.json"), "change the file")
        drafter = cls.composed(config, load(config.head) if config.head else None, folder, load)
        drafter.loaded_from = folder
        return drafter.eval()

    @classmethod
    @abstractmethod
    def composed(cls, config: Any, head: Drafter | None, folder: Path, load: Callable[[str], Drafter]) -> Self:
        """Make the drafter of its config and head, and of what else the config names.

        Args:
            config: checked.
            head: that the config names.
            folder, load: see :meth:`from_folder`.

        Returns:
            The drafter.

        Raises:
            ValueError: what the config names does not fit.
        """

    @property
    def features(self) -> tuple[str, ...]:
        """Those of the head."""
        return () if self.head is None else self.head.features

    @property
    def riders(self) -> Riders | None:
        """Those of the head."""
        return None if self.head is None else self.head.riders

    @property
    def parts(self) -> tuple[Drafter, ...]:
        """The head, where there is one."""
        return () if self.head is None else (self.head,)

    def drafts_from(self) -> str:
        """See :meth:`Drafter.drafts_from`: its config, and the folders that this names; empty for a drafter that was made in memory."""
        return "" if self.loaded_from is None else drafter_fingerprint(self.loaded_from)

    @property
    def made_of_replies(self) -> MadeOfReplies | None:
        """What it reads that was made of replies; None for nothing."""
        return None

    def attach(self, ends: TargetEnds) -> Drafter:
        """See :meth:`Drafter.attach`. Any target will do, unless there is a head or something made of replies.

        Raises:
            ValueError: the head is of another target, or what was made of replies has another vocabulary.
        """
        if self.head is not None:
            self.head = self.head.bound(ends)
        self.borrow(ends)
        made = self.made_of_replies
        if made is not None and made.vocab_size != ends.vocab_size:
            raise ValueError(
                f"the {made.called} has a vocabulary of {made.vocab_size} tokens, the target {ends.vocab_size}; make the {made.kind} with "
                "this target"
            )
        return self

    def for_any_target(self) -> Self:
        """See :meth:`Drafter.for_any_target`: nor is the head of any one target."""
        view = super().for_any_target()
        if view.head is not None:
            view.head = view.head.for_any_target()
        return view

    def check_tokenizer(self, fingerprint: str) -> None:
        """See :meth:`Drafter.check_tokenizer`: that of every part, and of what was made of replies.

        Args:
            fingerprint: of the target's tokenizer; empty if unknown.

        Raises:
            ValueError: one of them is of another tokenizer.
        """
        for part in self.parts:
            part.check_tokenizer(fingerprint)
        if (made := self.made_of_replies) is None:
            return
        own = made.tokenizer_fingerprint
        if own and fingerprint and own != fingerprint:
            raise ValueError(
                f"the {made.called} was made with another tokenizer ({own[:12]}) than this one ({fingerprint[:12]}); make it again with "
                "this target"
            )

    @property
    def reads_choices(self) -> bool:
        """The head's affair."""
        return self.head is not None and self.head.reads_choices

    def take_choices(self, state: ComposedState, tree: DraftTree, choices_BN: Tensor) -> ComposedState:  # type: ignore[override]
        """See :meth:`Drafter.take_choices`: for the head."""
        if self.head is None or state.head is None or not self.head.reads_choices:
            return state
        return replace(state, head=self.head.take_choices(state.head, tree, choices_BN))

    def needs_host(self) -> str:
        """See :meth:`Drafter.needs_host`: the first part's reason that there is."""
        return next((reason for part in self.parts if (reason := part.needs_host())), "")

    def teacher_forced(self, batch: PackedBatch, rollout: Rollout) -> Tensor:
        """Not for this drafter.

        Raises:
            ValueError: always.
        """
        raise ValueError(self.untrained)

    def start(self, opening: Opening) -> ComposedState:
        """Begin with both."""
        return ComposedState(
            self.start_own(_read_as_text(opening)), None if self.head is None else self.head.start(opening)
        )

    def start_in_steps(self, opening: Opening) -> Generator[None, None, ComposedState]:
        """See :meth:`Drafter.start_in_steps`: the head reads in steps."""
        head = None if self.head is None else (yield from self.head.start_in_steps(opening))
        return ComposedState(self.start_own(_read_as_text(opening)), head)

    def advance(self, state: ComposedState, emitted: Emitted) -> ComposedState:  # type: ignore[override]
        """Both take in what was emitted."""
        own = self.advance_own(state.own, emitted.tokens_only())
        if self.head is None or state.head is None:
            return ComposedState(own, None)
        return ComposedState(own, self.head.advance(state.head, emitted))

    def follow(self, state: ComposedState, cycle: Cycle, limits: DraftLimits) -> ComposedState:  # type: ignore[override]
        """See :meth:`Drafter.follow`: both do."""
        own = self.follow_own(state.own, cycle, limits)
        if self.head is None or state.head is None:
            return ComposedState(own, None)
        return ComposedState(own, self.head.follow(state.head, cycle, limits))

    @abstractmethod
    def start_own(self, opening: Opening) -> DraftState:
        """Begin the part that reads the text; see :meth:`Drafter.start`.

        Args:
            opening: without the target's states.

        Returns:
            Its state.
        """

    @abstractmethod
    def advance_own(self, own: Any, emitted: Emitted) -> DraftState:
        """Let the part that reads the text take in tokens; see :meth:`Drafter.advance`.

        Args:
            own: its state.
            emitted: without the target's states.

        Returns:
            The state after them.
        """

    @abstractmethod
    def follow_own(self, own: Any, cycle: Cycle, limits: DraftLimits) -> DraftState:
        """Let the part that reads the text follow a cycle without a draft; see :meth:`Drafter.follow`.

        Args:
            own: its state.
            cycle, limits: as there.

        Returns:
            The state, from which nothing is pending any more.
        """


def _read_as_text(opening: Opening) -> Opening:
    """The same without the target's states, which only a head reads."""
    return replace(opening, prompt=opening.prompt.tokens_only())
