"""Makes the demo model anew: ``python -m tools.demo_model.make``.

Texts, tokenizer, training, checkpoint, samples, loss curve and data card all follow from
``recipe.py`` and ``world.py``; nothing is downloaded. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import torch

from llama_fast.demo import FOLDER
from llama_fast.generation.generate import generate
from llama_fast.model import Llama
from llama_fast.tokenizer import Tokenizer
from llama_fast.training.config import TrainConfig
from llama_fast.training.evaluation import evaluate
from llama_fast.training.loop import finetune
from llama_fast.training.plot import plot_loss
from llama_fast.training.record import CSV_FILE, TENSORBOARD
from llama_fast.training.state import STATE_FILE, History
from llama_fast.utils.files import atomic_file

from .card import SAMPLE_PROMPTS, data_card
from .recipe import (
    BLOCK,
    CONFIG,
    HELD_OUT_TOKENS,
    SEED,
    TRAINING,
    held_out_data,
    make_tokenizer,
    stories,
    training_data,
)

STATE_FOLDER = Path("build") / "demo"
CHECKPOINT_FILES = ("params.json", "consolidated.00.pth", "tokenizer.model")
STORIES = "stories.json"


def make(
    folder: Path,
    *,
    training: TrainConfig = TRAINING,
    state_folder: Path | None = None,
    held_out_tokens: int = HELD_OUT_TOKENS,
    progress: bool = True,
) -> dict[str, object]:
    """Writes the checkpoint, metrics.json, stories.json, loss.png and DATA_CARD.md into
    `folder`.

    state_folder: where an interrupted training leaves its state; None keeps none. Files that are
    there are replaced, each in one step. Returns what ``metrics.json`` says.
    """
    for own in (folder, state_folder):
        if own is not None:
            own.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    dataset = training_data(tokenizer, training)
    held_out = held_out_data(tokenizer, "seed", held_out_tokens)
    torch.manual_seed(SEED)
    model = Llama(CONFIG, dtype=torch.float32)
    history = finetune(
        model, dataset, training, held_out=held_out, folder=state_folder, progress=progress
    )
    with tempfile.TemporaryDirectory() as scratch:
        saved = Path(scratch) / "model"
        model.to(torch.bfloat16).save_pretrained(saved, format="meta")
        tokenizer.save(saved / "tokenizer.model")
        for name in CHECKPOINT_FILES:
            with atomic_file(folder / name) as beside:
                shutil.copyfile(saved / name, beside)
    metrics = measure(folder, history, training, held_out_tokens)
    for name, content in (("metrics.json", metrics), (STORIES, stories())):
        with atomic_file(folder / name) as beside:
            beside.write_text(
                json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
    with atomic_file(folder / "DATA_CARD.md") as beside:
        beside.write_text(data_card(metrics), encoding="utf-8")
    plot_loss(history, folder / "loss.png", title="Loss of the demo model")
    if state_folder is not None:
        for name in (STATE_FILE, CSV_FILE):  # done: the next run starts anew
            (state_folder / name).unlink()
        shutil.rmtree(state_folder / TENSORBOARD, ignore_errors=True)
    return metrics


def measure(
    folder: Path, history: History, training: TrainConfig, held_out_tokens: int
) -> dict[str, object]:
    """The figures of ``metrics.json``, taken from the checkpoint as it was written."""
    model = Llama.from_pretrained(folder, device="cpu")
    tokenizer = Tokenizer.from_pretrained(folder)
    return {
        "config": dataclasses.asdict(model.config),
        "parameters": model.config.n_params,
        "training": dataclasses.asdict(training),
        "block": BLOCK,
        "tokens_seen": history.tokens,
        "seconds": round(sum(history.seconds)),
        "threads": torch.get_num_threads(),
        "held_out": {
            split: held_out_loss(model, tokenizer, split, held_out_tokens)
            for split in ("seed", "combinations")
        },
        "held_out_during_training": [
            {"step": record["step"], "loss": round(record["loss"], 4)}
            for record in history.held_out
        ],
        "samples": samples(model, tokenizer),
    }


def held_out_loss(
    model: Llama, tokenizer: Tokenizer, split: str, n_tokens: int
) -> dict[str, float]:
    """Nats per token and per byte on held-out texts, with the weights taken as float32."""
    data = held_out_data(tokenizer, split, n_tokens)
    judged = evaluate(model.float(), data)
    return {
        "per_token": round(judged.loss, 4),
        "per_byte": round(judged.loss * len(data.tokens) / data.n_bytes, 4),
        "tokens": len(data.tokens),
        "bytes": data.n_bytes,
    }


def samples(model: Llama, tokenizer: Tokenizer) -> list[dict[str, object]]:
    """What the model writes after each of the sample prompts, greedily and with temperature 0.7."""
    model = model.to(torch.bfloat16)
    found = []
    for temperature in (0.0, 0.7):
        completions = generate(
            model, tokenizer, SAMPLE_PROMPTS, max_new_tokens=200, temperature=temperature, seed=SEED
        )
        found += [
            {"prompt": prompt, "temperature": temperature, "text": completion.text}
            for prompt, completion in zip(SAMPLE_PROMPTS, completions, strict=True)
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_model.make", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the model is written")
    parser.add_argument("--state", type=Path, default=STATE_FOLDER, help="state of the training")
    parser.add_argument("--steps", type=int, default=TRAINING.steps, help="optimizer steps")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    training = dataclasses.replace(TRAINING, steps=options.steps)
    metrics = make(options.folder, training=training, state_folder=options.state)
    print(json.dumps({name: metrics[name] for name in ("tokens_seen", "seconds", "held_out")}))


if __name__ == "__main__":
    main()
