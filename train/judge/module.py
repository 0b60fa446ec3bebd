"""Training a judge: a sweep of penalties at once, the best of them by held-out questions, and the threshold from those.

Owns: the settings, standardisation, the choice among the sweep, the resulting judge, what is logged. Does not know: how tokens
are joined to states, the optimiser's inside, figures, files of a run.

Shape legend: N tokens, F features, S penalties, P = F + 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from draftsmith.models.files.device_and_dtype import as_dtype, resolved_dtype
from draftsmith.models.files.fingerprint import tokenizer_fingerprint
from draftsmith.models.files.loading import load_tokenizer
from draftsmith.models.judge import FEATURES, POST_NORM, WITH_OPINION, Judge, JudgeConfig
from draftsmith.models.target.target import PRE_NORM, TargetEnds
from draftsmith.train.batches.labelled_text import LabelledText
from draftsmith.train.batches.resumed import check_same
from draftsmith.train.judge.data import JudgeDataModule, JudgeTokens
from draftsmith.train.judge.fit import Scaling, SweepLBFGS, SweepProblem, measure_scaling, project
from draftsmith.train.judge.held_out import ALL, DIFFERING, HeldOutTokens
from draftsmith.train.judge.metrics import average_precision, choose_threshold, curve, reliability, roc_auc
from draftsmith.train.run.checkpoints import check_fits
from draftsmith.train.run.collectives import sum_over_ranks
from draftsmith.train.run.strategies import refuse_dividing

AUC = "val/auc"
_GRAIN = 2.0**-14
"""Held-out log-odds are rounded to it: equal states must tie, whatever a matrix product makes of their last digits, and the threshold
must not lie between two such."""


class JudgeModule(pl.LightningModule):
    """A judge in training: logistic regression on the states of labelled tokens, for several L2 penalties at once.

    What is minimised for each penalty is, with the features standardised by the training tokens::

        1/W * sum over tokens of c * BCE(y, sigmoid(weight . x + bias))  +  l2 / 2 * |weight|²,     W = sum of c

    scikit-learn's ``LogisticRegression(C, class_weight)`` finds the same weights for ``C = 1 / (l2 * W)``. With class_weight
    "balanced" W is the number of training tokens.

    An epoch is `iterations` of L-BFGS over all tokens, each with an exact line search, so there is no learning rate. Training stops when no
    gradient entry is above `tolerance`, or earlier by EarlyStopping on `val/auc`.

    Args:
        target: the frozen target: a model directory, a hub id, or `embedded:target`.
        feature: `last.pre_norm + opinion`, the last block's output and six numbers of the forward pass that verifies the token;
            `last.pre_norm`, the output alone (Judge Decoding); or `last.post_norm`, the output after the final norm (AutoJudge).
        l2: the penalties to try, all at once. The one whose area under the ROC curve over the held-out questions is largest is kept.
        class_weight: `balanced` (each class counts half), or a number: wrong tokens count so many times what they do there.
        iterations: steps of L-BFGS in an epoch.
        history: pairs of steps and gradients that L-BFGS remembers.
        tolerance: training stops when no entry of the gradient is above it.
        max_wrong: the threshold accepts at most this share of the wrong tokens of held-out questions.
        threshold_over: `differing`: of the tokens that the target would not have chosen, which are those that decoding asks a judge
            about. `all`: of all labelled tokens. Where differing tokens are all correct or all wrong, it is all of them, with a warning.
        hold_upper: the upper end of the share's 95 % interval (bootstrap over questions) must be within it too.
        num_replicates: samples of the bootstrap behind each interval.
        ends_dtype: dtype of the target's final norm and head; `auto` is its checkpoint's own on CUDA, float32 elsewhere.
        revision: of the target on the hub.
        adapter: a PEFT adapter on top of the target.
        trust_remote_code: run Python files that come with the target; read them first.

    Raises:
        ValueError: settings out of range; in setup(), a cache of another target or tokenizer, or a strategy that divides weights.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        target: str,
        feature: Literal["last.pre_norm + opinion", "last.pre_norm", "last.post_norm"] = "last.pre_norm + opinion",
        l2: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
        class_weight: Literal["balanced"] | float = "balanced",
        iterations: int = 10,
        history: int = 20,
        tolerance: float = 1e-6,
        max_wrong: float = 0.05,
        threshold_over: Literal["differing", "all"] = "differing",
        hold_upper: bool = False,
        num_replicates: int = 1000,
        ends_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        revision: str | None = None,
        adapter: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        counts = {"iterations": iterations, "history": history, "num_replicates": num_replicates}
        _check_settings(feature, l2, class_weight, max_wrong, counts)
        if threshold_over not in (DIFFERING, ALL):
            raise ValueError(f"threshold_over is {threshold_over!r}; give {DIFFERING} or {ALL}")
        self.target, self.revision, self.adapter = target, revision, adapter
        self.trust_remote_code = trust_remote_code
        self.feature, self.l2, self.class_weight = feature, tuple(float(penalty) for penalty in l2), class_weight
        self.iterations, self.history, self.tolerance = iterations, history, tolerance
        self.max_wrong, self.hold_upper, self.num_replicates = max_wrong, hold_upper, num_replicates
        self.threshold_over: str = threshold_over
        self.ends_dtype: str = ends_dtype
        self._vocab_size = 0
        # The optimiser is given a problem, not a loss with a graph.
        self.automatic_optimization = False
        self.theta = nn.Parameter(torch.zeros(0, 0, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(0, dtype=torch.float64))
        self._config = JudgeConfig()
        self._values = torch.empty(0)
        self._differs = torch.empty(0)
        self.best = 0
        self.held_out: HeldOutTokens | None = None

    def settings(self) -> dict[str, Any]:
        """Every setting of the run that concerns the judge, for provenance."""
        names = (
            "target",
            "revision",
            "adapter",
            "trust_remote_code",
            "feature",
            "l2",
            "class_weight",
            "iterations",
            "history",
            "tolerance",
            "max_wrong",
            "threshold_over",
            "hold_upper",
            "num_replicates",
            "ends_dtype",
        )
        return {name: getattr(self, name) for name in names}

    def setup(self, stage: str) -> None:
        """Checks the caches against the target, has the states read, makes room for the weights.

        Raises:
            ValueError: a strategy that divides weights among processes, or caches of another target or tokenizer.
        """
        refuse_dividing(self.trainer.strategy, "the judge", "it is trained whole")
        if len(self.theta):
            return
        data = self.data()
        device = str(self.trainer.strategy.root_device)
        self.ends_dtype = resolved_dtype(self.ends_dtype, self.target, device, self.revision, self.trust_remote_code)
        ends = TargetEnds.load(
            self.target, as_dtype(self.ends_dtype), device, self.revision, self.adapter, self.trust_remote_code
        )
        self._vocab_size = ends.vocab_size
        own_tokenizer = tokenizer_fingerprint(load_tokenizer(self.target, self.revision, self.trust_remote_code))
        for cache in data.caches:
            cache.check_target(ends.fingerprint, vocab_size=ends.vocab_size)
            cache.check_tokenizer(own_tokenizer)
        norm = _norm_of(ends) if self.feature == POST_NORM else None
        data.read_states(norm, ends, with_opinion=self.feature == WITH_OPINION)
        hidden_size, draft_hidden_size = data.feature_sizes
        draft = data.draft_caches[0].manifest.identity if data.draft_caches else None
        self._config = JudgeConfig(
            hidden_size=hidden_size,
            feature=self.feature,
            draft_hidden_size=draft_hidden_size,
            target_name=self.target,
            target_fingerprint=ends.fingerprint,
            tokenizer_fingerprint=own_tokenizer,
            draft_name="" if draft is None else draft.target,
            draft_fingerprint="" if draft is None else draft.target_fingerprint,
            labels=data.record(),
        )
        num_features = self._config.num_features
        self.theta = nn.Parameter(torch.zeros(len(self.l2), num_features + 1, dtype=torch.float64))
        self.mean, self.scale = (
            torch.zeros(num_features, dtype=torch.float64),
            torch.ones(num_features, dtype=torch.float64),
        )

    def labelled_text(self) -> LabelledText:
        """What this run learns from."""
        return self.data().labelled_text(self._vocab_size, self.iterations)

    def on_fit_start(self) -> None:
        """Measures what standardises the features; on a resumed run that gives the same again."""
        scaling = measure_scaling(
            self.data().tokens("train"), self._config.num_features, self.device, partial(sum_over_ranks, self)
        )
        self.mean, self.scale = scaling.mean, scaling.scale

    def configure_optimizers(self) -> SweepLBFGS:
        """See SweepLBFGS."""
        return SweepLBFGS(self.theta, self.iterations, self.history, self.tolerance)

    def training_step(self, batch: JudgeTokens, batch_idx: int) -> None:
        """Runs `iterations` of L-BFGS over all tokens of all processes.

        Args:
            batch: all training tokens of this process.
            batch_idx: 0.
        """
        problem = SweepProblem(
            batch,
            batch.labels,
            token_weights(batch.labels, self.data().labels("train"), self.class_weight),
            Scaling(self.mean, self.scale),
            torch.tensor(self.l2, dtype=torch.float64, device=self.device),
            partial(sum_over_ranks, self),
        )
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.step(problem=problem)
        losses = problem.losses(self.theta.detach())
        largest = self.trainer.optimizers[0].state[self.theta]["largest_gradient"]
        self.log("train/largest_gradient", largest.max(), batch_size=1)
        self.log_dict({f"train/loss/l2={l2:g}": loss for l2, loss in zip(self.l2, losses, strict=True)}, batch_size=1)
        if bool((largest <= self.tolerance).all()):
            self.trainer.should_stop = True

    def validation_step(self, batch: JudgeTokens, batch_idx: int) -> None:
        """The values of this process's held-out tokens, each at its place among all.

        Args:
            batch: all held-out tokens of this process.
            batch_idx: 0.
        """
        values = project(batch, Scaling(self.mean, self.scale), self.theta.detach(), len(batch))
        num_tokens = len(self.data().labels("validation"))
        everywhere = torch.zeros(num_tokens, len(self.l2), dtype=torch.float64, device=self.device)
        everywhere[batch.places] = values
        self._values = (sum_over_ranks(self, everywhere) / _GRAIN).round() * _GRAIN
        differs = torch.zeros(num_tokens, dtype=torch.float64, device=self.device)
        differs[batch.places] = batch.differs.double()
        self._differs = sum_over_ranks(self, differs) > 0

    def on_validation_epoch_end(self) -> None:
        """Chooses among the sweep and logs what it is worth."""
        data = self.data()
        labels, values = data.labels("validation"), self._values.cpu().numpy()
        areas = [roc_auc(values[:, index], labels) for index in range(len(self.l2))]
        self.best = int(np.argmax(areas))
        probabilities = torch.sigmoid(self._values[:, self.best]).cpu().numpy()
        self.held_out = HeldOutTokens(probabilities, labels, data.questions("validation"), self._differs.cpu().numpy())
        self.log(AUC, areas[self.best], prog_bar=True, batch_size=1)
        self.log_dict({f"{AUC}/l2={l2:g}": area for l2, area in zip(self.l2, areas, strict=True)}, batch_size=1)
        asked, _ = self.held_out.asked(self.threshold_over)
        point = choose_threshold(*asked.arrays, self.max_wrong, num_replicates=1)
        point = self.held_out.points([point["threshold"]], num_replicates=1)[0]
        self.log_dict(
            {
                "val/l2": self.l2[self.best],
                "val/average_precision_wrong": average_precision(probabilities, labels),
                "val/calibration_error": reliability(probabilities, labels).error,
                "val/threshold": point["threshold"],
                "val/correct_accepted": point["correct"],
                "val/wrong_accepted": point["wrong"],
            },
            batch_size=1,
        )
        self._log_differing(self.held_out.differing(), point["threshold"])

    def _log_differing(self, tokens: HeldOutTokens | None, threshold: float) -> None:
        """The same over the tokens that the target would not have chosen, where they are of both classes."""
        if tokens is None:
            return
        probabilities, labels, _ = tokens.arrays
        point = tokens.points([threshold], num_replicates=1)[0]
        self.log_dict(
            {
                f"{AUC}_differing": roc_auc(probabilities, labels),
                "val/calibration_error_differing": reliability(probabilities, labels).error,
                "val/correct_accepted_differing": point["correct"],
                "val/wrong_accepted_differing": point["wrong"],
            },
            batch_size=1,
        )

    def on_fit_end(self) -> None:
        """Warns where the threshold was chosen over other tokens than were asked for."""
        if self.held_out is None or self.held_out.asked(self.threshold_over)[1] == self.threshold_over:
            return
        warnings.warn(
            "held-out tokens that the target would not have chosen are all correct or all wrong, so the threshold was chosen over all "
            "labelled tokens; label more answers, or choose it by answers with draftsmith judge tune",
            stacklevel=2,
        )

    def judge(self) -> Judge:
        """The best of the sweep with its threshold and curve, on the CPU.

        Raises:
            ValueError: no validation has run, or the weights are not finite.
        """
        if self.held_out is None:
            raise ValueError("no validation has been run; the threshold is made from held-out questions")
        theta = self.theta.detach()[self.best]
        if not bool(torch.isfinite(theta).all()):
            raise ValueError(
                f"the weights of l2 = {self.l2[self.best]:g} are not finite; look at the states, or raise l2"
            )
        asked, over = self.held_out.asked(self.threshold_over)
        chosen = choose_threshold(*asked.arrays, self.max_wrong, self.hold_upper, self.num_replicates)
        [point] = self.held_out.points([chosen["threshold"]], self.num_replicates)
        config = JudgeConfig.from_dict(self._config.to_dict())
        config.curve = curve(*self.held_out.arrays, num_replicates=self.num_replicates)
        config.threshold = point["threshold"]
        config.labels = {**config.labels, "l2": self.l2[self.best], "class_weight": self.class_weight}
        config.labels |= {"max_wrong": self.max_wrong, "hold_upper": self.hold_upper, "at_threshold": dict(point)}
        config.labels["threshold_over"] = over
        differing = self.held_out.differing()
        if differing is not None:
            config.differing_curve = curve(*differing.arrays, num_replicates=self.num_replicates)
            config.labels["differing"] = differing.summary(point["threshold"], self.num_replicates)
        judge = Judge(config)
        with torch.no_grad():
            judge.mean.copy_(self.mean)
            judge.scale.copy_(self.scale)
            judge.weight.copy_(theta[:-1])
            judge.bias.copy_(theta[-1])
        return judge.eval()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the sweep, which a resumed run must agree in."""
        checkpoint["settings"] = {**self.settings(), "l2": list(self.l2)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint has the same objective and model.

        Args:
            checkpoint: what Lightning has read.

        Raises:
            ValueError: another objective, or another model's weights.
        """
        settings = self.settings()
        own = {"feature": settings["feature"], "l2": list(self.l2), "class_weight": settings["class_weight"]}
        check_same(own, dict.fromkeys(own) | checkpoint.get("settings", {}), "resume with the same settings")
        check_fits(self, checkpoint["state_dict"])

    def data(self) -> JudgeDataModule:
        """The run's tokens.

        Raises:
            ValueError: another data module.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, JudgeDataModule):
            raise ValueError(
                f"JudgeModule trains from labelled rows: give it JudgeDataModule, not {type(data).__name__}"
            )
        return data


def token_weights(labels: Tensor, all_labels: np.ndarray, class_weight: Literal["balanced"] | float) -> Tensor:
    """Each token's weight, such that those of all processes sum to 1.

    Balanced, each class counts half; a number multiplies the wrong tokens' share before that. Example: 3 correct and 1 wrong tokens
    weigh 1/6, 1/6, 1/6 and 1/2; with 2.0 they weigh 1/9 each and 2/3.

    Args:
        labels: bool [N], this process's, True is correct.
        all_labels: bool, those of all processes.
        class_weight: see JudgeModule.

    Returns:
        float64 [N].
    """
    num_correct = int(all_labels.sum())
    num_wrong = len(all_labels) - num_correct
    factor = 1.0 if class_weight == "balanced" else float(class_weight)
    correct, wrong = 1.0 / num_correct / (1.0 + factor), factor / num_wrong / (1.0 + factor)
    return torch.where(labels, correct, wrong).double()


def _norm_of(ends: TargetEnds) -> Callable[[Tensor], Tensor]:
    def norm(states: Tensor) -> Tensor:
        with torch.no_grad():
            return ends.final_norm(states.to(ends.device)).cpu()

    return norm


def _check_settings(
    feature: str, l2: Sequence[float], class_weight: str | float, max_wrong: float, counts: dict[str, int]
) -> None:
    if feature not in FEATURES:
        raise ValueError(
            f"feature is {feature!r}; a judge reads {PRE_NORM} or {POST_NORM} alone, or {WITH_OPINION}; give one of them"
        )
    if not l2 or not all(0.0 < penalty < float("inf") for penalty in l2):
        raise ValueError(
            f"l2 is {list(l2)}; it is a list of penalties above 0, without which separable tokens have no optimum"
        )
    if len(set(l2)) < len(l2):
        raise ValueError(f"l2 is {list(l2)}; each penalty stands once; leave the repeated one out")
    if class_weight != "balanced" and not (isinstance(class_weight, int | float) and 0.0 < class_weight < float("inf")):
        raise ValueError(
            f"class_weight is {class_weight!r}; it is 'balanced', or how many times more a wrong token counts than there; give a number "
            "above 0"
        )
    if not 0.0 <= max_wrong <= 1.0:
        raise ValueError(f"max_wrong is {max_wrong}; it is the share of wrong tokens that may be accepted; give 0 to 1")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
