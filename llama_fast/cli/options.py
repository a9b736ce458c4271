"""Options that several commands share, so that they are named, checked and explained alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..errors import BackendError, CheckpointError, LlamaFastError
from ..utils.files import check_file, check_folder, check_new_folder

if TYPE_CHECKING:
    import torch

DEMO = Path(__file__).parent.parent / "demo"
CHAT_DEMO = DEMO / "chat"

Command = TypeVar("Command", bound=Callable)


def example(text: str) -> Callable[[Command], Command]:
    """Gives a command the line that ends its help."""

    def mark(command: Command) -> Command:
        command.example = f"Example: {text}"
        return command

    return mark


class Format(str, Enum):
    hf = "hf"
    meta = "meta"


class DType(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def torch(self) -> torch.dtype:
        import torch

        return getattr(torch, self.value)


class Named(str, Enum):
    """The names of `llama_fast.quantization.rounding.NAMED`."""

    int8 = "int8"
    int4 = "int4"


class KvCache(str, Enum):
    """The names of `llama_fast.nn.kv_cache.KV_CACHES`."""

    int8 = "int8"


class Work(str, Enum):
    """The kinds of `llama_fast.bench.shapes.Work`."""

    decode = "decode"
    prefill = "prefill"
    training = "training"


class Backend(str, Enum):
    cpu = "cpu"
    cuda = "cuda"
    triton = "triton"
    eager = "eager"


Model = Annotated[
    Path | None,
    typer.Option(
        "--model",
        "-m",
        metavar="DIR",
        help="Folder of the model: Meta's (params.json, consolidated.*.pth) or Hugging Face's "
        "(config.json, *.safetensors).",
        show_default="the small model that ships",
    ),
]
_OF_THE_FOLDER = "the model's generation_config.json, else"
Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="DIR",
        help="Folder of a LoRA for this model, as finetune and PEFT write it.",
        show_default="none",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="T",
        help="0 takes the likeliest token; higher is more varied.",
        show_default=f"{_OF_THE_FOLDER} 0.6",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        metavar="P",
        help="Draw from the likeliest tokens that add up to P.",
        show_default=f"{_OF_THE_FOLDER} 0.9",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="K",
        help="Draw from the K likeliest tokens; 0: from all.",
        show_default=f"{_OF_THE_FOLDER} 0",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2**32 - 1,
        metavar="N",
        help="The same seed gives the same text.",
        show_default="a new one",
    ),
]
AsDType = Annotated[
    DType | None, typer.Option("--dtype", help="Convert the weights.", show_default="as stored")
]
Quantize = Annotated[
    Named | None,
    typer.Option(
        "--quantize",
        help="Round the weights to integers while they are read; `llama-fast quantize` "
        "writes a folder of them.",
        show_default="as stored",
    ),
]
Cache = Annotated[
    KvCache | None,
    typer.Option(
        "--kv-cache",
        help="Store keys and values as integers, in about half the memory.",
        show_default="in the weights' dtype",
    ),
]
Device = Annotated[
    str,
    typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1 …; auto: a GPU if there is one."),
]
OnBackend = Annotated[
    Backend | None,
    typer.Option(
        help="Run every op on this backend, or say why it cannot.", show_default="the fastest"
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, metavar="N", help="CPU threads.", show_default="all physical cores"
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show Python's traceback when something fails.")
]


def file_to_write(parameter: typer.CallbackParam, value: Any) -> Any:
    """Callback of an option that names one or more files to write: refuses, before any work, those
    that could not be."""
    for path in value if isinstance(value, list) else [value] * (value is not None):
        check_file(path, _option(parameter))
    return value


def new_folder(parameter: typer.CallbackParam, value: Path) -> Path:
    """Callback of what names a folder to make, as `file_to_write` for files."""
    check_new_folder(value, _option(parameter))
    return value


def folder_to_fill(parameter: typer.CallbackParam, value: Path | None) -> Path | None:
    """Callback of an option that names a folder to add files to, as `file_to_write` for files."""
    if value is not None:
        check_folder(value, _option(parameter))
    return value


def _option(parameter: typer.CallbackParam) -> str:
    """The name of an option; nothing for an argument, which the path alone says."""
    name = parameter.opts[0]
    return name if name.startswith("-") else ""


Target = Annotated[
    Path,
    typer.Argument(metavar="DST", help="Folder to write; a new one.", callback=new_folder),
]


def model_folder(model: Path | None, shipped: Path | None = None) -> Path:
    """Returns the folder to open: the one given, or that of a model that ships, by default the
    demo model. Raises CheckpointError."""
    if model is not None:
        return model
    shipped = shipped or DEMO
    if not (shipped / "tokenizer.model").is_file():
        raise CheckpointError(
            "this installation has no demo model; give the folder of a model with --model DIR"
        )
    return shipped


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def device_named(name: str) -> torch.device:
    """Returns the device of --device. Raises LlamaFastError for one that is not here."""
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise LlamaFastError(f"--device is {name!r}; write auto, cpu, cuda, or cuda:1 …")
    if device.type == "cuda" and not has_gpu:
        raise LlamaFastError(
            f"--device {name}: torch {torch.__version__} sees no GPU here; write --device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LlamaFastError(
            f"--device {name}: there are {torch.cuda.device_count()} GPUs, numbered from 0; write "
            "--device cuda:0"
        )
    return device


def check_backend(name: str, device: str) -> None:
    """Raises BackendError, with the reasons, for a --backend that cannot be used on the device."""
    from ..dispatch import ORDER, backends

    if name not in ORDER[device]:
        raise BackendError(
            f"--backend {name} does not run on device {device}, which has "
            f"{', '.join(ORDER[device])}; write one of these, or another --device"
        )
    if name != "eager" and (name not in backends() or backends()[name].unavailable):
        why = backends()[name].unavailable if name in backends() else ["it is not installed"]
        raise BackendError(f"--backend {name} cannot be used: {'; '.join(why)}")


def using(backend: Backend | None) -> AbstractContextManager[None]:
    """For a `with`: --backend, where it was given, serves all calls inside."""
    from ..dispatch import use_backend

    return use_backend(backend.value, strict=True) if backend else nullcontext()
