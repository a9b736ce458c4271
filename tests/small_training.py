"""A model, data and a training that take a moment, for the tests of the loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llama_fast.config import LlamaConfig
from llama_fast.model import Llama
from llama_fast.training.blocks import PackedDataset
from llama_fast.training.loop import finetune
from llama_fast.training.state import History
from llama_fast.training.weights import Weights

CONFIG = LlamaConfig(
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    hidden_dim=64,
    vocab_size=64,
    max_seq_len=16,
    tied=True,
)


def new_model(dtype: torch.dtype = torch.float32, config: LlamaConfig = CONFIG) -> Llama:
    torch.manual_seed(3)
    return Llama(config, dtype=dtype)


def counting_data(n_tokens: int = 600) -> PackedDataset:
    """Each token follows from the one before it, so the loss can reach 0."""
    return PackedDataset((torch.arange(n_tokens) * 7) % CONFIG.vocab_size, block=16, n_bytes=1200)


class Masked(PackedDataset):
    """Rows of which fewer and fewer targets are trained."""

    def batch(self, indices):
        indices = list(indices)
        batch = super().batch(indices)
        for place, row in enumerate(indices):
            batch.targets[0, place * self.block : place * self.block + row % self.block] = -100
        return batch._replace(kept=int((batch.targets >= 0).sum()))


def masked_data() -> Masked:
    data = counting_data()
    return Masked(data.tokens, data.block, n_bytes=data.n_bytes)


def quick(model, data, config, **more) -> History:
    return finetune(model, data, config, progress=False, **more)


def bits(model: Llama) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(left: Llama, right: Llama) -> None:
    for (name, one), other in zip(bits(left).items(), bits(right).values(), strict=True):
        assert torch.equal(one, other), name


def interrupting(step: int) -> Callable[..., None]:
    """Returns what to put in the place of `Weights.step`: Ctrl-C comes before that update, counted
    from 0."""
    real, seen = Weights.step, []

    def stop(self, *args):
        seen.append(1)
        if len(seen) == step + 1:
            raise KeyboardInterrupt
        real(self, *args)

    return stop


@pytest.fixture
def one_thread():
    """Bit-identity is promised for equal numbers of threads; small shapes need one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
