"""A transformer block of ops, on plain tensors and on DTensors. Two processes run it, for
tests/test_tensor_parallel.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import llama_fast.engines.dtensor  # noqa: F401  registers how ops may be cut
from llama_fast import ops

B, T, H, K, D, C, F, V = 2, 6, 4, 2, 16, 32, 48, 40
COLUMNS, ROWS, ALL = Shard(0), Shard(1), Replicate()
# Each with its shape, and how the layers of torch's tensor parallelism place it.
PARAMETERS = {
    "norm": ((C,), ALL), "norm2": ((C,), ALL), "q": ((H * D, C), COLUMNS),
    "k": ((K * D, C), COLUMNS), "v": ((K * D, C), COLUMNS), "o": ((C, H * D), ROWS),
    "gate": ((F, C), COLUMNS), "up": ((F, C), COLUMNS), "down": ((C, F), ROWS),
    "head": ((V, C), ALL), "x": ((B, T, C), ALL),
}  # fmt: skip


def block(p: dict[str, Tensor], cos: Tensor, sin: Tensor, targets: Tensor) -> dict[str, Tensor]:
    y = ops.rms_norm(p["x"], p["norm"])
    q, k, v = (ops.linear(y, p[name]).unflatten(-1, (-1, D)) for name in "qkv")
    q, k = ops.rope(q, k, cos, sin)
    o = ops.attention(q, k, v)
    y, stream = ops.add_rms_norm(ops.linear(o.flatten(2), p["o"]), p["x"], p["norm2"])
    h = ops.swiglu(ops.linear(y, p["gate"]), ops.linear(y, p["up"]))
    y = stream + ops.linear(h, p["down"])
    losses = ops.linear_cross_entropy(y, p["head"], targets, reduction="none")
    loss = ops.linear_cross_entropy(y, p["head"], targets) + losses.sum()
    return {"attention": o, "hidden": h, "y": y, "losses": losses, "loss": loss}


def found(mesh: DeviceMesh | None = None, sequence: bool = False) -> dict[str, dict]:
    """Results and gradients, and how they are placed over the last dim of the mesh.

    mesh      of one dim, or of two, the first of which shares the rows of x
    sequence  whether x comes with a part of the tokens on each rank of the last dim
    """
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device="cpu") * shape[-1] ** -0.5

    def placed(x: Tensor, at: Replicate | Shard = ALL, first: Replicate | Shard = ALL) -> Tensor:
        return x if mesh is None else distribute_tensor(x, mesh, [first, at][-mesh.ndim :])

    p = {}
    for name, (shape, at) in PARAMETERS.items():
        if name == "x":
            at, first = Shard(1) if sequence else ALL, Shard(0)
        else:
            first = ALL
        p[name] = placed(randn(*shape), at, first).requires_grad_()
    angles = randn(T, D // 2)
    targets = torch.randint(V, (B, T), generator=g)
    results = block(p, placed(angles.cos()), placed(angles.sin()), placed(targets))
    results["loss"].backward()
    results |= {f"gradient of {name}": x.grad for name, x in p.items()}
    return {
        "values": {name: _whole(x).detach() for name, x in results.items()},
        "placements": {
            name: str(x.placements[-1]) for name, x in results.items() if isinstance(x, DTensor)
        },
    }


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x
