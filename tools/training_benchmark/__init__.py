"""Parts of ``tools/benchmark_training.py``: the work to measure, and what packing is compared with."""
