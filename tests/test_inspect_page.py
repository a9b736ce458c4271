"""`llama-fast inspect` and its page, which Chromium opens where there is one."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

import llama_fast
from llama_fast import Llama, Tokenizer
from llama_fast.cli import main
from llama_fast.cli.options import DEMO
from llama_fast.config import LlamaConfig
from llama_fast.errors import LlamaFastError
from llama_fast.inspect.page import page, write

from .test_inspect import PROMPT

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt-get install chromium"
)


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.from_pretrained(DEMO, device="cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(DEMO)


@pytest.fixture
def run(capsys):
    """Runs a command line in this process: (exit code, stdout, stderr)."""
    return lambda *arguments: (main([str(x) for x in arguments]), *capsys.readouterr())


def data(text: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def unpacked(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f2").astype("f4"))


def test_numbers_on_the_page_are_those_of_the_trace(model, tokenizer):
    trace = llama_fast.trace(model, PROMPT, tokenizer, layers=[1, 3], heads=[0, 2])
    found = data(page(trace))
    T = trace.tokens.shape[1]
    assert found["shown"] == T and found["heads"] == [0, 2]
    assert [id_ for id_, _ in found["tokens"]] == trace.tokens[0].tolist()
    assert found["next"][0][1] == "42"
    assert found["next"][0][2] == trace.next_tokens(1)[0].probability
    for layer in found["layers"]:
        at = f"layers.{layer['index']}"
        for name in ("scores", "weights", "q", "q_rotated"):
            expected = trace[f"{at}.attention.{name}"][0]
            expected = expected[:, [0, 2]] if name[0] == "q" else expected
            torch.testing.assert_close(
                unpacked(layer[name]), expected.float().flatten(), rtol=1e-3, atol=1e-6
            )
        torch.testing.assert_close(
            unpacked(layer["input"]).view(T, 64), trace[f"{at}.input"][0, :, :64].float(),
            rtol=1e-3, atol=1e-6,
        )  # fmt: skip
        hidden = trace[f"{at}.mlp.hidden"][0].float()
        drawn = unpacked(layer["hidden"]).view(T, 64)
        assert drawn.abs().max() == hidden.abs().max().half()  # the largest units
        assert layer["error"] == trace.attention_error(layer["index"])


def test_a_page_needs_no_network_and_holds_any_text(model, tokenizer):
    text = 'a </script><script>alert("x")</script> <!-- 你好 & \\u003c'
    made = page(llama_fast.trace(model, text, tokenizer, layers=0))
    assert not re.search(r"https?://|@import|src=|url\(", made)
    assert made.count("</script>") == 2
    assert "".join(piece for _, piece in data(made)["tokens"][1:]) == text


def of_size(layers: int, T: int) -> int:
    """Bytes of a page of 32 heads of 64."""
    config = LlamaConfig(
        dim=64, n_layers=layers, n_heads=32, n_kv_heads=8, vocab_size=300, hidden_dim=96,
        head_dim=64, max_seq_len=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.inference_mode():
        trace = llama_fast.trace(Llama(config), list(range(T % 256)) + [0] * (T - T % 256))
    return len(page(trace).encode())


@pytest.mark.parametrize(("layers", "T"), [(2, 17), (2, 512), (16, 60)])
def test_the_page_is_bounded(layers, T):
    assert of_size(layers, T) < 3e6


def test_what_a_page_cannot_show_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(LlamaFastError, match="trace at least one layer and head"):
        write(tmp_path / "page.html", llama_fast.trace(model, "a", tokenizer, layers=[]))
    assert not list(tmp_path.iterdir())


@needs_chromium
@pytest.mark.parametrize("width", [390, 1100])
@pytest.mark.parametrize(
    ("hash", "words"),
    [
        ("", ["The next token", ">int4: the first", ">recomputed<", 'aria-label="32 pairs"']),
        ("zh,dark", ["下一个 token", ">int4：第一个", ">重新计算<", 'aria-label="32 对元素"',
                     "<title>走进模型"]),
    ],
)  # fmt: skip
def test_chromium_opens_it(model, tokenizer, tmp_path, width, hash, words):
    trace = llama_fast.trace(model, PROMPT, tokenizer, layers=[0, 3])
    other = llama_fast.trace(
        Llama.from_pretrained(DEMO, device="cpu", quantize="int4"), PROMPT, tokenizer
    )
    # A window of Chromium is no narrower than 500: the page is made to be.
    measure = f"""<script>
      document.documentElement.style.width = "{width}px";
      for (const b of document.querySelectorAll("#layers button, #views button")) b.click();
      data.next[0][1] = "\\\\xe5".repeat(40);
      draw();
      const next = document.getElementById("next").parentElement;
      document.body.dataset.hidden = next.scrollWidth - next.clientWidth;
      const out = [...document.querySelectorAll("main *")].filter((e) =>
        !e.closest(".scroll table") && e.getBoundingClientRect().right > {width} + 1);
      document.body.dataset.outside = out.map((e) => e.tagName + "#" + e.id).join(" ");
      const pixels = (c) => c.getContext("2d").getImageData(0, 0, c.width, c.height).data.buffer;
      const painted = [...document.querySelectorAll("canvas")].map((c) =>
        new Set(new Uint32Array(pixels(c))).size);
      document.body.dataset.painted = painted.join(" ");
    </script></html>"""
    file = tmp_path / "page.html"
    file.write_text(page(trace, trace.compare(other), "int4").replace("</html>", measure), "utf-8")
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={max(width, 500)},900",
            "--dump-dom", f"{file.as_uri()}#{hash}",
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stderr
    dom = done.stdout
    assert all(word in dom for word in words)
    assert 'data-hidden="0"' in dom, "the table of the next tokens is wider than its card"
    assert 'data-outside=""' in dom, re.search('data-outside="[^"]*"', dom)
    painted = [int(n) for n in re.search('data-painted="([^"]*)"', dom)[1].split()]
    assert len(painted) == 5 + 2 + 3 and min(painted) > 10  # strips, spirals, a map a head
    assert dom.count('class="chip mono"') == trace.tokens.shape[1]


def test_the_command(run, tmp_path):
    file = tmp_path / "page.html"
    code, out, err = run("inspect", PROMPT, "--layers", "1", "--heads", "0,2", "--html", file)
    assert code == 0 and not err
    assert "layers.1.attention.scores" in out and "layers.0.attention" not in out
    assert re.search(r"'42' +1333 +0\.99", out) and "the model" in out
    assert [layer["index"] for layer in data(file.read_text("utf-8"))["layers"]] == [1]
    code, out, _ = run("inspect", PROMPT)
    assert code == 0 and "layers.0.mlp.gate" in out and "layers.3.mlp.gate" in out


@pytest.mark.parametrize(
    ("other", "said"),
    [("int4", "They part at embedding"), ("eager", "They agree to"), (DEMO, "bit for bit")],
)
def test_the_command_compares(run, other, said):
    code, out, _ = run("inspect", PROMPT, "--compare", other)
    assert code == 0 and f"Beside {other}: " in out and said in out and "residual stream" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "x"], "write for example --layers 0,3 or --layers all"),
        (
            ["--layers", "0,9,-5"],
            "--layers 9,-5: the model has layers 0 to 3; give some of these, or all",
        ),
        (["--heads", "3"], "--heads 3: the model has heads 0 to 2; give some of these, or all"),
        (["--compare", "int5"], "there is no such folder; write int4, int8, eager"),
    ],
)
def test_wrong_usage(run, arguments, said):
    code, _, err = run("inspect", PROMPT, *arguments)
    assert code in (1, 2) and said in " ".join(err.split())


def test_folders_without_a_model(run, tmp_path):
    for option in ("--model", "--compare"):
        code, _, err = run("inspect", PROMPT, option, tmp_path)
        assert code == 1 and "holds no checkpoint; give the folder of a model" in err


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("no/such/page.html", "does not exist; make it, or give another file"),
        ("", "this is a folder; give the name of a file"),
        ("/dev/null", "this is a device; give the name of a file"),
        ("/proc/page.html", "nothing new can be written to /proc ("),
    ],
)
def test_a_page_that_could_not_be_written(run, tmp_path, monkeypatch, file, said):
    """Is refused before the model is loaded, and no folder is made for it."""
    monkeypatch.setattr(Llama, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    code, out, err = run("inspect", PROMPT, "--html", tmp_path / file)
    err = " ".join(err.split())
    assert (
        code == 1
        and not out
        and f"--html {tmp_path / file} cannot be written: " in err
        and said in err
    )
    assert "partial" not in err and not list(tmp_path.iterdir())


def test_bytes_in_the_terminal(run):
    _, out, _ = run("inspect", "\u2028 \\n", "--layers", "0")
    assert r"'\xe2" in out and r"\\x" not in out and r"\\" in out
