"""From rows of any data set to training batches."""

from prefixvlm.train.data.collator import ConversationCollator
from prefixvlm.train.data.conversation import Conversation
from prefixvlm.train.data.noise import add_mask_token
from prefixvlm.train.data.sources import load

__all__ = ["Conversation", "ConversationCollator", "add_mask_token", "load"]
