"""Rows of training data that are held out."""

from __future__ import annotations

import pytest
import torch

from llama_fast.errors import DataError
from llama_fast.training.blocks import PackedDataset
from llama_fast.training.split import hold_out


def data(rows: int = 20) -> PackedDataset:
    return PackedDataset(torch.arange(rows * 4 + 1), block=4)


def first_tokens(part) -> list[int]:
    return [int(part.batch([row]).tokens[0, 0]) for row in range(len(part))]


def test_each_row_is_in_one_part():
    trained, held_out = hold_out(data(), 0.2, seed=1)
    assert len(held_out) == 4
    assert sorted(first_tokens(trained) + first_tokens(held_out)) == list(range(0, 80, 4))
    assert sorted(trained.order(0, 0)) == list(range(16))
    assert trained.order(0, 0) == trained.order(0, 0) != trained.order(0, 1)
    both = trained.batch([3, 1])
    assert both.tokens[0, :4].tolist() == trained.batch([3]).tokens[0].tolist()
    assert both.cu_seqlens.tolist() == [0, 4, 8]


def test_the_parts_depend_on_the_seed_and_the_data_alone():
    prints = {hold_out(data(), 0.2, seed)[0].fingerprint() for seed in (1, 1, 2)}
    assert len(prints) == 2
    trained, held_out = hold_out(data(), 0.2, 1)
    assert trained.fingerprint() != held_out.fingerprint()
    assert trained.fingerprint() != hold_out(data(21), 0.2, 1)[0].fingerprint()
    assert len(hold_out(data(3), 0.01)[1]) == 1


@pytest.mark.parametrize("share", [0, 1, -0.5, float("nan")])
def test_a_share_that_is_no_part_is_refused(share):
    with pytest.raises(DataError, match="above 0 and below 1"):
        hold_out(data(), share)


def test_one_row_cannot_be_parted():
    with pytest.raises(DataError, match="1 packed row cannot be parted"):
        hold_out(data(1), 0.5)
