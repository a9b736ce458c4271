"""Builds a block that Llama does not have from the ops, and trains it for a few steps.

    python examples/parallel_block.py

Attention and MLP stand side by side and share one norm, as in GPT-J and PaLM (Chowdhery et al.,
"PaLM", 2022, section 2). The ops are differentiable, so nothing more than `forward` is written.
"""

import torch
from torch import Tensor, nn

import llama_fast
from llama_fast.nn import RMSNorm


class ParallelBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)); x (B,T,C), H query heads on K KV heads of D."""

    def __init__(self, C: int, H: int, K: int, D: int, F: int) -> None:
        super().__init__()
        self.sizes = [H * D, K * D, K * D, F, F]
        self.head_dim = D
        self.norm = RMSNorm(C)
        self.inputs = nn.Linear(C, sum(self.sizes), bias=False)  # q, k, v, gate and up at once
        self.outputs = nn.Linear(H * D + F, C, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        fused = llama_fast.linear(self.norm(x), self.inputs.weight)
        q, k, v, gate, up = fused.split(self.sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (q, k, v))  # (B,T,H,D)
        q, k = llama_fast.rope(q, k, cos, sin)
        o = llama_fast.attention(q, k, v, causal=True).flatten(-2)
        both = torch.cat((o, llama_fast.swiglu(gate, up)), dim=-1)
        return x + llama_fast.linear(both, self.outputs.weight)


torch.manual_seed(0)
B, T, C, D, V = 4, 32, 64, 16, 100
block, embed = ParallelBlock(C, H=4, K=2, D=D, F=128), nn.Embedding(V, C)
nn.init.normal_(embed.weight, std=0.1)  # it is the head too
angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
cos, sin = angles.cos(), angles.sin()  # (T, D/2)

tokens = torch.randint(V, (B, 1)) + torch.arange(T + 1)  # each row counts up
tokens %= V
optimizer = torch.optim.AdamW([*block.parameters(), *embed.parameters()], lr=1e-2)
losses = []
for _ in range(40):
    hidden = block(embed(tokens[:, :-1]), cos, sin)
    # The logits are never stored whole.
    targets = tokens[:, 1:].flatten()
    loss = llama_fast.linear_cross_entropy(hidden.flatten(0, 1), embed.weight, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

q = torch.randn(B, T, 4, D)
k = v = torch.randn(B, T, 2, D)
print(llama_fast.explain("attention", q, k, v))  # which backend serves it, and why not the others
