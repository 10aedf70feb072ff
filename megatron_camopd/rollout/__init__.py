"""Rollout engines, which sample responses with the student's weights, and the transfer of weights to them."""
