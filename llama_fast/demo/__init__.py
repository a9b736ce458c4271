"""The models that ship with the package: a small Llama 3 that knows one small town, and the same
model taught to chat.

``FOLDER`` holds the one in Meta's format, ``CHAT_FOLDER`` the other in Hugging Face's; in a clone,
``python -m tools.demo_model.make`` and ``python -m tools.demo_model.make_chat`` make them anew.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
CHAT_FOLDER = FOLDER / "chat"
