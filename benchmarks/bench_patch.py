"""A transformers model as it is, compiled, with Liger, and patched: prefill, decode, training.

    python -m benchmarks.bench_patch                       # Llama 3.2 1B's shape, random weights
    python -m benchmarks.bench_patch --layers 2 --rows training
    python -m benchmarks.bench_patch --contenders eager patched --rows decode

Each contender lives in a process of its own and is timed in turn with the others. Rates are of the
median time; a ratio is the median over the rounds of transformers' own time over the contender's.
Memory is the peak of the process: it counts torch and the weights too.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers

from benchmarks.worker import Worker, WorkerError
from llama_fast.config import LlamaConfig
from llama_fast.memory import resident_peak
from llama_fast.timing import OtherPrograms, interleaved, ratio

CONTENDERS = ("eager", "compiled", "liger", "patched")
ROWS = ("prefill", "decode", "training")


class Contender:
    """One way to run a model of Llama 3.2 1B's shape with `layers` layers, in bfloat16."""

    def __init__(self, kind: str, layers: int, prompt: int, steps: int, device: str) -> None:
        self.prompt, self.steps, self.device = prompt, steps, device
        shape = dataclasses.replace(LlamaConfig.preset("1b"), n_layers=layers)
        config = transformers.LlamaConfig(**shape.to_hf())
        torch.manual_seed(0)
        with torch.device(device):
            self.model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.model.eval()
        if kind == "patched":
            import llama_fast

            llama_fast.patch(self.model, strict=True)
        elif kind == "liger":
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=self.model)
        self.run = torch.compile(self.model) if kind == "compiled" else self.model
        self.ids = torch.randint(shape.vocab_size, (1, prompt), device=device)

    def prefill(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.out = self.run(input_ids=self.ids, use_cache=True, logits_to_keep=1)
        self._wait()

    def decode(self) -> None:
        """`steps` tokens after the last prefill, and those of earlier calls."""
        with torch.no_grad():
            for _ in range(self.steps):
                token = self.out.logits[:, -1].argmax(-1, keepdim=True)
                cache = self.out.past_key_values
                self.out = self.run(input_ids=token, past_key_values=cache, use_cache=True)
        self._wait()

    def training(self) -> None:
        self.model.train()
        self.run(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.model.zero_grad(set_to_none=True)
        self._wait()

    def memory(self) -> float:
        """Peak in bytes."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return resident_peak()

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def start(kind: str, arguments: argparse.Namespace, row: str) -> Worker:
    """A worker that has run the row once, so that it is warm. Raises WorkerError."""
    a = arguments
    made = (kind, a.layers, a.prompt, a.steps, a.device)
    worker = Worker(Contender, *made, threads=a.threads)
    try:
        for call in ("prefill", "decode") if row == "decode" else (row,):
            worker.ask(call)
    except BaseException:
        worker.close()
        raise
    return worker


def measure(row: str, arguments: argparse.Namespace) -> None:
    workers: dict[str, Worker] = {}
    try:
        for kind in arguments.contenders:
            try:
                workers[kind] = start(kind, arguments, row)
            except WorkerError as error:
                print(f"{row:9} {kind:9} does not run here: {error.text.splitlines()[0]}")
        calls: dict[str, Any] = {k: partial(w.ask, row) for k, w in workers.items()}
        processes = [os.getpid(), *(worker.process for worker in workers.values())]
        with OtherPrograms(processes) as others:
            samples = interleaved(calls, arguments.rounds, 0.05)
        tokens = arguments.steps if row == "decode" else arguments.prompt
        for kind, times in samples.items():
            line = f"{row:9} {kind:9} {tokens / median(times):9.1f} tokens/s"
            if "eager" in samples and kind != "eager":
                line += f"  {ratio(samples, 'eager', kind):5.2f} x eager"
            print(f"{line}  peak {workers[kind].ask('memory') / 1e9:.2f} GB", flush=True)
        if others.share is not None:
            print(f"{row:9} other programs took {others.share:.0%} of the processors")
    finally:
        for worker in workers.values():
            worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt or a step")
    parser.add_argument("--steps", type=int, default=4, help="tokens of a round of decoding")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    for row in arguments.rows:
        measure(row, arguments)


if __name__ == "__main__":
    main()
