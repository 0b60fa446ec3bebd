"""EAGLE-3: one decoder layer over fused states of several of the target's layers, with a head of its own (arXiv:2503.01840).

Four switches are those of EAGLE-3.1 (arXiv:2605.09992), which public heads use: where the fused states, the residual and the state that is
fed back are normalised. Ours begin with all of them off, as the paper has it.

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
from draftsmith.models.families.eagle_config import NO_LAYERS, EagleConfig, block_outputs, check_window, layer_fields
from draftsmith.models.families.eagle_layer import DraftLayer, rms_norm
from draftsmith.models.files.field_rules import FLAG, NAMES, Rule
from draftsmith.models.target.target import TargetEnds

SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
"""Fields of the config, named as engines and the speculators package name them."""


class Eagle3Config(EagleConfig):
    """EAGLE-3's fields.

    Attributes:
        layers: names of the target's layers that are fused, from low to high.
        norm_before_residual: the layer's residual is the state after ``hidden_norm``, not the state itself.
        norm_before_fc: one norm over the fused states together, before ``fc``.
        fc_norm: one norm for each fused layer, before ``fc``; excludes ``norm_before_fc``.
        norm_output: what a draft step feeds to the next is the output after the final norm.
    """

    model_type = "draftsmith_eagle3"
    rules: ClassVar[Mapping[str, Rule]] = {**EagleConfig.rules, "layers": NAMES, **dict.fromkeys(SWITCHES, FLAG)}

    def __init__(
        self,
        layers: Sequence[str] = (),
        norm_before_residual: bool = False,
        norm_before_fc: bool = False,
        fc_norm: bool = False,
        norm_output: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layers = list(layers)
        self.norm_before_residual, self.norm_before_fc = norm_before_residual, norm_before_fc
        self.fc_norm, self.norm_output = fc_norm, norm_output

    def fault(self) -> str:
        """See :meth:`DrafterConfig.fault`."""
        if not self.layers:
            return NO_LAYERS
        if self.norm_before_fc and self.fc_norm:
            return "norm_before_fc and fc_norm, of which a drafter has one at the most"
        return super().fault()

    @property
    def switches(self) -> dict[str, bool]:
        """The four switches by name."""
        return {name: getattr(self, name) for name in SWITCHES}


class Eagle3(EagleBase):
    """EAGLE-3: fused low, middle and high states, own norm and head, no guess of the feature (arXiv:2503.01840, section 3.1)."""

    config_class = Eagle3Config
    config: Eagle3Config
    wide = True

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        D, n = config.hidden_size, len(config.layers)
        self.input_norm = LlamaRMSNorm(n * D, eps=config.rms_norm_eps) if config.norm_before_fc else None
        norms = [LlamaRMSNorm(D, eps=config.rms_norm_eps) for _ in range(n)] if config.fc_norm else None
        self.fc_norm = None if norms is None else nn.ModuleList(norms)
        self.fc = nn.Linear(n * D, D, bias=False)
        self.midlayer = DraftLayer(config.llama(), wide=True, norms_state=not config.norm_before_residual)
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
        sliding_window: int | None = None,
    ) -> Eagle3:
        """Make a fresh drafter for one target, attached to it, its head started from the target's.

        Args:
            ends: the target's frozen ends.
            layers: names of the layers to fuse, low to high; None takes :func:`default_layers`.
            draft_token_ids: int64 [Vd], increasing; None keeps the full vocabulary.
            num_draft_steps: steps it will be trained for, stored in its config.
            tokenizer_fingerprint: stored, and checked by those who decode with text.
            sliding_window: see :class:`EagleConfig`.

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
                sliding_window=sliding_window,
            )
        )
        drafter.adopt_target(ends, draft_token_ids)
        with torch.no_grad():
            rows = ends.head_weight[drafter.draft_ids().to(ends.device)]
            drafter.lm_head.weight.copy_(rows * ends.logit_scale)
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
        """fc over the fused layers, normalised before it where the config says so.

        Args:
            features: layer name -> [..., D].

        Returns:
            [..., D].
        """
        states = [features[name].to(self.fc.weight.dtype) for name in self.config.layers]
        if self.fc_norm is not None:
            states = [norm(state) for norm, state in zip(self.fc_norm, states, strict=True)]
        fused = torch.cat(states, dim=-1)
        return self.fc(fused if self.input_norm is None else rms_norm(self.input_norm, fused))

    def join(self, embedded: Tensor, known: Tensor) -> Tensor:
        """The state as it is, [..., D], or with ``norm_before_residual`` after the layer's norm of it.

        The embedding enters through the layer's input.
        """
        return rms_norm(self.midlayer.hidden_norm, known) if self.config.norm_before_residual else known

    def fed_back(self, output: Tensor) -> Tensor:
        """The output, [..., D], after this drafter's own norm with ``norm_output``."""
        return rms_norm(self.norm, output) if self.config.norm_output else output

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
    return block_outputs([count - 1 for count in counts], num_layers)


class Eagle3Family(DrafterFamily):
    """EAGLE-3's drafter over fused layers (arXiv 2503.01840).

    Args:
        layers: names of the target's layers to fuse, low to high; null takes those that serving engines expect.
        draft_vocab_size: keep this many tokens, the most frequent labelled ones of the training samples; null keeps
            all.
        detach_steps: no gradient flows from a draft step into those before it.
        sliding_window: the layer sees only so many of the last tokens, which keeps long texts cheap; null for all. No engine's layout
            carries it.
    """

    kind = Eagle3

    def __init__(
        self,
        layers: list[str] | None = None,
        draft_vocab_size: int | None = None,
        detach_steps: bool = False,
        sliding_window: int | None = None,
    ) -> None:
        self.sliding_window = sliding_window
        self.layers, self.draft_vocab_size, self.detach_steps = layers, draft_vocab_size, detach_steps

    def build(
        self, ends: TargetEnds, draft_token_ids: Tensor | None, num_steps: int, tokenizer_fingerprint: str
    ) -> Eagle3:
        """See DrafterFamily.build.

        Raises:
            ValueError: the target has fewer than three layers, or the sliding window is shorter than the steps.
        """
        check_window(self.sliding_window, num_steps)
        drafter = Eagle3.for_target(
            ends,
            layers=self.layers,
            draft_token_ids=draft_token_ids,
            num_draft_steps=num_steps,
            tokenizer_fingerprint=tokenizer_fingerprint,
            sliding_window=self.sliding_window,
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
