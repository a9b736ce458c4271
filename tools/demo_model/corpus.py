"""Texts of the demo model's world, one a line of JSON, to train and to judge by:

    python -m tools.demo_model.corpus corpus.jsonl  # 3.2 MB of Chinese
    python -m tools.demo_model.corpus held-out.jsonl --split combinations --bytes 60000
    python -m tools.demo_model.corpus english.jsonl --chinese-share 0

The demo model has learnt from this world, but from other texts: another seed tells other ones. No
text of the split `combinations` tells facts together that a text of `train` does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llama_fast.utils.files import atomic_file

from .texts import documents
from .world import SPLITS

SEED = 7  # the demo model's training has another


def write(path: Path, n_bytes: int, split: str, chinese_share: float, seed: int) -> int:
    """Writes texts of `n_bytes` of UTF-8 or little more; returns how many."""
    lines, size = [], 0
    for text in documents(seed, split, chinese_share=chinese_share):
        lines.append(json.dumps({"text": text}, ensure_ascii=False))
        size += len(text.encode())
        if size >= n_bytes:
            break
    with atomic_file(path) as beside:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo_model.corpus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="the .jsonl file to write")
    parser.add_argument("--bytes", type=int, default=3_200_000, help="of text")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--chinese-share", type=float, default=1.0, help="the rest is English")
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    n = write(options.file, options.bytes, options.split, options.chinese_share, options.seed)
    print(f"wrote {options.file}: {n:,} texts")


if __name__ == "__main__":
    main()
