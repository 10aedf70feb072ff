"""The model in Megatron: construction, the output head, and the forward and backward passes over micro-batches."""
