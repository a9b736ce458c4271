"""A LoRA's training step of rank 16 on all seven matrices, ours and that of transformers with PEFT.

Each is built and asked in a process of its own: bfloat16 or quantised random weights, forward,
backward and AdamW.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_fast.bench.memory import give_back_idle
from llama_fast.config import LlamaConfig
from llama_fast.errors import WrongResultError
from llama_fast.utils.memory import resident_peak

RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-5
IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """The documents of a step: their lengths, and the part of each that begins it and has no label,
    as a prompt has none."""

    lengths: tuple[int, ...]
    masked: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def labelled(self) -> int:
        """Tokens that are predicted; the first of a document is not."""
        return sum(length - max(1, int(length * self.masked)) for length in self.lengths)

    def documents(self) -> list[tuple[Tensor, Tensor]]:
        """Tokens (T,) and their labels (T,) of each, the same in every run."""
        g = torch.Generator().manual_seed(0)
        found = []
        for length in self.lengths:
            tokens = torch.randint(1000, (length,), generator=g)
            labels = tokens.clone()
            labels[: max(1, int(length * self.masked))] = IGNORED
            found.append((tokens, labels))
        return found

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """One row of all documents: tokens (1,T), the targets of each, and cu_seqlens."""
        tokens, labels = zip(*self.documents(), strict=True)
        targets = [torch.cat((each[1:], each.new_full((1,), IGNORED))) for each in labels]
        ends = torch.tensor([0, *self.lengths]).cumsum(0)
        return torch.cat(tokens)[None], torch.cat(targets)[None], ends.to(torch.int32)


class Step:
    """What both share: a step's loss must be that of random weights, or its time means nothing."""

    config: LlamaConfig

    def __call__(self) -> None:
        loss, expected = self.step().item(), math.log(self.config.vocab_size)
        if not abs(loss - expected) < 2:
            raise WrongResultError(
                f"a step's loss is {loss:.3g}; with random weights it is near {expected:.3g}"
            )

    def step(self) -> Tensor:
        raise NotImplementedError

    def peak(self) -> int:
        return resident_peak()

    def first_peak(self) -> int:
        """The peak of the first step, without what building has left in allocators: up to a tenth
        of it, by chance."""
        with suppress(AttributeError):
            give_back_idle()
        self()
        return self.peak()


class Ours(Step):
    """Documents are packed into one row."""

    def __init__(
        self, config: LlamaConfig, batch: Batch, quantize: str | None, checkpoint: bool
    ) -> None:
        from llama_fast.bench.profile.steps import random_model
        from llama_fast.training.checkpointing import activation_checkpointing

        self.config = config
        settings = {"layers": config.n_layers, "dtype": torch.bfloat16, "device": "cpu"}
        self.model = random_model(config, **settings, quantize=quantize).train()
        self.tokens, self.targets, self.cu_seqlens = batch.packed()
        # To the end of the process: what is dropped is undone.
        self.saving = activation_checkpointing(self.model) if checkpoint else nullcontext()
        self.saving.__enter__()

    def backward(self) -> Tensor:
        loss = self.model.loss(self.tokens, self.targets, cu_seqlens=self.cu_seqlens)
        loss.backward()
        return loss


class OursLora(Ours):
    def __init__(
        self,
        config: LlamaConfig,
        batch: Batch,
        quantize: str | None = None,
        checkpoint: bool = False,
    ) -> None:
        from llama_fast import train

        super().__init__(config, batch, quantize, checkpoint)
        adapter = train.lora(self.model, RANK, ALPHA)
        self.optimizer = torch.optim.AdamW(adapter.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self) -> Tensor:
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


class OursFull(Ours):
    """All weights in bfloat16, 8-bit moments, each weight's step as soon as it has its gradient,
    checkpointed."""

    def __init__(self, config: LlamaConfig, batch: Batch) -> None:
        from llama_fast.training.optim import AdamW, step_in_backward

        super().__init__(config, batch, None, checkpoint=True)
        optimizer = AdamW(self.model.parameters(), LEARNING_RATE, moments="int8")
        self.stepping = step_in_backward(self.model, optimizer)

    def step(self) -> Tensor:
        return self.backward()


class PeftLora(Step):
    """As a user gets it: eager modules, SDPA attention, documents padded to the longest."""

    def __init__(self, config: LlamaConfig, batch: Batch) -> None:
        import peft
        import transformers

        self.config = config
        with torch.device("meta"):
            settings = transformers.LlamaConfig(**config.to_hf())
            net = transformers.LlamaForCausalLM(settings).bfloat16()
        net = net.to_empty(device="cpu")
        for name, parameter in net.named_parameters():
            parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(0, 0.02)
        net.tie_weights()
        rotary = net.model.rotary_emb
        fresh = type(rotary)(net.config)  # its buffers were on the meta device
        rotary.inv_freq, rotary.original_inv_freq = fresh.inv_freq, fresh.inv_freq
        lora = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.net = peft.get_peft_model(net, lora).train()
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
        shape = (len(batch.lengths), max(batch.lengths))
        tokens, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, (its_tokens, its_labels) in enumerate(batch.documents()):
            seen = slice(0, len(its_tokens))
            tokens[row, seen], labels[row, seen], mask[row, seen] = its_tokens, its_labels, 1
        self.inputs = {"input_ids": tokens, "labels": labels}
        if len(batch.lengths) > 1:
            self.inputs["attention_mask"] = mask

    def step(self) -> Tensor:
        loss = self.net(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def flops(config: LlamaConfig, batch: Batch) -> int:
    """Multiply-adds twice of a step: each matrix forward and for the gradient of its inputs, the
    head for labelled tokens alone, attention forward (two products) and backward (five)."""
    width = config.n_heads * config.head_dim
    layer = config.dim * (2 * width + 2 * config.n_kv_heads * config.head_dim)
    layer += 3 * config.dim * config.hidden_dim
    pairs = sum(length * (length + 1) // 2 for length in batch.lengths)
    attention = 2 * width * pairs * (2 + 5)
    head = 2 * 2 * batch.labelled * config.dim * config.vocab_size
    return config.n_layers * (2 * 2 * batch.tokens * layer + attention) + head


def with_layers(config: LlamaConfig, layers: int | None) -> LlamaConfig:
    return config if layers is None else dataclasses.replace(config, n_layers=layers)
