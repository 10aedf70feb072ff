"""Parts of ``tools/benchmark_head.py``: inputs with a float64 reference, contestants, measurement, memory, report."""
