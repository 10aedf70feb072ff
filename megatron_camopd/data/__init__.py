"""Data on its way into a step: files, then chat template, then an endless shuffled stream.

Prompts: ``read_prompts`` checks every row of the files before training starts, ``ChatFormatter`` turns one row into
token ids, ``PromptStream`` hands out the next prompts of a step and remembers where it stopped. Conversations, for
supervised fine-tuning: ``ConversationSet``, ``ConversationFormatter`` and ``ConversationStream``, which packs them.
"""

from megatron_camopd.data.chat import ChatFormatter
from megatron_camopd.data.conversation_tokens import ConversationFormatter, EncodedConversation
from megatron_camopd.data.conversations import Conversation, ConversationSet
from megatron_camopd.data.packing import ConversationStream, PackedBatch, PackedRow, PackedSet, pack_in_order
from megatron_camopd.data.prompt_files import Prompt, PromptSet, prompts_of_branch, read_prompts
from megatron_camopd.data.stream import EncodedPrompt, PromptBatch, PromptStream

__all__ = [
    "ChatFormatter",
    "Conversation",
    "ConversationFormatter",
    "ConversationSet",
    "ConversationStream",
    "EncodedConversation",
    "EncodedPrompt",
    "PackedBatch",
    "PackedRow",
    "PackedSet",
    "Prompt",
    "PromptBatch",
    "PromptSet",
    "PromptStream",
    "pack_in_order",
    "prompts_of_branch",
    "read_prompts",
]
