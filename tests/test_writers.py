"""Everything that writes files, in one table: what may be there, what may not, and a full disk."""

from __future__ import annotations

import ast
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import torch
from typer.models import ArgumentInfo

import llama_fast
from llama_fast.bench import results
from llama_fast.bench.profile.trace import write_trace
from llama_fast.bench.report import write as write_report
from llama_fast.checkpoint import convert, write_random
from llama_fast.checkpoint.vocabulary import extend_folder, prune_folder
from llama_fast.cli import app, chat_commands, profile_code, units, vocab
from llama_fast.cli.finetune_run import Run
from llama_fast.errors import LlamaFastError
from llama_fast.generation.session import Session
from llama_fast.generation.session_file import save_session
from llama_fast.inspect import page
from llama_fast.model import Llama
from llama_fast.quantization.folder import quantize_folder
from llama_fast.tokenizer import Tokenizer, vocabulary
from llama_fast.training import lora, reference, source
from llama_fast.training.plot import plot_loss
from llama_fast.training.record import CSV_FILE, Record
from llama_fast.training.state import History, StateFile

from .checkpoints import TINY

FILES = (
    "tokenizer.model", "tokenizer.json", "chat --save-cache", "chat /save", "--json",
    "bench --json", "inspect --html", "profile --trace", "loss.png",
)  # fmt: skip
NEW_FOLDERS = (
    "init", "convert to meta", "convert to hf", "quantize", "vocab extend", "vocab prune", "a LoRA",
)  # fmt: skip
FOLDERS_TO_FILL = (
    "training.pt", "log.csv", "run.json", "a reference", "a cache", "report", "profile --dump",
)  # fmt: skip
WRITERS = FILES + NEW_FOLDERS + FOLDERS_TO_FILL

PACKAGE = Path(llama_fast.__file__).parent
STEP = {
    "step": 1, "epoch": 0.1, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens": 8,
    "kept": 8,
}  # fmt: skip
HISTORY = History(train=[STEP], seconds=[0.1], peak_bytes=[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("writers") / "model"
    write_random(target, TINY, format="hf")
    return target


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder) -> Llama:
    return Llama.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def writers(folder, tokenizer, model) -> dict[str, Callable[[Path], object]]:
    """By name, what writes its file or folder to the path that it is given."""
    longer = vocabulary.extend(tokenizer, ["zq zq zq zq"], 1)
    pruned = vocabulary.prune(tokenizer, ["a b c"])
    seen = llama_fast.trace(model, "a b", tokenizer, layers=[0])
    turn = SimpleNamespace(message=SimpleNamespace(as_dict=lambda: {"role": "user"}), made=None)
    dialog = SimpleNamespace(chat=SimpleNamespace(turns=[turn]), session=SimpleNamespace(tokens=[]))
    adapted = Llama.from_pretrained(folder, device="cpu")
    adapter = lora(adapted, rank=2)
    when = {"date": "2026-11-30"}
    row = results.Row("a", "a", "s", samples={"eager": [1e-3]}, measured_with=when)
    data = source.Source(
        Path("a.txt"), "key", *map(torch.Tensor.numpy, torch.ones(5, 2, dtype=torch.int64)), ()
    )
    where = {"cpu": "a", "isa": "avx2", "gpus": [], "instructions": []}
    measured = results.Results(where, {"a": row})
    chip = SimpleNamespace(name="sm_90")
    kernel = SimpleNamespace(name="k", config="", amd=False, backend="triton", text="code")
    weights = SimpleNamespace(state=lambda: {"weights": torch.ones(3)})

    def session(path: Path) -> None:
        with Session(model, tokenizer) as talk:
            list(talk.stream("a b", max_new_tokens=1))
            save_session(talk, path)

    def state(path: Path) -> None:
        StateFile(path, {}).save(1, HISTORY, weights, torch.device("cpu"))

    def record(path: Path) -> None:
        with Record(path, HISTORY):
            pass

    def run(path: Path) -> None:
        begun = Run(path, {"--full": False})
        begun.make_folder()
        begun.begin()

    return {
        # files
        "tokenizer.model": tokenizer.save,
        "tokenizer.json": tokenizer.save_json,
        "chat --save-cache": session,
        "chat /save": lambda path: chat_commands.save_dialog(dialog, path),
        "--json": lambda path: units.write_json(path, {"a": 1}),
        "bench --json": lambda path: results.save(path, {}, [row]),
        "inspect --html": lambda path: page.write(path, seen),
        "profile --trace": lambda path: write_trace(lambda _: None, path, torch.device("cpu")),
        "loss.png": lambda path: plot_loss(HISTORY, path),
        # folders that are new
        "init": lambda path: write_random(path, TINY, format="hf"),
        "convert to meta": lambda path: convert(folder, path, "meta"),
        "convert to hf": lambda path: convert(folder, path, "hf"),
        "quantize": lambda path: quantize_folder(folder, path, "int8"),
        "vocab extend": lambda path: extend_folder(folder, longer, path),
        "vocab prune": lambda path: prune_folder(folder, pruned, path),
        "a LoRA": adapter.save,
        # folders that files are added to
        "training.pt": state,
        "log.csv": record,
        "run.json": run,
        "a reference": lambda path: reference._save(path / "r.safetensors", [torch.ones(2, 2)]),
        "a cache": lambda path: source._save(path / "entry.safetensors", data),
        "report": lambda path: write_report([measured], path, figures=False),
        "profile --dump": lambda path: profile_code._dump([kernel], chip, path),
    }  # fmt: skip


@pytest.fixture(params=WRITERS)
def write(request, writers) -> Callable[[Path], object]:
    assert [*writers] == [*WRITERS]
    if request.param == "loss.png":
        pytest.importorskip("matplotlib", reason="the loss curve needs matplotlib")
    return writers[request.param]


@pytest.fixture
def name(request) -> str:
    return request.node.callspec.params["write"]


def refused(write: Callable[[Path], object], path: Path, says: str) -> None:
    with pytest.raises(LlamaFastError, match=says) as raised:
        write(path)
    assert ".partial" not in str(raised.value)


def test_it_is_written_whole_and_again(write, name, tmp_path):
    target = tmp_path / "target"
    if name == "training.pt":
        target.mkdir()
    write(target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert not list(target.glob("**/.*"))
    if name in NEW_FOLDERS:
        before = {path: path.read_bytes() for path in target.iterdir()}
        refused(write, target, "is a folder that is not empty; give a new folder")
        assert before == {path: path.read_bytes() for path in target.iterdir()}
    else:
        write(target)
        assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_no_folder_is_made_above(write, tmp_path):
    refused(
        write, tmp_path / "no" / "such", "cannot be written: the folder .* does not exist; make"
    )
    assert not any(tmp_path.iterdir())


def test_a_file_stands_where_a_folder_should(write, name, tmp_path):
    (tmp_path / "file").write_text("kept")
    refused(write, tmp_path / "file" / "below", "is a file|does not exist")
    if name not in FILES:
        refused(write, tmp_path / "file", "is a file")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def test_no_file_takes_the_place_of_a_folder_or_a_device(write, name, tmp_path):
    if name in FILES:
        refused(write, tmp_path, "this is a folder; give the name of a file")
        refused(write, Path(os.devnull), "this is a device; give the name of a file")
        assert not any(tmp_path.iterdir()) and not Path(os.devnull).is_file()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc, which takes none")
def test_a_folder_that_takes_nothing(write, name):
    says = "does not exist" if name == "training.pt" else "nothing new can be written to /proc "
    refused(write, Path("/proc/target"), says)


def test_a_full_disk(write, name, tmp_path, monkeypatch):
    """What was there is there still, and nothing else."""
    target = tmp_path / "target"
    if name in FILES or name == "training.pt":
        target.mkdir() if name == "training.pt" else None
        write(target)

    def found() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = found()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        refused(write, target, "(?s)No space left on device.*[Mm]ake room")
    assert found() == before
    assert name not in NEW_FOLDERS or not any(tmp_path.iterdir())


def test_a_log_on_a_full_disk(tmp_path):
    """Its lines are added one by one, so each may be the one that there is no room for."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Record(tmp_path, HISTORY) as record:
        before = (tmp_path / CSV_FILE).read_bytes()
        file = record._file
        record._file = SimpleNamespace(name=file.name, flush=full, close=file.close)
        with pytest.raises(LlamaFastError, match=r"log\.csv cannot be written: No space left"):
            record.add(1, judged=False)
    assert before.count(b"\n") == 2 and (tmp_path / CSV_FILE).read_bytes().startswith(before)


def test_a_bench_says_before_it_measures_whose_results_are_there(tmp_path, run):
    file = tmp_path / "results.json"
    results.save(file, {"cpu": "another"}, [results.Row("a", "a", "s", samples={"eager": [1.0]})])
    before = file.read_bytes()
    arguments = ("bench", "rms_norm", "--shapes", "1b", "--work", "decode", "--backends", "eager")
    code, out, err = run(*arguments, "--rounds", 1, "--json", file)
    assert code == 1 and "holds another machine's results" in " ".join(err.split())
    assert not out and file.read_bytes() == before


# Command lines that write to X, and the name of the option. What they read is not there either, so
# they could not come to any work.
COMMANDS = (
    ("init X --preset 1b", ""),
    ("convert none X --to hf", ""),
    ("quantize none X", ""),
    ("vocab train none --out X", "--out"),
    ("vocab extend none none --out X", "--out"),
    ("vocab prune none none --out X", "--out"),
    ("vocab report none none --json X", "--json"),
    ("vocab report none none --plot X", "--plot"),
    ("finetune none none --out X", "--out"),
    ("finetune none none --cache X", "--cache"),
    ("chat --model none --save-cache X", "--save-cache"),
    ("inspect a --model none --html X", "--html"),
    ("bench none --json X", "--json"),
    ("profile none --json X", "--json"),
    ("profile none --trace X", "--trace"),
    ("profile none --arch sm_90 --dump X", "--dump"),
    ("report none --out X", "--out"),
    ("report none --write X", "--write"),
)


@pytest.mark.parametrize(("line", "option"), COMMANDS)
def test_commands_ask_before_any_work(run, tmp_path, line, option):
    target = tmp_path / "no" / "such"
    code, out, err = run(*(str(target) if word == "X" else word for word in line.split()))
    named = f"{option} {target}".strip()
    said = f"llama-fast: {named} cannot be written: the folder {target.parent} does not exist; make"
    assert code == 1 and not out and said in " ".join(err.split()), err
    assert not any(tmp_path.iterdir())


READ = set(
    "model adapter tools data source merge calibrate text texts tokenizer results corpus base "
    "vocab given".split()
)


def test_every_path_that_a_command_writes_is_asked_for():
    written, others = set(), set()
    commands = {command.__name__: command for command in app.COMMANDS}
    commands |= {f"vocab {command.__name__}": command for command in vocab.COMMANDS}
    for words, command in commands.items():
        for name, hint in get_type_hints(command, include_extras=True).items():
            if get_origin(hint) is not Annotated or "Path" not in str(get_args(hint)[0]):
                continue
            about = get_args(hint)[1]
            # typer takes the first of the names that are declared for a default.
            declared = [str(x) for x in (about.default, *(about.param_decls or ()))]
            options = [x for x in declared if x.startswith("--")] or [f"--{name}".replace("_", "-")]
            if about.callback is None:
                others.add(name)
            else:
                written.add((words, "" if isinstance(about, ArgumentInfo) else options[0]))
    tried = {(re.match(r"(vocab )?\w+", line)[0], option) for line, option in COMMANDS}
    assert written == tried and others == READ


OWN_PLACES = {
    ("utils/files.py", "mkdir"): "the helper itself",
    ("checkpoint/write.py", "write_text"): "in the folder that is being written",
    ("checkpoint/writers.py", "open"): "in the folder that is being written",
    ("training/record.py", "open"): "lines are added to a file that is there",
    ("cli/chat_screen.py", "mkdir"): "the user's own folder of settings",
    ("cli/streams.py", "open"): "the null device, in the place of a closed stream",
    ("bench/profile/cuda_code.py", "mkdir"): "build/ of a checkout",
    ("bench/memory.py", "write_text"): "Linux's /proc, which forgets the peak",
}
HELPERS = {"atomic_file", "atomic_folder", "writing", "TemporaryDirectory"}
WRITES = {"mkdir", "makedirs", "write_text", "write_bytes", "savefig", "save_file"}


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", None) or getattr(node.func, "id", "")


def _writes(node: ast.Call) -> bool:
    if _called(node) == "open":
        where = 1 if isinstance(node.func, ast.Name) else 0  # the function, or a path's method
        modes = [ast.unparse(argument) for argument in node.args[where : where + 1]]
        return any(set(str(mode)) & set("wax") for mode in modes)
    return _called(node) in WRITES or ast.unparse(node.func) == "torch.save"


def test_nothing_is_written_past_the_helpers():
    found = set()

    def look(node: ast.AST, file: str, inside: bool) -> None:
        if isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items]
            inside = inside or any(
                isinstance(call, ast.Call) and _called(call) in HELPERS for call in calls
            )
        if isinstance(node, ast.Call) and _writes(node) and not inside:
            found.add((file, _called(node)))
        for child in ast.iter_child_nodes(node):
            look(child, file, inside)

    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE).as_posix()
        look(ast.parse(path.read_text(encoding="utf-8")), file, False)
    assert found == OWN_PLACES.keys()
