"""The model that ships with the package: a small Llama 3 that knows one small town.

``FOLDER`` holds it in Meta's format; ``python -m llama_fast.demo.make`` makes it anew.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
