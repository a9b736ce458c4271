"""One weight file, memory-mapped: safetensors or Meta's .pth behind the same few methods.

A page of a mapped file counts as resident memory from its first use until the file is unmapped.
So a file can be released at any time, and maps itself again when it is next asked for a tensor.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import JSON_ERRORS, LFS_POINTER, LFS_START, CheckpointError, json_fault

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# (start, stop) of rows or columns.
Range = tuple[int, int]


class StoredFile:
    """A weight file. `shapes` and `dtypes` by key; a dtype that is no float of ours is a string."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype | str]

    def rows(self, key: str, start: int, stop: int, columns: Range | None = None) -> Tensor:
        """Rows start:stop along dim 0, of dim 1 these columns: a view of the mapped file, to be
        read and let go."""
        raise NotImplementedError

    def release(self) -> None:
        """Unmap the file, so that its pages stop counting as memory of this process."""
        raise NotImplementedError

    def nbytes(self, key: str) -> int:
        dtype = self.dtypes[key]
        return math.prod(self.shapes[key]) * (dtype.itemsize if dtype in _FLOATS.values() else 1)


class SafetensorsFile(StoredFile):
    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        try:
            self._map()
            slices = {key: self._file.get_slice(key) for key in self._file.keys()}
        except PermissionError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        except (SafetensorError, OSError, ValueError):
            raise CheckpointError(
                f"{path} cannot be read as safetensors: it is truncated or damaged at "
                f"{path.stat().st_size:,} bytes; copy or download it again"
            ) from None
        self.shapes = {key: tuple(entry.get_shape()) for key, entry in slices.items()}
        self.dtypes = {
            key: _FLOATS.get(entry.get_dtype(), entry.get_dtype()) for key, entry in slices.items()
        }

    def _map(self) -> None:
        if self._file is None:
            self._file = safe_open(self.path, framework="pt")

    def rows(self, key: str, start: int, stop: int, columns: Range | None = None) -> Tensor:
        self._map()
        with torch.device("cpu"):  # safetensors would use torch's default device
            found = self._file.get_slice(key)
            return found[start:stop] if columns is None else found[start:stop, slice(*columns)]

    def release(self) -> None:
        self._file = None


class PthFile(StoredFile):
    """A zip archive written by torch.save; only plain tensors are unpickled, never code."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors: Mapping[str, Tensor] | None = None
        self._check_container()
        self._map()
        self.shapes = {key: tuple(tensor.shape) for key, tensor in self._tensors.items()}
        self.dtypes = {
            key: tensor.dtype if tensor.dtype in _FLOATS.values() else str(tensor.dtype)
            for key, tensor in self._tensors.items()
        }

    def _check_container(self) -> None:
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            start = file.read(2)
        if start != b"PK" and size > 0:
            raise CheckpointError(
                f"{self.path} is not a weight file that can be memory-mapped: it is not the zip "
                "archive that torch.save writes since torch 1.6 (was it saved by an older torch, "
                "or is it an error page?)"
            )
        if not zipfile.is_zipfile(self.path):
            raise CheckpointError(
                f"{self.path} is truncated: its {size:,} bytes end before the archive's "
                "directory; copy or download it again"
            )

    def _map(self) -> None:
        if self._tensors is None:
            self._tensors = self._load()

    def _load(self) -> Mapping[str, Tensor]:
        try:
            content = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{self.path} holds more than plain weights and was refused; nothing in it was "
                f"executed. Save a plain dict of tensors. ({_first_sentence(error)})"
            ) from None
        except Exception as error:  # a damaged pickle fails in any way that Python can
            raise CheckpointError(
                f"{self.path} is truncated or damaged ({_first_sentence(error)}); "
                "copy or download it again"
            ) from None
        if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
            content = content["model"]
        if not isinstance(content, Mapping) or not content:
            raise CheckpointError(f"{self.path} holds no dict of tensors, which weights must be")
        for key, value in content.items():
            if not isinstance(value, Tensor) or value.layout != torch.strided:
                raise CheckpointError(
                    f"{self.path}: {key} is a {type(value).__name__}; every entry must be a plain "
                    "tensor"
                )
        return {str(key): value.detach() for key, value in content.items()}

    def rows(self, key: str, start: int, stop: int, columns: Range | None = None) -> Tensor:
        self._map()
        found = self._tensors[key][start:stop]
        return found if columns is None else found[:, slice(*columns)]

    def release(self) -> None:
        self._tensors = None


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0][:200]


def open_files(kind: Callable[[Path], StoredFile], paths: list[Path]) -> list[StoredFile]:
    """Open each path, saying clearly which one is missing or is not a file."""
    for path in paths:
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing; copy or download it again"
                if not path.exists()
                else f"{path} is not a file"
            )
        if _is_lfs_pointer(path):
            raise CheckpointError(f"{path}: {LFS_POINTER}, or download the file itself")
    return [kind(path) for path in paths]


def _is_lfs_pointer(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_START)) == LFS_START.encode()
    except OSError:  # whoever reads the file says so
        return False


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError says where the text goes wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except JSON_ERRORS as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {json_fault(error)}; correct it, or download it again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content
