"""Losses of drafters: plain functions from tensors to sums, with an eager twin beside each fast one."""

from draftsmith.train.losses.cross_entropy import head_cross_entropy
from draftsmith.train.losses.distillation import group_by_teacher, head_distillation
from draftsmith.train.losses.divergences import DivergenceLoss
from draftsmith.train.losses.features import FeatureSums, feature_smooth_l1
from draftsmith.train.losses.sums import OUTSIDE, Heads, StepSums, TeacherLogits, TopEmphasis

__all__ = [
    "OUTSIDE",
    "DivergenceLoss",
    "FeatureSums",
    "Heads",
    "StepSums",
    "TeacherLogits",
    "TopEmphasis",
    "feature_smooth_l1",
    "group_by_teacher",
    "head_cross_entropy",
    "head_distillation",
]
