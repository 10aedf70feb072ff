"""What ``tools/reliability.py`` runs: kills of training runs, and malformed inputs."""
