"""Text to token ids and back, without torch."""

from .tokenizer import PIECES, StreamDecoder, Tokenizer

__all__ = ["PIECES", "StreamDecoder", "Tokenizer"]
