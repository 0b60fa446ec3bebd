"""What a judge's config says: what the judge reads, where it draws the line, whose states it knows.

Owns the fields and their rules. Knows no weights, no files, and not how a judge was trained.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NoReturn, TypedDict

from transformers import AutoConfig, PreTrainedConfig

from draftsmith.models.opinion import NUM_NUMBERS
from draftsmith.models.target.target import PRE_NORM

POST_NORM = "last.post_norm"
WITH_OPINION = "last.pre_norm + opinion"
NO_GATE = "none"
GATES = (NO_GATE, "line", "reply")
FEATURES = (PRE_NORM, POST_NORM, WITH_OPINION)


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


class JudgedDrafter(TypedDict):
    """A drafter whose drafts a judge has seen.

    Attributes:
        name: as it was given.
        fingerprint: of its folder.
        shapes: of its drafts, as the command line writes them.
    """

    name: str
    fingerprint: str
    shapes: list[str]


class JudgeConfig(PreTrainedConfig):
    """What a judge reads, where it draws the line, and whose states it knows.

    Attributes:
        hidden_size: the target's hidden size D.
        feature: ``last.pre_norm + opinion``, the last block's output as it is and behind it the six numbers of
            :func:`~draftsmith.models.opinion.opinion`. ``last.pre_norm`` is the output alone, ``last.post_norm`` the same after the
            target's final norm.
        draft_hidden_size: 0, or the hidden size of the draft model. The last block's output of that model, before its own final norm, then
            follows the target's.
        threshold: from 0 to 1; a token is accepted where its probability of being correct is above it. 1 accepts nothing.
        gate: ``none``: each token stands alone. ``line``: of a drafted line all tokens stand, or none by the judge. ``reply``: the same of
            the rest of the reply, as far as its end.
        veto: whether the target's own tokens must pass the judge, too, or else the line or reply falls; with a gate only.
        line_end_ids: the tokens that end a line, for the gate of lines.
        curve: what other thresholds do, in rising order of the threshold; empty where none was measured.
        differing_curve: the same over the tokens that the target would not have chosen.
        target_name, target_fingerprint, tokenizer_fingerprint: the bond to one target; empty strings mean unknown.
        draft_name, draft_fingerprint: the bond to one draft model, where it reads one.
        drafters: those that the judge was trained or tuned with: ``name``, ``fingerprint`` and ``shapes`` of each; empty where unknown.
        labels: where the labels came from, and how many.
    """

    model_type = "draftsmith_judge"

    def __init__(
        self,
        hidden_size: int = 0,
        feature: str = PRE_NORM,
        draft_hidden_size: int = 0,
        threshold: float = 1.0,
        gate: str = NO_GATE,
        veto: bool = False,
        line_end_ids: list[int] | None = None,
        curve: list[CurvePoint] | None = None,
        differing_curve: list[CurvePoint] | None = None,
        target_name: str = "",
        target_fingerprint: str = "",
        tokenizer_fingerprint: str = "",
        draft_name: str = "",
        draft_fingerprint: str = "",
        drafters: list[JudgedDrafter] | None = None,
        labels: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.feature = feature
        self.draft_hidden_size = draft_hidden_size
        self.threshold = threshold
        self.gate, self.veto = gate, veto
        self.line_end_ids = [] if line_end_ids is None else line_end_ids
        self.curve = [] if curve is None else curve
        self.differing_curve = [] if differing_curve is None else differing_curve
        self.target_name = target_name
        self.target_fingerprint = target_fingerprint
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.draft_name = draft_name
        self.draft_fingerprint = draft_fingerprint
        self.drafters = [] if drafters is None else drafters
        self.labels = {} if labels is None else labels
        super().__init__(**kwargs)

    @property
    def reads_opinion(self) -> bool:
        """Whether the six numbers follow the target's state."""
        return self.feature == WITH_OPINION

    @property
    def num_features(self) -> int:
        """F."""
        return self.hidden_size + (NUM_NUMBERS if self.reads_opinion else 0) + self.draft_hidden_size


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
            refuse(
                place,
                name,
                fields[name],
                "a judge has no such field",
                f"did you mean {near[0]}?" if near else "remove it",
            )
    if fields.get("model_type") != JudgeConfig.model_type:
        refuse(
            place,
            "model_type",
            fields.get("model_type"),
            f"a judge's is {JudgeConfig.model_type}",
            "give a judge's folder",
        )
    for name, least in (("hidden_size", 1), ("draft_hidden_size", 0)):
        value = fields.get(name, 0)
        if type(value) is not int or value < least:
            refuse(place, name, value, f"it is a whole number of at least {least}", "train or export the judge again")
    if fields.get("feature", PRE_NORM) not in FEATURES:
        refuse(
            place, "feature", fields["feature"], f"it is one of {', '.join(FEATURES)}", "train the judge on one of them"
        )
    _share(place, "threshold", fields.get("threshold", 1.0))
    for name in ("target_name", "target_fingerprint", "tokenizer_fingerprint", "draft_name", "draft_fingerprint"):
        if not isinstance(fields.get(name, ""), str):
            refuse(place, name, fields[name], "it is text", "train or export the judge again")
    if not isinstance(fields.get("labels", {}), Mapping):
        refuse(place, "labels", fields["labels"], "it is an object", "train or export the judge again")
    _check_gate(place, fields)
    _check_drafters(place, fields.get("drafters", []))
    for name in ("curve", "differing_curve"):
        _check_curve(place, name, fields.get(name, []))


def _check_gate(place: str, fields: Mapping[str, Any]) -> None:
    gate, veto, ends = fields.get("gate", NO_GATE), fields.get("veto", False), fields.get("line_end_ids", [])
    if gate not in GATES:
        refuse(place, "gate", gate, f"it is one of {', '.join(GATES)}", "choose one of them")
    if type(veto) is not bool or (veto and gate == NO_GATE):
        refuse(place, "veto", veto, "it is true or false, and true only with a gate", "choose a gate, or write false")
    if not isinstance(ends, list) or not all(type(token) is int and token >= 0 for token in ends):
        refuse(place, "line_end_ids", ends, "it is a list of token ids", "tune the judge again")
    if bool(ends) != (gate == "line"):
        rule = "the gate of lines needs the tokens that end a line, and no other gate has any"
        refuse(place, "line_end_ids", ends[:5], rule, "tune the judge again")


def _check_drafters(place: str, drafters: Any) -> None:
    whole = isinstance(drafters, list) and all(
        isinstance(drafter, Mapping)
        and set(drafter) == set(JudgedDrafter.__annotations__)
        and isinstance(drafter["name"], str)
        and isinstance(drafter["fingerprint"], str)
        and isinstance(drafter["shapes"], list)
        and all(isinstance(shape, str) for shape in drafter["shapes"])
        for drafter in drafters
    )
    if not whole:
        rule = "it is a list of objects with name, fingerprint and shapes"
        refuse(place, "drafters", drafters, rule, "tune the judge again, or write []")


def _check_curve(place: str, name: str, curve: Any) -> None:
    if not isinstance(curve, list):
        refuse(place, name, curve, "it is a list of points", "train the judge again, or write []")
    last = -1.0
    for index, point in enumerate(curve):
        if not isinstance(point, Mapping) or set(point) != set(_POINT):
            refuse(
                place,
                f"{name}[{index}]",
                point,
                f"a point has {', '.join(_POINT)}",
                "train the judge again, or write []",
            )
        for part in _POINT:
            _share(place, f"{name}[{index}].{part}", point[part])
        if point["threshold"] <= last:
            refuse(
                place,
                f"{name}[{index}].threshold",
                point["threshold"],
                f"it is above {last}, the one before",
                "sort the curve",
            )
        last = point["threshold"]


def _share(place: str, name: str, value: Any) -> None:
    # bool is an int for Python, and NaN passes no comparison.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        refuse(place, name, value, "it is a number from 0 to 1", "correct it, or train the judge again")


def refuse(place: str, field: str, value: object, rule: str, remedy: str) -> NoReturn:
    """Stop with an error about a field.

    Args:
        place: what errors call the config or file.
        field: its name.
        value: what it is.
        rule: what it must be.
        remedy: what to do.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{place}: {field} is {value!r}; {rule}; {remedy}")


AutoConfig.register(JudgeConfig.model_type, JudgeConfig)
