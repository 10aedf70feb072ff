"""Parts of ``tools/benchmark_rollout.py``: checkpoints of random weights, measurement, report."""
