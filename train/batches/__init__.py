"""Training batches, from a hidden-state cache or from the target in the loop."""

from draftsmith.public import lazy_names

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "EpochPlan": "batch_plan",
        "count_batches": "batch_plan",
        "plan_epoch": "batch_plan",
        "steps_differ": "batch_plan",
        "Buckets": "epoch_order",
        "Windows": "epoch_order",
        "EpochSampler": "epoch_sampler",
        "needed_shards": "epoch_sampler",
        "deal_by_length": "shares",
        "deal_out": "shares",
    },
)
