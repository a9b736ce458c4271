"""Rows of training data that tests write and read."""

from __future__ import annotations

import json

from llama_fast.tokenizer import ToolCall

CALL = ToolCall("f", {"a": 1})
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def write(folder, name, rows, array=False):
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    text = "[" + ",\n".join(lines) + "]" if array else "\n".join(lines)
    path.write_text(text, encoding="utf-8")
    return path


def dialog(question="Q?", answer="Yes."):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


MIXED = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL.as_dict()]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "last"},
    ],
    "tools": [TOOL],
}


def trained_texts(data) -> list[str]:
    """The texts of the runs of trained tokens."""
    shown = data.show(100, color=False)
    return [part.split("⟧")[0] for part in shown.split("⟦")[1:]]
