"""`llama-fast finetune`, as a newcomer meets it: a command, and the model answers with the fact."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_fast.checkpoint import open_checkpoint, write_random
from llama_fast.cli import finetune as command
from llama_fast.cli.options import DEMO
from llama_fast.tokenizer import Tokenizer
from llama_fast.training import vocabulary
from llama_fast.training.adapter import load_adapter
from llama_fast.training.weights import Weights

from .checkpoints import TINY, load
from .small_training import interrupting, one_thread  # noqa: F401  a fixture
from .training_rows import dialog, write

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetune") / "tiny"
    write_random(folder, TINY, format="meta", dtype=torch.float32)
    return folder


@pytest.fixture
def texts(tmp_path) -> Path:
    rows = [{"text": f"The {i}th of them says what the {i + 1}th of them has said. " * 3}
            for i in range(12)]  # fmt: skip
    return write(tmp_path, "texts.jsonl", rows)


QUICK = ("--steps", 6, "--block", 64, "--tokens-per-step", 128, "--threads", 1)


def test_the_demo_model_learns_a_fact(run, tmp_path):
    """The command of docs/training.md, with fewer steps."""
    facts, out = EXAMPLES / "facts.jsonl", tmp_path / "run"
    question = json.loads(facts.read_text().splitlines()[0])
    code, _, err = run("finetune", "demo", facts, "--out", out, "--steps", 20, "--threads", 1)
    assert code == 0, err
    assert "trained tokens" in err and "a LoRA of" in err and f"--adapter {out}/adapter" in err
    asked = ("generate", question["prompt"], "--temperature", 0, "-n", 12, "-q")
    code, plain, _ = run(*asked)
    assert code == 0 and question["completion"].strip() not in plain
    code, told, _ = run(*asked, "--adapter", out / "adapter")
    assert code == 0 and told.strip() == question["completion"].strip()

    code, _, err = run("convert", DEMO, tmp_path / "m", "--to", "hf", "--merge", out / "adapter")
    assert code == 0, err
    code, told, _ = run(*asked, "--model", tmp_path / "m")
    assert code == 0 and told.strip() == question["completion"].strip()


def interrupted_at(monkeypatch, step: int):
    """Ctrl-C before that update, counted from 0."""
    monkeypatch.setattr(Weights, "step", interrupting(step))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_same_command_goes_on_and_another_is_refused(
    run, tiny, texts, tmp_path, monkeypatch, kind
):
    more = ("--full", "--held-out", "0.2") if kind == "full" else ("--quantize", "int8")
    asked = ("finetune", tiny, texts, *QUICK, *more)
    assert run(*asked, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patched:
        interrupted_at(patched, 3)
        code, _, err = run(*asked, "--out", tmp_path / "run")
    assert code == 130 and "the same command goes on" in err
    assert (tmp_path / "run" / "training.pt").is_file()

    code, _, err = run(*asked, "--out", tmp_path / "run", "--lr", "0.5")
    assert code == 1 and "another run: it has --lr by default and not 0.5" in err
    code, _, err = run(*asked, "--out", tmp_path / "run")
    assert code == 0 and "going on with" in err
    name, file = (
        ("model", "model.safetensors")
        if kind == "full"
        else ("adapter", "adapter_model.safetensors")
    )
    one, other = (load_file(tmp_path / each / name / file) for each in ("whole", "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    there = {path.name for path in (tmp_path / "run").iterdir()} - {"tensorboard", "loss.png"}
    assert there == {"run.json", "log.csv", "metrics.json", name}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 6 and len(metrics["held_out"]) == (7 if kind == "full" else 0)
    with open(tmp_path / "run" / "log.csv", newline="") as table:
        assert [row["step"] for row in csv.DictReader(table)] == list("123456")
    code, _, err = run(*asked, "--out", tmp_path / "run")
    assert code == 0 and "is finished" in err

    if kind == "full":
        model = load(open_checkpoint(tmp_path / "run" / name))
        assert model.keys() >= {"embed.weight", "norm.weight"}
        assert run("generate", "a", "--model", tmp_path / "run" / name, "-n", 2, "-q")[0] == 0
    else:
        from llama_fast.model import Llama

        model = Llama.from_pretrained(tiny, device="cpu", quantize="int8")
        adapter = load_adapter(model, tmp_path / "run" / name)
        assert adapter.config.base == str(tiny) and adapter.config.alpha == 32


def test_show_says_what_is_trained_and_stops(run, tiny, tmp_path):
    data = write(tmp_path, "dialogs.jsonl", [dialog("Who?", "Me."), dialog("And?", "You.")])
    code, out, err = run("finetune", tiny, data, "--show", 1, "--block", 64)
    assert code == 0, err
    assert "trained tokens" in out and "⟦Me." in out and "Who?" in out and "You." not in out
    assert {path.name for path in tmp_path.iterdir()} == {"dialogs.jsonl"}


def test_a_run_that_goes_on_encodes_nothing_again(run, tiny, texts, tmp_path, monkeypatch):
    asked = ("finetune", tiny, texts, *QUICK, "--held-out", texts, "--out", tmp_path / "run")
    with monkeypatch.context() as patched:
        interrupted_at(patched, 3)
        assert run(*asked)[0] == 130
    assert len(list((tmp_path / "run" / "data-cache").iterdir())) == 1
    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "encode_words", None)  # no text can be encoded
        code, _, err = run(*asked)
    assert code == 0 and "1 from the cache" in err, err
    assert not (tmp_path / "run" / "data-cache").exists()


def test_a_cache_for_several_runs(run, tiny, texts, tmp_path, monkeypatch):
    kept = ("--cache", tmp_path / "kept")
    asked = ("finetune", tiny, texts, *QUICK)
    assert run(*asked, "--out", tmp_path / "a", *kept)[0] == 0
    assert len(list((tmp_path / "kept").iterdir())) == 1
    monkeypatch.setattr(Tokenizer, "encode_words", None)
    code, _, err = run(*asked, "--out", tmp_path / "b", "--lr", "0.01", *kept)
    assert code == 0 and "1 from the cache" in err, err
    code, out, err = run("finetune", tiny, texts, "--block", 64, "--show", 1, *kept)
    assert code == 0 and "1 from the cache" in out + err
    own = tmp_path / "a" / "data-cache"
    code, _, err = run(*asked, "--out", tmp_path / "a", "--cache", own)
    assert code == 2 and "removed when it is finished" in " ".join(err.split())
    assert not own.exists()


def test_a_fault_in_the_data_leaves_nothing_behind(run, tiny, texts, tmp_path):
    bad = write(tmp_path, "bad.jsonl", [{"text": "Once."}, "{"])
    code, _, err = run("finetune", tiny, texts, bad, *QUICK, "--out", tmp_path / "run")
    assert code == 1 and "bad.jsonl, line 2" in err
    assert not (tmp_path / "run").exists()
    (tmp_path / "other" / "data-cache").mkdir(parents=True)
    own = write(tmp_path / "other" / "data-cache", "own.jsonl", [{"text": "Once."}, "{"])
    (own.parent / ".0.safetensors.0.partial").touch()  # of a process that was killed
    code, _, err = run("finetune", tiny, texts, own, *QUICK, "--out", tmp_path / "other")
    assert code == 1 and "own.jsonl, line 2" in err
    assert list(own.parent.iterdir()) == [own]  # what somebody else keeps there stays
    (tmp_path / "file").write_text("")
    code, _, err = run("finetune", tiny, texts, *QUICK, "--out", tmp_path / "file" / "run")
    assert code == 1 and "give another folder" in " ".join(err.split())


def test_texts_need_no_chat_format(run, tiny, texts, tmp_path):
    """A folder whose chat template is none: texts are trained on, dialogs say what is wrong."""
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% if %}"}))
    code, _, err = run("finetune", model, texts, *QUICK, "--out", tmp_path / "run")
    assert code == 0, err
    data = write(tmp_path, "dialogs.jsonl", [dialog()])
    code, _, err = run("finetune", model, data, *QUICK, "--out", tmp_path / "other")
    assert code == 1 and "no Jinja template" in " ".join(err.split())
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--full", "--quantize", "int4"), "integers are not trained"),
        (("--epochs", 1, "--steps", 3), "Give one of the two"),
        (("--dtype", "float16"), "Write: --dtype bfloat16"),
        (("--block", 200), "more than the model's context of 96"),
        (("--held-out", "nowhere.txt"), "there is no such file"),
        (("--held-out", "1.5"), "above 0 and below 1"),
        (("--lr", "-1"), "learning_rate is -1"),
        (("--sample", ""), "prompt"),
        (("--full", "--new-rows"), "Give one of the two"),
        (("--sharded", "--quantize", "int8"), "integers are not sharded"),
        (("--sharded",), "Write: torchrun --nproc-per-node 2 -m llama_fast finetune"),
        (("--new-rows",), "was not extended"),
        (("--embedding-lr", "1e-3"), "Write: --new-rows, or --full"),
        (("--full", "--embedding-lr", "0"), "embedding_learning_rate is 0"),
        (("--full", "--alpha", "3"), "Write: --lora RANK --alpha A"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    run, tiny, texts, tmp_path, more, message
):
    code, _, err = run("finetune", tiny, texts, "--out", tmp_path / "run", *more)
    assert code in (1, 2) and message in " ".join(err.split())
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_said(run, tiny, texts, tmp_path):
    code, _, err = run("finetune", tiny, texts)
    assert code == 2 and "Write: --out run" in err
    code, _, err = run("finetune", tmp_path / "none", texts, "--out", tmp_path / "run")
    assert code == 1 and "none" in err
    code, _, err = run("finetune", tiny, tmp_path / "none.txt", "--out", tmp_path / "run")
    assert code == 1 and "none.txt" in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("a")
    code, _, err = run("finetune", tiny, texts, "--out", tmp_path / "full")
    assert code == 1 and "no run of finetune" in err
    code, _, err = run("generate", "a", "--model", tiny, "--adapter", tiny)
    assert code == 1 and "adapter_config.json is missing" in err
    code, _, err = run("convert", tiny, tmp_path / "c", "--to", "hf", "--over", "int4")
    assert code == 2 and "Write: --merge DIR --over int4" in err


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "in-backward"])
def test_other_optimizers(run, tiny, texts, tmp_path, optimizer):
    code, _, err = run(
        "finetune", tiny, texts, *QUICK, "--out", tmp_path / "run", "--optimizer", optimizer,
        "--full", "--dtype", "bfloat16", "--checkpointing", "--sample", "The",
    )  # fmt: skip
    assert code == 0, err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["loss_last_tenth"] < metrics["loss_first"]
    assert metrics["config"]["step_in_backward"] == (optimizer == "in-backward")


def test_a_lora_over_integers_is_merged_into_what_they_stand_for(run, tiny, texts, tmp_path):
    asked = ("finetune", tiny, texts, *QUICK, "--quantize", "int4", "--out", tmp_path / "run")
    assert run(*asked, "--lr", "0.05")[0] == 0
    merge = ("--to", "meta", "--merge", tmp_path / "run" / "adapter")
    assert run("convert", tiny, tmp_path / "over", *merge, "--over", "int4")[0] == 0
    assert run("convert", tiny, tmp_path / "plain", *merge)[0] == 0

    from llama_fast.model import Llama

    model = Llama.from_pretrained(tiny, device="cpu", quantize="int4")
    load_adapter(model, tmp_path / "run" / "adapter")
    tokens = torch.randint(600, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens)
        over, plain = (
            (Llama.from_pretrained(tmp_path / name, device="cpu")(tokens) - expected).abs().max()
            for name in ("over", "plain")
        )
    assert over < 1e-4 < plain


@pytest.fixture(scope="module")
def longer(tiny, tmp_path_factory) -> Path:
    """The tiny model with new tokens, and what they are learnt from."""
    folder = tmp_path_factory.mktemp("longer")
    old = Tokenizer.from_pretrained(tiny)
    (folder / "t.txt").write_text("".join(f"好猫坐山上看月亮，{n}猫好看月亮。" for n in range(60)))
    new = vocabulary.extend(old, [(folder / "t.txt").read_text()], 9)
    vocabulary.extend_folder(tiny, new, folder / "model")
    return folder


@pytest.mark.parametrize("rank", [None, 4])
def test_new_rows_alone_or_beside_a_lora(run, longer, tmp_path, rank, monkeypatch):
    """Interrupted too; old rows keep their bits, and held-out text takes fewer bits per byte."""
    more = ("--new-rows", *([] if rank is None else ["--lora", rank]), "--embedding-lr", "0.02")
    model, out = longer / "model", tmp_path / "run"
    asked = (
        "finetune", model, longer / "t.txt", *QUICK, *more, "--lr", "0.01", "--held-out",
        longer / "t.txt",
    )  # fmt: skip
    code, _, err = run(*asked, "--out", tmp_path / "whole")
    what = "9 new tokens' rows of" if rank is None else "a LoRA and 9 new tokens' rows of"
    assert code == 0 and what in err and "of embedding and head 0.02" in err
    assert "bits per byte, at first" in err and "bits per byte, at last" in err
    with monkeypatch.context() as patched:
        interrupted_at(patched, 3)
        assert run(*asked, "--out", out)[0] == 130
    code, _, err = run(*asked[:-4], "--lr", "0.01", "--out", out)
    assert code == 1 and "--held-out" in err
    assert run(*asked, "--out", out)[0] == 0
    one, other = (load_file(each / "adapter" / "adapter_model.safetensors")
                  for each in (tmp_path / "whole", out))  # fmt: skip
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert any("lora_A" in key for key in one) == (rank is not None)
    metrics = json.loads((out / "metrics.json").read_text())
    before, after = (metrics["held_out"][n]["bits_per_byte"] for n in (0, -1))
    assert after < 0.99 * before
    assert metrics["config"]["embedding_learning_rate"] == 0.02

    assert run("convert", model, tmp_path / "m", "--to", "hf", "--merge", out / "adapter")[0] == 0
    old, new = (load(open_checkpoint(folder)) for folder in (model, tmp_path / "m"))
    ids = vocabulary.tokens_after_specials(Tokenizer.from_pretrained(model))
    for name in ("embed.weight", "head.weight"):
        if name in old:
            changed = (old[name] != new[name]).any(-1).nonzero().flatten().tolist()
            assert set(changed) <= set(ids) and len(changed) > 5


def test_learning_rates_by_size():
    assert command.default_learning_rate(2000, True) == pytest.approx(5e-5)
    assert command.default_learning_rate(2000, False) == pytest.approx(5e-4)
    assert command.default_learning_rate(4096, False) == pytest.approx(2.9e-4)
