"""One record a family: what trainer, decoder, doctor, exporter and card know of a kind of drafter.

Owns the record with its rules, and the settings that a training run names. Knows no single family, and nothing of training.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.drafter_config import DrafterConfig
from draftsmith.models.drafters.drafter_reader import module_table
from draftsmith.models.target.ends import TargetEnds
from draftsmith.models.tree.limits import DraftLimits


class DrafterFamily(ABC):
    """Settings that make fresh drafters of one family for any target. A run's YAML names a subclass by ``class_path``.

    Its ``__init__`` takes one typed argument for each setting, documented under ``Args:``, and keeps it under the same name.

    Attributes:
        kind: the class of the drafters.
        draft_vocab_size: how many of the target's tokens a drafter proposes; None proposes all.
    """

    kind: ClassVar[type[Drafter]]
    draft_vocab_size: int | None = None

    @abstractmethod
    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> Drafter:
        """Make a new drafter, attached to its target.

        Args:
            ends: the target's frozen ends.
            draft_token_ids: int64 [Vd], increasing; None keeps the full vocabulary.
            num_steps: draft steps K that it will be trained for.
            tokenizer_fingerprint: belongs in its config.

        Returns:
            The drafter.

        Raises:
            ValueError: sizes that do not fit the target.
        """

    def configure(self, drafter: Drafter) -> None:  # noqa: B027  (families without such settings leave it)
        """Set what concerns training only, of a drafter that was trained before. In most families that is nothing.

        Args:
            drafter: of this family.
        """

    def settings(self) -> dict[str, object]:
        """Give every setting by name, for provenance.

        Returns:
            Its own settings; `recorded_settings` in the registry adds the family's name.
        """
        return dict(vars(self))


def fresh_drafter(
    family: DrafterFamily, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
) -> Drafter:
    """What a family's ``build`` returns, checked: all that would make its first saved folder unreadable is found here.

    Args:
        family: the settings.
        ends: see :meth:`DrafterFamily.build`, as the other arguments.
        draft_token_ids: see there.
        num_steps: see there.
        tokenizer_fingerprint: see there.

    Raises:
        ValueError: a drafter of another class, another draft vocabulary or another target; or one whose module cannot be made again
            from its config.
    """
    drafter = family.build(ends, draft_token_ids, num_steps, tokenizer_fingerprint)
    place = f"{type(family).__name__}.build"
    if type(drafter) is not family.kind:
        raise ValueError(
            f"{place} gave a {type(drafter).__name__}; it must give a {family.kind.__name__}, which is its kind"
        )
    config = drafter.config
    config.check(place)
    wanted = {
        "hidden_size": ends.hidden_size,
        "vocab_size": ends.vocab_size,
        "num_draft_steps": num_steps,
        "target_fingerprint": ends.fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint,
    }
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{place} gave a config with {name} {getattr(config, name)!r:.80}, this run has {value!r}; fill the common fields "
                f"with {type(config).__name__}.for_target"
            )
    if draft_token_ids is not None and not torch.equal(drafter.draft_ids().cpu(), draft_token_ids.cpu()):
        raise ValueError(
            f"{place} gave a drafter with another draft vocabulary than it was asked for; pass draft_token_ids to the config's "
            "for_target, then call drafter.set_draft_ids(draft_token_ids)"
        )
    module_table(family.kind, config, place).check(drafter.state_dict(), place, finite=False)
    return drafter


@dataclass(frozen=True)
class About:
    """A family in words, for cards and messages.

    Attributes:
        title: its name in a sentence, such as ``Medusa``.
        what: what a drafter is, with a link to the paper; begins a sentence.
        reads: what it reads of the target.
    """

    title: str
    what: str
    reads: str = "the last hidden state"

    @property
    def with_article(self) -> str:
        """The title behind ``A`` or ``An``."""
        return f"{'An' if self.title[:1] in 'AEIOU' else 'A'} {self.title}"


@dataclass(frozen=True)
class Family:
    """Everything that the package knows of a family outside of its own file.

    Attributes:
        name: a short word of lower case, the tag on model cards.
        drafter: the class of its drafters.
        config: the class of their configs; ``model_type`` tells the family of a folder.
        settings: the class that a training run's YAML names.
        about: the family in words.
        layouts: modules with the layouts of other software that can hold these drafters; each offers ``LAYOUTS``.
        limits: how drafts are made where nobody says; None drafts chains, and small dynamic trees in ``custom_generate``.

    Raises:
        ValueError: classes that do not belong together, or a field of the config without a rule.
    """

    name: str
    drafter: type[Drafter]
    config: type[DrafterConfig]
    settings: type[DrafterFamily]
    about: About
    layouts: tuple[str, ...] = ()
    limits: DraftLimits | None = None

    def __post_init__(self) -> None:
        if self.drafter.config_class is not self.config:
            raise ValueError(
                f"family {self.name}: {self.drafter.__name__}.config_class is {self.drafter.config_class.__name__}, the record names "
                f"{self.config.__name__}; name the same class in both"
            )
        if self.config.model_type == DrafterConfig.model_type:
            raise ValueError(
                f"family {self.name}: {self.config.__name__}.model_type is {DrafterConfig.model_type!r}, as of every drafter; give the "
                "config a model_type of its own"
            )
        if getattr(self.settings, "kind", None) is not self.drafter:
            raise ValueError(f"family {self.name}: set {self.settings.__name__}.kind = {self.drafter.__name__}")
        if lacking := _without_rule(self.config):
            raise ValueError(
                f"family {self.name}: {self.config.__name__}.rules says nothing of {', '.join(lacking)}; add a rule for each, since fields "
                "without one are not read from files"
            )


def _without_rule(config: type[DrafterConfig]) -> list[str]:
    """Arguments of a config that no rule is about."""
    parameters = inspect.signature(config.__init__).parameters
    named = [name for name, parameter in parameters.items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    return [name for name in named[1:] if name not in config.rules]
