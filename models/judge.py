"""The judge: a linear head that reads the target's state of a draft token. It tells whether that token may stand although it is not the
target's own choice.

Owns the head's equation, its folder, and its bond to one target. Decoding with a judge is LOSSY. Knows nothing of how it
was trained, and no decoder.

Shape legend: D the target's hidden size, F features (D, the target's opinion of the token, and the draft model's hidden size, where it
reads these).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel

from draftsmith.json_text import parse_json_object
from draftsmith.models.files.finite import is_finite
from draftsmith.models.judge_config import (
    FEATURES,
    GATES,
    NO_GATE,
    POST_NORM,
    WITH_OPINION,
    CurvePoint,
    JudgeConfig,
    JudgedDrafter,
    check_config,
    refuse,
)
from draftsmith.models.opinion import NUM_NUMBERS
from draftsmith.models.target.bound_module import BoundModule
from draftsmith.models.target.target import PRE_NORM, TargetEnds

__all__ = [
    "FEATURES",
    "GATES",
    "NO_GATE",
    "POST_NORM",
    "WITH_OPINION",
    "CurvePoint",
    "Judge",
    "JudgeConfig",
    "JudgedDrafter",
    "check_config",
    "load_judge",
    "log_odds_of",
]

_TENSORS = ("bias", "mean", "scale", "weight")


class Judge(BoundModule):
    """Logistic regression on the state of the draft token itself (Judge Decoding, arXiv:2501.19309, section 4.2).

    With e the state at the position of token i, after the target has read that token and before the final norm::

        log_odds = weight . ((e - mean) / scale) + bias,      accepted where sigmoid(log_odds) > threshold

    ``mean`` and ``scale`` float32 [F] standardise the features; ``weight`` float32 [F] and ``bias`` float32 [] are the regression's.
    One polarity everywhere: 1 is correct. A new judge has zeros for weights, and threshold 1: it accepts nothing.

    Args:
        config: which target it belongs to, what it reads, and its threshold.

    Raises:
        ValueError: a field of the config breaks its rule.
    """

    config: JudgeConfig
    config_class = JudgeConfig
    called = "judge"
    mean: Tensor
    scale: Tensor

    def __init__(self, config: JudgeConfig) -> None:
        check_config(config.to_dict(), type(self).__name__)
        super().__init__(config)
        F = config.num_features
        self.register_buffer("mean", torch.zeros(F))
        self.register_buffer("scale", torch.ones(F))
        self.weight = nn.Parameter(torch.zeros(F))
        self.bias = nn.Parameter(torch.zeros(()))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draws nothing at random: `load_judge` accepts no judge that lacks tensors."""

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the target's layers that it reads; the final norm is applied here, where the feature is after it."""
        return (PRE_NORM,)

    @property
    def reads_draft(self) -> bool:
        """Whether it needs the draft model's states too."""
        return self.config.draft_hidden_size > 0

    @property
    def reads_opinion(self) -> bool:
        """Whether it needs the target's opinion of each token too."""
        return self.config.reads_opinion

    def attach(self, ends: TargetEnds) -> Judge:
        """Borrow the target's frozen ends; needed for ``last.post_norm``, and a check of the target for both.

        Args:
            ends: the target's.

        Returns:
            This judge.

        Raises:
            ValueError: the judge was made for another target (its weights or hidden size differ).
        """
        self.check_target(ends)
        self.borrow(ends)
        return self

    def log_odds(self, states: Tensor, draft_states: Tensor | None = None, opinion: Tensor | None = None) -> Tensor:
        """The log-odds of being correct.

        Args:
            states: [..., D] of any float dtype, the target's states before its final norm, each at the position of the token that
                is judged.
            draft_states: [..., the draft model's hidden size] at the same positions, for a judge that reads them.
            opinion: float [..., 6], what the target thinks of each token (:mod:`draftsmith.models.opinion`), for a judge that reads it.

        Returns:
            float32 [...].

        Raises:
            ValueError: states of another size, draft states or an opinion missing or not wanted, or a norm is needed and no target is
                attached.
        """
        _check_states("states", states, self.config.hidden_size)
        self._check_given(draft_states, opinion)
        if self.config.feature == POST_NORM:
            states = self.ends.final_norm(states)
        parts = [states.float()]
        if opinion is not None:
            _check_states("opinion", opinion, NUM_NUMBERS)
            parts.append(opinion.to(states.device).float())
        if draft_states is not None:
            _check_states("draft_states", draft_states, self.config.draft_hidden_size)
            parts.append(draft_states.to(states.device).float())
        with torch.autocast(states.device.type, enabled=False):
            standard = (torch.cat(parts, dim=-1) - self.mean.float()) / self.scale.float()
            return standard @ self.weight.float() + self.bias.float()

    def accepts(self, states: Tensor, draft_states: Tensor | None = None, opinion: Tensor | None = None) -> Tensor:
        """Whether each token may stand: sigmoid(log_odds) > threshold. NaN states are never accepted.

        Compared as log-odds, because sigmoid in float32 is 1 from 17 on: so a threshold of 1 accepts nothing, whatever the states.

        Args:
            states: as for :meth:`log_odds`.
            draft_states: as for :meth:`log_odds`.
            opinion: as for :meth:`log_odds`.

        Returns:
            bool [...].

        Raises:
            ValueError: as :meth:`log_odds`.
        """
        return self.log_odds(states, draft_states, opinion) > log_odds_of(self.config.threshold)

    def with_threshold(self, threshold: float) -> Judge:
        """Make a copy with another threshold, attached to the same target.

        Args:
            threshold: from 0 to 1.

        Returns:
            The copy.

        Raises:
            ValueError: the threshold is not within 0 and 1.
        """
        config = copy.deepcopy(self.config)
        config.threshold = threshold
        return self._with(config)

    def with_gate(self, gate: str, veto: bool = False, line_end_ids: Sequence[int] = ()) -> Judge:
        """Make a copy with another gate, attached to the same target.

        Args:
            gate: ``none``, ``line`` or ``reply``; see :class:`JudgeConfig`.
            veto: whether the target's own tokens must pass, too.
            line_end_ids: the tokens that end a line, for the gate of lines.

        Returns:
            The copy.

        Raises:
            ValueError: an unknown gate, a veto without a gate, or a gate of lines without the tokens that end them.
        """
        config = copy.deepcopy(self.config)
        config.gate, config.veto, config.line_end_ids = gate, veto, list(line_end_ids)
        return self._with(config)

    def _with(self, config: JudgeConfig) -> Judge:
        other = Judge(config)
        other.load_state_dict(self.state_dict())
        nn.Module.to(other, self.weight.device)
        other._borrowed[:] = self._borrowed
        return other.train(self.training)

    def _check_given(self, draft_states: Tensor | None, opinion: Tensor | None) -> None:
        if self.reads_draft != (draft_states is not None):
            reads = "it reads the draft model's states too" if self.reads_draft else "it reads the target's states only"
            raise ValueError(
                f"draft_states are {'missing' if self.reads_draft else 'given'}; {reads} (draft_hidden_size "
                f"{self.config.draft_hidden_size}); call it so"
            )
        if self.reads_opinion != (opinion is not None):
            remedy = (
                "give opinion_of_text of draftsmith.models.opinion" if self.reads_opinion else "leave the opinion out"
            )
            raise ValueError(
                f"the target's opinion is {'missing' if self.reads_opinion else 'given'}; this judge reads {self.config.feature}; {remedy}"
            )


def log_odds_of(probability: float) -> float:
    """The log-odds of a probability.

    Args:
        probability: from 0 to 1.

    Returns:
        Minus infinity at 0, infinity at 1.
    """
    if probability in (0.0, 1.0):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def load_judge(folder: Path) -> Judge:
    """Load a judge from the folder it was saved in, whole or not at all. Only safetensors are read.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.

    Returns:
        The judge in evaluation mode, attached to nothing.

    Raises:
        ValueError: a file is missing or broken, or a field breaks its rule. Also for a tensor that is missing, unknown, not finite, or of
            another shape or dtype, and for a scale that is not above 0.
    """
    folder = Path(folder)
    fields = _fields(folder / "config.json")
    check_config(fields, str(folder / "config.json"))
    judge = Judge(JudgeConfig.from_dict(fields))
    tensors = _tensors(folder / "model.safetensors", judge.config.num_features)
    judge.load_state_dict(tensors)
    return judge.eval()


def _check_states(name: str, states: Tensor, size: int) -> None:
    if states.shape[-1:] != (size,) or not states.is_floating_point():
        raise ValueError(
            f"{name} are {states.dtype} of shape {tuple(states.shape)}; this judge reads floats [..., {size}]; give the states of the "
            "model it was trained on"
        )


def _fields(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the folder of a trained judge")
    return parse_json_object(
        path.read_bytes(), str(path), "give the folder of a trained judge, or train or export it again"
    )


def _tensors(path: Path, num_features: int) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; pickled weights are not read; train or export the judge again")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is cut off or no safetensors file: {error}; train or export the judge again"
        ) from error
    if set(tensors) != set(_TENSORS):
        missing, unknown = sorted(set(_TENSORS) - set(tensors)), sorted(set(tensors) - set(_TENSORS))
        raise ValueError(f"{path} is not a whole judge: it lacks {missing} and has unknown {unknown}; export it again")
    for name, tensor in tensors.items():
        shape = () if name == "bias" else (num_features,)
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            refuse(
                str(path),
                name,
                f"{tensor.dtype} {tuple(tensor.shape)}",
                f"it is float32 {shape}, as config.json has it",
                "export it again",
            )
        if not is_finite(tensor):
            refuse(str(path), name, "NaN or infinite in places", "every number is finite", "train the judge again")
    if not bool((tensors["scale"] > 0).all()):
        refuse(str(path), "scale", float(tensors["scale"].min()), "every scale is above 0", "train the judge again")
    return tensors


AutoModel.register(JudgeConfig, Judge)
