"""The folder of a fine-tuning run: what it was asked for, its state, and what it leaves behind.

run.json      what the run is; the same command goes on with it, another one is refused
data-cache/   the ids of the data's files, until the run is finished
training.pt   the state, until the run is finished, and with --dpo --full reference-….safetensors
log.csv       a line a step            tensorboard/   the same curves, where it is installed
adapter/      the LoRA, or model/ after --full
metrics.json  the figures              loss.png       the curve, where matplotlib is installed
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import JSON_ERRORS, CheckpointError, LlamaFastError, json_fault
from ..utils.files import make_folder
from .terminal import note
from .units import write_json

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..distributed import Processes
    from ..model import Llama
    from ..training import Adapter, History

RUN, METRICS, PLOT, ADAPTER, MODEL = "run.json", "metrics.json", "loss.png", "adapter", "model"
CACHE = "data-cache"


class Run:
    """asked: what decides the result, plain values for JSON, by the names of the options."""

    def __init__(self, folder: Path, asked: dict[str, Any]) -> None:
        self.folder, self.asked = folder, json.loads(json.dumps(asked))

    @property
    def result(self) -> Path:
        return self.folder / (MODEL if self.asked["--full"] else ADAPTER)

    @property
    def cache(self) -> Path:
        return self.folder / CACHE

    def check(self) -> bool:
        """Returns whether the run is finished already. A folder with no more than a cache is as one
        that is not there: another process may have begun.

        Raises CheckpointError where the folder holds something else, or a run that differs."""
        path = self.folder / RUN
        if not path.is_file():
            if self.folder.exists() and (not self.folder.is_dir() or self._names() - {CACHE}):
                raise CheckpointError(
                    f"{self.folder} is there and is no run of finetune; give --out a new folder"
                )
            return False
        try:
            found = json.loads(path.read_bytes())
        except JSON_ERRORS as error:
            raise CheckpointError(f"{path} is no JSON: {json_fault(error)}") from None
        if found != self.asked:
            raise CheckpointError(
                f"{self.folder} is another run: it has {_difference(found, self.asked)}. Give the "
                "same command to go on with it, or --out a new folder"
            )
        return (self.folder / METRICS).is_file()

    def begin(self) -> None:
        """Writes down what the run is, in the folder that was made."""
        write_json(self.folder / RUN, self.asked)

    def make_folder(self) -> None:
        """Raises CheckpointError where it cannot be made."""
        make_folder(self.folder, CheckpointError)

    def finish(
        self,
        llama: Llama,
        adapter: Adapter | None,
        source: Checkpoint,
        history: History,
        metrics: dict[str, Any],
        processes: Processes,
    ) -> None:
        """Writes the result and the figures, and removes the state. All processes call it, the
        first one writes."""
        from ..training.reference import REFERENCE_FILES
        from ..training.state import STATE_FILE

        # Else it is a run that was killed just after it has written the result.
        missing = not processes.gather(self.result.exists())[0]
        if missing and adapter is None:
            _write_model(self.result, llama, source, processes)
        if not processes.main:
            return
        if missing and adapter is not None:
            adapter.save(self.result, base=str(source.folder))
        self._plot(history)
        write_json(self.folder / METRICS, metrics)
        for path in (self.folder / STATE_FILE, *self.folder.glob(REFERENCE_FILES)):
            path.unlink(missing_ok=True)
        self._remove_cache()

    def _plot(self, history: History) -> None:
        from ..training.plot import plot_loss

        try:
            unit = "nats per pair" if self.asked.get("--dpo") else "nats per token"
            plot_loss(history, self.folder / PLOT, unit=unit)
        except LlamaFastError as error:  # no matplotlib
            note(f"llama-fast: no {PLOT}: {error}")

    def remove_if_empty(self) -> None:
        """Takes the folder away where nothing was done in it yet."""
        if self.folder.is_dir() and self._names() <= {RUN, CACHE}:
            self._remove_cache()
            with suppress(OSError):  # the cache has files that are not ours, and stays
                (self.folder / RUN).unlink(missing_ok=True)
                self.folder.rmdir()

    def _remove_cache(self) -> None:
        with suppress(OSError):
            for entry in self.cache.glob("*.safetensors*"):  # and what a killed process left of one
                entry.unlink(missing_ok=True)
            self.cache.rmdir()

    def _names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


def _difference(found: dict[str, Any], asked: dict[str, Any]) -> str:
    names = [name for name in asked | found if found.get(name) != asked.get(name)]
    return ", ".join(
        f"{name} {_word(found.get(name))} and not {_word(asked.get(name))}" for name in names
    )


def _word(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "by default" if value is None else str(value)


def _write_model(folder: Path, llama: Llama, source: Checkpoint, processes: Processes) -> None:
    """A folder in Hugging Face's format, with the tokenizer and the settings of the source."""
    from ..checkpoint import companions, state_shapes
    from ..checkpoint.write import stream_hf
    from ..distributed.fully_sharded import gathered, give

    state = llama.state_dict()
    names = list(state_shapes(llama.config))
    if not processes.main:
        return give(state, names)
    dtypes = {name: state[name].dtype for name in names}
    tensors = ((name, gathered(state[name])) for name in names)
    stream_hf(folder, llama.config, dtypes, tensors, **companions(source))
