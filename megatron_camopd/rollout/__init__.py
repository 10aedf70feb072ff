"""Rollout engines, and the weight sync and checks that keep their weights equal to the student's."""
