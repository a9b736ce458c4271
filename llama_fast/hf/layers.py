"""Layers by the contract of Hugging Face's kernel layers, for `use_kernels=True` and `kernelize`.

    from llama_fast.hf import layers
    layers.register()
    model = AutoModelForCausalLM.from_pretrained("DIR", use_kernels=True)

Such a layer is a stateless nn.Module: it has a `forward` and nothing else of its own, no __init__
and no attributes, for its forward is put onto a module of the model, whose weights it reads. The
flags say that it has a backward pass and that torch.compile may trace it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.integrations import hub_kernels
from transformers.models.llama.modeling_llama import LlamaMLP, rotate_half
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from .. import ops
from .conditions import fits, hooked
from .forwards import SILU


class RMSNorm(nn.Module):
    """Stands for the layer "RMSNorm": a `weight` (C,) and a `variance_epsilon`."""

    weight: Tensor
    variance_epsilon: float

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., C) → (..., C), of the weight's dtype."""
        if fits(hidden_states, self.weight):
            return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        x = nn.functional.rms_norm(
            hidden_states.float(), self.weight.shape, None, self.variance_epsilon
        )
        return self.weight * x.to(hidden_states.dtype)


class Rotation(nn.Module):
    """Stands for the layer "rotary_pos_emb", which is the function of all models of a type."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """q (B,H,T,D), k (B,K,T,D), cos and sin (B or 1,T,D) → the rotated q and k. With another
        `unsqueeze_dim`, heads lie there in q and k."""
        B, half = q.shape[0], q.shape[-1] // 2
        if unsqueeze_dim in (1, 2) and fits(q, k) and cos.shape[-1] == 2 * half:
            # The angles are there twice, for both elements of a pair.
            tables = (table[..., :half].float().expand(B, -1, -1) for table in (cos, sin))
            turn = (lambda x: x.transpose(1, 2)) if unsqueeze_dim == 1 else (lambda x: x)
            q, k = ops.rope(turn(q), turn(k), *tables)
            return turn(q), turn(k)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class SwiGLUMLP(nn.Module):
    """Stands for the layer "SwiGLUMLP": linear layers `gate_proj`, `up_proj` and `down_proj`, and
    an activation `act_fn`. transformers has no layer of that name; `register` gives it to MLPs."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) → (..., C)."""
        gate, up, act = self.gate_proj(x), self.up_proj(x), self.act_fn
        ours = type(act) in SILU and not hooked(act) and fits(gate, up)
        return self.down_proj(ops.swiglu(gate, up) if ours else act(gate) * up)


LAYERS = {"RMSNorm": RMSNorm, "rotary_pos_emb": Rotation, "SwiGLUMLP": SwiGLUMLP}


@dataclass(frozen=True)
class Repository:
    """Where a kernel mapping finds a layer of this file, by its name in `LAYERS`."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        return LAYERS[self.layer_name]


def register() -> None:
    """Makes these layers the ones that `use_kernels=True` and `kernelize` put into models, on CPUs
    and on CUDA GPUs, there with transformers 5.16 or newer. Raises ImportError where `kernels` is
    not installed."""
    import kernels

    ours = {name: dict.fromkeys(("cpu", "cuda"), Repository(name)) for name in LAYERS}
    # `use_kernels=True` registers transformers' own mapping once more, and the last one counts.
    # Older versions have no function that returns it.
    theirs = getattr(hub_kernels, "get_kernel_mapping_transformers", dict)()
    for name, repositories in ours.items():
        theirs.setdefault(name, {}).update(repositories)
    kernels.register_kernel_mapping(ours)
    for mlp in (LlamaMLP, MistralMLP, Qwen2MLP, Qwen3MLP):
        kernels.replace_kernel_forward_from_hub(mlp, "SwiGLUMLP")
