"""The stages of a run: distillation, supervised fine-tuning and generation, and the loop that training shares."""
