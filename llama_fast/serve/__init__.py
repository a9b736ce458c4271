"""Answers over HTTP: OpenAI's interface over one engine. `server.py` starts it, docs/serve.md tells
what it serves; `batch.py` is the loop that makes all answers."""
