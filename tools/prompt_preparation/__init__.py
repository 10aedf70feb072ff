"""Parts of ``tools/prepare_prompts.py``: streamed sources, one module per sub-command, output with a manifest."""
