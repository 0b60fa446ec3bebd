"""The judge: a linear head that reads the target's state of a draft token. It tells whether that token may stand although it is not the
target's own choice.

Owns the head's equation, its threshold, its folder, and its bond to one target. Decoding with a judge is LOSSY. Knows nothing of how it
was trained, and no decoder.

Shape legend: D the target's hidden size, F features (D, and the draft model's hidden size where it reads that too).
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from draftsmith.models.files.finite import is_finite
from draftsmith.models.target.target import PRE_NORM, TargetEnds
from draftsmith.outside import parse_json_object

POST_NORM = "last.post_norm"
FEATURES = (PRE_NORM, POST_NORM)
_TENSORS = ("bias", "mean", "scale", "weight")


class CurvePoint(TypedDict):
    """What one threshold does to held-out tokens: shares from 0 to 1, each with a 95 % interval over questions.

    Attributes:
        threshold: the threshold, from 0 to 1.
        correct, correct_low, correct_high: the share of the tokens labelled correct that are accepted, and its interval.
        wrong, wrong_low, wrong_high: the same of the tokens labelled wrong.
    """

    threshold: float
    correct: float
    correct_low: float
    correct_high: float
    wrong: float
    wrong_low: float
    wrong_high: float


_POINT = tuple(CurvePoint.__annotations__)


class JudgeConfig(PreTrainedConfig):
    """What a judge reads, where it draws the line, and whose states it knows.

    Attributes:
        hidden_size: the target's hidden size D.
        feature: ``last.pre_norm``, the last block's output as it is, or ``last.post_norm``, the same after the target's final norm.
        draft_hidden_size: 0, or the hidden size of the draft model. The last block's output of that model, before its own final norm, then
            follows the target's.
        threshold: from 0 to 1; a token is accepted where its probability of being correct is above it. 1 accepts nothing.
        curve: what other thresholds do, in rising order of the threshold; empty where none was measured.
        target_name, target_fingerprint, tokenizer_fingerprint: the bond to one target; empty strings mean unknown.
        draft_name, draft_fingerprint: the bond to one draft model, where it reads one.
        labels: where the labels came from, and how many.
    """

    model_type = "draftsmith_judge"

    def __init__(
        self,
        hidden_size: int = 0,
        feature: str = PRE_NORM,
        draft_hidden_size: int = 0,
        threshold: float = 1.0,
        curve: list[CurvePoint] | None = None,
        target_name: str = "",
        target_fingerprint: str = "",
        tokenizer_fingerprint: str = "",
        draft_name: str = "",
        draft_fingerprint: str = "",
        labels: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.feature = feature
        self.draft_hidden_size = draft_hidden_size
        self.threshold = threshold
        self.curve = [] if curve is None else curve
        self.target_name = target_name
        self.target_fingerprint = target_fingerprint
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.draft_name = draft_name
        self.draft_fingerprint = draft_fingerprint
        self.labels = {} if labels is None else labels
        super().__init__(**kwargs)

    @property
    def num_features(self) -> int:
        """F."""
        return self.hidden_size + self.draft_hidden_size


class Judge(PreTrainedModel):
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
    base_model_prefix = ""
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
        # In a list, so that the target's norm is neither a parameter of the judge nor saved with it.
        self._borrowed: list[TargetEnds] = []
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

    def attach(self, ends: TargetEnds) -> Judge:
        """Borrow the target's frozen ends; needed for ``last.post_norm``, and a check of the target for both.

        Args:
            ends: the target's.

        Returns:
            This judge.

        Raises:
            ValueError: the judge was made for another target (its weights or hidden size differ).
        """
        trained_for = self.config.target_fingerprint
        if trained_for and ends.fingerprint and trained_for != ends.fingerprint:
            raise ValueError(
                f"this judge was trained for target {self.config.target_name!r} (fingerprint {trained_for[:12]}), not for {ends.name!r} "
                f"({ends.fingerprint[:12]}); use that target, or train a judge for this one"
            )
        if self.config.hidden_size != ends.hidden_size:
            raise ValueError(
                f"this judge expects hidden size {self.config.hidden_size}, the target {ends.name!r} has {ends.hidden_size}; use the "
                "target it was trained for"
            )
        self._borrowed[:] = [ends]
        return self

    def check_tokenizer(self, fingerprint: str) -> None:
        """Check that a tokenizer is the one of training.

        Args:
            fingerprint: of the tokenizer; empty if unknown.

        Raises:
            ValueError: both fingerprints are known and differ.
        """
        trained_with = self.config.tokenizer_fingerprint
        if trained_with and fingerprint and trained_with != fingerprint:
            raise ValueError(
                f"this judge was trained with another tokenizer ({trained_with[:12]}) than this one "
                f"({fingerprint[:12]}); use the tokenizer of the judge's target"
            )

    def check_draft(self, name: str, fingerprint: str) -> None:
        """Check that a draft model is the one whose states the judge was trained on; any will do for a judge that reads none.

        Args:
            name: of the draft model, for the message.
            fingerprint: of its files; empty if unknown.

        Raises:
            ValueError: both fingerprints are known and differ.
        """
        trained_with = self.config.draft_fingerprint
        if self.reads_draft and trained_with and fingerprint and trained_with != fingerprint:
            raise ValueError(
                f"this judge reads the states of draft model {self.config.draft_name!r} (fingerprint {trained_with[:12]}), not of {name!r} "
                f"({fingerprint[:12]}); use that draft model, or train a judge that reads the target alone"
            )

    def log_odds(self, states: Tensor, draft_states: Tensor | None = None) -> Tensor:
        """The log-odds of being correct.

        Args:
            states: [..., D] of any float dtype, the target's states before its final norm, each at the position of the token that
                is judged.
            draft_states: [..., the draft model's hidden size] at the same positions, for a judge that reads them.

        Returns:
            float32 [...].

        Raises:
            ValueError: states of another size, draft states missing or not wanted, or a norm is needed and no target is attached.
        """
        _check_states("states", states, self.config.hidden_size)
        if self.reads_draft != (draft_states is not None):
            reads = "it reads the draft model's states too" if self.reads_draft else "it reads the target's states only"
            raise ValueError(
                f"draft_states are {'missing' if self.reads_draft else 'given'}; {reads} (draft_hidden_size "
                f"{self.config.draft_hidden_size}); call it so"
            )
        if self.config.feature == POST_NORM:
            states = self._ends().final_norm(states)
        parts = [states.float()]
        if draft_states is not None:
            _check_states("draft_states", draft_states, self.config.draft_hidden_size)
            parts.append(draft_states.to(states.device).float())
        with torch.autocast(states.device.type, enabled=False):
            standard = (torch.cat(parts, dim=-1) - self.mean.float()) / self.scale.float()
            return standard @ self.weight.float() + self.bias.float()

    def accepts(self, states: Tensor, draft_states: Tensor | None = None) -> Tensor:
        """Whether each token may stand: sigmoid(log_odds) > threshold. NaN states are never accepted.

        Compared as log-odds, because sigmoid in float32 is 1 from 17 on: so a threshold of 1 accepts nothing, whatever the states.

        Args:
            states: as for :meth:`log_odds`.
            draft_states: as for :meth:`log_odds`.

        Returns:
            bool [...].

        Raises:
            ValueError: as :meth:`log_odds`.
        """
        return self.log_odds(states, draft_states) > log_odds_of(self.config.threshold)

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
        other = Judge(config)
        other.load_state_dict(self.state_dict())
        nn.Module.to(other, self.weight.device)
        other._borrowed[:] = self._borrowed
        return other.train(self.training)

    def _ends(self) -> TargetEnds:
        if not self._borrowed:
            raise ValueError(
                f"this judge reads {POST_NORM} and is attached to no target; call judge.attach(target.ends) first"
            )
        return self._borrowed[0]


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


def check_config(fields: Mapping[str, Any], place: str) -> None:
    """Check the fields of a judge's config against their rules.

    Args:
        fields: by name.
        place: what errors call the config.

    Raises:
        ValueError: with place, field, value, rule and remedy.
    """
    known = set(JudgeConfig().to_dict()) | {"model_type", "architectures", "dtype", "transformers_version", "auto_map"}
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            _refuse(
                place,
                name,
                fields[name],
                "a judge has no such field",
                f"did you mean {near[0]}?" if near else "remove it",
            )
    if fields.get("model_type") != JudgeConfig.model_type:
        _refuse(
            place,
            "model_type",
            fields.get("model_type"),
            f"a judge's is {JudgeConfig.model_type}",
            "give a judge's folder",
        )
    for name, least in (("hidden_size", 1), ("draft_hidden_size", 0)):
        value = fields.get(name, 0)
        if type(value) is not int or value < least:
            _refuse(place, name, value, f"it is a whole number of at least {least}", "train or export the judge again")
    if fields.get("feature", PRE_NORM) not in FEATURES:
        _refuse(
            place, "feature", fields["feature"], f"it is one of {', '.join(FEATURES)}", "train the judge on one of them"
        )
    _share(place, "threshold", fields.get("threshold", 1.0))
    for name in ("target_name", "target_fingerprint", "tokenizer_fingerprint", "draft_name", "draft_fingerprint"):
        if not isinstance(fields.get(name, ""), str):
            _refuse(place, name, fields[name], "it is text", "train or export the judge again")
    if not isinstance(fields.get("labels", {}), Mapping):
        _refuse(place, "labels", fields["labels"], "it is an object", "train or export the judge again")
    _check_curve(place, fields.get("curve", []))


def _check_curve(place: str, curve: Any) -> None:
    if not isinstance(curve, list):
        _refuse(place, "curve", curve, "it is a list of points", "train the judge again, or write []")
    last = -1.0
    for index, point in enumerate(curve):
        if not isinstance(point, Mapping) or set(point) != set(_POINT):
            _refuse(
                place,
                f"curve[{index}]",
                point,
                f"a point has {', '.join(_POINT)}",
                "train the judge again, or write []",
            )
        for name in _POINT:
            _share(place, f"curve[{index}].{name}", point[name])
        if point["threshold"] <= last:
            _refuse(
                place,
                f"curve[{index}].threshold",
                point["threshold"],
                f"it is above {last}, the one before",
                "sort the curve",
            )
        last = point["threshold"]


def _share(place: str, name: str, value: Any) -> None:
    # bool is an int for Python, and NaN passes no comparison.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        _refuse(place, name, value, "it is a number from 0 to 1", "correct it, or train the judge again")


def _refuse(place: str, field: str, value: object, rule: str, remedy: str) -> NoReturn:
    raise ValueError(f"{place}: {field} is {value!r}; {rule}; {remedy}")


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
            _refuse(
                str(path),
                name,
                f"{tensor.dtype} {tuple(tensor.shape)}",
                f"it is float32 {shape}, as config.json has it",
                "export it again",
            )
        if not is_finite(tensor):
            _refuse(str(path), name, "NaN or infinite in places", "every number is finite", "train the judge again")
    if not bool((tensors["scale"] > 0).all()):
        _refuse(str(path), "scale", float(tensors["scale"].min()), "every scale is above 0", "train the judge again")
    return tensors


AutoConfig.register(JudgeConfig.model_type, JudgeConfig)
AutoModel.register(JudgeConfig, Judge)
