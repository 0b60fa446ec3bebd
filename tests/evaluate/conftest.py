from collections.abc import Callable

import pytest

from draftsmith.evaluate.records import Row
from draftsmith.evaluate.strata.decoded import DepthAcceptance

RowMaker = Callable[..., Row]


@pytest.fixture
def make_row() -> RowMaker:
    """A believable row; keyword arguments replace its fields."""

    def make(**changes: object) -> Row:
        fields: dict = {
            "target": "sums",
            "drafter": "redrafter",
            "temperature": 0.0,
            "prompts": 40,
            "exact_share": 1.0,
            "tokens_per_step": 3.1,
            "tokens_per_step_interval": (2.9, 3.3),
            "speedup": 1.8,
            "tokens_per_second": 720.0,
            "baseline_tokens_per_second": 400.0,
            "transformers_tokens_per_second": 380.0,
            "speedup_interval": (1.7, 1.9),
            "speedup_median": 1.79,
            "speedup_over_transformers": 1.9,
            "engine_vs_transformers": 1.05,
            "transformers_exact_share": 1.0,
            "suspicious": False,
            "shape": "1x4",
            "beam_width": 1,
            "draft_length": 4,
            "node_budget": None,
            "min_probability": 0.0,
            "drafter_fingerprint": "ab" * 32,
            "parameters": 600_000,
            "dtype": "float32",
            "device": "cpu",
            "batch_size": 1,
            "max_new_tokens": 128,
            "repeats": 1,
            "tokens": 4000,
            "looping_share": 0.05,
            "acceptance_by_depth": tuple(DepthAcceptance(d, 100, 90, 0.9 - 0.05 * d, 0.9**d) for d in range(1, 5)),
            "accepted_lengths": (10, 20, 30, 25, 15),
            "stage_seconds": {"prefill": 0.5, "draft": 1.0, "verify": 3.0, "accept": 0.3, "host": 0.2},
        }
        return Row(**(fields | changes))

    return make
