"""Input data: files, chat templates, and endless shuffled streams of token ids.

Prompts: ``read_prompts`` checks every row of the files before training starts, ``ChatFormatter`` converts one row to
token ids, ``PromptStream`` yields the next prompts of a step and can be resumed. Conversations, for supervised
fine-tuning, go through ``ConversationSet``, ``ConversationFormatter`` and ``ConversationStream``, which packs them.

Throughout this package, a row is one record of a file, except in ``packing``, where a packed row is one training
sequence made of several conversations.
"""

from megatron_camopd.data.chat import ChatFormatter
from megatron_camopd.data.conversation_tokens import ConversationFormatter, EncodedConversation
from megatron_camopd.data.conversations import Conversation, ConversationSet
from megatron_camopd.data.end_of_sequence import check_end_of_sequence
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
    "check_end_of_sequence",
    "pack_in_order",
    "prompts_of_branch",
    "read_prompts",
]
