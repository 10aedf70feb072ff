"""The parts of ``tools/benchmark_head.py``: inputs and float64 reference, contestants, measuring, memory, report."""
