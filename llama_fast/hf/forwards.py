"""What replaces the `forward` of a transformers module: the same mathematics over the ops.

Each function takes the module first, as a method does, and goes to the module's own forward (that
of its class) wherever an op cannot stand in for it: another dtype than the weight's, a tensor
subclass, autocast. Submodules are called as modules, so hooks and adapters on them keep working.

Legend of dims: B batch, T query tokens, S key tokens, H query heads, K KV heads, D head dim,
C model dim, F hidden dim, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules import module as torch_module
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .. import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Forward:
    """A function in the place of a module's forward: `module.__dict__["forward"]`.

    A bound method would do, but for pickle, which looks it up by its name on the module. The
    functions are those of this file, so a pickled or copied model keeps its patch.
    """

    __slots__ = ("function", "module")

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.function = function
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the replaced forward: generate() and trainers choose arguments by it."""
        return inspect.signature(MethodType(type(self.module).forward, self.module))

    def __repr__(self) -> str:
        return f"<llama_fast {self.function.__name__} of {type(self.module).__name__}>"


def function_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function of this file that stands in for the module's forward, if one does."""
    forward = vars(module).get("forward")
    return forward.function if type(forward) is Forward else None


def fits(*tensors: Tensor) -> bool:
    """Whether an op may be given these: no tensor subclasses, one dtype that kernels have."""
    dtype = tensors[0].dtype
    if dtype not in DTYPES:
        return False
    for tensor in tensors:
        kind = type(tensor)
        if (kind is not Tensor and kind is not Parameter) or tensor.dtype is not dtype:
            return False
    return True


def needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """hidden_states (..., C) → (..., C)."""
    if not fits(hidden_states, self.weight):
        return type(self).forward(self, hidden_states)
    return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def swiglu(self: nn.Module, x: Tensor) -> Tensor:
    """x (..., C) → (..., C): down(silu(gate(x)) · up(x))."""
    gate, up = self.gate_proj(x), self.up_proj(x)
    h = ops.swiglu(gate, up) if fits(gate, up) else self.act_fn(gate) * up
    return self.down_proj(h)


def linear(self: nn.Linear, input: Tensor) -> Tensor:
    """input (..., C_in) → (..., C_out), without bias.

    On a GPU, with a gradient, torch's product serves: the op would call the same one, and only add
    to the host's time.
    """
    weight = self.weight
    if (
        fits(input, weight)
        and input.ndim > 1
        and input.stride(-1) == 1
        and weight.is_contiguous()
        and not torch.is_autocast_enabled(input.device.type)
        and (input.is_cpu or not needs_gradient(input, weight))
    ):
        return ops.linear(input, weight)
    return nn.functional.linear(input, weight)


def rope_attention(
    self: nn.Module,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """hidden_states (B,T,C), position_embeddings cos and sin (B or 1,T,D) → (B,T,C) and weights.

    The rotation is the op; the cache, the attention function and the projections are the module's.
    """
    heads = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k = self.q_proj(hidden_states).view(heads), self.k_proj(hidden_states).view(heads)
    v = self.v_proj(hidden_states).view(heads).transpose(1, 2)
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)

    cos, sin = position_embeddings
    if fits(q, k) and cos.shape[-1] == self.head_dim and type(cos) is Tensor:
        half = self.head_dim // 2  # transformers repeats the angles for both elements of a pair
        tables = (cos[..., :half].float(), sin[..., :half].float())
        if cos.shape[0] != q.shape[0]:
            tables = (tables[0][0], tables[1][0])
        q, k = ops.rope(q, k, *tables)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    else:
        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    cache_position = kwargs.pop("cache_position", None)  # given by transformers before 5 alone
    if past_key_values is not None:
        placed = {"sin": sin, "cos": cos, "cache_position": cache_position}
        more = () if cache_position is None else (placed,)
        k, v = past_key_values.update(k, v, self.layer_idx, *more)

    window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
    if window is not None:
        kwargs["sliding_window"] = window
    implementation = self.config._attn_implementation
    attend = (
        eager_attention_forward
        if implementation == "eager"
        else ALL_ATTENTION_FUNCTIONS[implementation]
    )
    output, weights = attend(
        self,
        q,
        k,
        v,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        **kwargs,
    )
    output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
    return self.o_proj(output), weights


def add_rms_norm_layer(self: nn.Module, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """A decoder layer, hidden_states (B,T,C) → (B,T,C), whose first residual sum is made in one
    kernel with the norm that follows it.

    Goes to the layer's own forward where calling that norm does more than its op: it has hooks, or
    stands no longer where it stood. So it does for gradient checkpointing, which newer versions of
    transformers do there.
    """
    norm = self.post_attention_layernorm
    if (
        getattr(norm, "variance_epsilon", None) is None
        or hooked(norm)
        or is_replaced(norm)
        or (getattr(self, "gradient_checkpointing", False) and self.training)
    ):
        return type(self).forward(self, hidden_states, **kwargs)
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    if fits(attended, hidden_states, norm.weight):
        normed, total = ops.add_rms_norm(
            attended, hidden_states, norm.weight, norm.variance_epsilon
        )
    else:
        total = hidden_states + attended
        normed = norm(total)
    return total + self.mlp(normed)


def is_replaced(norm: nn.Module) -> bool:
    """Whether something besides this file has given the norm another forward."""
    return "forward" in vars(norm) and function_of(norm) is not rms_norm


def causal_lm_loss(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A causal language model; the loss of a training step is made without ever holding the logits,
    so the step's output has none. All other calls go to the model's own forward.
    """
    if len(args) == 1 and "input_ids" not in kwargs:
        args, kwargs = (), {"input_ids": args[0], **kwargs}
    labels, keep = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
    head = getattr(self, "lm_head", None)
    if (
        args
        or labels is None
        or not self.training
        or not torch.is_grad_enabled()
        or not isinstance(keep, int)
        or keep
        or kwargs.get("return_dict") is False
        or type(head) is not nn.Linear
        or head.bias is not None
        or hooked(head)
        or ("forward" in vars(head) and function_of(head) is not linear)
        or self.loss_function is not ForCausalLMLoss
    ):
        return type(self).forward(self, *args, **kwargs)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("labels", "logits_to_keep")}
    outputs = self.model(**kwargs, return_dict=True)
    x = outputs.last_hidden_state  # (B,T,C)
    weight = head.weight
    if not fits(x, weight) or torch.is_autocast_enabled(x.device.type):
        logits = head(x)
        loss = self.loss_function(
            logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
        )
    else:
        logits = None
        loss = shifted_loss(x, weight, labels, **kwargs)
    return CausalLMOutputWithPast(
        loss=loss,
        logits=logits,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def shifted_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' loss of causal language models: the mean over the labels, each predicted from
    the token before it, or their sum over `num_items_in_batch`.

    x (B,T,C), weight (V,C), labels and shift_labels (B,T) → a float32 scalar.
    """
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(x.shape[:-1]).to(x.device).contiguous()
    loss = ops.linear_cross_entropy(x, weight, targets, ignore_index=ignore_index)
    if num_items_in_batch is None:
        return loss
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    kept = (targets != ignore_index).sum()
    return torch.where(kept > 0, loss * kept, 0.0) / num_items_in_batch
