"""What replaces the `forward` of a transformers module: the same mathematics over the ops.

Each function takes the module first, as a method does, and goes to the module's own forward (that
of its class) wherever an op cannot stand in for it: another dtype than the weight's, a tensor
subclass, autocast, or a module that is no longer what it was when it was patched (another
activation, a bias, a hook where a kernel would skip it). Submodules are called as modules, so hooks
and adapters on them keep working.

Legend of dims: B batch, T query tokens, S key tokens, H query heads, K KV heads, D head dim,
C model dim, F hidden dim, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .. import ops
from . import attention, paged
from .conditions import fits, hooked, is_learnt, needs_gradient
from .logits import DeferredLogits
from .patched import own_class, own_forward, replaced_forward

# The classes of transformers' silu, in all versions.
SILU = {nn.SiLU, getattr(activations, "SiLUActivation", nn.SiLU)}


def rms_norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """hidden_states (..., C) → (..., C)."""
    if not fits(hidden_states, self.weight) or is_learnt(self.variance_epsilon):
        return own_forward(self, hidden_states)
    return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def swiglu(self: nn.Module, x: Tensor) -> Tensor:
    """x (..., C) → (..., C): down(silu(gate(x)) · up(x))."""
    act = self.act_fn
    if type(act) not in SILU or "forward" in vars(act) or hooked(act):
        return own_forward(self, x)
    gate, up = self.gate_proj(x), self.up_proj(x)
    h = ops.swiglu(gate, up) if fits(gate, up) else act(gate) * up
    return self.down_proj(h)


def linear(self: nn.Linear, input: Tensor) -> Tensor:
    """input (..., C_in) → (..., C_out).

    On a GPU, with a gradient, torch's product serves: the op would call the same one, and only add
    to the host's time.
    """
    weight = self.weight
    if (
        self.bias is None
        and fits(input, weight)
        and input.ndim > 1
        and input.stride(-1) == 1
        and weight.is_contiguous()
        and not torch.is_autocast_enabled(input.device.type)
        and (input.is_cpu or not needs_gradient(input, weight))
    ):
        return ops.linear(input, weight)
    return nn.functional.linear(input, weight, self.bias)


def rope_attention(self: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """An attention module with our rotation and its own attention function."""
    return _attend(self, True, False, *args, **kwargs)


def fused_attention(self: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """An attention module with its own rotation and our attention."""
    return _attend(self, False, True, *args, **kwargs)


def rope_fused_attention(
    self: nn.Module, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention module with our rotation and our attention."""
    return _attend(self, True, True, *args, **kwargs)


def _attend(
    self: nn.Module,
    rotate: bool,
    fused: bool,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """hidden_states (B,T,C), position_embeddings cos and sin (B or 1,T,D) → (B,T,C) and weights.

    rotate, fused   whether our ops rotate, and attend; the cache and the projections are the
                    module's
    """
    heads = (*hidden_states.shape[:-1], -1, self.head_dim)
    q, k = self.q_proj(hidden_states).view(heads), self.k_proj(hidden_states).view(heads)
    v = self.v_proj(hidden_states).view(heads).transpose(1, 2)
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)

    cos, sin = position_embeddings
    if rotate and fits(q, k) and cos.shape[-1] == self.head_dim and type(cos) is Tensor:
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
    attend = attention.own_function(self)
    name = self.config._attn_implementation
    if fused and (name in attention.REPLACED or (name == paged.EAGER and paged.is_paged(kwargs))):
        attend = partial(attention.attend, attend)
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
        or is_learnt(norm.variance_epsilon)
        or hooked(norm)
        or replaced_forward(norm) is not None
        or (getattr(self, "gradient_checkpointing", False) and self.training)
    ):
        return own_forward(self, hidden_states, **kwargs)
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    if fits(attended, hidden_states, norm.weight):
        normed, total = ops.add_rms_norm(
            attended, hidden_states, norm.weight, norm.variance_epsilon
        )
    else:
        total = hidden_states + attended
        normed = norm(total)
    return total + self.mlp(normed)


def causal_lm_loss(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A causal language model; the loss of a training step is made without ever holding the logits,
    which the step's output makes when they are asked for. All other calls go to the model's own
    forward.
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
        or not _returns_dict(self, kwargs)
        or getattr(self, "_is_replica", False)  # DataParallel gathers tensors, and nothing else
        or own_class(head) is not nn.Linear
        or head.bias is not None
        or not head.weight.is_contiguous()
        or hooked(head)
        or replaced_forward(head) is not None
        or self.loss_function is not ForCausalLMLoss
    ):
        return own_forward(self, *args, **kwargs)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("labels", "logits_to_keep")}
    outputs = self.model(**{**kwargs, "return_dict": True})
    x = outputs.last_hidden_state  # (B,T,C)
    weight = head.weight
    if not fits(x, weight) or torch.is_autocast_enabled(x.device.type):
        logits = head(x)
        loss = self.loss_function(
            logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
        )
    else:
        loss = shifted_loss(x, weight, labels, **kwargs)
        logits = DeferredLogits(head, x)
    return CausalLMOutputWithPast(
        loss=loss,
        logits=logits,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _returns_dict(self: nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("return_dict")
    if asked is None:
        asked = getattr(self.config, "return_dict", True)
    return bool(asked)


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
