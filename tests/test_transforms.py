"""torch.func's transforms, forward-mode gradients and ONNX files, taken of the definitions."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import llama_fast
from llama_fast import ops
from llama_fast.errors import BackendError
from llama_fast.model import Llama

from .test_train import CONFIG

X, W = torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(0)), torch.rand(24)


def norm(x, w):
    return ops.rms_norm(x, w, 1e-5)


def torchs_norm(x, w):
    return torch.nn.functional.rms_norm(x, w.shape, w, 1e-5)


def total(function):
    return lambda x, w: function(x, w).pow(3).sum()


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: grad(total(f), argnums=1)(X, W),
        lambda f: hessian(total(f), argnums=1)(X, W),
        lambda f: jvp(f, (X, W), (X.flip(0), W))[1],
        lambda f: jacfwd(f, argnums=1)(X, W),
        lambda f: jacrev(f, argnums=1)(X, W),
        lambda f: vmap(f, in_dims=(0, None))(X, W),
        lambda f: vmap(grad(total(f), argnums=1), in_dims=(0, None))(X, W),
    ],
    ids=["grad", "hessian", "jvp", "jacfwd", "jacrev", "vmap", "vmap-grad"],
)
def test_agrees_with_torchs_own(transform):
    torch.testing.assert_close(transform(norm), transform(torchs_norm))


def test_tangents_are_not_lost():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X, X.flip(0))
        found = forward_ad.unpack_dual(norm(x, W)).tangent
    torch.testing.assert_close(found, jvp(lambda x: torchs_norm(x, W), (X,), (X.flip(0),))[1])


def test_gradients_of_each_sequence():
    """Of the whole model and its fused loss, in one call, and one after the other."""

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Llama(CONFIG)

        def forward(self, tokens):
            return self.model.loss(tokens[None], tokens[None].roll(-1))

    torch.manual_seed(0)
    loss, tokens = Loss(), torch.randint(64, (3, 9))
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    parameters = {name: p.detach() for name, p in loss.named_parameters()}
    found = vmap(grad(lambda p, t: functional_call(loss, p, (t,))), in_dims=(None, 0))(
        parameters, tokens
    )
    for i, sequence in enumerate(tokens):
        loss.zero_grad()
        loss(sequence).backward()
        for name, parameter in loss.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_kernel_that_was_asked_for_strictly_is_refused():
    with llama_fast.use_backend("eager", strict=True):
        vmap(norm, in_dims=(0, None))(X, W)
    with llama_fast.use_backend("cpu", strict=True):
        with pytest.raises(BackendError, match="a forward-mode gradient"):
            vmap(norm, in_dims=(0, None))(X, W)


def test_an_onnx_file_has_the_definitions(monkeypatch):
    """torch.onnx.export takes such a program apart, and knows no op of ours."""

    def exported():
        with torch.no_grad():
            program = torch.export.export(model, (tokens,), strict=False)
        return program.module(), any("llama_fast" in str(n.target) for n in program.graph.nodes)

    model, tokens = Llama(CONFIG).eval(), torch.randint(64, (1, 5))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert exported()[1]
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program, has_ops = exported()
    assert not has_ops
    torch.testing.assert_close(program(tokens), model(tokens), rtol=1e-4, atol=1e-4)
