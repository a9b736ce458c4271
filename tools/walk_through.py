"""Draws the pictures of docs/walk-through.md: the canvases of the page that `llama-fast inspect`
writes, without their words, so that they serve every language.

    python -m tools.walk_through

Needs Chromium.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from llama_fast import Llama, Tokenizer, trace
from llama_fast.demo import FOLDER
from llama_fast.inspect.page import page

PROMPT = "the answer to the ultimate question of life, the universe, and everything is "
PICTURES = Path(__file__).parent.parent / "docs" / "figures" / "walk-through"
SECTIONS = ("embedding", "norm", "rotation", "attention", "mlp")
WIDTH = 720


def draw(chromium: str, text: str, section: str, folder: Path) -> None:
    style = f"""<style>
      header, #about, section:not(:has(h2[data-t="{section}"])),
      section > :not(:has(canvas), canvas), figcaption {{ display: none !important; }}
      .two:not(:has(.spiral)) {{ grid-template-columns: 1fr; }}
      main, section {{ margin: 0; padding: 0; border: 0; }} section {{ border-radius: 0; }}
    </style><script>document.body.dataset.tall = Math.ceil(document.querySelector("main")
      .getBoundingClientRect().height);</script></body>"""
    file = folder / "page.html"
    file.write_text(text.replace("</body>", style), encoding="utf-8")

    def run(*options: str, height: int = 900) -> str:
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={folder / 'profile'}", f"--window-size={WIDTH},{height}"]
        done = subprocess.run(
            [*command, *options, f"{file.as_uri()}#light"],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    height = int(re.search(r'data-tall="(\d+)"', run("--dump-dom"))[1])
    run(f"--screenshot={PICTURES / section}.png", height=height)


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("Chromium is not here; install it: apt-get install chromium")
    model = Llama.from_pretrained(FOLDER, device="cpu")
    text = page(trace(model, PROMPT, Tokenizer.from_pretrained(FOLDER), layers=[0]))
    PICTURES.mkdir(parents=True, exist_ok=True)
    for section in SECTIONS:
        with tempfile.TemporaryDirectory() as folder:
            draw(chromium, text, section, Path(folder))


if __name__ == "__main__":
    main()
