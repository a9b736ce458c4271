"""Generates text, first a whole completion, then token by token.

    python examples/generate.py [DIR]

DIR is a folder of weights, Meta's or Hugging Face's; without it the small model that ships writes.
"""

import sys

import llama_fast
from llama_fast.demo import FOLDER

folder = sys.argv[1] if len(sys.argv) > 1 else FOLDER
model = llama_fast.Llama.from_pretrained(folder)  # quantize="int4" would round the weights
tokenizer = llama_fast.Tokenizer.from_pretrained(folder)

# Prompts of several lengths make one batch.
prompts = ["Once upon a time", "从前"]
completions = llama_fast.generate(
    model, tokenizer, prompts, max_new_tokens=40, temperature=0.7, top_p=0.9, seed=1
)
for prompt, completion in zip(prompts, completions, strict=True):
    print(f"{prompt}{completion.text}  [{completion.finish_reason}]")

question = "the answer to the ultimate question of life, the universe, and everything is "
print(question, end="")
for chunk in llama_fast.stream(model, tokenizer, question, max_new_tokens=5, temperature=0):
    print(chunk.text, end="", flush=True)
print()
