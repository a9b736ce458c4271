"""The model that ships with the package: a small Llama 3 that knows one small town.

``FOLDER`` holds it in Meta's format; ``python -m tools.demo_model.make`` in a clone makes it anew.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
