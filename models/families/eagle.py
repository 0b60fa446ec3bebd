"""EAGLE-1: the target's next feature from one decoder layer, scored by the target's own head (arXiv:2401.15077).

EAGLE-2 (arXiv:2406.16858) is the same weights with dynamic trees; HASS (arXiv:2408.15766) is the same architecture trained over several
steps. Owns the drafter, its settings and its record. Knows nothing of losses, trees or verification.

Shape legend: D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.family import About, DrafterFamily, Family
from draftsmith.models.families.eagle_base import EagleBase
from draftsmith.models.families.eagle_config import EagleConfig, check_window, layer_fields
from draftsmith.models.families.eagle_layer import DraftLayer
from draftsmith.models.families.target_head import TargetHead
from draftsmith.models.target.target import PRE_NORM, TargetEnds


class Eagle(TargetHead, EagleBase):
    """EAGLE-1: f^_{t+1} = layer(fc([E(x_{t+1}); f_t])), scored by the target's own head (arXiv:2401.15077, section 4).

    f is the target's state after its final norm. ``fc`` has a bias only where the config asks for it.
    """

    config_class: type[EagleConfig] = EagleConfig
    wide = False
    predicts_features = True

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.bias)
        self.layers = nn.ModuleList([DraftLayer(config.llama(), wide=False)])
        self.post_init()

    @classmethod
    def for_target(
        cls,
        ends: TargetEnds,
        *,
        draft_token_ids: Tensor | None = None,
        num_draft_steps: int = 1,
        tokenizer_fingerprint: str = "",
        sliding_window: int | None = None,
    ) -> Eagle:
        """Make a fresh drafter for one target, attached to it.

        Args:
            ends: the target's frozen ends.
            draft_token_ids: int64 [Vd], increasing: only these rows of the target's head are scored; None scores all.
            num_draft_steps: steps it will be trained for, stored in its config.
            tokenizer_fingerprint: stored, and checked by those who decode with text.
            sliding_window: see :class:`EagleConfig`.

        Returns:
            The drafter; its first guess of a feature is the feature before it.
        """
        drafter = cls(
            cls.config_class(
                **layer_fields(ends),
                draft_vocab_size=None if draft_token_ids is None else len(draft_token_ids),
                num_draft_steps=num_draft_steps,
                tokenizer_fingerprint=tokenizer_fingerprint,
                sliding_window=sliding_window,
            )
        )
        drafter.adopt_target(ends, draft_token_ids)
        with torch.no_grad():  # begins by handing the feature on: what follows is a correction of it
            D = ends.hidden_size
            drafter.fc.weight[:, D:].copy_(torch.eye(D))
        return drafter

    @property
    def layer(self) -> DraftLayer:
        """The one decoder layer, without a norm of its input."""
        layer = self.layers[0]
        assert isinstance(layer, DraftLayer)
        return layer

    def read(self, features: Mapping[str, Tensor]) -> Tensor:
        """Read a position by its state after the final norm.

        Args:
            features: layer name -> [..., D].

        Returns:
            [..., D].
        """
        return self.ends.final_norm(features[PRE_NORM])

    def join(self, embedded: Tensor, known: Tensor) -> Tensor:
        """fc([embedding; feature]).

        Args:
            embedded: [..., D], of the token x_{t+1}.
            known: [..., D], the feature of position t.

        Returns:
            [..., D].
        """
        return self.fc(torch.cat([embedded, known], dim=-1))

    def head_inputs(self, output: Tensor) -> Tensor:
        """The predicted feature as it is, [..., D]."""
        return output


class EagleFamily(DrafterFamily):
    """EAGLE-1's feature predictor (arXiv 2401.15077), which EAGLE-2 decodes with and HASS trains over several steps.

    Args:
        draft_vocab_size: score only this many tokens, the most frequent labelled ones of the training samples, with
            their rows of the target's head; null scores all.
        feature_noise: uniform noise added to the target's states in training, times 512 / length; EAGLE-1 uses 0.1.
        detach_steps: no gradient flows from a draft step into those before it (HASS); matters with several steps.
        sliding_window: the layer sees only so many of the last tokens, which keeps long texts cheap; null for all. No engine's layout
            carries it.

    Raises:
        ValueError: ``feature_noise`` is below 0.
    """

    kind: ClassVar[type[Eagle]] = Eagle

    def __init__(
        self,
        draft_vocab_size: int | None = None,
        feature_noise: float = 0.0,
        detach_steps: bool = True,
        sliding_window: int | None = None,
    ) -> None:
        if feature_noise < 0.0:
            raise ValueError(f"feature_noise is {feature_noise}; it must be at least 0")
        self.sliding_window = sliding_window
        self.draft_vocab_size, self.feature_noise, self.detach_steps = draft_vocab_size, feature_noise, detach_steps

    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> Eagle:
        """See DrafterFamily.build.

        Raises:
            ValueError: the sliding window is shorter than the steps.
        """
        check_window(self.sliding_window, num_steps)
        drafter = self.kind.for_target(
            ends,
            draft_token_ids=draft_token_ids,
            num_draft_steps=num_steps,
            tokenizer_fingerprint=tokenizer_fingerprint,
            sliding_window=self.sliding_window,
        )
        self.configure(drafter)
        return drafter

    def configure(self, drafter: Drafter) -> None:
        """See DrafterFamily.configure."""
        assert isinstance(drafter, Eagle)
        drafter.feature_noise, drafter.detach_steps = self.feature_noise, self.detach_steps


FAMILY = Family(
    name="eagle",
    drafter=Eagle,
    config=EagleConfig,
    settings=EagleFamily,
    about=About(
        title="EAGLE-1",
        what="A draft head of one decoder layer that predicts the target's next feature "
        "([EAGLE](https://arxiv.org/abs/2401.15077), or with a dynamic tree [EAGLE-2](https://arxiv.org/abs/2406.16858))",
        reads="the last hidden states",
    ),
    layouts=("draftsmith.export.layouts.eagle",),
)
