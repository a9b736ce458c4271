"""Write one weight file a tensor at a time: safetensors or Meta's .pth.

The libraries' own writers need every tensor of a file in memory at once, which the conversion of a
checkpoint larger than the memory cannot offer.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import math
import pickle
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

_SAFETENSORS_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float64: torch.DoubleStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
}
_ALIGNMENT = 64


def _raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, shared where it is contiguous on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


class SafetensorsWriter:
    """A .safetensors: takes the tensors in exactly the order in which `contents` announced them.

    The format is an 8-byte little-endian length, a JSON header of that length with every tensor's
    dtype, shape and byte range, then the bytes.
    """

    def __init__(
        self, path: Path, contents: dict[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for key, (shape, dtype) in contents.items():
            end = offset + math.prod(shape) * dtype.itemsize
            header[key] = {
                "dtype": _SAFETENSORS_DTYPES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        # The tensors are then aligned in a mapped file, as far as their sizes are multiples.
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._contents = list(contents)
        self._next = 0
        self._file = open(path, "wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, key: str, tensor: Tensor) -> None:
        assert key == self._contents[self._next]
        self._next += 1
        self._file.write(_raw_bytes(tensor))

    def close(self) -> None:
        """Finish the file. Every announced tensor must have been added."""
        assert self._next == len(self._contents)
        self._file.close()

    def abandon(self) -> None:
        """Close without finishing, after an error."""
        # A full disk refuses the last buffer again; the file is about to be removed.
        with contextlib.suppress(OSError):
            self._file.close()


class PthWriter:
    """A .pth in torch.save's zip format; torch.load(weights_only=True, mmap=True) reads it.

    data.pkl is a pickled dict in which each tensor refers to a storage by number; data/0, data/1, …
    are the storages' bytes, uncompressed and aligned so that they can be mapped; two small records
    give version and byte order.
    """

    def __init__(self, path: Path) -> None:
        self._root = path.stem
        self._file = open(path, "wb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        self._entries: dict[str, _Entry] = {}
        self._storages = 0

    def add(self, key: str, tensor: Tensor) -> None:
        self._entries[key] = self.put(tensor)

    def put(self, tensor: Tensor) -> object:
        """Writes a tensor, and returns what stands for it in the content that `close` is given."""
        self._write(f"data/{self._storages}", _raw_bytes(tensor))
        entry = _Entry(_Storage(self._storages, tensor), tuple(tensor.shape))
        self._storages += 1
        return entry

    def add_again(self, key: str, existing: str) -> None:
        """Give a tensor that was added a second name, without its bytes again."""
        self._entries[key] = self._entries[existing]

    def close(self, content: object = None) -> None:
        """Finish the file, whose content is a dict of what was added, or what is given: plain
        values, with what `put` has returned in the place of tensors."""
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=2).dump(self._entries if content is None else content)
        self._write("data.pkl", memoryview(pickled.getvalue()))
        self._write("byteorder", memoryview(sys.byteorder.encode()))
        self._write("version", memoryview(b"3\n"))
        self._zip.close()
        self._file.close()

    def abandon(self) -> None:
        """Close without finishing, after an error."""
        self._zip.fp = None  # so that the archive does not try to write its directory
        # A full disk refuses the last buffer again; the file is about to be removed.
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, name: str, content: memoryview) -> None:
        info = zipfile.ZipInfo(f"{self._root}/{name}")
        info.file_size = content.nbytes
        large = content.nbytes >= 2**31 - 1
        # The data starts after a fixed header, the name and the extra fields: our padding, and
        # 20 bytes of 64-bit sizes in a large record.
        start = self._file.tell() + 30 + len(info.filename) + 4 + (20 if large else 0)
        padding = -start % _ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        with self._zip.open(info, "w", force_zip64=large) as record:
            record.write(content)


class _Storage:
    """Stands for the bytes of record data/<number>."""

    def __init__(self, number: int, tensor: Tensor) -> None:
        self.persistent_id = (
            "storage", _STORAGES[tensor.dtype], str(number), "cpu", tensor.numel()
        )  # fmt: skip


class _Entry:
    """Pickles as the call that rebuilds a contiguous tensor from its storage."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.storage = storage
        self.shape = shape

    def __reduce__(self) -> tuple:
        strides = torch.empty(self.shape, device="meta").stride()
        arguments = (self.storage, 0, self.shape, strides, False, collections.OrderedDict())
        return _rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, item: object) -> tuple | None:
        return item.persistent_id if isinstance(item, _Storage) else None
