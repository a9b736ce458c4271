"""Every op can be called with what the registry of problem shapes makes for it."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import llama_fast.ops  # noqa: F401  declares the ops
from llama_fast.bench import shapes
from llama_fast.bench.shapes import NAMES, Work, problem_shapes
from llama_fast.config import LlamaConfig
from llama_fast.dispatch import OPS
from llama_fast.errors import ConfigError

TINY = LlamaConfig(
    dim=64, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=96, vocab_size=160
)
WORK = [Work.decode(24), Work.prefill(5)]


def test_every_op_of_a_model_has_problem_shapes():
    called_by_no_model = {"adamw"}
    named = {name for name, op in OPS.items() if op.cases is not None}
    assert set(NAMES) == named - called_by_no_model


def test_a_problem_is_named_after_what_it_asks_for():
    for name in NAMES:
        for problem, make in problem_shapes(name, TINY, Work.prefill(5), device="meta").items():
            assert set(OPS[name].label(*make(0)).split()) <= set(problem.split())


@pytest.mark.parametrize("work", WORK, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_op_takes_them(name, dtype, work):
    op = OPS[name]
    for make in problem_shapes(name, TINY, work, dtype=dtype).values():
        args = make(0)
        schema = getattr(torch.ops.llama_fast, name).default._schema
        assert len(args) == len(schema.arguments)
        found = op(*args)
        first = found if isinstance(found, torch.Tensor) else found[0]
        assert first.numel() and first.isfinite().all() and first.count_nonzero()
        assert min(op.cost(*args)) > 0
        floats = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
        assert all(x.count_nonzero() > 0.5 * x.numel() for x in floats)


class Generator(torch.Generator):
    """Stands for one of a GPU."""

    def __new__(cls, device: str) -> Generator:
        return super().__new__(cls)

    device = torch.device("cuda")


class WithoutGPU(TorchFunctionMode):
    """Lets meta tensors stand for those of a GPU, and refuses what torch refuses there: numbers of
    one device drawn with the generator of another."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        args, kwargs = tree_map(self._stand_in, (args, kwargs))
        if kwargs.pop("generator", None) is not None:
            of = args[0].device if isinstance(args[0], torch.Tensor) else kwargs.get("device")
            assert str(of) == "meta", f"{function} draws numbers of {of or 'cpu'}"
        return function(*args, **kwargs)

    def _stand_in(self, x):
        return "meta" if isinstance(x, str | torch.device) and "cuda" in str(x) else x


@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_all_is_drawn_there(name, monkeypatch):
    monkeypatch.setattr(shapes.torch, "Generator", Generator)
    with WithoutGPU():
        for work in (Work.decode(24), Work.training(5)):
            for make in problem_shapes(name, TINY, work, device="cuda", gradient=True).values():
                tensors = [x for x in make(0) if isinstance(x, torch.Tensor)]
                assert tensors and all(x.is_meta for x in tensors)


def test_seeds_give_other_numbers_in_the_same_layout():
    make = problem_shapes("attention", TINY, Work.prefill(7))["attention"]
    one, same, other = make(0), make(0), make(1)
    assert torch.equal(one[0], same[0]) and not torch.equal(one[0], other[0])
    assert one[1].stride() == other[1].stride()
    q, k = one[:2]
    assert q.shape == (1, 7, 4, 32) and k.shape == (1, 7, 2, 32)


def test_matrices_are_those_of_the_model():
    found = problem_shapes("linear", TINY, Work.decode(8))
    shapes = {name: tuple(make(0)[1].shape) for name, make in found.items()}
    floats = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    assert shapes.keys() == {f"{name}{form}" for name in floats for form in ("", " int8", " int4")}
    assert floats == {
        "linear gate_up swiglu": (192, 64),
        "linear qkv": (256, 64),
        "linear output": (64, 128),
        "linear gate_up": (192, 64),
        "linear down": (64, 96),
        "linear head": (160, 64),
    }


def test_other_ops_are_named():
    with pytest.raises(ConfigError, match="no model calls an op named 'conv'"):
        problem_shapes("conv", TINY, Work.decode(8))


def test_work_says_what_it_is():
    assert str(Work.decode(8192)) == "decode, 1 token, 8192 keys"
    assert str(Work.prefill(512)) == "prefill, 512 tokens"
