"""What a rank that leads tells the others; what they make of it is in tests/ranks.py."""

from __future__ import annotations

import pytest
import torch

from llama_fast import Llama, LlamaConfig, Tokenizer, generate
from llama_fast.cli.options import DEMO
from llama_fast.errors import ConfigError
from llama_fast.generation.follow import Leader
from llama_fast.generation.session import Session

GREEDY = {"max_new_tokens": 4, "temperature": 0, "stop_ids": ()}


class Told(Leader):
    """Calls that nobody hears."""

    def __init__(self) -> None:
        super().__init__(None)
        self.calls = []

    def _exchange(self, message: list) -> list:
        self.calls.append(message[0])
        return message


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(DEMO)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, hidden_dim=48,
        vocab_size=tokenizer.vocab_size, max_seq_len=64,
    )  # fmt: skip
    model = Llama(config).eval()
    model.head.leader = Told()
    return model


def test_a_text_is_told_call_by_call(model, tokenizer):
    generate(model, tokenizer, [[5, 6], [7]], **GREEDY)
    told = model.head.leader.calls
    assert told[:2] == ["acquire", "prefill"] and told.count("step") == 3
    assert told[-1] == "release" and told.count("free") == 2


def test_the_others_have_one_engine_at_a_time(model, tokenizer):
    with Session(model, tokenizer) as session:
        list(session.stream([1, 2], **GREEDY))
        with pytest.raises(ConfigError, match="one engine at a time"):
            generate(model, tokenizer, [[5]], **GREEDY)
        assert "release" not in model.head.leader.calls
        list(session.stream([1, 2, 3], **GREEDY))
    generate(model, tokenizer, [[5]], **GREEDY)
    assert model.head.leader.calls.count("acquire") == model.head.leader.calls.count("release") == 2
