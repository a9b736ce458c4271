"""Lets the ops serve a transformers model, and takes them out again.

    python examples/patch_transformers.py [DIR]

DIR is a Llama, Mistral, Qwen2 or Qwen3 for transformers; without it a small random Llama is made.
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import llama_fast

if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
else:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
model.eval()
tokens = torch.randint(model.config.vocab_size, (1, 256))


@torch.no_grad()
def logits_and_seconds() -> tuple[torch.Tensor, float]:
    model(tokens)  # the first call of a shape chooses the kernels
    start = time.perf_counter()
    logits = model(tokens).logits
    return logits, time.perf_counter() - start


before, seconds_before = logits_and_seconds()
with llama_fast.patch(model) as patch:
    print(patch.report)  # which module is served by which op and backend
    after, seconds_after = logits_and_seconds()
# Here the patch is gone: the model has the very objects that it had.

difference = (after - before).norm() / before.norm()
print(f"logits differ by {difference:.1%} of their size, which is bfloat16's rounding")
print(f"a prompt of {tokens.shape[1]} tokens: {seconds_before / seconds_after:.1f} × as fast")
