"""Scripts that measure, run from the root of the repository: `python -m benchmarks.drafters.families`. Not in the wheel."""
