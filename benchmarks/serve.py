"""Many clients that stream from the server at once, beside one static batch of the same prompts.

    python -m benchmarks.serve                          # the demo model
    python -m benchmarks.serve --size 1b --layers 4     # random weights of a larger shape
    python -m benchmarks.serve --clients 16 --tokens 128 --runs 5

The static batch is what `generate` makes of all prompts in one call, with nobody to send it to. The
clients are a process of their own, and count what they are sent. They take turns; told are tokens
per second of each run, and the ratio of the medians. Rows of random texts end where they end, and
with more than 32 rows the last bits depend on their number, so each counts its own tokens. The
server's share of the processor is in it, and the clients' too where the machine has no core for
them: so it is told too what the computing process took of the processor.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import torch

from llama_fast import Llama, LlamaConfig
from llama_fast.bench import machine
from llama_fast.cli.options import DEMO
from llama_fast.config.presets import SIZES
from llama_fast.generation.generate import generate
from llama_fast.serve.requests import Served
from llama_fast.serve.server import run
from llama_fast.tokenizer import Tokenizer
from llama_fast.tokenizer.chat import ChatFormat

PROMPT_TOKENS = (16, 48)  # of the shortest and the longest prompt
CONTEXT = 512


def main() -> int:
    options = arguments()
    if options.client:
        return client(options)
    served = demo(options) if options.size is None else random_model(options)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(*PROMPT_TOKENS, (options.clients,), generator=generator).tolist()
    prompts = [
        torch.randint(256, 2000, (length,), generator=generator).tolist() for length in lengths
    ]
    asked = [
        {"prompt": ids, "seed": seed, "max_tokens": options.tokens, "stream": True}
        for seed, ids in enumerate(prompts)
    ]
    print(
        f"{machine.describe(None)['cpu']}, {torch.get_num_threads()} threads; "
        f"{options.clients} clients, "
        f"{min(lengths)} to {max(lengths)} tokens of prompt, up to {options.tokens} of answer",
        flush=True,
    )
    measured: list[tuple[Run, Run]] = []
    settings = {"rows": options.clients, "queue": options.clients, "reuse": False}
    with_server(served, lambda _, url: turns(served, options, url, asked, measured), **settings)
    for name in ("per_second", "per_cpu_second"):
        static, streamed = (
            statistics.median(getattr(run, name) for run in runs)
            for runs in zip(*measured, strict=True)
        )
        unit = name.replace("_", " ").replace("cpu", "processor")
        print(
            f"tokens {unit}: static batch {static:.0f}, clients {streamed:.0f}: "
            f"{streamed / static:.2f} of it"
        )
    first = statistics.median(run.first for _, run in measured)
    print(f"first token after {first:.2f} s (median)")
    return 0


class Run(NamedTuple):
    """What one run took. first: seconds to the median client's first token."""

    tokens: int
    seconds: float
    cpu_seconds: float
    first: float = 0.0

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def per_cpu_second(self) -> float:
        """Of the process that computes; the clients' own is not in it. A machine that others use
        too changes it less than the other figure."""
        return self.tokens / self.cpu_seconds


def turns(served, options, url, asked, measured: list[tuple[Run, Run]]) -> None:
    """Measures both, one after the other; the first turn warms up."""
    for turn in range(options.runs + 1):
        begin, cpu = time.perf_counter(), time.process_time()
        made = generate(
            served.model,
            served.tokenizer,
            [one["prompt"] for one in asked],
            seed=[one["seed"] for one in asked],
            max_new_tokens=options.tokens,
        )
        count = sum(len(one.tokens) for one in made)
        static = Run(count, time.perf_counter() - begin, time.process_time() - cpu)
        command = [sys.executable, "-m", "benchmarks.serve", "--client", url]
        cpu = time.process_time()
        found = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, check=True
        )
        told = json.loads(found.stdout)
        cpu = time.process_time() - cpu
        streamed = Run(told["tokens"], told["seconds"], cpu, told["first"])
        if turn:
            measured.append((static, streamed))
            print(
                f"static {static.per_second:.0f}, clients {streamed.per_second:.0f} tokens/s",
                flush=True,
            )


def with_server(served: Served, work, **settings) -> None:
    """Calls work(server, url) while a server runs."""
    started, url, http = threading.Event(), [], []

    def ready(address: str) -> None:
        url.append(address)
        started.set()

    settings |= {"port": 0, "ready": ready, "started": http.append}
    thread = threading.Thread(target=run, args=(served,), kwargs=settings)
    thread.start()
    started.wait()
    try:
        work(http[0], url[0])
    finally:
        http[0].should_exit = True
        thread.join()


def client(options) -> int:
    """The clients: reads requests from stdin, streams all at once, tells what came."""
    asked = json.load(sys.stdin)
    host, port = options.client.removeprefix("http://").split(":")

    async def one(body: dict) -> tuple[int, float]:
        reader, writer = await asyncio.open_connection(host, int(port))
        data = json.dumps(body | {"stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        first, last = 0.0, b""
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                first, last = first or time.perf_counter(), line
        writer.close()
        return json.loads(last[6:])["usage"]["completion_tokens"], first

    async def everyone() -> dict:
        begin = time.perf_counter()
        found = await asyncio.gather(*map(one, asked))
        seconds = time.perf_counter() - begin
        first = statistics.median(first - begin for _, first in found)
        return {"tokens": sum(n for n, _ in found), "seconds": seconds, "first": first}

    print(json.dumps(asyncio.run(everyone())))
    return 0


def demo(options) -> Served:
    model, tokenizer = Llama.from_pretrained(DEMO), Tokenizer.from_pretrained(DEMO)
    return Served("demo", model, tokenizer, ChatFormat.for_tokenizer(tokenizer), CONTEXT, 1)


def random_model(options) -> Served:
    """Random weights of a published shape, and a vocabulary of its size whose words are numbers."""
    sizes = SIZES[options.size] | ({"n_layers": options.layers} if options.layers else {})
    config = LlamaConfig(**sizes | {"max_seq_len": CONTEXT})
    torch.manual_seed(0)
    model = Llama(config, dtype=torch.bfloat16).eval()
    words = [bytes([b]) for b in range(256)]
    words += [b"%06d" % n for n in range(config.vocab_size - 256 - len(words))]
    tokenizer = Tokenizer(words)
    return Served(options.size, model, tokenizer, ChatFormat.for_tokenizer(tokenizer), CONTEXT, 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="a published shape; the demo model without")
    parser.add_argument("--layers", type=int, help="of that shape, where not all")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--client", metavar="URL", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
