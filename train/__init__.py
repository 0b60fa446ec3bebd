"""Losses, modules, data loading and callbacks: the one package that knows Lightning.

Its public names are what a run's YAML names: ``class_path: draftsmith.train.DraftModule``. They stay where modules move.
"""

from typing import Any

from draftsmith.public import lazy_names

_look_up, _listing = lazy_names(
    __name__,
    {
        "CacheDataModule": "batches.data_module",
        "OnlineDataModule": "batches.online",
        "ChainDecodeValidation": "draft_lm.callbacks",
        "KeepBestDraftLM": "draft_lm.callbacks",
        "DistilDataModule": "draft_lm.data",
        "DraftLMModule": "draft_lm.module",
        "KeepBestDrafter": "drafter_callbacks.keep_best_drafter",
        "Throughput": "drafter_callbacks.throughput",
        "TreeDecodeValidation": "drafter_callbacks.tree_decode_validation",
        "DraftModule": "drafter.module",
        "JointDraftModule": "drafter.joint_module",
        "TargetLora": "drafter.adapted_target",
        "LmDataModule": "embedded_lm.data",
        "LmModule": "embedded_lm.module",
        "JudgeFigures": "judge.callbacks",
        "KeepJudge": "judge.callbacks",
        "JudgeDataModule": "judge.data",
        "JudgeModule": "judge.module",
        "FullyShard": "run.strategies",
        "RunLogger": "run.run_logger",
        "Zero": "run.strategies",
        "Preemption": "run.preemption",
        "ResumeValidation": "run.resume_validation",
    },
)


def __getattr__(name: str) -> Any:
    """The names above, and the settings class of every drafter family."""
    if not name.endswith("Family"):
        return _look_up(name)
    from draftsmith.train.drafter import family_settings

    return getattr(family_settings, name)


def __dir__() -> list[str]:
    """As :func:`__getattr__`."""
    from draftsmith.train.drafter.family_settings import settings_classes

    return sorted([*_listing(), *settings_classes()])
