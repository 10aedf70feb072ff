"""The frozen teachers of a distillation run."""
