"""A minute of the server with many clients, a third of whom leave half way: is an answer lost or
mixed up, and does memory stay?

    python -m benchmarks.serve_minute                    # 64 clients over 16 rows, the demo model
    python -m benchmarks.serve_minute --seconds 600 --rows 8

First each request is asked alone. Then all clients ask for one at random, again and again, and read
its stream to the end or leave somewhere; what they were sent must be the text of that request, or
its beginning. With more than 16 rows the last bits depend on their number (docs/serve.md), so that
texts may differ. Exit status 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time

from llama_fast.bench import machine
from llama_fast.utils.memory import status_bytes

from .serve import demo, with_server

PROMPTS = ["Once upon a time", "The dog", "What is 9 - 5?", "狗", "In the morning the", "从前"]
REQUESTS = 24
FLAT = 16e6  # bytes by which memory may have grown since the first quarter
REPORTS = 12  # in all
SHOWN = 5  # faults


def main() -> int:
    options = arguments()
    if options.client:
        asyncio.run(clients(options))
        return 0
    print(f"{machine.describe(None)['cpu']}; {options.clients} clients, {options.rows} rows")
    wrong: list[str] = []
    served = demo(options)
    settings = {"rows": options.rows, "queue": options.clients}
    with_server(served, lambda http, url: minute(http, url, wrong), **settings)
    print("\n".join(wrong[:SHOWN]) or "every answer was its own, none was lost, memory stayed")
    if len(wrong) > SHOWN:
        print(f"and {len(wrong) - SHOWN} more")
    return bool(wrong)


def minute(http, url: str, wrong: list[str]) -> None:
    """Runs the clients, and adds what went wrong."""
    command = [sys.executable, "-m", "benchmarks.serve_minute", *sys.argv[1:], "--client", url]
    memory = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            memory.append(status_bytes("VmRSS"))
            told = json.loads(line)
            print(
                f"{told['seconds']:.0f} s: {told['whole']} whole answers, {told['left']} left, "
                f"{told['tokens']} tokens, {memory[-1] / 1e6:.0f} MB",
                flush=True,
            )
    wrong += told["wrong"]
    if process.returncode:
        wrong.append("the clients have failed")
    if told["whole"] < 10 or told["left"] < 10:
        wrong.append("there were hardly any answers")
    grown = memory[-1] - memory[len(memory) // 4]
    print(f"memory after the first quarter: {grown / 1e6:+.1f} MB")
    if grown > FLAT:
        wrong.append(f"memory grew by {grown / 1e6:.0f} MB after the first quarter")
    batch, end = http._server.batch, time.monotonic() + 10
    while batch.rows_in_use or batch.waiting or http._server._boxes:
        if time.monotonic() > end:
            wrong.append(f"{batch.rows_in_use} rows stay in use, {batch.waiting} answers wait")
            return
        time.sleep(0.01)


async def clients(options) -> None:
    """Asks and checks; prints a line of JSON now and then, the last with what was wrong."""
    host, port = options.client.removeprefix("http://").split(":")
    told = {"whole": 0, "left": 0, "tokens": 0, "wrong": []}

    async def ask(body: dict, leave_after: int | None = None) -> tuple[str, bool]:
        """The text of a request, and whether it came to its end."""
        reader, writer = await asyncio.open_connection(host, int(port))
        data = json.dumps(body | {"stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        text, events, ended = "", 0, False
        while events != leave_after and (line := await reader.readline()):
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                text += event["choices"][0]["text"] if "choices" in event else str(event)
                events += 1
            ended = ended or line.startswith(b"data: [DONE]")
        writer.close()
        told["tokens"] += events
        return text, ended

    async def client(number: int) -> None:
        generator = random.Random(number)
        while time.monotonic() < end:
            n = generator.randrange(REQUESTS)
            # Behind no event at all: it leaves while it waits, or while its prompt is computed.
            leave_after = generator.randrange(12) if generator.random() < 1 / 3 else None
            try:
                text, ended = await asyncio.wait_for(ask(asked[n], leave_after), 120)
            except Exception as error:  # a stream that is cut, or does not come
                told["wrong"].append(f"{asked[n]}: {type(error).__name__} {error}")
                continue
            whole = ended and text == known[n]
            told["whole" if ended else "left"] += 1
            if not (whole or (leave_after is not None and known[n].startswith(text))):
                told["wrong"].append(f"{asked[n]}: {text!r}, and alone {known[n]!r}")

    async def report() -> None:
        while True:
            await asyncio.sleep(options.seconds / REPORTS)
            print(json.dumps(told | {"seconds": time.monotonic() - begin}), flush=True)

    asked = [
        {
            "prompt": PROMPTS[n % len(PROMPTS)],
            "seed": n,
            "max_tokens": 8 + 4 * n,
            "temperature": 0.4 + n / 20,
        }
        for n in range(REQUESTS)
    ]
    known = [(await ask(body))[0] for body in asked]
    told["tokens"] = 0
    begin = time.monotonic()
    end = begin + options.seconds
    reports = asyncio.create_task(report())
    await asyncio.gather(*map(client, range(options.clients)))
    reports.cancel()
    print(json.dumps(told | {"seconds": time.monotonic() - begin}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--client", metavar="URL", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
