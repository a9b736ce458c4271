"""Text to token ids and back, and dialogs to ids and back, without torch."""

from .chat import ChatFormat
from .chat_choice import chat_format
from .chat_decode import decode_message
from .chat_encoded import Encoded, Owner
from .chat_messages import Message, ToolCall
from .chat_template import TemplateFormat
from .chat_tools import ToolDefinition
from .tokenizer import PIECES, StreamDecoder, Tokenizer

__all__ = [
    "PIECES",
    "ChatFormat",
    "Encoded",
    "Message",
    "Owner",
    "StreamDecoder",
    "TemplateFormat",
    "Tokenizer",
    "ToolCall",
    "ToolDefinition",
    "chat_format",
    "decode_message",
]
