"""EAGLE-3: one decoder layer over fused states of several of the target's layers, with a head of its own (arXiv:2503.01840).

Owns the drafter, which layers it reads by default, its settings and its record. Knows nothing of losses, trees or verification.

Shape legend: D hidden, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from draftsmith.models.drafters.drafter import Drafter
from draftsmith.models.drafters.family import About, DrafterFamily, Family
from draftsmith.models.families.eagle_base import EagleBase
from draftsmith.models.families.eagle_config import EagleConfig, layer_fields
from draftsmith.models.families.eagle_layer import DraftLayer, rms_norm
from draftsmith.models.files.field_rules import NAMES, Rule
from draftsmith.models.target.target import PRE_NORM, TargetEnds


class Eagle3Config(EagleConfig):
    """EAGLE-3's fields.

    Attributes:
        layers: names of the target's layers that are fused, from low to high.
    """

    model_type = "draftsmith_eagle3"
    rules: ClassVar[Mapping[str, Rule]] = {**EagleConfig.rules, "layers": NAMES}

    def __init__(self, layers: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers = list(layers)

    def fault(self) -> str:
        """See :meth:`DrafterConfig.fault`."""
        return super().fault() if self.layers else "layers [], but it reads at least one of the target's"


class Eagle3(EagleBase):
    """EAGLE-3: fused low, middle and high states, own norm and head, no guess of the feature (arXiv:2503.01840, section 3.1)."""

    config_class = Eagle3Config
    config: Eagle3Config
    wide = True

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        D = config.hidden_size
        self.fc = nn.Linear(len(config.layers) * D, D, bias=False)
        self.midlayer = DraftLayer(config.llama(), wide=True)
        self.norm = LlamaRMSNorm(D, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(D, config.num_draft_tokens, bias=False)
        self.post_init()

    @classmethod
    def for_target(
        cls,
        ends: TargetEnds,
        *,
        layers: Sequence[str] | None = None,
        draft_token_ids: Tensor | None = None,
        num_draft_steps: int = 7,
        tokenizer_fingerprint: str = "",
    ) -> Eagle3:
        """Make a fresh drafter for one target, attached to it, its head started from the target's.

        Args:
            ends: the target's frozen ends.
            layers: names of the layers to fuse, low to high; None takes :func:`default_layers`.
            draft_token_ids: int64 [Vd], increasing; None keeps the full vocabulary.
            num_draft_steps: steps it will be trained for, stored in its config.
            tokenizer_fingerprint: stored, and checked by those who decode with text.

        Returns:
            The drafter.

        Raises:
            ValueError: ``layers`` is None and the target has fewer than three layers.
        """
        drafter = cls(
            Eagle3Config(
                **layer_fields(ends),
                layers=default_layers(ends.config.num_hidden_layers) if layers is None else layers,
                draft_vocab_size=None if draft_token_ids is None else len(draft_token_ids),
                num_draft_steps=num_draft_steps,
                tokenizer_fingerprint=tokenizer_fingerprint,
            )
        )
        if draft_token_ids is not None and drafter.d2t is not None:
            drafter.set_draft_ids(draft_token_ids)
        with torch.no_grad():
            rows = ends.head_weight[drafter.draft_ids().to(ends.device)]
            drafter.lm_head.weight.copy_(rows * ends.logit_scale)
        drafter.attach(ends)
        return drafter

    @property
    def features(self) -> tuple[str, ...]:
        """The layers that are fused."""
        return tuple(self.config.layers)

    @property
    def layer(self) -> DraftLayer:
        """The one decoder layer, which reads [norm(embedding); norm(state)]."""
        return self.midlayer

    @property
    def head_weight(self) -> Tensor:
        """[Vd, D]."""
        return self.lm_head.weight

    def weights_read_once(self) -> tuple[Tensor, ...]:
        """See :meth:`Drafter.weights_read_once`: fc, which reads the states of emitted tokens only."""
        return (self.fc.weight,)

    def read(self, features: Mapping[str, Tensor]) -> Tensor:
        """fc over the fused layers.

        Args:
            features: layer name -> [..., D].

        Returns:
            [..., D].
        """
        fused = torch.cat([features[name] for name in self.config.layers], dim=-1)
        return self.fc(fused.to(self.fc.weight.dtype))

    def join(self, embedded: Tensor, known: Tensor) -> Tensor:
        """The state as it is, [..., D]: the embedding enters through the layer's input."""
        return known

    def head_inputs(self, output: Tensor) -> Tensor:
        """The output after this drafter's own norm, [..., D]."""
        return rms_norm(self.norm, output)


def default_layers(num_layers: int) -> tuple[str, ...]:
    """The three layers that EAGLE-3 fuses: outputs of layers 2, L/2 and L - 3 counted from 1, as every engine has it by default.

    Targets so shallow that these coincide take the first, the middle and the last but one instead.

    Args:
        num_layers: L, of the target.

    Returns:
        Names of three layers, from low to high.

    Raises:
        ValueError: fewer than three layers.
    """
    if num_layers < 3:
        raise ValueError(f"EAGLE-3 fuses three layers, the target has {num_layers}; use EAGLE-1 or ReDrafter for it")
    counts = (2, num_layers // 2, num_layers - 3)
    if not counts[0] < counts[1] < counts[2]:
        counts = (1, (num_layers + 1) // 2, num_layers - 1 if num_layers > 3 else num_layers)
    return tuple(PRE_NORM if count == num_layers else f"layer.{count - 1}.output" for count in counts)


class Eagle3Family(DrafterFamily):
    """EAGLE-3's drafter over fused layers (arXiv 2503.01840).

    Args:
        layers: names of the target's layers to fuse, low to high; null takes those that serving engines expect.
        draft_vocab_size: keep this many tokens, the most frequent labelled ones of the training samples; null keeps
            all.
        detach_steps: no gradient flows from a draft step into those before it.
    """

    kind = Eagle3

    def __init__(
        self, layers: list[str] | None = None, draft_vocab_size: int | None = None, detach_steps: bool = False
    ) -> None:
        self.layers, self.draft_vocab_size, self.detach_steps = layers, draft_vocab_size, detach_steps

    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> Eagle3:
        """See DrafterFamily.build.

        Raises:
            ValueError: the target has fewer than three layers.
        """
        drafter = Eagle3.for_target(
            ends,
            layers=self.layers,
            draft_token_ids=draft_token_ids,
            num_draft_steps=num_steps,
            tokenizer_fingerprint=tokenizer_fingerprint,
        )
        self.configure(drafter)
        return drafter

    def configure(self, drafter: Drafter) -> None:
        """See DrafterFamily.configure."""
        assert isinstance(drafter, Eagle3)
        drafter.detach_steps = self.detach_steps


FAMILY = Family(
    name="eagle3",
    drafter=Eagle3,
    config=Eagle3Config,
    settings=Eagle3Family,
    about=About(
        title="EAGLE-3",
        what="A draft head of one decoder layer over fused states ([EAGLE-3](https://arxiv.org/abs/2503.01840))",
        reads="hidden states of several layers",
    ),
    layouts=("draftsmith.export.layouts.eagle3", "draftsmith.export.layouts.speculators"),
)
