"""C++ and Python tell the same calls apart, and leave the same ones to torch's dispatcher."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import Parameter

from llama_fast.dispatch.signature import _cpu, call_signature, read_by_python


class Subclass(torch.Tensor):
    pass


def test_the_fast_reader_serves_where_torch_has_dlpacks_functions():
    offered = _cpu is not None and hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert (call_signature is not read_by_python) == offered


def test_calls_are_told_apart_as_python_does():
    x = torch.zeros(4, 6)
    calls = [
        (x,),
        (torch.ones(4, 6),),
        (x[:, :3],),
        (torch.zeros(4, 3),),
        (x.t(),),
        (torch.zeros(6, 4),),
        (x[:1],),
        (x[0],),
        (x[1],),
        (torch.zeros(()),),
        (x.half(),),
        (x.bfloat16(),),
        (x.double(),),
        (x.int(),),
        (x.to("meta"),),
        (x.half().to("meta"),),
        (x.to_sparse(),),
        (x, x),
        (x, None),
        (None, x),
        (x, True),
        (x, False),
        (x, 1),
        (x, 0),
        (x, 1.0),
        (x, 1e-5),
        (x, 2**40),
        (x, 2**70),
        (x, "text"),
        (x, ""),
        (x, "other"),
        (x, "longer than a word"),
        (x, "longer than a line"),
        (x, "text", ""),
        (x, "äöü"),
        (x, 1, 2),
        (x, 2, 1),
        (x,) * 40,
        (x,) * 41,
        (Parameter(x, requires_grad=False),),
        (),
    ]
    signatures = [call_signature(call, True) for call in calls]
    expected = [read_by_python(call, True) for call in calls]
    for i, j in itertools.product(range(len(calls)), repeat=2):
        assert (signatures[i] == signatures[j]) == (expected[i] == expected[j]), (
            calls[i],
            calls[j],
        )


@pytest.mark.parametrize("read", [call_signature, read_by_python])
def test_gradients_and_subclasses_are_left_to_the_dispatcher(read):
    x, wanting = torch.zeros(3), torch.zeros(3, requires_grad=True)
    assert read((x, wanting), True) is None
    assert read((x, Parameter(x)), True) is None
    assert read((x, wanting), False) == read((x, x), False) is not None
    assert read((x, wanting.detach()), True) == read((x, x), True)
    for grad in (True, False):
        assert read((x, x.as_subclass(Subclass)), grad) is None


def test_nothing_is_kept_of_the_arguments():
    x = torch.zeros(3, 4)
    storage = x.untyped_storage()
    address = storage.data_ptr()
    call_signature((x, 1), True)
    x.resize_(5, 7)
    assert call_signature((x, 1), True) == call_signature((torch.zeros(5, 7), 1), True)
    assert address  # the first memory may have gone: the kind does not look at it
