"""Teaches the small model that ships a fact by a LoRA, asks for it, and takes the LoRA off again.

    python examples/finetune.py

The command does the same: llama-fast finetune demo examples/facts.jsonl --out run
"""

from pathlib import Path

import llama_fast
from llama_fast import train
from llama_fast.demo import FOLDER

model = llama_fast.Llama.from_pretrained(FOLDER)
tokenizer = llama_fast.Tokenizer.from_pretrained(FOLDER)
question = "The keeper of the lighthouse of Lantern Bay is"


def answer() -> str:
    found = llama_fast.generate(model, tokenizer, [question], max_new_tokens=12, temperature=0)
    return question + found[0].text


data = train.read(Path(__file__).parent / "facts.jsonl", tokenizer, block=512)
print(data.show(1, color=False))  # what is trained stands between ⟦ and ⟧
print(f"before: {answer()}")

adapter = train.lora(model, rank=16, alpha=32)
config = train.TrainConfig(steps=25, batch_size=1, learning_rate=3e-3)
history = train.finetune(model, data, config, adapter=adapter, progress=False)
print(f"loss: {history.train[0]['loss']:.2f} at first, {history.train[-1]['loss']:.2f} at last")
print(f"after: {answer()}")

with adapter.disabled():
    print(f"without: {answer()}")
# adapter.save("my-adapter") writes a folder that PEFT reads; adapter.merge() changes the weights
