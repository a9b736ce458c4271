"""The command line, as a user meets it: texts, exit codes, errors of one line, interruptions."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llama_fast import checkpoint, config, dispatch
from llama_fast.bench import machine, results
from llama_fast.checkpoint import open_checkpoint, write_random
from llama_fast.cli import app, main, measure, options
from llama_fast.config.quantization import NAMED
from llama_fast.generation.generate import generate
from llama_fast.generation.sampling import Sampling
from llama_fast.model import Llama
from llama_fast.tokenizer import Tokenizer

from .checkpoints import TINY, load

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder of random weights in Meta's format, with a tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    write_random(folder, TINY, format="meta")
    return folder


@pytest.fixture(autouse=True)
def one_thread():
    """These models are too small to share, and a busy machine makes threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(*arguments: object, stdout: int = subprocess.PIPE) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "llama_fast", *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


# --- help -------------------------------------------------------------------------------------


def test_help_and_tokenize_do_without_torch(tiny):
    code = (
        "import sys; from llama_fast.cli import main\n"
        f"codes = main(['--help']), main(['tokenize', 'a b', '--model', {str(tiny)!r}])\n"
        "print(codes, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "(0, 0) False", done.stderr


@pytest.mark.parametrize("name", [command.__name__ for command in app.COMMANDS])
def test_every_command_explains_itself(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert "Example: llama-fast " + name in " ".join(out.split())


@pytest.mark.parametrize(
    ("group", "name"),
    [(group, c.__name__) for group, module in app.GROUPS.items() for c in module.COMMANDS],
)
def test_every_command_of_a_group_explains_itself(run, group, name):
    code, out, _ = run(group, name, "--help")
    assert code == 0
    assert f"Example: llama-fast {group} {name}" in " ".join(out.split())
    code, out, _ = run(group, "--help")
    assert code == 0 and name in out and f"Example: llama-fast {group} " in " ".join(out.split())


def test_no_arguments_show_the_help_and_version_the_version(run):
    code, out, _ = run()
    assert code == 0 and all(command.__name__ in out for command in app.COMMANDS)
    assert run("--version")[:2] == (0, "llama-fast 0.1.0\n")


def test_choices_are_the_library_s():
    assert [backend.value for backend in options.Backend] == list(dispatch.BACKENDS)
    assert [named.value for named in options.Named] == list(NAMED)
    assert [dtype.torch for dtype in options.DType] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]


# --- generate ---------------------------------------------------------------------------------


def test_generate_writes_what_the_library_generates(run, tiny):
    (expected,) = generate(
        Llama.from_pretrained(tiny, device="cpu"),
        Tokenizer.from_pretrained(tiny),
        "a prompt",
        max_new_tokens=12,
        seed=5,
        temperature=0.9,
        top_k=40,
        top_p=0.8,
    )
    code, out, _ = run(
        *("generate", "a prompt", "--model", tiny, "--max-new-tokens", 12, "--seed", 5),
        *("--temperature", 0.9, "--top-k", 40, "--top-p", 0.8, "--device", "cpu"),
    )
    assert code == 0 and out == expected.text + "\n", "no prompt where nobody watches"


def test_generate_shows_the_prompt_on_a_terminal(run, tiny, monkeypatch):
    command = ("generate", "a prompt", "-m", tiny, "-n", 4, "--temperature", 0)
    text = run(*command)[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("llama_fast.cli.terminal.LONGEST_PROMPT", 6)
    shown = run(*command)[1]
    assert "a prompt" not in shown and "… prompt" in shown and shown.endswith(text)
    assert run(*command, "--quiet")[1] == shown


def test_generate_ends_with_the_figures(run, tiny, monkeypatch):
    monkeypatch.setattr("llama_fast.bench.roofline.read_bandwidth", lambda device: 8e9)
    code, _, err = run("generate", "abc", "-m", tiny, "-n", 8, "--temperature", 0)
    assert code == 0
    assert re.search(r"^weights +[\d.]+ kB in bfloat16, loaded in [\d.]+ s$", err, re.M)
    assert re.search(r"^first token +[\d.]+ s after a prompt of \d+ tokens$", err, re.M)
    assert re.search(
        r"^decode .*\d tokens/s, \d+% of the memory bandwidth \(.*/s of 8 GB/s\)$", err, re.M
    )
    assert re.search(r"^peak memory +\d+ MB|[\d.]+ GB$", err, re.M)
    served = re.search(r"^backends +(.*)$", err, re.M)[1]
    for op in ("rms_norm", "linear", "kv_append", "attention", "add_rms_norm", "linear swiglu"):
        assert re.search(rf"\b{op}\b", served), served


def test_generate_on_a_backend_is_served_by_it_alone(run, tiny):
    code, _, err = run("generate", "abc", "-m", tiny, "-n", 2, "--backend", "eager")
    assert code == 0
    assert re.search(r"^backends +eager: [a-z_, ]+$", err, re.M)


def test_generate_quiet_writes_the_text_alone(run, tiny):
    code, out, err = run("generate", "abc", "-m", tiny, "-n", 2, "--quiet")
    assert code == 0 and out and err == ""


def test_generate_reads_a_pipe_without_its_last_line_end(run, tiny):
    command = ("generate", "-m", tiny, "-n", 6, "--temperature", 0, "-q")
    expected = run(*command, "two\nlines ")[1]
    assert run(*command, stdin=b"two\nlines \n") == (0, expected, "")


def test_generate_stops_before_a_stop_text(run, tiny):
    command = ("generate", "abc", "-m", tiny, "-n", 30, "--seed", 1, "-q")
    text = run(*command)[1].rstrip("\n")
    stop = text[len(text) // 2 :][:3]
    code, out, _ = run(*command, "--stop", "never seen", "--stop", stop)
    assert code == 0 and out == text[: text.index(stop)] + "\n"


def test_generate_stops_before_a_special_token(run, tiny, monkeypatch):
    command = ("generate", "abc", "-m", tiny, "-n", 30, "--seed", 1, "-q")
    text = run(*command)[1].rstrip("\n")
    name, calls = "<|reserved_special_token_3|>", []
    id_ = Tokenizer.from_pretrained(tiny).specials[name]
    sample = Sampling.sample

    def third(*args):
        calls.append(1)
        return sample(*args) if len(calls) < 3 else torch.tensor([id_])

    monkeypatch.setattr(Sampling, "sample", third)
    code, out, _ = run(*command, "--stop", name)
    assert code == 0 and len(calls) == 3 and text.startswith(out.rstrip("\n"))


def test_generate_says_why_no_token_can_be_drawn(run, tiny, tmp_path):
    model = Llama.from_pretrained(tiny, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for weight in model.layers[0].mlp.parameters():
            weight.mul_(20000)
    model.save_pretrained(tmp_path / "large", format="meta")
    shutil.copy(tiny / "tokenizer.model", tmp_path / "large")
    command = ("generate", "abc", "-m", tmp_path / "large", "-n", 3, "-q")
    assert run(*command)[0] == 0
    code, out, err = run(*command, "--dtype", "float16")
    assert code == 1 and out == "\n" and err.count("\n") == 1
    assert "token 1 of prompt 0" in err and "--dtype bfloat16" in err


def test_generate_converts_the_weights_and_shortens_the_context(run, tiny):
    code, _, err = run(
        "generate", "abc", "-m", tiny, "-n", 100, "--dtype", "float32", "--max-seq-len", 12,
        "--seed", 0,
    )  # fmt: skip
    assert code == 0 and "in float32" in err
    prompt, new = (int(re.search(p, err)[1]) for p in (r"of (\d+) tokens", r"(\d+) new tokens"))
    assert prompt + new == 12


def test_generate_quantises_the_weights_as_it_reads_them(run, tiny):
    (expected,) = generate(
        Llama.from_pretrained(tiny, device="cpu", quantize="int4"),
        Tokenizer.from_pretrained(tiny),
        "abc",
        max_new_tokens=8,
        temperature=0,
    )
    command = ("generate", "abc", "-m", tiny, "-n", 8, "--temperature", 0, "--quantize", "int4")
    code, out, err = run(*command)
    assert code == 0 and out == expected.text + "\n"
    weights = re.search(r"^weights +([\d.]+) kB in int4, computing in bfloat16", err, re.M)
    parts = [t.nbytes for name, t in Llama.from_pretrained(tiny, quantize="int4", device="cpu")
             .state_dict().items() if not name.startswith("head.")]  # fmt: skip
    assert float(weights[1]) == pytest.approx(sum(parts) / 1000, rel=0.01)
    assert "linear int4" in err and "linear swiglu int4" in err


def test_generate_with_a_cache_of_integers(run, tiny):
    (expected,) = generate(
        Llama.from_pretrained(tiny, device="cpu"),
        Tokenizer.from_pretrained(tiny),
        "abc",
        max_new_tokens=8,
        temperature=0,
        kv_cache="int8",
    )
    command = ("generate", "abc", "-m", tiny, "-n", 8, "--temperature", 0)
    code, out, err = run(*command, "--kv-cache", "int8")
    assert code == 0 and out == expected.text + "\n"
    assert "attention int8" in err and "kv_append int8" in err
    assert "attention int8" not in run(*command)[2]


def test_generate_sets_the_number_of_threads(run, tiny):
    assert run("generate", "abc", "-m", tiny, "-n", 1, "-q", "--threads", 3)[0] == 0
    assert torch.get_num_threads() == 3


def test_generate_without_a_model_takes_the_demo(run, tiny, monkeypatch):
    monkeypatch.setattr(options, "DEMO", tiny)
    command = ("generate", "abc", "-n", 4, "--temperature", 0, "-q")
    assert run(*command) == run(*command, "--model", tiny)


def test_bytes_of_a_token_count_one_row_of_an_untied_embedding():
    shape = {**TINY.__dict__, "tied": False}
    llama = Llama(config.LlamaConfig(**shape), dtype=torch.bfloat16)
    all_weights, embedding = 2 * llama.config.n_params, 2 * 600 * 32
    cache = 10 * 2 * 2 * 2 * 2 * 8  # tokens, k and v, layers, heads, bytes, head dim
    assert measure.bytes_per_token(llama, 10) == all_weights - embedding + 2 * 32 + cache
    tied = Llama(TINY, dtype=torch.bfloat16)
    assert measure.bytes_per_token(tied, 10) == 2 * TINY.n_params + cache
    coded = 10 * 2 * 2 * 2 * (8 + 4)  # a byte an element, and a scale a head
    assert measure.bytes_per_token(tied, 10, "int8") == 2 * TINY.n_params + coded


# --- streams ----------------------------------------------------------------------------------

NARROW = {
    "help": ["--help"],
    "generate": ["generate", "从前 é", "-m", "{tiny}", "-n", 3],
    "info": ["info", "{tiny}"],
    "tokenize": ["tokenize", "从前 é"],
    "convert": ["convert", "{tiny}", "{tmp}/从前", "--to", "hf"],
    "quantize": ["quantize", "{tiny}", "{tmp}/从前", "--report", "--text", "{text}"],
    "init": ["init", "{tmp}/从前", "--preset", "1b"],
    "doctor": ["doctor"],
    "explain": ["explain", "attention"],
    "bench": ["bench", "rms_norm", "--shapes", "1b", "--work", "decode", "--json", "{results}"],
    "profile": ["profile", "rms_norm", "--shape", "1b", "--repeats", "1"],
    "report": ["report", "{results}", "--out", "{tmp}/从前", "--no-figures"],
    "error": ["info", "{tmp}/从前"],
}


@pytest.fixture
def small_shapes(monkeypatch):
    """Sizes and times that take a moment."""
    monkeypatch.setitem(config.PRESETS, "1b", TINY)
    monkeypatch.setattr("llama_fast.bench.roofline.BYTES", 2**20)
    monkeypatch.setattr("llama_fast.bench.roofline.SECONDS", 0.001)
    monkeypatch.setattr("llama_fast.bench.measure.SAMPLE", 1e-4)
    monkeypatch.setattr("llama_fast.bench.baselines.COMPILED", "none")  # compiling takes long


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("command", NARROW)
def test_output_that_an_encoding_cannot_hold_is_replaced(
    tiny, tmp_path, monkeypatch, small_shapes, command, encoding
):
    text, results_file = tmp_path / "text.txt", tmp_path / "results.json"
    text.write_text("从前 " * 80, encoding="utf-8")
    if command == "report":
        recorded = next((ROOT / "benchmarks" / "results").glob("*.json"))
        shutil.copy(recorded, results_file)
    places = {"tiny": tiny, "tmp": tmp_path, "text": text, "results": results_file}
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)
        for errors in ("strict", "backslashreplace")
    )
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    code = main([str(word).format(**places) for word in NARROW[command]])
    out.flush(), err.flush()
    said = out.buffer.getvalue().decode(encoding)
    assert code == (1 if command == "error" else 0), (said, err.buffer.getvalue())
    assert said or command in ("convert", "init", "error")
    if command in ("tokenize", "report", "bench"):
        assert ("?" in said) == (command != "bench" or encoding == "ascii")  # cp1252 has µ and ×
    assert out.errors == "strict"  # as it was


def test_another_way_with_characters_is_kept(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["tokenize", "从前"]) == 0
    out.flush()
    assert b"\\u4ece" in out.buffer.getvalue()


@pytest.mark.parametrize("command", ["help", "info", "tokenize", "explain", "generate", "error"])
@pytest.mark.parametrize("how", ["none", "closed"])
def test_closed_streams_are_quiet(tiny, tmp_path, monkeypatch, command, how):
    for name in ("stdout", "stderr"):
        stream = None
        if how == "closed":
            stream = io.TextIOWrapper(io.BytesIO())
            stream.close()
        monkeypatch.setattr(sys, name, stream)
    places = {"tiny": tiny, "tmp": tmp_path}
    words = [str(word).format(**places) for word in NARROW[command]]
    assert main(words) == (1 if command == "error" else 0)
    assert sys.stdout is None or sys.stdout.closed


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_process_whose_streams_are_closed(tiny, tmp_path):
    """What is opened later does not take the number of a stream, and nothing is complained of."""
    program = f"'{sys.executable}' -m llama_fast"
    write = f"{program} convert {tiny} {tmp_path}/new --to hf >&- 2>{tmp_path}/err"
    assert subprocess.run(["bash", "-c", write], cwd=ROOT).returncode == 0
    assert "wrote" in (tmp_path / "err").read_text()
    assert open_checkpoint(tmp_path / "new").config == TINY
    done = subprocess.run(
        ["bash", "-c", f"{program} tokenize a -m {tiny} <&- >&- 2>&-"],
        cwd=ROOT,
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line(tiny):
    with open("/dev/full", "wb") as full:
        process = start("tokenize", "a b", "-m", tiny, stdout=full.fileno())
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.decode().splitlines()[-1] == "llama-fast: No space left on device"


MARK = "\ufeff"


def test_a_byte_order_mark_is_no_part_of_a_text(run, tiny, tmp_path):
    plain = run("tokenize", "a b", "-m", tiny, "--ids")[1]
    assert run("tokenize", MARK + "a b", "-m", tiny, "--ids")[1] == plain
    marked = (MARK + "a b\r\n").encode()
    assert run("tokenize", "-m", tiny, "--ids", stdin=marked)[1] == plain
    same = ["-m", tiny, "-n", 4, "--seed", 1, "-q"]
    text = run("generate", "a b", *same)[1]
    assert run("generate", *same, stdin=marked)[1] == text
    assert run("generate", MARK, *same)[2] == run("generate", "", *same)[2]
    first, second = tmp_path / "plain.txt", tmp_path / "marked.txt"
    first.write_text("a b c " * 40, encoding="utf-8")
    second.write_text(MARK + "a b c " * 40, encoding="utf-8")
    for name in (first, second):
        assert run("quantize", tiny, name.with_suffix(""), "--calibrate", name)[0] == 0
    weights = [
        (name.with_suffix("") / "model.safetensors").read_bytes() for name in (first, second)
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("command", ["convert", "quantize", "init"])
def test_a_pipe_gets_lines_of_progress(run, tiny, tmp_path, monkeypatch, small_shapes, command):
    monkeypatch.setattr("llama_fast.cli.terminal.LINE_SECONDS", 0)
    words = [word.format(tiny=tiny, tmp=tmp_path, text=tiny / "params.json")
             for word in NARROW[command]]  # fmt: skip
    code, _, err = run(*words)
    assert code == 0
    shares = [int(found) for found in re.findall(r"^Writing 从前: (\d+)% of [\d.]+ kB$", err, re.M)]
    assert len(shares) >= 5 and shares == sorted(shares) and shares[-1] > 80
    assert not re.search(r"[^\n -~]", err.replace("从前", ""))  # no control characters
    monkeypatch.setattr("llama_fast.cli.terminal.LINE_SECONDS", 3600)
    shutil.rmtree(tmp_path / "从前")
    assert run(*words)[2].count("%") == 1 + (command == "quantize")  # how it begins


def test_a_model_that_is_loaded_in_a_pipe_is_quiet(run, tiny, monkeypatch):
    monkeypatch.setattr("llama_fast.cli.terminal.LINE_SECONDS", 0)
    assert run("generate", "a", "-m", tiny, "-n", 1, "-q")[2] == ""


# --- errors -----------------------------------------------------------------------------------

BAD = {
    "empty prompt": (["generate", "", "-m", "{tiny}"], 1, "the prompt is empty"),
    "long prompt": (["generate", "ab " * 200, "-m", "{tiny}"], 1, "the model's context is 96"),
    "missing folder": (["generate", "a", "-m", "{tmp}/none"], 1, "does not exist"),
    "model is a file": (["generate", "a", "-m", "{tiny}/params.json"], 1, "is a file"),
    "no checkpoint": (["generate", "a", "-m", "{tmp}"], 1, "holds no checkpoint"),
    "no demo": (["generate", "a"], 1, "give the folder of a model with --model DIR"),
    "negative count": (["generate", "a", "-n", "-1"], 2, "-1 is too small; write 1 or more"),
    "negative temperature": (["generate", "a", "--temperature", "-1"], 2, "--temperature"),
    "negative seed": (["generate", "a", "--seed", "-1"], 2, "--seed"),
    "top-p zero": (["generate", "a", "-m", "{tiny}", "--top-p", "0"], 1, "top_p is 0"),
    "kv cache": (["generate", "a", "-m", "{tiny}", "--kv-cache", "int4"], 2, "--kv-cache"),
    "empty stop": (["generate", "a", "-m", "{tiny}", "--stop", ""], 1, "not empty"),
    "no number": (["generate", "a", "-n", "many"], 2, "'many' is no whole number"),
    "top-p two": (["generate", "a", "--top-p", "2"], 2, "2 is too large; write 1 or less"),
    "temperature": (["generate", "a", "--temperature", "hot"], 2, "'hot' is no number"),
    "seed": (["generate", "a", "--seed", f"{2**32}"], 2, "write 4294967295 or less"),
    "unknown backend": (["generate", "a", "--backend", "tpu"], 2, "'cpu', 'cuda', 'triton'"),
    "backend elsewhere": (
        ["generate", "a", "-m", "{tiny}", "--device", "cpu", "--backend", "triton"],
        1,
        "does not run on device cpu, which has cpu, eager",
    ),
    "unknown device": (["generate", "a", "-m", "{tiny}", "--device", "tpu"], 1, "auto, cpu, cuda"),
    "unknown dtype": (["generate", "a", "--dtype", "int3"], 2, "bfloat16"),
    "context too long": (["generate", "a", "-m", "{tiny}", "--max-seq-len", "97"], 1, "is 96"),
    "no threads": (["generate", "a", "--threads", "0"], 2, "--threads"),
    "unknown option": (["generate", "a", "--frob"], 2, "--frob"),
    "unknown command": (["frob"], 2, "there are generate, chat"),
    "no size": (["init", "{tmp}/new"], 2, "example: llama-fast init --preset 1b"),
    "no results": (["report"], 2, "example: llama-fast report results.json"),
    "results not there": (["report", "{tmp}/r.json"], 1, "llama-fast bench --json"),
    "info of nothing": (["info", "9b"], 1, "the presets are 1b"),
    "tokenize without a file": (["tokenize", "a", "-m", "{tmp}"], 1, "tokenizer.json"),
    "tokenize no text": (["tokenize", "a\udc80", "-m", "{tiny}"], 1, "lone surrogate"),
    "convert nothing": (["convert", "{tmp}/none", "{tmp}/new", "--to", "hf"], 1, "not exist"),
    "convert onto": (["convert", "{tiny}", "{tiny}", "--to", "hf"], 1, "not empty"),
    "convert unwritable": (
        ["convert", "{tiny}", "{tiny}/params.json/new", "--to", "hf"],
        1,
        "cannot be written",
    ),
    "convert to what": (["convert", "{tiny}", "{tmp}/new"], 2, "--to"),
    "convert to gguf": (["convert", "{tiny}", "{tmp}/new", "--to", "gguf"], 2, "'hf', 'meta'"),
    "convert files to hf": (
        ["convert", "{tiny}", "{tmp}/new", "--to", "hf", "--files", "2"],
        2,
        "--to meta",
    ),
    "convert uneven": (
        ["convert", "{tiny}", "{tmp}/new", "--to", "meta", "--files", "3"],
        1,
        "divide n_heads=4",
    ),
    "init unknown": (["init", "{tmp}/new", "--preset", "9b"], 1, "there is no preset '9b'"),
    "init onto": (["init", "{tiny}", "--preset", "1b"], 1, "not empty"),
    "init no tokenizer": (
        ["init", "{tmp}/new", "--preset", "1b", "--tokenizer", "{tiny}/params.json"],
        1,
        "not a byte-level BPE tokenizer.json",
    ),
    "bench unknown": (
        ["bench", "conv"],
        1,
        "there is no op conv; write one or several of rms_norm",
    ),
    "bench work": (["bench", "--work", "chat"], 2, "one or several of decode,prefill,training"),
    "bench backends": (
        ["bench", "rms_norm", "--backends", "cuda", "--device", "cpu"],
        1,
        "tensors on cpu are served by cpu, eager; give --backends cpu,eager",
    ),
    "explain unknown": (["explain", "conv"], 1, "there is no op 'conv'; write one of rms_norm"),
    "explain shape": (["explain", "rope", "--shape", "9b"], 1, "135m is a small one"),
    "bench shape": (["bench", "--shapes", "9b"], 1, "there is no preset '9b'"),
    "doctor arch": (["doctor", "--arch", "sm_90"], 2, "llama-fast doctor --resources --arch sm_90"),
    "bench device": (["bench", "--device", "tpu"], 1, "--device is 'tpu'"),
    "profile unknown": (
        ["profile", "conv"],
        1,
        "write decode, prefill, train, or one of the ops rms_norm",
    ),
    "profile shape": (["profile", "decode", "--shape", "9b"], 1, "there is no preset '9b'"),
    "profile tokens": (["profile", "decode", "--tokens", "2"], 2, "profile prefill --tokens 2"),
    "profile context": (["profile", "train", "--context", "2"], 2, "profile decode --context 2"),
    "profile layers": (["profile", "rope", "--layers", "2"], 2, "profile decode --layers 2"),
    "profile quantize": (
        ["profile", "train", "--quantize", "int4"],
        2,
        "or profile decode, prefill or an op",
    ),
    "profile backend": (
        ["profile", "rope", "--device", "cpu", "--backend", "triton"],
        1,
        "does not run on device cpu, which has cpu, eager",
    ),
    "profile arch": (["profile", "rope", "--arch", "sm_75"], 1, "write one of sm_80, sm_86"),
    "profile arch model": (["profile", "decode", "--arch", "90", "-m", "x"], 2, "--shape 8b"),
    "profile arch backend": (
        ["profile", "rope", "--arch", "90", "--backend", "cpu"],
        2,
        "cpu has no code for sm_90; triton and cuda have. Write: --backend triton",
    ),
    "profile dump": (["profile", "rope", "--dump", "x"], 2, "profile rope --arch sm_90 --dump DIR"),
    "profile ncu": (["profile", "rope", "--arch", "gfx942", "--ncu"], 1, "gfx942 is AMD's"),
    "profile gradient": (
        ["profile", "kv_append", "--backward"],
        1,
        "has no gradient; leave --backward out, or take rope",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_an_exit_code(run, tiny, tmp_path, monkeypatch, case):
    monkeypatch.setattr(options, "DEMO", tmp_path / "no demo")
    arguments, code, needle = BAD[case]
    found, out, err = run(*(a.format(tiny=tiny, tmp=tmp_path) for a in arguments))
    assert (found, out) == (code, "")
    assert err.startswith("llama-fast: ") and err.count("\n") == 1 and needle in err, err
    assert not list(tmp_path.iterdir())


def test_a_pipe_that_is_not_utf8_is_refused(run, tiny):
    code, _, err = run("generate", "-m", tiny, stdin=b"caf\xe9")
    assert code == 1 and "standard input is not UTF-8 (byte 3)" in err


def test_an_empty_pipe_is_refused(run, tiny):
    code, _, err = run("generate", "-m", tiny, stdin=b"\n")
    assert code == 1 and "the prompt is empty" in err


@pytest.mark.parametrize("command", ["generate", "tokenize"])
def test_a_terminal_is_not_waited_for(run, tiny, monkeypatch, command):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    code, _, err = run(command, "-m", tiny)
    assert code == 1 and err.count("\n") == 1
    assert f'llama-fast {command} "Once upon a time"' in err


def test_debug_shows_the_traceback(run, tmp_path):
    for arguments in (["--debug", "info", tmp_path], ["info", tmp_path, "--debug"]):
        code, _, err = run(*arguments)
        assert code == 1
        assert "Traceback" in err and "in open_checkpoint" in err
        assert err.splitlines()[-1].startswith("llama-fast: ")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("of\nsome sort"), "unexpected RuntimeError: of some sort; --debug shows"),
        (PermissionError(13, "Permission denied", "/x"), "Permission denied: /x"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "not enough memory"),
    ],
)
def test_any_error_is_one_line(run, tiny, monkeypatch, error, text):
    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint, "open_checkpoint", fail)
    code, _, err = run("info", tiny)
    assert code == 1 and err.count("\n") == 1 and text in err


def test_warnings_are_one_line(run, tiny, tmp_path):
    both = tmp_path / "both"
    assert run("convert", tiny, both, "--to", "hf")[0] == 0
    for name in ("params.json", "consolidated.00.pth"):
        shutil.copy(tiny / name, both)
    code, _, err = run("info", both)
    assert code == 0 and err.count("\n") == 1
    assert err.startswith("llama-fast: note: ") and "holds both formats" in err


# --- interruptions ----------------------------------------------------------------------------


def test_ctrl_c_keeps_what_was_generated(tmp_path):
    folder = tmp_path / "long"
    write_random(folder, config.LlamaConfig(**{**TINY.__dict__, "max_seq_len": 100_000}))
    running = start("generate", "abc", "-m", folder, "-n", 90_000, "--temperature", 0)
    first = running.stdout.read(4)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert first and out.endswith(b"\n")
    assert re.fullmatch(rb"llama-fast: interrupted after \d+ tokens\n", err), err


def test_ctrl_c_while_libraries_load_is_clean(tiny):
    running = start("generate", "abc", "-m", tiny)
    time.sleep(1)
    running.send_signal(signal.SIGINT)
    err = running.communicate(timeout=60)[1]
    if running.returncode == 0:
        pytest.skip("this machine was done before it could be interrupted")
    assert running.returncode in (130, -signal.SIGINT)  # the latter before Python has begun
    assert b"Traceback" not in err or running.returncode < 0, err


def test_an_interrupted_write_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(config.PRESETS, "1b", TINY)
    monkeypatch.setattr("llama_fast.checkpoint.random._fill", interrupt)
    code, out, err = run("init", tmp_path / "new", "--preset", "1b")
    assert (code, out, err) == (130, "", "llama-fast: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_is_no_error(tiny):
    reader, writer = os.pipe()
    os.close(reader)
    running = start("tokenize", "a b c", "-m", tiny, stdout=writer)
    os.close(writer)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 141 and b"Error" not in err and b"Exception" not in err, err


# --- the other commands -----------------------------------------------------------------------


def test_info_of_a_folder(run, tiny):
    code, out, err = run("info", tiny)
    words = " ".join(out.split())
    assert (code, err) == (0, "")
    assert "(Meta's format)" in out and f"{TINY.n_params:,}, stored in bfloat16" in out
    for name in ("params.json", "consolidated.00.pth", "tokenizer.model"):
        assert name in out
    assert "4 query (H), 2 key and value (K), 8 wide (D)" in words and "96 tokens" in words


def test_info_lists_the_model_s_files_alone(run):
    code, out, _ = run("info")
    files = out.partition("Files")[2].partition("Memory")[0].split()
    assert code == 0 and {"params.json", "consolidated.00.pth", "tokenizer.model"} <= set(files)
    assert not [name for name in files if name.endswith((".py", ".md", ".png"))]
    assert "metrics.json" not in files and "stories.json" not in files


def test_sizes_for_a_laptop(run):
    words = " ".join(run("info", "135m")[1].split())
    assert "parameters 134,515,008" in words and "head: the embedding itself" in words


def test_info_of_a_published_size(run):
    words = " ".join(run("info", "Llama-3.1-8B")[1].split())
    assert "parameters 8,030,261,248" in words and "131,072 tokens" in words
    # 16.06 GB of weights, and 131,072 bytes a token: 0.27, 1.07, 4.29 and 17.2 GB
    assert "bfloat16, float16 16.1 GB 16.3 GB 17.1 GB 20.4 GB 33.2 GB" in words
    # 2 · 32 layers · 8 heads · (128 + 4) bytes
    assert "int8 (--kv-cache int8) 67.6 kB 138 MB 554 MB 2.21 GB 8.86 GB" in words


def test_tokenize(run, tiny):
    tokenizer = Tokenizer.from_pretrained(tiny)
    text = "hé <|eot_id|>"
    code, out, err = run("tokenize", text, "-m", tiny)
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert code == 0 and [int(id_) for id_, _ in lines] == tokenizer.encode(text)
    assert [lines[0][1], lines[1][1]] == ["'h'", r"b'\xc3'"]
    assert err == f"{len(lines)} tokens of {len(text)} characters\n"
    special = tokenizer.encode(text, allowed_special="all")
    assert tokenizer.eot_id in special
    expected = (0, " ".join(map(str, special)) + "\n", "")
    assert run("tokenize", text, "-m", tiny, "--ids", "--special") == expected
    assert run("tokenize", "-m", tiny, "--ids", "--special", stdin=text.encode()) == expected


def test_convert_there_and_back(run, tiny, tmp_path):
    code, out, err = run("convert", tiny, tmp_path / "hf", "--to", "hf")
    assert (code, out) == (0, "")
    assert re.fullmatch(
        r"(Writing hf: \d+% of 69.4 kB\n)+wrote .*hf: 5 files, [\d.]+ kB in [\d.]+ s\n", err
    ), err
    back = tmp_path / "meta"
    assert run("convert", tmp_path / "hf", back, "--to", "meta", "--files", 2)[0] == 0
    assert (back / "consolidated.01.pth").exists() and (back / "tokenizer.model").exists()
    first, second = load(open_checkpoint(tiny)), load(open_checkpoint(back))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert run("convert", tiny, tmp_path / "f32", "--to", "hf", "--dtype", "float32")[0] == 0
    assert open_checkpoint(tmp_path / "f32").dtype == torch.float32


def test_init_writes_the_same_random_weights_in_both_formats(run, tmp_path, monkeypatch):
    monkeypatch.setitem(config.PRESETS, "1b", TINY)
    monkeypatch.setattr("llama_fast.checkpoint.random.BLOCK", 1000)
    states = []
    for name, more in (
        ("a", ["--format", "hf"]),
        ("b", ["--format", "meta"]),
        ("c", ["--seed", 1, "--dtype", "float32"]),
    ):
        code, _, err = run("init", tmp_path / name, "--preset", "1b", *more)
        assert code == 0 and "made up" in err
        states.append(load(open_checkpoint(tmp_path / name)))
    first, second, other = states
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert other["embed.weight"].dtype == torch.float32
    assert not torch.equal(first["embed.weight"], other["embed.weight"].bfloat16())
    assert (first["norm.weight"] == 1).all()
    for name, std in (("embed.weight", 0.02), ("layers.1.mlp.down.weight", 0.01)):
        weight = first[name].double()
        assert weight.std().item() == pytest.approx(std, rel=0.1)
        assert weight.mean().abs() < 0.1 * std
        assert weight.unique().numel() > 200  # no block repeats another
    assert Tokenizer.from_pretrained(tmp_path / "b").vocab_size == TINY.vocab_size
    code, out, _ = run("generate", "any text", "-m", tmp_path / "a", "-n", 3, "-q")
    assert code == 0 and out


def test_init_copies_a_tokenizer(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(config.PRESETS, "1b", TINY)
    file = tiny / "tokenizer.model"
    code, _, err = run("init", tmp_path / "new", "--preset", "1b", "--tokenizer", file)
    assert code == 0 and "made up" not in err
    assert (tmp_path / "new" / "tokenizer.model").read_bytes() == file.read_bytes()


def test_doctor_names_every_op_and_is_content(run):
    code, out, _ = run("doctor")
    assert code == 0, out
    assert torch.__version__ in out and "is usable on this machine" in out
    assert machine.describe(None)["cpu"] in out and "ImportError" not in out
    assert out.count("eager could serve") == 1 and "next in line" not in out
    if not torch.cuda.is_available():
        assert not re.search(r"^ triton +available", out, re.M)
    for name, op in dispatch.OPS.items():
        if op.cases is not None:
            labels = {name, *(f"{name} int8" for _ in ["a form"] if op.variant)}
            for label in labels:
                assert re.search(rf"^ *{label} +({'|'.join(dispatch.BACKENDS)})\b", out, re.M), (
                    label
                )


def test_doctor_says_what_is_wrong(run, monkeypatch):
    broken = dispatch.Backend("cpu", ["the module is made of cheese"], {})
    monkeypatch.setitem(dispatch.backends(), "cpu", broken)
    for op in dispatch.OPS.values():
        op.forget_order()
    try:
        code, out, _ = run("doctor")
    finally:
        for op in dispatch.OPS.values():
            op.forget_order()
    assert code == 1
    assert "made of cheese" in out and "PROBLEM: the C++ kernels" in out
    assert "is usable" not in out


@pytest.mark.filterwarnings("ignore::llama_fast.errors.FallbackWarning")
def test_doctor_says_once_which_gpu_a_backend_does_not_serve(run, monkeypatch):
    """Here a device of the CPU stands for a GPU, with a driver that is too old."""
    from llama_fast.cli import doctor

    why = "the driver here is made of cheese"
    before = dispatch.backends()["cpu"]
    refused = {"refuses": lambda device: [why]}
    rows = {
        name: row._replace(unsupported=lambda *args: [why])
        for name, row in before.implementations.items()
    }
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(doctor, "_machine", list)
    monkeypatch.setattr(doctor, "BUILT", {})
    broken = dataclasses.replace(before, implementations=rows, **refused)
    dispatch.register_backend(broken)
    try:
        code, out, _ = run("doctor")
    finally:
        dispatch.register_backend(before)
    assert code == 0 and " ".join(out.split()).count(why) == 1, out
    assert re.search(rf"cpu +available.*; not on cuda:0: {why}", " ".join(out.split()))
    assert re.search(r"^ *rms_norm +eager\b", out, re.M)


def test_bench_shows_the_roofline(run, monkeypatch):
    from llama_fast.bench import roofline

    found = roofline.Roofline("cpu", 3, "avx9", 1.5e9, 2.5e9, 3.5e9, None)
    monkeypatch.setattr(roofline, "measure", lambda device: found)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, out, _ = run("bench", "--ceilings")
    assert code == 0 and "CPU, 3 threads, avx9" in out
    words = " ".join(out.split())
    assert "memory read 1.5 GB/s" in words and "float32 multiply-add 3.5 GFLOP/s" in words
    assert "bfloat16" not in words


def test_bench_times_the_ops(run, monkeypatch, tmp_path):
    from llama_fast.bench import measure as speed
    from llama_fast.bench import roofline

    found = roofline.Roofline("cpu", 1, "avx9", 1e9, 2e9, 3e9, None)
    monkeypatch.setattr(roofline, "measure", lambda device: found)
    monkeypatch.setattr(config.LlamaConfig, "preset", lambda name: TINY)
    monkeypatch.setattr(speed, "SAMPLE", 1e-4)
    file = tmp_path / "speed.json"
    code, out, err = run(
        *("bench", "swiglu", "linear", "--work", "decode,prefill", "--tokens", 5),
        *("--keys", 9, "--rounds", 2, "--backends", "eager,cpu,cuda", "--json", file),
    )
    assert code == 0
    decode, prefill = out.split("prefill, 5 tokens of 1b, bfloat16, on cpu (1 thread, avx9)\n")
    assert decode.startswith("decode, 1 token, 9 keys of 1b, bfloat16, on cpu (1 thread, avx9)\n")
    for part in (decode, prefill):
        assert re.search(r"^ swiglu +eager +[\d.,]+ µs +\d+%", part, re.M)
        assert re.search(r"^ linear head int4 +cpu +[\d.,]+ µs +\d+%", part, re.M)
    assert all(line == line.rstrip() for line in out.splitlines())
    assert err.count("cuda cannot serve it: ") == 1, "once for all calls"
    assert re.search(r"swiglu, linear .* and \d+ others: ", err)
    assert f"Next: llama-fast report {file}" in err
    found = results.load(file)
    assert found.machine["isa"] == "avx9" and len(found.rows) == 2 * (1 + 18)
    for row in found.rows.values():
        assert row.measured_with["versions"]["torch"] and row.measured_with["threads"] == 1
        assert set(row.samples) == {"eager", "cpu"} == set(row.errors)
        assert len(row.samples["cpu"]) == 2 and row.seconds("cpu") > 0 and row.errors["cpu"] < 0.02
        assert row.at_best is None or row.share("cpu") > 0
        assert row.times("eager", "eager") == 1.0


def test_bench_times_gradients_peers_and_several_lengths(run, monkeypatch, tmp_path):
    from llama_fast.bench import baselines, roofline
    from llama_fast.bench import measure as speed

    found = roofline.Roofline("cpu", 1, "avx9", 1e9, 2e9, 3e9, None)
    monkeypatch.setattr(roofline, "measure", lambda device: found)
    monkeypatch.setattr(config.LlamaConfig, "preset", lambda name: TINY)
    monkeypatch.setattr(speed, "SAMPLE", 1e-4)
    monkeypatch.setattr(baselines, "COMPILED", "none")  # compiling takes long
    monkeypatch.setattr(baselines, "PEERS", (*baselines.TORCH, *baselines.LIBRARIES))
    file = tmp_path / "speed.json"
    code, _, err = run(
        *("bench", "attention", "kv_append", "--work", "decode,training", "--tokens", "3,5"),
        *("--keys", "9,17", "--rounds", 2, "--peers", "--json", file),
    )
    assert code == 0
    assert "kv_append has no gradient: training does not call it" in err
    assert "attention: flash-attn cannot serve it" in err
    rows = results.load(file).rows
    attention = [row.call for row in rows.values() if row.call["problem"] == "attention"]
    assert sorted((call["work"], call["keys"]) for call in attention) == [
        ("decode", 9), ("decode", 17), ("training", 3), ("training", 5),
    ]  # fmt: skip
    for row in rows.values():
        if row.call["problem"] == "attention":
            assert {"eager", "torch", "torch math"} <= set(row.samples)
    code, _, err = run("bench", "--tokens", "many")
    assert code == 2 and "Write for example: --tokens 512,2048" in err


@pytest.mark.parametrize("noise", ["samples", "others", "none"])
def test_bench_says_which_figures_are_noisy_and_why(run, monkeypatch, noise):
    from llama_fast.bench import measure as speed

    row = results.Row("swiglu", "swiglu", "GB/s", 1.0, call={"problem": "swiglu", "work": "decode"})
    row.call |= {"pass": "forward", "batch": 1, "tokens": 1, "keys": 9}
    row.samples = {"cpu": [1.0, 1.0, 1.0], "eager": [2.0, 2.0, 2.0]}
    row.bytes, row.flops, row.others = 1000, 1000, 0.01
    if noise == "samples":
        row.samples["eager"] = [1.0, 2.0, 3.0]
    if noise == "others":
        row.others = 0.31
    monkeypatch.setattr(config.LlamaConfig, "preset", lambda name: TINY)
    monkeypatch.setattr(speed, "measure", lambda *_, **__: row)
    code, out, err = run("bench", "swiglu", "--keys", 9)
    assert code == 0
    marked = {line.split()[1]: "~" in line for line in out.splitlines() if "swiglu" in line}
    assert marked == {"cpu": False, "eager": noise == "samples"}
    assert ("~ samples that spread over more than 10%" in err) == (noise == "samples")
    assert ("Other programs took up to 31%" in err) == (noise == "others")


@pytest.mark.parametrize("width", [80, 120])
def test_bench_fits_the_terminal(run, monkeypatch, width):
    from llama_fast.bench import measure as speed
    from llama_fast.cli import terminal

    monkeypatch.setattr(config.LlamaConfig, "preset", lambda name: TINY)
    monkeypatch.setattr(speed, "SAMPLE", 1e-4)
    monkeypatch.setattr(terminal, "WIDTH", width)
    code, out, _ = run("bench", "linear", "--keys", 9, "--rounds", 1)
    assert code == 0
    assert max(map(len, out.splitlines())) <= width
    assert ("GFLOP/s" in out) == (width == 120)
    assert re.search(r"^ linear gate_up int8\b", out, re.M) and "…" not in out


def test_bench_without_anybody_who_has_the_pass_is_an_error(run, monkeypatch):
    monkeypatch.setattr(config.LlamaConfig, "preset", lambda name: TINY)
    code, _, err = run("bench", "kv_append", "--work", "training", "--tokens", 4)
    assert code == 1 and err.endswith("give other --work\n"), err


def test_explain_says_it_of_every_backend(run):
    code, out, err = run("explain", "linear", "--device", "cpu", "--keys", 16)
    assert (code, err) == (0, "")
    assert out.startswith("decode, 1 token, 16 keys of 135m, bfloat16\n")
    for backend in dispatch.BACKENDS:
        assert re.search(rf"^  {backend}: \S", out, re.M)
    assert "cuda: it serves tensors on cuda; these are on cpu" in out
    code, out, _ = run("explain", "rms_norm", "--backend", "eager", "--work", "prefill")
    assert code == 0 and "rms_norm on cpu: eager" in out


@pytest.mark.parametrize("width", [80, 120])
def test_profile_shows_where_a_step_s_time_goes(run, monkeypatch, tmp_path, width):
    from llama_fast.bench import roofline
    from llama_fast.cli import terminal

    found = roofline.Roofline("cpu", 1, "avx9", 1e9, 2e9, 3e9, None)
    monkeypatch.setattr(roofline, "measure", lambda device: found)
    monkeypatch.setattr(config.LlamaConfig, "preset", lambda name: TINY)
    monkeypatch.setattr(terminal, "WIDTH", width)
    trace, file = tmp_path / "trace.json", tmp_path / "profile.json"
    code, out, err = run(
        *("profile", "decode", "--context", 9, "--layers", 1, "--repeats", 2, "--device", "cpu"),
        *("--trace", trace, "--json", file, "--batch", 2),
    )
    assert code == 0, err
    assert err.startswith("Random weights of 1 of the 2 layers of 1b")
    assert "Measuring this machine's peak rates" in err and f"Trace: {trace}" in out
    lines = out.partition("The median")[0].splitlines()[1:]
    assert max(map(len, lines)) <= width
    table = [line for line in lines if "%" in line]
    shares = [(line.split()[0], float(re.search(r"([\d.]+)%", line)[1])) for line in table]
    shares.remove(("the", 100))
    assert sum(share for _, share in shares) == pytest.approx(100, abs=0.5)
    assert {"linear", "attention", "kv_append", "(the"} <= {name for name, _ in shares}
    assert ("bytes" in out) == (width == 120)
    content = json.loads(file.read_text())
    times = [row["seconds"] for row in content["rows"]]
    assert sum(times) + content["rest"] == pytest.approx(sorted(content["seconds"])[0])
    assert len(content["replayed"]) == 2 and min(content["replayed"]) > 0
    assert "Recorded and replayed, as generate does" in out
    assert json.loads(trace.read_text())["traceEvents"]


def test_profile_bare_only_runs(run, monkeypatch, tmp_path):
    monkeypatch.setattr(config.LlamaConfig, "preset", lambda name: TINY)
    monkeypatch.chdir(tmp_path)
    assert run("profile", "swiglu", "--device", "cpu", "--bare", "--repeats", 2) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_profile_of_an_op_and_its_gradient(run, monkeypatch, tmp_path):
    monkeypatch.setattr(config.LlamaConfig, "preset", lambda name: TINY)
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(
        *("profile", "rms_norm", "--tokens", 4, "--backward", "--device", "cpu", "--repeats", 2),
        *("--backend", "eager"),
    )
    assert code == 0 and "rms_norm and its gradient at the sizes of 1b, bfloat16" in out
    assert re.search(r"rms_norm 1×4×32 +eager +\d+ ", out)
    assert re.search(r"rms_norm_backward 1×4×32, 1×4×32 +eager +\d+ ", out)
    assert (tmp_path / "llama-fast-rms_norm-1b.trace.json").exists()


def test_a_terminal_gets_lines_that_break_between_words(monkeypatch, capsys):
    from llama_fast.cli import terminal

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    monkeypatch.setattr(terminal.os, "get_terminal_size", lambda _: os.terminal_size((20, 9)))
    terminal.note("one two three four five six")
    terminal.note_pairs([("a", "seven eight nine ten"), ("long", "eleven")])
    assert capsys.readouterr().err == (
        "one two three four\nfive six\na     seven eight\n      nine ten\nlong  eleven\n"
    )
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    terminal.note("one two three four five six")
    assert capsys.readouterr().err == "one two three four five six\n"
