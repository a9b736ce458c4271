"""Llama 3 as a module over the ops, and the loading of its weights."""

from .llama import Llama

__all__ = ["Llama"]
