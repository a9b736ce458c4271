"""Before anything imports Triton: without a GPU, its kernels run in its interpreter."""

from __future__ import annotations

import importlib.util
import os

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

from llama_fast.utils.environment import triton_interpreter
from tests.triton_interpreter import behave_as_a_gpu

if triton_interpreter():
    behave_as_a_gpu()
