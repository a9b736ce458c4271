"""Hugging Face's cache of downloads: a model's folder is models--ORG--NAME/snapshots/COMMIT."""

from __future__ import annotations

from pathlib import Path


def snapshot_hint(folder: Path) -> str:
    """Returns what to write instead of a folder of the cache: the model's main snapshot, or the
    newest; nothing for a folder that is not of the cache."""
    if folder.name == "snapshots":
        folder = folder.parent
    if found := _snapshot(folder):
        return f"it is a model's folder of Hugging Face's cache; give its snapshot {found}"
    models = sorted(folder.glob("models--*"))
    if not models:
        models = sorted(folder.glob("hub/models--*"))
    snapshots = [found for model in models if (found := _snapshot(model))]
    if not snapshots:
        return ""
    return (
        f"it is Hugging Face's cache, with {len(snapshots)} models in it; give the snapshot of "
        f"one, such as {snapshots[0]}"
    )


def _snapshot(model: Path) -> Path | None:
    snapshots = model / "snapshots"
    if not snapshots.is_dir():
        return None
    try:
        main = snapshots / (model / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = snapshots
    if main != snapshots and main.is_dir():
        return main
    found = [path for path in snapshots.iterdir() if path.is_dir()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
