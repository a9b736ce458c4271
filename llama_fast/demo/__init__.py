"""The models that ship with the package: a small Llama 3 that knows one small town, and the same
model taught to chat.

``FOLDER`` and ``CHAT_FOLDER`` hold them in Meta's format; in a clone, ``python -m
tools.demo_model.make`` and ``python -m tools.demo_model.make_chat`` make them anew.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
CHAT_FOLDER = FOLDER / "chat"
