"""The loop that makes all answers: none is mixed up with another, and none takes others down."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from pathlib import Path

import pytest
import torch

from llama_fast.errors import BusyError, LlamaFastError, LogitsError, PromptError
from llama_fast.generation.generate import Rows
from llama_fast.generation.sampling import Sampling
from llama_fast.serve import batch as loop
from llama_fast.serve.batch import Batch, common_beginning
from llama_fast.serve.job import Job

from .serving import demo, generate

PROMPTS = ["Once upon a time", "The dog", "What is 9 - 5?", "狗", "In the morning the"]


@pytest.fixture(scope="module")
def served():
    return demo()


class Collected:
    """Batches whose pieces are kept by job."""

    def __init__(self, served, **settings):
        self.served = served
        self.pieces: dict[Job, list] = {}
        self.order: list[Job] = []
        self._new = threading.Condition()
        self.batch = Batch(
            served.model, self._publish, **{"rows": 3, "max_seq_len": 256} | settings
        )

    def _publish(self, pieces):
        with self._new:
            for job, piece in pieces:
                self.pieces[job].append(piece)
                self.order.append(job)
            self._new.notify_all()

    def __enter__(self):
        self.batch.start()
        return self

    def __exit__(self, *_):
        self.batch.stop()

    def job(self, prompt, max_new_tokens=12, seed=1, sampling=None, stop=None, grammar=None):
        tokenizer = self.served.tokenizer
        ids = tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
        rows = Rows(
            self.served.model, tokenizer, [ids], max_new_tokens, seed, stop, None, None, grammar
        )
        made = Job(rows, sampling or Sampling())
        self.pieces[made] = []
        return made

    def submit(self, *jobs):
        self.batch.submit(jobs)
        return jobs

    def result(self, job):
        """The text of a job, or its error, when it has ended."""

        def ended():
            pieces = self.pieces[job]
            return pieces and (pieces[-1].finish_reason or pieces[-1].error)

        with self._new:
            assert self._new.wait_for(ended, 30), "the answer does not end"
        pieces = self.pieces[job]
        return pieces[-1].error or "".join(piece.text for piece in pieces)


def alone(served, prompt, max_new_tokens=12, seed=1, **asked):
    return generate(served, prompt, max_new_tokens=max_new_tokens, seed=seed, **asked)[0].text


def test_each_row_has_its_own_settings(served):
    """More answers than rows, of other samplings, lengths, seeds and stop strings each."""
    asked = [
        {"prompt": PROMPTS[0], "max_new_tokens": 20, "sampling": Sampling(0)},
        {"prompt": PROMPTS[1], "max_new_tokens": 7, "seed": 5},
        {"prompt": PROMPTS[2], "max_new_tokens": 15, "sampling": Sampling(1.5, 0.5), "seed": 2},
        {"prompt": PROMPTS[3], "max_new_tokens": 25, "stop": ["."], "seed": 9},
        {"prompt": PROMPTS[4], "max_new_tokens": 1},
        {"prompt": PROMPTS[0], "max_new_tokens": 9, "sampling": Sampling(1.0, 1.0, 5), "seed": 3},
    ]
    with Collected(served) as collected:
        jobs = [collected.job(**one) for one in asked]
        collected.submit(*jobs)
        found = [collected.result(job) for job in jobs]
    for one, text in zip(asked, found, strict=True):
        sampling = one.pop("sampling", Sampling())
        settings = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        assert text == alone(served, **one, **settings, top_k=sampling.top_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_rows_do_not_see_their_neighbours(dtype, kv_cache):
    """Bit for bit, by the logprobs: an answer among others of all lengths, and alone."""
    served = demo()
    served.model.to(dtype)
    found = []
    for others in (0, 3):
        with Collected(served, rows=4, kv_cache=kv_cache) as collected:
            rest = [collected.job(PROMPTS[n], 4 + 3 * n, seed=n) for n in range(others)]
            job = collected.job(PROMPTS[4], 20, seed=6)
            collected.submit(*rest, job)
            collected.result(job)
            found.append([(piece.token, piece.logprob) for piece in collected.pieces[job]])
    assert found[0] == found[1]


def test_prompts_that_wait_are_computed_at_once(monkeypatch):
    """But for one to which the others would be padded far; and to the bits of each alone, though
    prompts of few tokens are otherwise multiplied in another order than many."""
    served = demo()
    served.model.float()
    calls = []
    inner = loop.Engine.prefill

    def prefill(self, prompts, first_row=0, *more):
        calls.append(([len(prompt) for prompt in prompts], first_row))
        return inner(self, prompts, first_row, *more)

    monkeypatch.setattr(loop.Engine, "prefill", prefill)
    prompts = [list(range(300 + n, 300 + n + length)) for n, length in enumerate((9, 12, 10, 60))]

    def pieces(rows, prompts):
        with Collected(served, rows=rows) as collected:
            jobs = collected.submit(*(collected.job(ids, 6) for ids in prompts))
            for job in jobs:
                collected.result(job)
            return [[(x.token, x.logprob) for x in collected.pieces[job]] for job in jobs]

    together = pieces(4, prompts)
    assert calls == [([9, 12, 10], 0), ([60], 3)]
    assert together == [pieces(1, [ids])[0] for ids in prompts]
    monkeypatch.setattr(loop, "PREFILL_TOKENS", 25)
    calls.clear()
    assert pieces(4, prompts) == together
    # 12 of 2 rows are 24, one token is left; the next turn has 25 again.
    assert [lengths for lengths, _ in calls] == [[9, 12], [1], [9], [16], [25], [19]]


def test_a_prompt_goes_on_from_what_a_row_holds(served):
    tokenizer = served.tokenizer
    first = tokenizer.encode("Once upon a time there was a small dog. " * 4, bos=True)
    with Collected(served) as collected:
        (one,) = collected.submit(collected.job(first, 10))
        collected.result(one)
        made = [piece.token for piece in collected.pieces[one]]
        longer = [*first, *made, *tokenizer.encode(" And then")]
        (two,) = collected.submit(collected.job(longer, 10))
        assert collected.result(two) == alone(served, longer, 10)
        # The last token is drawn, and not computed.
        assert one.reused == 0 and two.reused == len(first) + len(made) - 1
        (three,) = collected.submit(collected.job(first, 10))  # the very same
        assert collected.result(three) == collected.result(one)
        assert three.reused == len(first) - 1
        (four,) = collected.submit(collected.job([*first[:20], 5, 6], 4))
        collected.result(four)
        assert four.reused == 0  # too little to look for
    with Collected(served, reuse=False) as collected:
        for _ in range(2):
            (one,) = collected.submit(collected.job(first, 5))
            assert collected.result(one) == alone(served, first, 5) and one.reused == 0


def test_a_long_prompt_does_not_stop_the_others(served, monkeypatch):
    monkeypatch.setattr(loop, "PREFILL_TOKENS", 8)
    text = "Once upon a time there was a small dog. " * 12
    with Collected(served) as collected:
        (short,) = collected.submit(collected.job("The dog", 60, sampling=Sampling(1, 1), seed=4))
        while not collected.pieces[short]:
            time.sleep(0.001)
        (long,) = collected.submit(collected.job(text, 5))
        assert collected.result(long) == alone(served, text, 5)
        answered = collected.order[: collected.order.index(long)].count(short)
        parts = len(long.ids) / 8
        assert parts > 12 and answered > parts - 2, (answered, parts)
        assert collected.result(short) == alone(
            served, "The dog", 60, seed=4, temperature=1, top_p=1
        )


def test_an_answer_of_no_numbers_ends_alone():
    served = demo()
    with torch.no_grad():
        served.model.embed.weight[7] = torch.nan  # whoever reads the token 7
    good, bad = served.tokenizer.encode("The", bos=True), [served.tokenizer.bos_id, 7]
    # The head is the embedding itself, so the logit of 7 is NaN for all: keep the two apart.
    served.model.head.weight = torch.nn.Parameter(served.model.head.weight.nan_to_num())
    with Collected(served) as collected:
        jobs = collected.submit(collected.job(good), collected.job(bad), collected.job(good))
        found = [collected.result(job) for job in jobs]
    assert isinstance(found[1], LogitsError) and "embed.weight" in str(found[1])
    assert found[0] == found[2] == alone(served, good)


@pytest.mark.parametrize("where", ["step_first", "prefill"])
def test_after_an_error_the_loop_goes_on(served, where, monkeypatch):
    inner, left = getattr(loop.Engine, where), [1]

    def fails_once(self, *given):
        if left and left.pop():
            raise RuntimeError("out of memory")
        return inner(self, *given)

    monkeypatch.setattr(loop.Engine, where, fails_once)
    with Collected(served) as collected:
        (one,) = collected.submit(collected.job(PROMPTS[0]))
        assert "out of memory" in str(collected.result(one))
        (two,) = collected.submit(collected.job(PROMPTS[0]))
        assert collected.result(two) == alone(served, PROMPTS[0])


def test_a_grammar_that_fails_on_the_way_ends_its_row_alone(served):
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    from llama_fast.generation.grammar import Grammar

    with Collected(served) as collected:
        jobs = [
            collected.job(PROMPTS[0], grammar=Grammar.regex("[a-z ]{60}")),
            collected.job(PROMPTS[1], grammar=Grammar.regex("[0-9]{3}")),
            collected.job(PROMPTS[2]),
            collected.job(PROMPTS[0], grammar=Grammar.regex("[a-z ]{60}")),
        ]

        def too_complex():
            raise PromptError("the grammar cannot go on")

        jobs[0].matcher.allowed = too_complex
        push = jobs[3].matcher.push
        jobs[3].matcher.push = lambda token: push(token) if jobs[3].made < 3 else too_complex()
        collected.submit(*jobs)
        found = [collected.result(job) for job in jobs]
        assert isinstance(found[0], PromptError) and isinstance(found[3], PromptError)
        assert len(found[1]) == 3 and found[1].isdigit()
        assert found[2] == alone(served, PROMPTS[2])
        assert collected.batch.rows_in_use == 0


def test_a_job_that_is_cancelled_gives_its_row(served):
    with Collected(served, rows=1) as collected:
        endless = collected.job(PROMPTS[0], 200, sampling=Sampling(1, 1), seed=4)
        waits, after = collected.job(PROMPTS[1]), collected.job(PROMPTS[2])
        collected.submit(endless, waits, after)
        while not collected.pieces[endless]:
            time.sleep(0.001)
        collected.batch.cancel([endless, waits])
        assert collected.result(after) == alone(served, PROMPTS[2])
        assert not collected.pieces[waits]
        assert len(collected.pieces[endless]) < 200


def test_the_end(served):
    collected = Collected(served, rows=1, queue=2)
    with collected:
        jobs = collected.submit(*(collected.job(PROMPTS[0], 200) for _ in range(3)))
        with pytest.raises(BusyError, match="the queue holds 2"):
            collected.batch.submit([collected.job(PROMPTS[1])] * 2)
        while not collected.pieces[jobs[0]]:
            time.sleep(0.001)
    assert all(isinstance(collected.result(job), BusyError) for job in jobs)
    with pytest.raises(BusyError, match="shutting down"):
        collected.submit(collected.job(PROMPTS[1]))
    with pytest.raises(LlamaFastError, match="context"):
        Batch(served.model, print, max_seq_len=9999).start()
    with pytest.raises(LlamaFastError):
        Batch(served.model, print, max_seq_len=64, kv_cache="int9").start()


def test_the_batch_is_on_the_backend_that_was_asked_for(served):
    with Collected(served, backend="eager") as collected:
        (job,) = collected.submit(collected.job(PROMPTS[0], 4, sampling=Sampling(0)))
        assert collected.result(job) == alone(served, PROMPTS[0], 4, temperature=0)
    with (
        pytest.raises(LlamaFastError, match="cuda"),
        Collected(served, backend="cuda") as collected,
    ):
        (job,) = collected.submit(collected.job(PROMPTS[0], 4))
        raise collected.result(job)


def test_common_beginning():
    generator = random.Random(0)
    for _ in range(300):
        a = [generator.randrange(2) for _ in range(generator.randrange(12))]
        b = [generator.randrange(2) for _ in range(generator.randrange(12))]
        same = [x == y for x, y in zip(a, b, strict=False)]
        expected = same.index(False) if False in same else len(same)
        assert common_beginning(a, b) == expected


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_many_streams_with_clients_that_leave(served):
    """16 clients over 6 rows for some seconds; every third stream is left half read. Each text is
    the one that `generate` makes of it alone."""
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    from .serving import serving

    asked = [
        {"prompt": prompt, "seed": 10 * n, "max_tokens": 12 + 3 * n, "temperature": 0.5 + n / 4}
        for n, prompt in enumerate(PROMPTS * 2)
    ]
    known = [
        alone(served, one["prompt"], one["max_tokens"], one["seed"], temperature=one["temperature"])
        for one in asked
    ]
    assert len(set(known)) == len(known)
    wrong: list[str] = []
    counts = [0, 0]
    memory: list[int] = []

    def client(host: str, number: int) -> None:
        generator = random.Random(number)
        for turn in range(8):
            n = generator.randrange(len(asked))
            connection = http.client.HTTPConnection(host, timeout=60)
            connection.request(
                "POST", "/v1/completions", json.dumps(asked[n] | {"stream": True}),
                {"content-type": "application/json"},
            )  # fmt: skip
            response = connection.getresponse()
            leaves_after = generator.randrange(1, 9) if generator.random() < 1 / 3 else None
            text, lines = "", 0
            while line := response.readline():
                if line.startswith(b"data: {"):
                    found = json.loads(line[6:])
                    text += found["choices"][0]["text"] if "choices" in found else str(found)
                    lines += 1
                if lines == leaves_after:
                    break
            counts[lines == leaves_after] += 1
            whole = text == known[n] if lines != leaves_after else known[n].startswith(text)
            if not whole or response.status != 200:
                wrong.append(f"{asked[n]}: {text!r} and not {known[n]!r}")
            response.close()
            connection.close()
            if number == 0 and turn == 1:
                memory.append(resident())

    with serving(served, rows=6, queue=64) as server:
        host = server.url.removeprefix("http://")
        clients = [threading.Thread(target=client, args=(host, number)) for number in range(16)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(120)
        memory.append(resident())
        end = time.monotonic() + 10
        while server.batch.rows_in_use or server.batch.waiting:
            assert time.monotonic() < end, "rows stay in use"
            time.sleep(0.01)
        assert not server.http._server._boxes
    assert not wrong, "\n".join(wrong[:3])
    assert sum(counts) == 128 and counts[1] > 20 and counts[0] > 60
    assert memory[1] - memory[0] < 24e6, memory
