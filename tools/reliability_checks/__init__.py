"""Checks of ``tools/reliability.py``: kills of training runs, and malformed inputs."""
