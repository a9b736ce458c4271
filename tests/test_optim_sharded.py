"""AdamW over parameters that are cut over ranks: each rank does to its part what one process does
to the whole. The ranks are played one after another, by a process group that exchanges nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from llama_fast.config.share import RowShare
from llama_fast.errors import ConfigError
from llama_fast.ops.quantized_moments import FIRST, SECOND, dequantize
from llama_fast.training.moments import of_rank
from llama_fast.training.optim import AdamW

fake_pg = pytest.importorskip(
    "torch.testing._internal.distributed.fake_pg", reason="torch's process group for tests"
)
# Rows of one block, of two, and such that blocks would lie across borders; 5 rows over 4 ranks
# leave the last one none.
SHAPES = ((7, 256), (5, 512), (6, 100), (300,), (2, 3, 256))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ranks(*sizes: int) -> Iterator[tuple[int, object]]:
    """Each rank of a mesh, and the mesh as that rank has it."""
    size = 1
    for length in sizes:
        size *= length
    for rank in range(size):
        dist.init_process_group("fake", rank=rank, world_size=size, store=fake_pg.FakeStore())
        try:
            yield rank, init_device_mesh("cpu", sizes)
        finally:
            dist.destroy_process_group()
            _clear_sharding_prop_cache()  # it knows meshes of ranks that are no more


def cut(x: torch.Tensor, mesh, *placements) -> DTensor:
    return distribute_tensor(x, mesh, placements or (Shard(0),), src_data_rank=None)


def trained(params: list[torch.Tensor], gradients, steps: range, optimizer=None, **options):
    """Takes steps along gradients that are functions of a step."""
    optimizer = optimizer or AdamW(params, lr=1e-2, seed=3, **options)
    for step in steps:
        for param, gradient in zip(params, gradients(step), strict=True):
            param.grad = gradient.to(param.dtype)
        optimizer.step(grad_scale=0.5)
    return optimizer


def whole_gradients(step: int) -> list[torch.Tensor]:
    return [randn(*shape, seed=100 * step + i) for i, shape in enumerate(SHAPES)]


def new_params(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(randn(*shape, seed=i).to(dtype)) for i, shape in enumerate(SHAPES)]


def numbers(state: dict, name: str) -> torch.Tensor:
    """A moment as numbers, whatever it is kept in."""
    if f"{name}_scale" not in state:
        return state[name]
    scale = state[f"{name}_scale"].view(-1)  # saved by several ranks: a row for each of a weight's
    return dequantize(state[name], scale, {"exp_avg": FIRST}.get(name, SECOND))


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_the_parts_are_those_of_the_whole(n, dtype, moments):
    options = {"moments": moments, "stochastic_rounding": False}
    wholes = new_params(dtype)
    expected = trained(wholes, whole_gradients, range(3), **options)
    for rank, mesh in ranks(n):
        params = [torch.nn.Parameter(cut(param.data, mesh)) for param in new_params(dtype)]
        found = trained(
            params, lambda s, mesh=mesh: [cut(g, mesh) for g in whole_gradients(s)], range(3),
            **options,
        )  # fmt: skip
        for param, whole in zip(params, wholes, strict=True):
            state, exact = found.state[param], expected.state[whole]
            eight_bits = state["exp_avg"].dtype is torch.int8
            assert eight_bits == (moments == "int8" and param[0].numel() % 256 == 0)
            if moments == "int8" and not eight_bits:
                continue  # more exact than the whole's, so not the same
            rows = slice(*RowShare(rank, n).of(len(whole)))
            assert torch.equal(param.to_local(), whole[rows])
            own = of_rank(state)
            for name in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(numbers(own, name), numbers(exact, name)[rows]), name


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_a_state_of_one_process_goes_on_in_parts(moments):
    """To the bit where moments are kept in the same form; else no number is rounded on the way."""
    options = {"moments": moments, "stochastic_rounding": False}
    wholes = new_params(torch.float32)
    expected = trained(wholes, whole_gradients, range(2), **options)
    saved, before = expected.state_dict(), [param.detach().clone() for param in wholes]
    kept = {i: {name: numbers(state, name).clone() for name in ("exp_avg", "exp_avg_sq")}
            for i, state in saved["state"].items()}  # fmt: skip
    saved = {**saved, "state": {i: {name: x.clone() if torch.is_tensor(x) else x
                                    for name, x in state.items()}
                                for i, state in saved["state"].items()}}  # fmt: skip
    trained(wholes, whole_gradients, range(2, 4), expected)
    for rank, mesh in ranks(3):
        params = [torch.nn.Parameter(cut(x.clone(), mesh)) for x in before]
        optimizer = AdamW(params, lr=1e-2, seed=3, **options)
        optimizer.load_state_dict(saved)
        for i, param in enumerate(params):
            state = optimizer.state[param]
            assert state["step"] == 2 and isinstance(state["exp_avg"], DTensor)
            rows = slice(*RowShare(rank, 3).of(len(param)))
            for name, number in kept[i].items():
                assert torch.equal(numbers(of_rank(state), name), number[rows])
        trained(
            params, lambda s, mesh=mesh: [cut(g, mesh) for g in whole_gradients(s)], range(2, 4),
            optimizer,
        )  # fmt: skip
        for param, whole in zip(params, wholes, strict=True):
            rows = slice(*RowShare(rank, 3).of(len(whole)))
            if moments == "float32" or param[0].numel() % 256 == 0:
                assert torch.equal(param.to_local(), whole[rows])
            else:
                torch.testing.assert_close(param.to_local(), whole[rows], rtol=0, atol=2e-3)


def test_parts_draw_other_bits_and_replicas_the_same():
    """Four ranks: two replicas of two parts, all of the same numbers."""
    found = []
    for _, mesh in ranks(2, 2):
        param = torch.nn.Parameter(
            cut(torch.ones(2, 4096, dtype=torch.bfloat16), mesh, Replicate(), Shard(0))
        )
        param.grad = torch.ones_like(param)
        AdamW([param], lr=1e-3, weight_decay=0.0).step()
        found.append(param.detach().to_local())
    alone = torch.nn.Parameter(torch.ones(1, 4096, dtype=torch.bfloat16))
    alone.grad = torch.ones_like(alone)
    AdamW([alone], lr=1e-3, weight_decay=0.0).step()
    assert torch.equal(found[0], alone.data)  # the first part is rounded as a whole is
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])
    for part in found:  # 1 - 1e-3 lies between two numbers of bfloat16: both are drawn
        assert part.float().mean() == pytest.approx(1 - 1e-3, abs=2e-4)


def test_a_gradient_that_is_cut_otherwise_is_cut_as_the_parameter():
    whole = torch.nn.Parameter(randn(4, 8))
    whole.grad = randn(4, 8, seed=1)
    for rank, mesh in ranks(2):
        param = torch.nn.Parameter(cut(whole.data.clone(), mesh))
        param.grad = cut(whole.grad, mesh, Replicate())
        AdamW([param]).step()
        expected = torch.nn.Parameter(whole.detach().clone())
        expected.grad = whole.grad
        AdamW([expected]).step()
        assert torch.equal(param.to_local(), expected[2 * rank : 2 * rank + 2])


def test_a_parameter_that_is_cut_by_columns_takes_steps_and_no_whole_state():
    whole = torch.nn.Parameter(randn(2, 512))
    whole.grad = randn(2, 512, seed=1)
    optimizer = AdamW([whole], moments="int8")
    before = whole.detach().clone()
    optimizer.step()
    for _, mesh in ranks(2):
        param = torch.nn.Parameter(cut(before, mesh, Shard(1)))
        param.grad = cut(whole.grad, mesh, Shard(1))
        own = AdamW([param], moments="int8")
        own.step()
        assert own.state[param]["exp_avg"].dtype is torch.float32
        with pytest.raises(ConfigError, match=r"cannot take over a whole state.*Shard\(0\)"):
            own.load_state_dict(optimizer.state_dict())
