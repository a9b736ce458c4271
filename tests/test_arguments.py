"""What generation is given, in the forms that people have it in: served where the meaning is plain,
and refused by name elsewhere."""

from __future__ import annotations

import array

import numpy as np
import pytest
import torch

from llama_fast.config import LlamaConfig
from llama_fast.errors import PromptError
from llama_fast.generation.arguments import (
    encode_prompts,
    seeds,
    stop_texts,
    stop_token_ids,
    whole_number,
)
from llama_fast.tokenizer import Tokenizer
from llama_fast.tokenizer.files import BYTE_ORDER

IDS = [3, 1, 4]
CONFIG = LlamaConfig(
    dim=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, hidden_dim=8, vocab_size=60,
    max_seq_len=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer([bytes([b]) for b in BYTE_ORDER])


ONE = {
    "list": IDS,
    "tuple": tuple(IDS),
    "range": range(3),
    "array.array": array.array("i", IDS),
    "numpy": np.array(IDS),
    "numpy of 8 bits": np.array(IDS, dtype=np.uint8),
    "numbers of numpy's": [np.int32(i) for i in IDS],
    "tensor": torch.tensor(IDS),
    "tensor of 32 bits": torch.tensor(IDS, dtype=torch.int32),
    "tensors of one number": [torch.tensor(i) for i in IDS],
    "generator": (i for i in IDS),
    "objects": np.array(IDS, dtype=object),
}


@pytest.mark.parametrize("form", ONE)
def test_ids_in_a_row_are_one_prompt(tokenizer, form):
    expected = [0, 1, 2] if form == "range" else IDS
    found = encode_prompts(tokenizer, ONE[form])
    assert found == [expected] and all(type(i) is int for i in found[0])


SEVERAL = {
    "lists": [IDS, [5]],
    "a tuple": (tuple(IDS), [5]),
    "arrays": [np.array(IDS), np.array([5])],
    "tensors": [torch.tensor(IDS), torch.tensor([5])],
    "a generator of lists": (x for x in [IDS, [5]]),
    "generators": [(i for i in IDS), iter([5])],
    "map": map(list, [IDS, [5]]),
    "an array of objects": np.array([IDS, [5]], dtype=object),
}


@pytest.mark.parametrize("form", SEVERAL)
def test_what_yields_ids_in_rows_is_several_prompts(tokenizer, form):
    assert encode_prompts(tokenizer, SEVERAL[form]) == [IDS, [5]]


@pytest.mark.parametrize("of", [torch.tensor, np.array])
def test_a_matrix_of_ids_is_a_prompt_a_row(tokenizer, of):
    assert encode_prompts(tokenizer, of([IDS, IDS])) == [IDS, IDS]


@pytest.mark.parametrize(
    "texts",
    [
        ["ab", "c"],
        ("ab", "c"),
        (text for text in ["ab", "c"]),
        np.array(["ab", "c"]),
        {"ab": 0, "c": 1}.keys().__iter__(),
    ],
)
def test_texts_in_whatever_holds_them(tokenizer, texts):
    expected = [tokenizer.encode(text, bos=True) for text in ("ab", "c")]
    assert encode_prompts(tokenizer, texts) == expected


def test_a_text_and_ids_may_stand_side_by_side(tokenizer):
    assert encode_prompts(tokenizer, ["ab", IDS]) == [tokenizer.encode("ab", bos=True), IDS]
    assert encode_prompts(tokenizer, np.str_("ab")) == [tokenizer.encode("ab", bos=True)]
    assert encode_prompts(tokenizer, []) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts is None; give a text"),
        (5, "prompts is 5; give a text"),
        (torch.tensor(5), "prompts is 5"),
        (2.5, "prompts is 2.5"),
        (b"once", "prompts: bytes were given.*decode"),
        (bytearray(b"once"), "bytearray were given"),
        (memoryview(b"once"), "memoryview were given"),
        (["a", b"once"], "prompt 1: bytes were given"),
        ([b"once"], "prompt 0: bytes were given"),
        ([memoryview(b"once")], "prompt 0: memoryview"),
        (np.array([b"once"]), "prompt 0: bytes"),
        ([None], "prompt 0 is None"),
        (["a", 5], "prompt 1 is 5"),
        ([5, "a"], "the prompt: 'a' is not a token id"),
        ([5, None], "None is not a token id"),
        ([1.0, 2.0], "prompt 0 is 1.0"),
        ([[1.0, 2.0]], "prompt 0: 1.0 is not a token id; ids are whole numbers"),
        (torch.ones(1, 3), "1.0 is not a token id"),
        ([[True, False]], "True is not a token id"),
        (torch.ones(1, 3, dtype=torch.bool), "True is not a token id"),
        ([[[1, 2]]], r"prompt 0: \[1, 2\] is not a token id"),
        (torch.ones(1, 1, 3).long(), "is not a token id"),
        ([["a", "b"]], "'a' is not a token id"),
        ({"input_ids": IDS}, "prompts: a dict was given"),
        ([{"role": "user", "content": "hi"}], "prompt 0: a dict was given"),
        ({1, 2}, "prompts: a set was given"),
    ],
)
def test_prompts_without_a_plain_meaning_are_refused(tokenizer, prompts, message):
    with pytest.raises(PromptError, match=message):
        encode_prompts(tokenizer, prompts)


@pytest.mark.parametrize(
    ("stop", "texts"),
    [
        (None, []), ((), []), (["a", "b"], ["a", "b"]), (("a",), ["a"]), ({"a"}, ["a"]),
        ((x for x in "ab"), ["a", "b"]), (np.array(["ab"]), ["ab"]),
    ],
)  # fmt: skip
def test_stop_texts(stop, texts):
    assert stop_texts(stop) == texts


@pytest.mark.parametrize("stop", ["end", b"end", [b"end"], [""], [None], 2.5, [["a"]], {"a": 1}])
def test_other_stop_texts_are_refused(stop):
    with pytest.raises(PromptError, match=r"must be a list of texts that are not empty$"):
        stop_texts(stop)


@pytest.mark.parametrize("stop", [3, [3], ["a", 3], torch.tensor([3]), np.array([3])])
def test_ids_among_the_stop_texts_are_sent_to_stop_ids(stop):
    with pytest.raises(PromptError, match="token ids belong in stop_ids"):
        stop_texts(stop)


@pytest.mark.parametrize(
    ("stop_ids", "ids"),
    [
        (None, set()), ((), set()), (5, {5}), (np.int64(5), {5}), (torch.tensor(5), {5}),
        ([5, 6], {5, 6}), ({5, 6}, {5, 6}), (torch.tensor([5, 6]), {5, 6}),
        (np.array([5]), {5}), ((x for x in (5, 6)), {5, 6}), (frozenset({0, 59}), {0, 59}),
    ],
)  # fmt: skip
def test_stop_ids(stop_ids, ids):
    assert stop_token_ids(stop_ids, CONFIG) == ids


@pytest.mark.parametrize(
    ("stop_ids", "message"),
    [
        ("<|eot_id|>", "'<' is not a token id"), (["5"], "'5' is not a token id"),
        (b"5", "bytes were given"), (2.5, "stop_ids is 2.5"), ([True], "True is not"),
        ([60], r"the model's ids are 0 … 59"), (-1, "the model's ids"), ([None], "None is not"),
    ],
)  # fmt: skip
def test_other_stop_ids_are_refused(stop_ids, message):
    with pytest.raises(PromptError, match=message):
        stop_token_ids(stop_ids, CONFIG)


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (None, [None, None]), (5, [5, 5]), (np.int64(5), [5, 5]), (torch.tensor(5), [5, 5]),
        ([1, None], [1, None]), (np.array([1, 2]), [1, 2]), (torch.tensor([1, 2]), [1, 2]),
        ((x for x in (1, 2)), [1, 2]), (-1, [-1, -1]), (2**64 - 1, [2**64 - 1] * 2),
    ],
)  # fmt: skip
def test_seeds(seed, expected):
    assert seeds(seed, 2) == expected


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        ([1], "1 seeds were given for 2 prompts"), ([], "0 seeds"), ("12", "seed is '12'"),
        (1.5, "seed is 1.5; it must be .* and whole"), (b"ab", "seed is b'ab'"),
        ([1, "2"], "seed is '2'"), (2**64, r"below 2\*\*64"), (-(2**64), "or more, and whole"),
        ({1: 2, 3: 4}, "seed is {1: 2"),
    ],
)  # fmt: skip
def test_other_seeds_are_refused(seed, message):
    with pytest.raises(PromptError, match=message):
        seeds(seed, 2)


@pytest.mark.parametrize("value", [None, "5", 2.5, float("inf"), 0, -3, [5]])
def test_other_numbers_of_tokens_are_refused(value):
    with pytest.raises(PromptError, match=r"max_new_tokens is .* it must be 1 or more, and whole"):
        whole_number(value, "max_new_tokens", 1)
