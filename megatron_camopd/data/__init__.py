"""Prompts on their way into a step: files, then chat template, then an endless shuffled stream per branch.

``read_prompts`` checks every row of the files before training starts, ``ChatFormatter`` turns one row into
token ids, and ``PromptStream`` hands out the next prompts of a step and remembers where it stopped.
"""

from megatron_camopd.data.chat import ChatFormatter
from megatron_camopd.data.prompt_files import Prompt, PromptSet, read_prompts
from megatron_camopd.data.stream import EncodedPrompt, PromptStream

__all__ = ["ChatFormatter", "EncodedPrompt", "Prompt", "PromptSet", "PromptStream", "read_prompts"]
