"""The frozen teachers, which take turns in one Megatron model."""
