"""Whole models: the step that decodes a token, and a training step of a patched transformers model.

Random weights. A step of decoding is replayed as a CUDA graph, so the host's time is none of it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import bench_patch
from benchmarks.models import with_layers
from llama_fast.backends import cuda
from llama_fast.bench.profile.steps import random_model
from llama_fast.bench.results import OURS, READ, Row
from llama_fast.bench.roofline_gpu import plain_read
from llama_fast.bench.timing import OtherPrograms, interleaved, interleaved_on_gpu
from llama_fast.cli.measure import bytes_per_token
from llama_fast.dispatch import backends, use_backend
from llama_fast.errors import WrongResultError
from llama_fast.generation.engine import Engine
from llama_fast.utils.compare import relative_rms

from .goals import bandwidth
from .part import measured, said
from .parts import PARTS
from .setting import KERNELS, Setting, constant

DECODE = {"bf16": 0.90, "int8": 0.85, "int4": 0.75}  # of bandwidth
# Of the logits' own size, from the eager definitions in the same dtype: rounding through all
# layers. Unrelated logits are 1.4 away.
TOLERANCE = 0.1
STEPS = 512  # that a cache has room for
ROUNDS = 20
EAGER = "eager"


def decode(setting: Setting) -> list[str]:
    sizes = setting.sizes
    of = with_layers(sizes.shape, sizes.layers)
    names = {form: f"decode {form}, {of}, behind {sizes.context} tokens" for form in DECODE}
    rows = {name: partial(_decode, form, name, setting) for form, name in names.items()}
    return measured(setting, rows, PARTS["decode"].row)


def _decode(form: str, what: str, setting: Setting, failed: dict[str, Exception]) -> Row:
    sizes = setting.sizes
    model = random_model(
        sizes.config,
        layers=sizes.layers,
        dtype=torch.bfloat16,
        device=setting.device,
        quantize=None if form == "bf16" else form,
    )
    row = Row(what, what, "tok/s", 1.0, missing=dict(setting.without))
    token = torch.zeros(1, dtype=torch.int64, device=setting.device)
    with use_backend(EAGER, strict=True):
        expected = _engine(model, sizes.context).step(token).clone()
    steps: dict[str, Callable[[], Any]] = {}
    kept = []  # a replay writes to the memory of its step
    for who, backend, name in _baselines():
        if {who, backend} & setting.without.keys():
            continue
        if backend != EAGER and (why := backends()[backend].unavailable):
            row.missing[who] = "; ".join(why)
            continue
        try:
            with use_backend(backend, strict=True), constant(name):
                engine = _engine(model, sizes.context)
                row.errors[who] = _error(engine, token, expected)
        except Exception as error:
            failed[who] = error
            row.missing[who] = said(error)
            row.notes.append(f"{who} failed: {said(error)}")
            continue
        replay = engine.captured().replay
        if setting.gpu and replay is None:
            row.notes.append(f"{who}: the step could not be captured, and is run in Python")
        kept.append(engine)
        steps[who] = replay or _in_python(engine, token, backend, name)
    row.bytes = int(bytes_per_token(model, sizes.context))
    row.bound = "read"
    if setting.gpu:
        steps[READ] = plain_read(row.bytes, setting.device)
        row.samples, _ = interleaved_on_gpu(steps, ROUNDS)
        row.at_best = row.seconds(READ)
    else:
        with OtherPrograms([os.getpid()]) as others:
            row.samples = interleaved(steps, 3)
        row.others = others.share
        row.at_best = row.bytes / setting.roofline.read if setting.roofline.read else None
    row.goals = [bandwidth(DECODE[form]).measured(row)]
    return row


def _baselines() -> list[tuple[str, str, str]]:
    """(name, backend, the constant of backends.cuda that is set for it)"""
    rows = [(name, name, "") for name in (*KERNELS, EAGER)]
    if hasattr(cuda, "OVERLAP"):
        rows.insert(1, (f"{OURS} cuda overlap", "cuda", "OVERLAP"))
    return rows


def _engine(model: Any, context: int) -> Engine:
    """The first steps after so many tokens, the same random ones every time."""
    cache = model.new_cache(1, context + STEPS)
    generator = torch.Generator(model.device).manual_seed(0)
    for x in cache.tensors():
        x.normal_(generator=generator)
    cache.advance(context)
    return Engine(model, cache)


def _error(engine: Engine, token: Tensor, expected: Tensor) -> float:
    """Of the first step, and of the same one replayed. Raises WrongResultError."""
    errors = [relative_rms(engine.step(token), expected)]
    for _ in range(2):  # the second is captured, the third replayed
        engine.cache.reset()
        engine.cache.advance(engine.cache.max_seq_len - STEPS)
        errors.append(relative_rms(engine.step(token), expected))
    if not max(errors) <= TOLERANCE:
        raise WrongResultError(
            f"its logits are {max(errors):.2g} of their size away from the eager definition's; at "
            f"most {TOLERANCE} is rounding, so its time means nothing"
        )
    return errors[-1]


def _in_python(engine: Engine, token: Tensor, backend: str, name: str) -> Callable[[], Any]:
    def run() -> None:
        with use_backend(backend, strict=True), constant(name):
            engine.step(token)

    return run


def training(setting: Setting) -> list[str]:
    """A training step of a transformers model as it is, with Liger, and patched; and then beside
    torch.compile, so that what takes long to compile takes no other row along."""
    P = bench_patch
    if setting.gpu:
        options = P.Options(layers=16, batch=4, tokens=2048, device="cuda", rounds=10)
    else:
        options = P.Options("demo", 1, tokens=8, threads=1, rounds=2, backend="triton")
    name, groups = P.name_of("training", options), [("", (OURS, P.TRANSFORMERS, P.LIGER))]
    if setting.gpu:
        groups.append((f", beside {P.COMPILED}", (OURS, P.TRANSFORMERS, P.COMPILED)))
    rows = {
        name + more: lambda failed, kinds=kinds: P.measure(
            "training", dataclasses.replace(options, baselines=kinds)
        )
        for more, kinds in groups
    }
    return measured(setting, rows, PARTS["training"].row)
