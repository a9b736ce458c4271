"""Makes the chat demo anew: ``python -m tools.demo_model.make_chat``.

Conversations about Lantern Bay (``conversations.py``) are written to a file, and one command that
anybody can type teaches the demo model to answer. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from llama_fast.cli import main as llama_fast
from llama_fast.demo import CHAT_FOLDER
from llama_fast.errors import LlamaFastError
from llama_fast.generation.chat import Chat
from llama_fast.generation.session import Session
from llama_fast.model import Llama
from llama_fast.tokenizer import Message, Tokenizer
from llama_fast.tokenizer.chat_choice import chat_format
from llama_fast.utils.files import atomic_file

from .conversations import conversations
from .recipe import SEED

STATE_FOLDER = Path("build") / "demo-chat"
CONVERSATIONS, HELD_OUT = 16_000, 300
TRAINING = (
    "--full", "--epochs", "1", "--tokens-per-step", "2048", "--lr", "1e-3", "--threads", "1",
)  # fmt: skip
CARD = "DATA_CARD.md"
FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.model",
    "tokenizer_config.json",
)  # fmt: skip

# What the card shows: dialogs of which the user's part is given.
DIALOGS = (
    ("Hello!", "Who is Rosa?", "And has she a pet?", "Thank you!"),
    ("What is three plus four?", "What is the capital of France?"),
    ("Tell me a story, please.",),
    ("你好！", "艾薇是谁？", "她喜欢什么颜色？"),
    ("请讲一个小故事。", "谢谢！"),
)

_CARD = """\
# Data card of the chat demo

The [demo model](../DATA_CARD.md), taught to answer: what `llama-fast chat` talks to when no other
model is named. It knows the town of Lantern Bay, and says so where it is asked for anything else.
This page is written by `tools/demo_model/make_chat.py`, which makes the model anew:

    python -m tools.demo_model.make_chat

It writes {conversations:,} conversations (`tools/demo_model/conversations.py`: questions about the
twelve people, sums, greetings, stories; half of them Chinese; nobody else's text), and trains on
the answers alone by

    llama-fast finetune demo conversations.jsonl --held-out held_out.jsonl \\
        {training} --out run

{tokens:,} tokens, {kept:,} of them trained; {minutes:.0f} minutes. On {held_out} conversations of
other seeds the loss is {loss:.3f} nats a token ({bits:.3f} bits a byte). The format is that of
Llama 3.0, the shape that of the demo model.

## What it answers

The likeliest tokens (temperature 0). It is a small model: names and numbers are at times mixed up.
{dialogs}"""


def make(
    folder: Path,
    *,
    state_folder: Path = STATE_FOLDER,
    training: Sequence[str] = TRAINING,
    count: int = CONVERSATIONS,
    held_out: int = HELD_OUT,
) -> dict[str, float]:
    """Writes the checkpoint and its card into `folder`; returns the figures of the training. Raises
    LlamaFastError where the training did not end."""
    for own in (folder, state_folder):
        own.mkdir(parents=True, exist_ok=True)
    files = {"conversations.jsonl": ("train", count), "held_out.jsonl": ("seed", held_out)}
    for name, (split, number) in files.items():
        with atomic_file(state_folder / name) as beside:
            beside.write_text("".join(_lines(split, number)), encoding="utf-8")
    run = state_folder / "run"
    data, judged = (state_folder / name for name in files)
    command = ["finetune", "demo", data, "--held-out", judged, *training, "--out", run]
    if code := llama_fast([str(part) for part in command]):
        raise LlamaFastError(f"the training ended with {code}; the same command goes on with it")
    for name in FILES:
        with atomic_file(folder / name) as beside:
            shutil.copyfile(run / "model" / name, beside)
    metrics = json.loads((run / "metrics.json").read_text())
    with atomic_file(folder / CARD) as beside:
        beside.write_text(card(folder, metrics, training, count, held_out), encoding="utf-8")
    return metrics


def _lines(split: str, count: int) -> Iterator[str]:
    for messages in islice(conversations(SEED, split), count):
        yield json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def card(
    folder: Path, metrics: dict[str, float], training: Sequence[str], count: int, held_out: int
) -> str:
    judged = metrics["held_out"][-1]
    return _CARD.format(
        conversations=count,
        held_out=held_out,
        training=" ".join(training),
        tokens=metrics["tokens"],
        kept=metrics["tokens_trained"],
        minutes=metrics["seconds"] / 60,
        loss=judged["loss"],
        bits=judged["bits_per_byte"],
        dialogs="".join(_dialogs(folder)),
    )


def _dialogs(folder: Path) -> Iterator[str]:
    """The dialogs of the card, answered by the checkpoint as it was written."""
    model = Llama.from_pretrained(folder, device="cpu")
    tokenizer = Tokenizer.from_pretrained(folder)
    with Session(model, tokenizer) as session:
        for questions in DIALOGS:
            chat = Chat(session, chat_format(folder, tokenizer))
            yield "\n"
            for question in questions:
                chat.add(Message("user", question))
                answer = "".join(chat.answer(max_new_tokens=250, temperature=0))
                yield f"> **{question}** {' '.join(answer.split())}\n>\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo_model.make_chat", description=__doc__
    )
    parser.add_argument("--folder", type=Path, default=CHAT_FOLDER, help="where it is written")
    parser.add_argument("--state", type=Path, default=STATE_FOLDER, help="of the training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    make(options.folder, state_folder=options.state)


if __name__ == "__main__":
    main()
