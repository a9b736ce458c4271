"""`llama-fast vocab`: commands that make a vocabulary longer or shorter, and judge it."""

from __future__ import annotations

from .vocab_extend import extend
from .vocab_prune import prune
from .vocab_report import report
from .vocab_train import train

COMMANDS = (train, extend, prune, report)
HELP = "Make a vocabulary longer or shorter, with the rows of a model for it, and see how it fits."
EXAMPLE = "Example: llama-fast vocab train corpus.txt --base MODEL --tokens 5000 --out longer"
