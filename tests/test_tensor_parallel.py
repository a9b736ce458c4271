"""A model over several ranks is the model: logits, texts, what is read, and how it ends."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Shard

from llama_fast import checkpoint
from llama_fast.bench.plan import plan
from llama_fast.cli.options import DEMO
from llama_fast.cli.terminal import size as size_of
from llama_fast.config import LlamaConfig
from llama_fast.config.quantization import NAMED
from llama_fast.config.share import Share
from llama_fast.errors import ConfigError
from llama_fast.model import Llama
from llama_fast.model.quantized import quantize_

from . import ranks, sharded_ops
from .checkpoints import meta_files, meta_state, save_meta
from .selection import runs_all

ROOT = Path(__file__).parent.parent
SIZES = (2, 3, 4)


def cases_but(*left_out: str) -> list:
    return [
        pytest.param(size, case, marks=[pytest.mark.thorough] * ((size, case) in ranks.THOROUGH))
        for size, cases in ranks.CASES_OF.items()
        for case in cases
        if case not in left_out
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    model = Llama(ranks.CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # larger, so that one token is likelier than others
                parameter.mul_(3)
    model.save_pretrained(folder / "hf")
    stored = meta_state(ranks.CONFIG, model.state_dict())
    params = ranks.CONFIG.to_meta()
    save_meta(folder / "meta", params, meta_files(stored, 2))
    tied = dataclasses.replace(ranks.CONFIG, tied=True)
    embedded = Llama(tied)
    state = model.state_dict()
    embedded.load_state_dict(state | {"head.weight": state["embed.weight"]})
    embedded.save_pretrained(folder / "tied")
    shutil.copy(DEMO / "tokenizer.model", folder / "tied")
    for name in ("int8", "int4"):
        quantize_(Llama.from_pretrained(folder / "hf"), name).save_pretrained(folder / name)
    uneven = Llama(ranks.UNEVEN)
    with torch.no_grad():
        for name, parameter in uneven.named_parameters():
            # As above, and sure of its tokens, so that a draw needs candidates alone.
            parameter.mul_(9 if name == "head.weight" else 3 if parameter.ndim == 2 else 1)
    uneven.save_pretrained(folder / "uneven")
    quantize_(Llama.from_pretrained(folder / "uneven"), "int4").save_pretrained(
        folder / "uneven int4"
    )
    demo = Llama.from_pretrained(DEMO)
    demo.config = dataclasses.replace(demo.config, max_seq_len=2304)
    demo.save_pretrained(folder / "longer-2304")
    return folder


def torchrun(
    size: int, *arguments: object, timeout: int = 200, given: str = ""
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.run(
        [*map(str, (*command, size, *arguments))],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        input=given,
    )


@pytest.fixture(scope="module")
def found(folder, pytestconfig):
    """What each rank has found, by the number of ranks."""

    @functools.cache
    def of(size: int) -> list[dict]:
        ended = torchrun(size, "-m", "tests.ranks", folder, *["--all"] * runs_all(pytestconfig))
        paths = [folder / f"found-{size}-{rank}.pt" for rank in range(size)]
        assert all(path.exists() for path in paths), ended.stderr[-6000:]
        return [torch.load(path) for path in paths]

    return of


@pytest.fixture(scope="module")
def alone(folder):
    return functools.cache(lambda case: ranks.found_with(folder, case))


@pytest.mark.parametrize(("size", "case"), cases_but())
def test_the_logits_and_texts_of_one_process(found, alone, case, size):
    own = alone(case)
    of_ranks = [of_rank[case] for of_rank in found(size)]
    for other in of_ranks[1:]:  # bit by bit, so that all draw the same
        assert torch.equal(of_ranks[0]["logits"], other["logits"])
        assert all(of_ranks[0].get(kind) == other.get(kind) for kind in ("greedy", "fresh"))
    known = ranks.CONFIG.vocab_size - ranks.CONFIG.vocab_padding
    given, expected = (x["logits"][..., :known] for x in (of_ranks[0], own))
    # Keys that lie between two integers fall to the one or the other.
    tolerance = {"bfloat16": 2e-2, "int8 cache": 1e-2}.get(case, 1e-5)
    assert (given - expected).abs().max() <= tolerance * expected.abs().max()
    assert of_ranks[0]["logits"][..., known:].isneginf().all()
    assert of_ranks[0]["replayed"]
    if tolerance == 1e-5:
        assert of_ranks[0]["greedy"] == own["greedy"]
        assert of_ranks[0].get("drawn") == own.get("drawn")


@pytest.mark.parametrize(("size", "case"), cases_but("int8 cache"))
def test_a_rank_reads_its_share(found, alone, case, size):
    whole = alone(case)
    # Bytes of the file for each of the model: it may be rounded, or made of wider floats.
    stored = whole["bytes"] / whole["held"]
    config = ranks.UNEVEN if size == 3 else ranks.CONFIG
    for rank, of_rank in enumerate(found(size)):
        sizes = [checkpoint.state_shapes(c) for c in (config, Share(config, rank, size).part)]
        in_all, own = (sum(math.prod(shape) for shape in shapes.values()) for shapes in sizes)
        assert of_rank[case]["bytes"] <= 1.02 * of_rank[case]["held"] * stored
        # Of integers cut unevenly, weights of 8 and of 4 bits have other parts: see the plan.
        if case not in ("tied", "uneven int4"):
            assert of_rank[case]["held"] <= 1.02 * whole["held"] * own / in_all


@pytest.mark.parametrize(("size", "case"), cases_but("meta", "int8", "int8 cache"))
def test_the_plan_says_what_ranks_take(found, folder, case, size):
    """Bytes held, and bytes given to each exchange, by the first rank, which has most."""
    name, settings = ranks.CASES[case]
    source = checkpoint.open_checkpoint(folder / name)
    quantization = getattr(source, "quantization", None) or NAMED.get(settings.get("quantize"))
    dtype = settings["dtype"]
    planned = plan(source.config, size, dtype=dtype, quantization=quantization, batch=2, context=64)
    of_rank = found(size)[0][case]
    assert planned.weights == of_rank["held"]
    assert [planned.sums, planned.summed] == [
        len(of_rank["given"]["sum"]),
        sum(of_rank["given"]["sum"]),
    ]
    # Logits besides, where the candidates were too few for this draw.
    assert planned.gathered == of_rank["given"]["gather"][0]
    assert len(of_rank["given"]["gather"]) <= 2 - (size == 3)
    K = max(1, -(-source.config.n_kv_heads // size))
    assert planned.cache == 2 * 64 * 2 * ranks.CONFIG.n_layers * K * 32 * dtype.itemsize


def test_torch_compile_of_a_rank(found):
    assert [of_rank["compiled"] for of_rank in found(2)] == [True, True]


def test_a_prompt_near_the_end_of_the_context(found, folder):
    alone = ranks.near_the_end(folder)
    assert len(alone) == 3
    assert [of_rank["long"] for of_rank in found(3)] == [alone] * 3


@pytest.mark.parametrize("size", SIZES)
def test_a_draw_exchanges_candidates(found, size):
    """Of a greedy text one for each row and step, with two sums; the logits would be 1152 and more
    floats. The rows of this text end together."""
    case, rows = ranks.CASES_OF[size][0], len(ranks.PROMPTS)
    for of_rank in found(size):
        steps = max(map(len, of_rank[case]["greedy"]))
        assert of_rank[case]["given greedy"] == steps * rows * (1 + 2) * 8
    if size == 3:
        steps = max(map(len, of_rank[case]["drawn"]))
        assert of_rank[case]["given drawn"] == steps * rows * (256 + 2) * 8


@pytest.mark.parametrize("size", [2, 4])
def test_ops_on_dtensors(found, size):
    """A block whose weights torch's tensor parallelism has cut, fed with whole rows and with a part
    of the tokens: results, gradients, and that heads and hidden dims are never gathered. Four
    ranks are a mesh of two dims."""
    alone = sharded_ops.found()["values"]
    for of_rank in found(size):
        for sharded in of_rank["dtensors"]:
            for name, value in alone.items():
                torch.testing.assert_close(sharded["values"][name], value, rtol=1e-5, atol=1e-5)
            assert sharded["placements"]["attention"] == sharded["placements"]["hidden"] == "S(2)"
            for name, (_, at) in sharded_ops.PARAMETERS.items():
                if isinstance(at, Shard):
                    assert sharded["placements"][f"gradient of {name}"] == str(at)
        assert of_rank["dtensors"][1]["placements"]["y"] == "S(1)"  # no row is whole


def test_info_of_ranks(run):
    code, out, err = run("info", "405b", "--ranks", 8, "--device", "h100", "--quantize", "int4",
                         "--context", "64k", "--batch", 2)  # fmt: skip
    words = " ".join(out.split())
    assert (code, err) == (0, "")
    whole = plan(LlamaConfig.preset("405b"), 1, quantization=NAMED["int4"], context=65536, batch=2)
    assert f"weights {size_of(whole.weights / 8)} in int4" in words
    assert "KV cache 8.46 GB, rows: 2, tokens of each: 65,536" in words
    assert "253 sums" in words and "memory fits: " in words and "450 GB/s to the others" in words
    for arguments, said in (
        (["405b", "--ranks", 8, "--device", "h100"], "memory does not fit: "),
        (["8b", "--ranks", 1, "--device", "rtx4090"], "memory fits: "),
    ):
        assert said in " ".join(run("info", *arguments)[1].split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["8b", "--device", "h100"], "say for what --ranks N is to be shown"),
        (["8b", "--ranks", 2, "--device", "h1"], "--device is 'h1'; it must be one of a100, h100"),
        (["8b", "--ranks", 2, "--context", "0k"], "--context is '0k'; write a number of tokens"),
        (["8b", "--ranks", 2, "--context", "128k"], "this model's context is 8192 tokens"),
        (["8b", "--ranks", 9], "n_heads=32 with n_kv_heads=8 cannot be cut into 9 parts"),
    ],
)
def test_info_of_ranks_refuses(run, arguments, said):
    code, _, err = run("info", *arguments)
    assert code == 1 and said in err


@pytest.mark.parametrize("size", SIZES)
def test_what_it_is_not_for(found, size):
    for said in (of_rank["refusals"] for of_rank in found(size)):
        assert said["loss"].startswith("GradientError: a model over ranks is for inference")
        assert f"spread over {size} ranks" in said["save"]
        assert said["token"].startswith("IndexError: tokens 2296 to 2296")
        assert "device is meta and the mesh is of cpu" in said["device"]
        assert said["another"].startswith("ConfigError: the model is LlamaConfig(")
        assert "max_seq_len=101" in said["another"]
        assert f"on rank {size - 1}: give all ranks the same" in said["another"]
        assert "the mesh has 2 dims" in said["two dims"] and 'mesh["b"]' in said["two dims"]
        assert f"n_heads=1 with n_kv_heads=1 cannot be cut into {size} parts" in said["heads"]


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_that_ends_ends_the_others(found, folder, size):
    found(size)
    for rank in {*range(size)} - {1}:
        seconds, said = (folder / f"said-{size}-{rank}.txt").read_text().split(" ", 1)
        assert said.startswith(f"rank {rank}: another rank of this model has ended")
        assert float(seconds) < 20


def test_the_command_under_torchrun(folder):
    shutil.copy(DEMO / "tokenizer.model", folder / "hf")
    asked = ["-m", "llama_fast", "generate", "Once", "--model", folder / "hf", "-n", 20]
    alone = subprocess.run(
        [sys.executable, *map(str, asked), "--temperature", "0", "--quiet"],
        cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    ended = torchrun(2, *asked, "--temperature", 0)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.strip() == alone.stdout.decode().strip()
    assert ended.stderr.count("2; the figures are of the first") == 1
    assert ended.stderr.count("backends") == 1


def test_a_dialog_under_torchrun():
    """The first rank reads and writes; the demo model's 3 heads are 2 and 1 of two ranks."""
    asked = ["-m", "llama_fast", "chat", "--temperature", "0"]
    lines = "Hello\n/nonsense\nWhat is the capital of France?\n"
    alone = subprocess.run(
        [sys.executable, *asked], cwd=ROOT, capture_output=True, text=True, input=lines,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    ended = torchrun(2, *asked, given=lines)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout == alone.stdout and alone.stdout.count("\n") >= 2
    assert ended.stderr.count("/nonsense is no command") == 1


@pytest.mark.parametrize("size", SIZES)
def test_the_first_rank_leads(found, folder, size):
    """A session and a server's batch, which one rank alone runs."""
    first, *others = (of_rank["led"] for of_rank in found(size))
    assert first == ranks.led_texts(folder, ranks.CASES_OF[size][0])
    assert others == [None] * (size - 1)
    for of_rank in found(size):  # of each row a candidate and two sums
        assert {*of_rank["given led"]} == {24, 48}


@pytest.mark.parametrize(
    ("size", "asked", "said"),
    [
        (4, ["generate", "Once"], "cannot be cut into 4 parts: start at most as many"),
        (2, ["generate"], "torchrun has started 2 processes, which have one standard input"),
        (2, ["quantize"], "torchrun has started 2 processes, and quantize is a command of one"),
    ],
)
def test_what_cannot_be_served_ends_at_once(size, asked, said):
    ended = torchrun(size, "-m", "llama_fast", *asked, "--model", DEMO, timeout=60)
    assert ended.returncode != 0
    assert said in ended.stderr


class TestShare:
    """The parts of a model's config."""

    LARGE = LlamaConfig.preset("405b")

    @pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 16, 24, 32, 48])
    def test_the_parts_are_the_whole(self, size):
        shares = [Share(self.LARGE, rank, size) for rank in range(size)]
        for letters, whole in (("H·D", 128 * 128), ("F", 53248), ("V", 128256)):
            ends = [share.ranges[letters] for share in shares]
            assert ends[0][0] == 0 and ends[-1][1] == whole
            assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
        for share in shares:
            checkpoint.state_shapes(share.part)
            # The query heads of a rank are those that its KV heads serve.
            group = self.LARGE.n_heads // self.LARGE.n_kv_heads
            (first, last), (low, high) = share.ranges["H·D"], share.ranges["K·D"]
            assert low <= first // group // 128 * 128 and (last - 128) // group // 128 * 128 < high
            assert share.part.n_heads % share.part.n_kv_heads == 0

    @pytest.mark.parametrize(
        ("size", "sizes", "said"),
        [
            (12, {}, "n_heads=128 with n_kv_heads=8 cannot be cut into 12 .* are 1 to 8, 16, 24"),
            (256, {}, "cannot be cut into 256 parts"),
            (3, {"hidden_dim": 256}, "cannot be cut into 3 equal parts, and has 2 blocks of 128"),
            (8, {"vocab_size": 100}, "vocab_size=100 is too small for 8 ranks"),
        ],
    )
    def test_refused(self, size, sizes, said):
        with pytest.raises(ConfigError, match=said):
            Share(dataclasses.replace(self.LARGE, **sizes), 0, size)

    def test_a_quantised_block_is_not_cut(self, folder):
        odd = dataclasses.replace(ranks.CONFIG, head_dim=8, hidden_dim=768, n_layers=1)
        quantize_(Llama(odd), "int8").save_pretrained(folder / "odd-int8")
        source = checkpoint.open_checkpoint(folder / "odd-int8")
        with pytest.raises(ConfigError, match="in blocks of rows of 16, which 4 ranks"):
            source.part(Share(odd, 0, 4))
