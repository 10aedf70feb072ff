"""What ``tools/benchmark_rollout.py`` is made of: models of random weights, the measurement, the report."""
