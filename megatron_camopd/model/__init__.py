"""The Megatron model: building it, its output head, micro-batches, and the passes that score and train."""
