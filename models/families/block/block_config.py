"""The config of block drafters, and which of the target's layers they read by default.

Owns the fields and what contradicts what. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

from transformers import LlamaConfig

from draftsmith.models.families.block.block_correction import CorrectionKind
from draftsmith.models.families.block.block_layer import GROUP
from draftsmith.models.families.eagle_config import NO_LAYERS, LayerConfig, block_outputs
from draftsmith.models.files.field_rules import COUNT, COUNT_OR_NULL, FLAG, NAMES, PARTS, TOKEN_OR_NULL, Rule, is_whole

CANDIDATES = 16
"""Tokens of a slot that DFlash 2's selector chooses among, as public drafters have it."""
CORRECTION_RANK, CORRECTION_STATE = 256, 1024
"""Default sizes of a correction."""


class BlockConfig(LayerConfig):
    """The fields of a block drafter.

    Attributes:
        layers: names of the target's layers that are read, from low to high.
        num_draft_layers: decoder layers of the drafter.
        block_size: S, slots of a block, the root's included.
        causal: a slot sees no later slot of its block.
        sample_from_anchor: slot 0, which holds the root, predicts the first drafted token; otherwise slot 1 does.
        mask_token_id: an unused token of the target whose embedding fills the slots behind the root; None learns a vector for them.
        correction: how a drafted token changes the logits of the next slot: ``none``, ``vanilla``, ``gated``, ``recurrent``, ``gru``,
            ``selector`` or ``lookaround``.
        correction_rank: r.
        correction_state: size of the GRU's state.
        confidence: a head says how likely each token will be accepted, before it is drawn.
        confidence_with_markov: that head reads the token before the slot, by its row of a Markov correction; False leaves it out.
        convolution: each layer has DFlash 2's convolution over the slots around its attention and its MLP.
        candidates: with the correction ``selector``, how many tokens of a slot can be drafted.
        sliding_window: in the layers of ``sliding_layers``, a slot sees only so many of the last positions, its own among them.
        sliding_layers: these draft layers, by number from 0.
        sliding_causal: in these layers, a slot sees no later slot of its block.
        window_from_root: in these layers, all slots of a block see so many tokens before the root, as the speculators package trains them.
        attention_bias: the four projections of attention have biases, as some public drafters do.
    """

    model_type = "draftsmith_block_drafter"
    rules: ClassVar[Mapping[str, Rule]] = {
        **LayerConfig.rules,
        "layers": NAMES,
        "num_draft_layers": PARTS,
        "block_size": COUNT,
        "causal": FLAG,
        "sample_from_anchor": FLAG,
        "mask_token_id": TOKEN_OR_NULL,
        "correction": (
            lambda value: value in get_args(CorrectionKind),
            f"one of {', '.join(get_args(CorrectionKind))}",
        ),
        "correction_rank": COUNT,
        "correction_state": COUNT,
        "confidence": FLAG,
        "confidence_with_markov": FLAG,
        "convolution": FLAG,
        "candidates": COUNT,
        "sliding_window": COUNT_OR_NULL,
        "sliding_layers": (
            lambda value: isinstance(value, list) and all(is_whole(number, 0) for number in value),
            "a list of whole numbers",
        ),
        "sliding_causal": FLAG,
        "window_from_root": FLAG,
        "attention_bias": FLAG,
    }

    def __init__(
        self,
        layers: Sequence[str] = (),
        num_draft_layers: int = 1,
        block_size: int = 8,
        causal: bool = False,
        sample_from_anchor: bool = False,
        mask_token_id: int | None = None,
        correction: CorrectionKind = "none",
        correction_rank: int = CORRECTION_RANK,
        correction_state: int = CORRECTION_STATE,
        confidence: bool = False,
        confidence_with_markov: bool = True,
        convolution: bool = False,
        candidates: int = CANDIDATES,
        sliding_window: int | None = None,
        sliding_layers: Sequence[int] = (),
        sliding_causal: bool = False,
        window_from_root: bool = False,
        attention_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layers = list(layers)
        self.num_draft_layers, self.block_size = num_draft_layers, block_size
        self.causal, self.sample_from_anchor = causal, sample_from_anchor
        self.mask_token_id = mask_token_id
        self.correction, self.correction_rank, self.correction_state = correction, correction_rank, correction_state
        self.confidence, self.confidence_with_markov = confidence, confidence_with_markov
        self.convolution, self.candidates = convolution, candidates
        self.sliding_window, self.sliding_layers = sliding_window, list(sliding_layers)
        self.sliding_causal, self.window_from_root = sliding_causal, window_from_root
        self.attention_bias = attention_bias

    @property
    def first_slot(self) -> int:
        """The slot that predicts the first drafted token."""
        return 0 if self.sample_from_anchor else 1

    def llama(self) -> LlamaConfig:
        """See :meth:`LayerConfig.llama`."""
        layer = super().llama()
        layer.attention_bias = self.attention_bias
        return layer

    def view(self, layer: int) -> tuple[int | None, bool]:
        """What a slot sees in a draft layer.

        Args:
            layer: its number, from 0.

        Returns:
            The sliding window, None for the whole text; and whether it sees no later slot of its block.
        """
        if layer not in self.sliding_layers:
            return None, self.causal
        return self.sliding_window, self.causal or self.sliding_causal

    @property
    def hides_later(self) -> bool:
        """Whether no slot depends on a later one of its block, in any layer."""
        return all(self.view(layer)[1] for layer in range(self.num_draft_layers))

    def fault(self) -> str:
        """See :meth:`DrafterConfig.fault`."""
        if not self.layers:
            return NO_LAYERS
        if self.block_size <= self.first_slot:
            return f"block_size {self.block_size}, of which no slot predicts a token without sample_from_anchor"
        most_steps = self.block_size - self.first_slot
        if self.num_draft_steps > most_steps:
            return (
                f"num_draft_steps {self.num_draft_steps} and block_size {self.block_size}, of which {most_steps} slots predict with "
                f"sample_from_anchor {str(self.sample_from_anchor).lower()}"
            )
        if self.convolution and self.hidden_size % GROUP:
            return f"convolution and hidden size {self.hidden_size}, which is no multiple of the {GROUP} channels of a group"
        if self.correction == "selector" and self.confidence:
            return "correction 'selector' and confidence, which judges drafts over the whole vocabulary: use one of the two"
        if not (self.confidence or self.confidence_with_markov):
            return "confidence_with_markov false without confidence, whose head it is about: set confidence true, or leave it out"
        if self.correction != "selector" and self.candidates != CANDIDATES:
            return f"candidates {self.candidates} and correction {self.correction!r}, but only 'selector' has candidates: use {CANDIDATES}"
        if self.mask_token_id is not None and self.mask_token_id >= self.vocab_size:
            return (
                f"mask_token_id {self.mask_token_id}, which is not below the target's vocabulary of {self.vocab_size}"
            )
        return self._window_fault() or super().fault()

    def _window_fault(self) -> str:
        """What is wrong with the sliding windows, in words; empty where nothing is."""
        window, layers = self.sliding_window, self.sliding_layers
        if (window is None) == bool(layers) or (self.sliding_causal and not layers):
            return (
                f"sliding_window {window}, sliding_layers {layers} and sliding_causal {str(self.sliding_causal).lower()}, of which a "
                "drafter with a window has the first two, and any other none"
            )
        if self.window_from_root and not layers:
            return "window_from_root true and no sliding_window, which it is about: set a window, or leave it out"
        if window is not None and window < self.block_size and not self.window_from_root:
            return f"sliding_window {window} and block_size {self.block_size}, but a block lies within the window"
        if beyond := [layer for layer in layers if layer >= self.num_draft_layers]:
            return f"sliding_layers {beyond}, which are not below num_draft_layers {self.num_draft_layers}"
        return ""


def default_layers(num_layers: int, count: int) -> tuple[str, ...]:
    """The layers that public block drafters read: ``count`` of them, evenly from the second block to the third from the end.

    Targets too shallow for that take theirs evenly from the first block to the last, each once.

    Example: 36 blocks and 5 layers -> the outputs of blocks 1, 9, 17, 25 and 33, counted from 0.

    Args:
        num_layers: blocks of the target.
        count: how many layers to read; one reads the middle block.

    Returns:
        Their names, from low to high.
    """
    first, last = (1, num_layers - 3) if num_layers - 3 >= count else (0, num_layers - 1)
    blocks = {round(first + place * (last - first) / max(count - 1, 1)) for place in range(count)}
    return block_outputs(sorted(blocks) if count > 1 else [num_layers // 2], num_layers)
