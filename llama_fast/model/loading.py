"""Weights into a model and out of it: from a folder, as floats or quantised on the way.

It knows of no architecture: a model has a config, `tie`, and weights under the names of
`checkpoint.state_shapes`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..config import LlamaConfig
from ..config.checks import check_dtype
from ..config.quantization import Quantization
from ..dispatch import reserve
from ..distributed import fully_sharded as fsdp
from ..distributed.processes import Processes
from ..distributed.tensor_parallel import Ranks, refuse_spread, spread
from ..errors import ConfigError
from ..nn.lora import refuse_adapters
from ..ops import QuantizedWeight
from ..ops.quantized_weight import round_rows
from ..utils.normal_tensors import normal_tensors
from .quantized import quantization_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self


def _device(asked: str | torch.device) -> torch.device:
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(asked)
    except (RuntimeError, TypeError):
        raise ConfigError(f'device is {asked!r}; it must be "auto", "cpu" or "cuda"') from None


def _check_device(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f'device is {str(device)!r}; it must be "auto", "cpu" or "cuda"')
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"device is {str(device)!r}, and torch {torch.__version__} sees {count or 'no'} GPUs "
            'here: give "auto" or "cpu"' + (', or "cuda:0"' if count else "")
        )


class Pretrained(nn.Module):
    """A model that is loaded from a folder and saved as one."""

    config: LlamaConfig

    @classmethod
    @normal_tensors()
    def from_pretrained(
        cls,
        path: str | Path | checkpoint.Checkpoint | checkpoint.QuantizedCheckpoint,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        quantize: str | Quantization | None = None,
        max_seq_len: int | None = None,
        mesh: DeviceMesh | None = None,
        fully_sharded: bool = False,
        progress: checkpoint.Progress | None = None,
    ) -> Self:
        """Loads a folder of Meta's (`params.json`) or Hugging Face's (`config.json`) format, or of
        quantised weights, or one that `checkpoint.open_checkpoint` has opened.

        device       "auto": the GPU when there is one, else the CPU
        dtype        of the weights; None keeps the file's
        quantize     "int8", "int4" or a `Quantization`: weights are stored as integers, each as it
                     is read. None keeps them; a folder that is quantised is loaded as it is
        max_seq_len  a shorter context than the model's own: smaller tables and caches
        mesh         a mesh of one dim, over whose ranks the model is spread (tensor parallel): each
                     reads its rows and columns alone, and is given the same tokens. For inference
        fully_sharded  each of the processes that are joined holds and reads some rows of every
                     weight (FSDP2), and is given its own data. To train all weights, or an adapter
        progress     called as progress(bytes done, bytes in all, name) while the weights stream in

        Weights are streamed: the peak of memory is the model and a few blocks of one weight, also
        where they are quantised on the way. Those of a quantised folder are mapped: on the
        CPU they take no time to load, and of memory the pages that are used.
        Raises CheckpointError or ConfigError, naming the file and the remedy.
        """
        settings = None if quantize is None else Quantization.of(quantize)
        if dtype is not None:
            check_dtype(dtype)
        ranks = None if mesh is None else Ranks.of(mesh)
        if ranks is not None and device == "auto":
            device = ranks.device
        device = _device(device)
        if ranks is not None and device.type != ranks.device.type:
            raise ConfigError(
                f"device is {device} and the mesh is of {ranks.device.type}: leave device out"
            )
        _check_device(device)
        if ranks is not None and ranks.size == 1:
            ranks = None
        opened = isinstance(path, checkpoint.Checkpoint | checkpoint.QuantizedCheckpoint)
        source = path if opened else checkpoint.open_checkpoint(path)
        if fully_sharded and (
            mesh is not None or settings or not isinstance(source, checkpoint.Checkpoint)
        ):
            raise ConfigError(
                "fully_sharded is for training over weights that are floats: leave mesh and "
                "quantize out, and give the folder that a quantised one was made from"
            )
        whole = config = source.config.shortened(max_seq_len)
        if ranks is not None:
            forms = settings, getattr(source, "quantization", None)
            ranks.agree({"the model": whole, "dtype": dtype or source.dtype, "quantize": forms})
            share = ranks.share(whole)
            source, config = source.part(share), share.part
        model = cls(config, device="meta", dtype=dtype or source.dtype)
        if ranks is not None:
            spread(model, share, ranks)
            model.config = whole
        shapes = checkpoint.state_shapes(config)
        if isinstance(source, checkpoint.QuantizedCheckpoint):
            if settings is not None:
                raise ConfigError(
                    f"{source.folder} is quantised already ({source.quantization}); leave quantize "
                    "out, or give the folder that it was made from"
                )
            for name, weight in source.tensors().items():
                if not isinstance(weight, Tensor):
                    shape, form = shapes[name], source.quantization.of_weight(name)
                    weight = QuantizedWeight.holding(shape, form, weight)
                model.set_weight(name, weight.to(device))
        elif settings is not None:
            for name, rows in source.rows(progress=progress):
                on_device = (part.to(device) for part in rows)
                weight = round_rows(shapes[name], on_device, settings.of_weight(name), device)
                model.set_weight(name, weight)
        elif fully_sharded and Processes().size > 1:
            for begin, unit in fsdp.units(model):
                for name in (name for name in shapes if name.startswith(begin)):
                    if model.get_parameter(name).is_meta:
                        shape, dtype = shapes[name], model.dtype
                        model.set_weight(name, torch.empty(shape, device=device, dtype=dtype))
                model.tie()
                fsdp.shard(unit)
            parts = fsdp.parts(model, shapes)
            source.load_rows_into(parts, fsdp.row_share(), progress=progress)
        else:
            for name, shape in shapes.items():
                fresh = torch.empty(shape, device=device, dtype=model.dtype)
                model.set_weight(name, reserve(fresh))
            model.tie()
            source.load_into(model.state_dict(), progress=progress)
        model.tie()
        model.rope.to_empty(device=device)
        return model.eval().requires_grad_(ranks is None)

    @normal_tensors()
    def set_weight(self, name: str, weight: Tensor | QuantizedWeight) -> None:
        """Puts a weight in the place of the one of that name ("layers.0.mlp.down.weight"); a float
        in the model's dtype, and without a copy where it has it and was not made in inference
        mode."""
        module = self.get_submodule(name.removesuffix(".weight"))
        if isinstance(weight, Tensor):
            weight = nn.Parameter(weight.to(self.dtype, copy=weight.is_inference()))
        module.weight = weight

    def save_pretrained(self, path: str | Path, format: str = "hf") -> None:
        """Writes the model as a new folder in Hugging Face's ("hf") or Meta's ("meta") format; one
        that is quantised as `checkpoint.quantized` says, whose config.json is Hugging Face's. One
        that is fully sharded is gathered tensor by tensor: all processes call it, the first writes.

        Raises CheckpointError when the folder exists or cannot be written; nothing half-written
        is left behind.
        """
        if format not in ("hf", "meta"):
            raise ConfigError(f'format is {format!r}; it must be "hf" or "meta"')
        refuse_adapters(self, "a folder of the model")
        refuse_spread(self, "a folder")
        quantization = quantization_of(self)
        if fsdp.is_fully_sharded(self) and not Processes().main:
            fsdp.give(self.state_dict(), checkpoint.state_shapes(self.config))
        elif quantization is None:
            write = checkpoint.write_hf if format == "hf" else checkpoint.write_meta
            write(path, self.config, self.state_dict())
        elif format == "hf":
            checkpoint.write_quantized(path, self.config, quantization, self.state_dict())
        else:
            raise ConfigError(
                f"the model is quantised ({quantization}), which Meta's format cannot hold; "
                'leave format="hf"'
            )
