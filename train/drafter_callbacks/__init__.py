"""Callbacks of drafter training: validation by tree decoding, speed, the best drafter on disk, what a run will do."""

from draftsmith.public import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "TOKENS_PER_STEP": "acceptance_metrics",
        "acceptance_sums": "acceptance_metrics",
        "log_acceptance": "acceptance_metrics",
        "KeepBestDrafter": "keep_best_drafter",
        "Throughput": "throughput",
        "TreeDecodeValidation": "tree_decode_validation",
    },
)
