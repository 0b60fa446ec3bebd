"""Losses, modules, data loading and callbacks: the one package that knows Lightning.

Its public names are what a run's YAML names: ``class_path: draftsmith.train.DraftModule``. They stay where modules move.
"""

from draftsmith.public import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CacheDataModule": "batches.data_module",
        "OnlineDataModule": "batches.online",
        "ChainDecodeValidation": "draft_lm.callbacks",
        "KeepBestDraftLM": "draft_lm.callbacks",
        "DistilDataModule": "draft_lm.data",
        "DraftLMModule": "draft_lm.module",
        "KeepBestDrafter": "drafter.callbacks",
        "Throughput": "drafter.callbacks",
        "TreeDecodeValidation": "drafter.callbacks",
        "Eagle3Family": "drafter.family_settings",
        "EagleFamily": "drafter.family_settings",
        "ReDrafterFamily": "drafter.family_settings",
        "DraftModule": "drafter.module",
        "LmDataModule": "embedded_lm.data",
        "LmModule": "embedded_lm.module",
        "JudgeFigures": "judge.callbacks",
        "KeepJudge": "judge.callbacks",
        "JudgeDataModule": "judge.data",
        "JudgeModule": "judge.module",
        "FullyShard": "run.strategies",
        "Zero": "run.strategies",
    },
)
