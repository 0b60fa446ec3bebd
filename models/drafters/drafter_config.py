"""The config that every family's extends: the fields common to all drafters, and the rule of each field.

Owns what a field must be, in memory as in a file. Knows no family, no module and no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor
from transformers import PreTrainedConfig

from draftsmith.models.files.field_rules import COUNT, COUNT_OR_NULL, PARTS, POSITIVE, TEXT, Rule, check_fields
from draftsmith.models.target.target import TargetEnds


class DrafterConfig(PreTrainedConfig):
    """Fields common to every drafter: which target and tokenizer it belongs to, and its vocabulary.

    Attributes:
        hidden_size: the target's hidden size D.
        vocab_size: the target's vocabulary size V.
        draft_vocab_size: Vd; None or V means the full vocabulary.
        num_draft_steps: the horizon it was trained for.
        score_scale: draft logits are multiplied by it before paths are compared at temperature 0 (see :meth:`Drafter.score_scale`).
        target_name, target_fingerprint, tokenizer_fingerprint: the bond to one target; empty strings mean unknown.
    """

    model_type = "draftsmith_drafter"
    rules: ClassVar[Mapping[str, Rule]] = {
        "hidden_size": COUNT,
        "vocab_size": COUNT,
        "draft_vocab_size": COUNT_OR_NULL,
        "num_draft_steps": PARTS,
        "score_scale": POSITIVE,
        "target_name": TEXT,
        "target_fingerprint": TEXT,
        "tokenizer_fingerprint": TEXT,
    }
    """What each field must be in a file; a field that is not here is not read."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A config without fields of its own keeps its parent's ``__init__``: Transformers would write another one."""
        cls.__init__ = cls.__init__  # type: ignore[method-assign]
        super().__init_subclass__(**kwargs)

    def __init__(
        self,
        hidden_size: int = 0,
        vocab_size: int = 0,
        draft_vocab_size: int | None = None,
        num_draft_steps: int = 5,
        score_scale: float = 1.0,
        target_name: str = "",
        target_fingerprint: str = "",
        tokenizer_fingerprint: str = "",
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.draft_vocab_size = draft_vocab_size
        self.num_draft_steps = num_draft_steps
        self.score_scale = score_scale
        self.target_name = target_name
        self.target_fingerprint = target_fingerprint
        self.tokenizer_fingerprint = tokenizer_fingerprint
        super().__init__(**kwargs)

    @classmethod
    def for_target(
        cls,
        ends: TargetEnds,
        draft_token_ids: Tensor | None,
        num_draft_steps: int,
        tokenizer_fingerprint: str,
        **own: Any,
    ) -> Self:
        """Make a config with the common fields of one target.

        Args:
            ends: the target's.
            draft_token_ids: int64 [Vd], the draft vocabulary; None keeps the target's whole vocabulary.
            num_draft_steps: the horizon that it will be trained for.
            tokenizer_fingerprint: of the target's tokenizer.
            own: the fields of the family.

        Returns:
            The config.
        """
        return cls(
            **own,
            hidden_size=ends.hidden_size,
            vocab_size=ends.vocab_size,
            draft_vocab_size=None if draft_token_ids is None else len(draft_token_ids),
            num_draft_steps=num_draft_steps,
            target_name=ends.name,
            target_fingerprint=ends.fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )

    @property
    def num_draft_tokens(self) -> int:
        """Vd: rows of an output head."""
        return self.vocab_size if self.draft_vocab_size is None else min(self.draft_vocab_size, self.vocab_size)

    def check(self, place: str, remedy: str = "change the settings that made this config") -> None:
        """Check each field by its rule, and that the fields go together.

        Args:
            place: what errors call the config or its file.
            remedy: what errors advise.

        Raises:
            ValueError: with the field, its value, its rule and the remedy; or what :meth:`fault` says.
        """
        name = type(self).__name__
        if absent := [field for field in self.rules if not hasattr(self, field)]:
            raise ValueError(
                f"{name} keeps no {', '.join(absent)}; in its __init__, set self.{absent[0]} = {absent[0]}"
            )
        check_fields({field: getattr(self, field) for field in self.rules}, self.rules, place, remedy)
        if fault := self.fault():
            raise ValueError(f"{place} has {fault}; {remedy}")

    def fault(self) -> str:
        """Find fields that contradict each other.

        Returns:
            The contradiction in words; empty where there is none.
        """
        if self.draft_vocab_size is not None and self.draft_vocab_size > self.vocab_size:
            return (
                f"draft_vocab_size {self.draft_vocab_size}, which is above the target's vocabulary of {self.vocab_size}"
            )
        return ""
