"""The stage ``distill``: on-policy distillation from one teacher per branch."""
