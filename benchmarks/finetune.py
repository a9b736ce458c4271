"""A LoRA's training step beside Hugging Face with PEFT, at a published shape with a few layers.

    python -m benchmarks.finetune [--shape 1b] [--layers 4] [--tokens 512] [--rounds 5]

Forward, backward and AdamW's step of rank 16 on all seven matrices, in bfloat16 with random
weights, in turn in one process: with every label trained, and with the first half of them masked,
as a prompt is. A line has the medians of wall time and of processor time, and their ratios to ours.
Needs transformers and peft.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from llama_fast import train
from llama_fast.bench.profile.steps import random_model
from llama_fast.config import LlamaConfig
from llama_fast.model import Llama

RANK = 16


def ours(model: Llama, tokens: torch.Tensor, targets: torch.Tensor) -> Callable[[], None]:
    adapter = train.lora(model, RANK, 2 * RANK)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5, fused=True)
    cu_seqlens = torch.tensor([0, tokens.shape[1]], dtype=torch.int32)
    model.train()

    def step() -> None:
        model.loss(tokens, targets, cu_seqlens=cu_seqlens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def theirs(config: object, tokens: torch.Tensor, targets: torch.Tensor) -> Callable[[], None]:
    """The model as a user gets it: eager modules, SDPA attention. Its labels are shifted inside."""
    import peft
    import transformers

    with torch.device("meta"):
        net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf())).bfloat16()
    net = net.to_empty(device="cpu")
    for name, parameter in net.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(0, 0.02)
    rotary = net.model.rotary_emb
    fresh = type(rotary)(net.config)  # its buffers were on the meta device
    rotary.inv_freq, rotary.original_inv_freq = fresh.inv_freq, fresh.inv_freq
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    net = peft.get_peft_model(net, settings).train()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    labels = torch.cat((torch.full((1, 1), -100), targets[:, :-1]), 1)

    def step() -> None:
        net(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, tuple[float, float]]:
    """(wall, processor) seconds of each step, medians of rounds in turn."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            wall, processor = time.perf_counter(), time.process_time()
            step()
            found[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {
        name: tuple(statistics.median(column) for column in zip(*times, strict=True))
        for name, times in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1b", help="a preset: 1b, 3b, 8b …")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    shape = LlamaConfig.preset(given.shape)
    tokens = torch.randint(1000, (1, given.tokens), generator=torch.Generator().manual_seed(0))
    for name, masked in (("all labels", 0), ("half masked", given.tokens // 2)):
        targets = tokens.roll(-1, 1)
        targets[:, :masked] = -100
        targets[:, -1] = -100
        model = random_model(shape, layers=given.layers, dtype=torch.bfloat16, device="cpu")
        steps = {
            "llama_fast": ours(model, tokens, targets),
            "transformers + PEFT": theirs(model.config, tokens, targets),
        }
        found = measured(steps, given.rounds)
        for baseline, (wall, processor) in found.items():
            own = found["llama_fast"]
            print(
                f"{name:12s} {baseline:20s} {wall:7.2f} s, {processor:7.2f} s of processors, "
                f"{wall / own[0]:.2f}× and {processor / own[1]:.2f}× ours",
                flush=True,
            )


if __name__ == "__main__":
    main()
