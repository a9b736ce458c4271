"""Checkpoints that cannot be used: each is refused by name, and nothing is left half-written."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_fast.checkpoint import convert, open_checkpoint, state_shapes, write_hf, write_meta
from llama_fast.errors import CheckpointError, ConfigError, LlamaFastError
from tests.checkpoints import SMALL, load, meta_files, meta_state, random_state, save_meta

INDEX = "model.safetensors.index.json"


@pytest.fixture
def hf(tmp_path) -> Path:
    write_hf(tmp_path / "hf", SMALL, random_state(SMALL))
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path) -> Path:
    """Three shards or more, and their index."""
    write_hf(tmp_path / "sharded", SMALL, random_state(SMALL), max_shard_bytes=50_000)
    return tmp_path / "sharded"


@pytest.fixture
def meta(tmp_path) -> Path:
    """Two files."""
    write_meta(tmp_path / "meta", SMALL, random_state(SMALL), n_files=2)
    return tmp_path / "meta"


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def edit_safetensors(path: Path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def edit_pth(path: Path, edit) -> None:
    tensors = torch.load(path, weights_only=True)
    edit(tensors)
    torch.save(tensors, path)


# --- which folder ---------------------------------------------------------------------------


def test_missing_path_says_what_is_needed(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; .*config\.json.*params"):
        open_checkpoint(tmp_path / "nowhere")


def test_path_is_a_file(meta):
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth is a file; .*folder"):
        open_checkpoint(meta / "consolidated.00.pth")


def test_neither_format(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)


def test_checkpoint_one_level_down(tmp_path, hf):
    with pytest.raises(CheckpointError, match=rf"did you mean {hf}\?"):
        open_checkpoint(tmp_path)


def test_both_formats(tmp_path, hf):
    other = random_state(SMALL, torch.float32)
    write_meta(tmp_path / "meta", SMALL, other)
    for path in (tmp_path / "meta").iterdir():
        shutil.copy(path, hf)
    with pytest.warns(UserWarning, match="both formats; reading Hugging Face's"):
        assert open_checkpoint(hf).dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_checkpoint(hf, format="meta").dtype == torch.float32
        assert open_checkpoint(hf, format="hf").dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="format is 'gguf'"):
        open_checkpoint(hf, format="gguf")


# --- config files ---------------------------------------------------------------------------


def test_missing_config(hf, meta):
    for folder, name in ((hf, "config.json"), (meta, "params.json")):
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=rf"{name} is missing"):
            open_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"dim": 64,\n', "not valid JSON: .* at line 2, column 1"),
        ("[1, 2]", "must hold a JSON object, not a list"),
        ("", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON: it is not UTF-8 text"),
    ],
)
def test_invalid_json(hf, meta, sharded, text, message):
    for path in (hf / "config.json", meta / "params.json", sharded / INDEX):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(CheckpointError, match=rf"{path.name} .*{message}"):
            open_checkpoint(path.parent)


def test_config_of_another_model(hf, meta):
    edit_json(hf / "config.json", mlp_bias=True)
    with pytest.raises(ConfigError, match=r"hf/config\.json: mlp_bias is True"):
        open_checkpoint(hf)
    edit_json(meta / "params.json", n_heads=0)
    with pytest.raises(ConfigError, match=r"meta/params\.json: n_heads is 0"):
        open_checkpoint(meta)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 512}, r"embed_tokens.weight has shape \(320, 64\).*\(512, 64\) from vocab"),
        ({"intermediate_size": 128}, r"gate_proj.weight.*\(128, 64\) from intermediate_size"),
        ({"num_key_value_heads": 4}, r"k_proj.weight.*\(64, 64\) from num_key_value_heads"),
        ({"head_dim": 32}, r"q_proj.weight has shape .* head_dim"),
        ({"num_hidden_layers": 1}, r"unknown model\.layers\.1\.input_layernorm\.weight.*layers=1"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\..* and 6 more are missing"),
    ],
)
def test_hf_config_contradicts_the_weights(hf, changes, message):
    edit_json(hf / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(hf)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vocab_size": 500},
            r"tok_embeddings.weight adds up to 320 .*\(500, 64\) from vocab",
        ),
        ({"vocab_size": 640}, r"which is 4 file\(s\): a shard is missing, or params.json"),
        ({"vocab_size": 160}, r"which is 1 file\(s\): there is an extra shard, or params.json"),
        ({"multiple_of": 512, "ffn_dim_multiplier": 1.0}, r"feed_forward.w1.weight adds up to 176"),
        ({"dim": 128}, r"tok_embeddings.weight has shape \(160, 64\).*\(320, 128\)"),
        ({"n_kv_heads": 4}, r"attention.wk.weight adds up to 32 .*\(64, 64\) from n_kv_heads"),
        ({"n_layers": 1}, r"unknown layers\.1\.attention\.wk\.weight"),
        ({"n_layers": 3}, r"layers\.2\..* and 6 more are missing"),
    ],
)
def test_meta_params_contradict_the_weights(meta, changes, message):
    edit_json(meta / "params.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(meta)


def test_rope_factor_is_for_meta_folders(hf):
    with pytest.raises(CheckpointError, match=r"config\.json gives the RoPE factor"):
        open_checkpoint(hf, rope_factor=8)


# --- shards ---------------------------------------------------------------------------------


def test_missing_weights(hf, meta):
    (hf / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors and no .*index\.json"):
        open_checkpoint(hf)
    (hf / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not read"):
        open_checkpoint(hf)
    for path in meta.glob("*.pth"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"has no consolidated\.00\.pth"):
        open_checkpoint(meta)


def test_missing_shard(sharded, meta):
    missing = sorted(sharded.glob("model-*"))[1]
    missing.unlink()
    with pytest.raises(CheckpointError, match=rf"{missing.name} is missing \(1 of the"):
        open_checkpoint(sharded)
    (meta / "consolidated.00.pth").rename(meta / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match=r"00\.pth is missing, while consolidated\.02\.pth"):
        open_checkpoint(meta)


def test_last_meta_shard_missing(meta):
    (meta / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"which is 2 file\(s\): a shard is missing"):
        open_checkpoint(meta)


def test_missing_index(sharded):
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"shards but no model\.safetensors\.index\.json"):
        open_checkpoint(sharded)


def test_extra_shard(hf, sharded, meta):
    shutil.copy(hf / "model.safetensors", sharded)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is an extra shard: .*index"):
        open_checkpoint(sharded)
    shutil.copy(sorted(sharded.glob("model-*"))[0], hf)
    with pytest.raises(CheckpointError, match=r"00001-of-\d+\.safetensors is an extra shard"):
        open_checkpoint(hf)
    shutil.copy(meta / "consolidated.01.pth", meta / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match=r"which is 2 file\(s\): there is an extra shard"):
        open_checkpoint(meta)


@pytest.mark.parametrize("keep", [0, 5, 2 / 3])
def test_truncated_shard(hf, sharded, meta, keep):
    for path in (
        hf / "model.safetensors",
        sorted(sharded.glob("model-*"))[1],
        meta / "consolidated.01.pth",
    ):
        size = path.stat().st_size
        os.truncate(path, keep if isinstance(keep, int) else int(size * keep))
        with pytest.raises(CheckpointError, match=rf"{path.name}.* truncated"):
            open_checkpoint(path.parent)


def test_wrong_shape(hf, meta):
    key = "model.layers.1.mlp.down_proj.weight"
    edit_safetensors(hf / "model.safetensors", lambda t: t.update({key: t[key][:, 1:].clone()}))
    with pytest.raises(CheckpointError, match=rf"hf/model\.safetensors: {key} .*\(64, 175\)"):
        open_checkpoint(hf)
    key = "layers.1.attention.wo.weight"
    edit_pth(meta / "consolidated.01.pth", lambda t: t.update({key: t[key].flatten()}))
    with pytest.raises(CheckpointError, match=rf"01\.pth: {key} has shape \(2048,\)"):
        open_checkpoint(meta)
    edit_pth(meta / "consolidated.01.pth", lambda t: t.update({key: torch.zeros(64, 31)}))
    with pytest.raises(CheckpointError, match=rf"{key} adds up to 63 along dim 1"):
        open_checkpoint(meta)


def test_norm_of_wrong_shape(meta):
    edit_pth(meta / "consolidated.01.pth", lambda t: t.update({"norm.weight": torch.ones(32)}))
    with pytest.raises(CheckpointError, match=r"01\.pth: norm\.weight has shape \(32,\)"):
        open_checkpoint(meta)


def test_unknown_key(hf, meta):
    edit_safetensors(hf / "model.safetensors", lambda t: t.update(q_bias=torch.ones(1)))
    with pytest.raises(CheckpointError, match="unknown q_bias"):
        open_checkpoint(hf)
    edit_pth(meta / "consolidated.01.pth", lambda t: t.update(q_bias=torch.ones(1)))
    with pytest.raises(CheckpointError, match=r"01\.pth: unknown q_bias"):
        open_checkpoint(meta)


def test_missing_key(hf, meta):
    edit_safetensors(hf / "model.safetensors", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        open_checkpoint(hf)
    edit_pth(meta / "consolidated.01.pth", lambda t: t.pop("output.weight"))
    with pytest.raises(CheckpointError, match=r"01\.pth: output\.weight is missing"):
        open_checkpoint(meta)


def test_missing_head_names_the_remedy(hf):
    edit_safetensors(hf / "model.safetensors", lambda t: t.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r'lm_head.*"tie_word_embeddings": true'):
        open_checkpoint(hf)


def test_tied_config_with_another_head(hf):
    edit_json(hf / "config.json", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        open_checkpoint(hf)


def test_index_that_contradicts_the_shards(sharded):
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    key = "model.embed_tokens.weight"
    other = sorted(set(index.values()))[-1]
    edit_json(sharded / INDEX, weight_map={**index, key: other})
    with pytest.raises(CheckpointError, match=rf"{other} does not hold {key}"):
        open_checkpoint(sharded)
    edit_json(sharded / INDEX, weight_map={**index, key: "../hf/model.safetensors"})
    with pytest.raises(CheckpointError, match="no file name inside the folder"):
        open_checkpoint(sharded)
    edit_json(sharded / INDEX, weight_map=[])
    with pytest.raises(CheckpointError, match='no "weight_map" object'):
        open_checkpoint(sharded)


def test_weight_in_two_shards(sharded):
    last = sorted(sharded.glob("model-*"))[-1]
    key = "model.embed_tokens.weight"
    edit_safetensors(last, lambda t: t.update({key: torch.zeros(320, 64)}))
    with pytest.raises(CheckpointError, match=f"{key} is in both"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_of_ours(hf, meta, dtype):
    key = "model.layers.0.mlp.up_proj.weight"
    edit_safetensors(hf / "model.safetensors", lambda t: t.update({key: t[key].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"{key} is stored as .*must be float32"):
        open_checkpoint(hf)
    key = "layers.0.feed_forward.w3.weight"
    edit_pth(meta / "consolidated.00.pth", lambda t: t.update({key: t[key].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"{key} is stored as torch.*must be float32"):
        open_checkpoint(meta)


def test_replicated_weights_that_differ(meta):
    edit_pth(meta / "consolidated.01.pth", lambda t: t["norm.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"norm\.weight differs between .*00\.pth and .*01"):
        load(open_checkpoint(meta))


def test_copies_of_kv_heads_that_differ_in_a_later_layer(tmp_path):
    """Layer 0 says that heads are stored twice; layer 1 contradicts it."""
    config = dataclasses.replace(SMALL, n_kv_heads=4)
    state = random_state(config)
    stored = meta_state(config, state)
    for name in ("wk", "wv"):
        heads = stored[f"layers.0.attention.{name}.weight"].view(2, 2, 16, 64)
        heads[:, 1] = heads[:, 0]
    save_meta(tmp_path / "meta", config.to_meta(), meta_files(stored, 4))
    checkpoint = open_checkpoint(tmp_path / "meta")
    assert checkpoint.config.n_kv_heads == 2
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.wk\.weight differs"):
        load(checkpoint)


# --- pickles --------------------------------------------------------------------------------


class _Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("container", ["zip", "legacy", "bare"])
def test_malicious_pickle_is_not_executed(meta, tmp_path, container):
    trace = tmp_path / "executed"
    path = meta / "consolidated.00.pth"
    weights = torch.load(path, weights_only=True)
    weights["norm.weight"] = _Malicious(f"touch {trace}")
    if container == "bare":
        path.write_bytes(pickle.dumps(weights["norm.weight"]))
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(CheckpointError, match=rf"{path.name} (holds more than plain|is not a w)"):
        open_checkpoint(meta)
    assert not trace.exists()
    # The trap works: executing it is what an ordinary unpickler does.
    if container == "bare":
        pickle.loads(path.read_bytes())
        assert trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds no dict of tensors"),
        ({}, "holds no dict of tensors"),
        ({"norm.weight": [1.0, 2.0]}, r"norm\.weight is a list"),
        ({"norm.weight": torch.ones(2).to_sparse()}, r"norm\.weight is a Tensor"),
        (collections.Counter(a=1), "a is a int"),
    ],
)
def test_pth_that_is_no_dict_of_tensors(meta, content, message):
    torch.save(content, meta / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match=rf"consolidated\.00\.pth.*{message}"):
        open_checkpoint(meta)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_bytes_give_no_other_error(hf, meta):
    """Wrong bytes where the files say what lies where: refused, or (in padding, names) harmless."""
    random = Random(0)
    archive = meta / "consolidated.00.pth"
    whole = archive.read_bytes()
    pickled = range(whole.index(b"data.pkl"), len(whole))
    for path, where in ((hf / "model.safetensors", range(2000)), (archive, pickled)):
        whole = path.read_bytes()
        refused = 0
        for _ in range(150):
            damaged = bytearray(whole)
            for position in random.sample(where, 3):
                damaged[position] = random.randrange(256)
            path.write_bytes(damaged)
            try:
                open_checkpoint(path.parent)
            except CheckpointError:
                refused += 1
        assert refused > 100, path


# --- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_non_finite_weight(tmp_path, value, dtype):
    name = "layers.1.attention.qkv.weight"
    state = random_state(SMALL, dtype)
    state[name][70, 3] = value  # in k
    write_hf(tmp_path / "hf", SMALL, state)
    write_meta(tmp_path / "meta", SMALL, state, n_files=2)
    for form, key in (("hf", "self_attn.k_proj"), ("meta", "attention.wk")):
        checkpoint = open_checkpoint(tmp_path / form)
        with pytest.raises(CheckpointError, match=rf"{key}\.weight has values .* not finite"):
            load(checkpoint)
        with pytest.raises(CheckpointError, match=rf"{key}\.weight has values .* not finite"):
            list(checkpoint.tensors())
        loaded = dict(checkpoint.tensors(check_finite=False))
        assert torch.equal(loaded[name].isfinite(), state[name].isfinite())
        assert not loaded[name].isfinite().all()


def test_large_finite_weights_pass(tmp_path):
    """Their sum overflows, they do not."""
    state = random_state(SMALL, torch.float16)
    state["embed.weight"].fill_(60000.0)
    write_hf(tmp_path / "hf", SMALL, state)
    assert (load(open_checkpoint(tmp_path / "hf"))["embed.weight"] == 60000).all()


def test_weights_too_large_for_the_dtype(tmp_path):
    state = random_state(SMALL, torch.float32)
    state["norm.weight"][5] = 1e6
    write_hf(tmp_path / "hf", SMALL, state)
    checkpoint = open_checkpoint(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"norm.weight has values too large for float16 \(up"):
        load(checkpoint, torch.float16)
    assert load(checkpoint, torch.bfloat16)["norm.weight"][5] == 999424


# --- states that do not fit -----------------------------------------------------------------


def test_state_that_does_not_fit(hf, tmp_path):
    checkpoint = open_checkpoint(hf)
    state = {name: torch.empty(shape) for name, shape in state_shapes(SMALL).items()}
    lacks = {name: tensor for name, tensor in state.items() if name != "norm.weight"}
    extra = {**state, "bias": torch.empty(1)}
    shape = {**state, "norm.weight": torch.empty(65)}
    with pytest.raises(CheckpointError, match=r"norm\.weight is only in the checkpoint"):
        checkpoint.load_into(lacks)
    with pytest.raises(CheckpointError, match="bias is only in the state"):
        checkpoint.load_into(extra)
    with pytest.raises(CheckpointError, match=r"norm\.weight .*\(65,\).*\(64,\)"):
        checkpoint.load_into(shape)
    for write in (write_hf, write_meta):
        with pytest.raises(CheckpointError, match=r"lacks norm\.weight"):
            write(tmp_path / "out", SMALL, lacks)
        with pytest.raises(CheckpointError, match="unknown bias"):
            write(tmp_path / "out", SMALL, extra)
        with pytest.raises(CheckpointError, match=r"norm\.weight has shape \(65,\)"):
            write(tmp_path / "out", SMALL, shape)
        with pytest.raises(CheckpointError, match=r"norm\.weight is torch\.float64"):
            write(tmp_path / "out", SMALL, {**state, "norm.weight": torch.ones(64).double()})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("n_files", "name"), [(0, "n_heads"), (3, "n_heads"), (4, "n_kv_heads")])
def test_cut_that_does_not_divide(tmp_path, n_files, name):
    with pytest.raises(CheckpointError, match=rf"n_files is {n_files}.* divide {name}"):
        write_meta(tmp_path / "out", SMALL, random_state(SMALL), n_files=n_files)
    assert not any(tmp_path.iterdir())


# --- writing --------------------------------------------------------------------------------


def test_existing_target_is_refused_and_untouched(hf, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("kept")
    for write in (
        lambda: write_hf(target, SMALL, random_state(SMALL)),
        lambda: write_meta(target, SMALL, random_state(SMALL)),
        lambda: convert(hf, target, "meta"),
        lambda: convert(hf, target, "hf"),
        lambda: convert(hf, hf, "meta"),
    ):
        with pytest.raises(LlamaFastError, match="folder that is not empty"):
            write()
    with pytest.raises(LlamaFastError, match="precious is a file"):
        convert(hf, target / "precious", "meta")
    assert [path.read_text() for path in target.iterdir()] == ["kept"]
    (target / "precious").unlink()
    convert(hf, target, "meta")  # an empty folder will do
    assert open_checkpoint(target).config == SMALL


def test_convert_to_an_unknown_format(hf, tmp_path):
    with pytest.raises(CheckpointError, match="'gguf'; it must be 'hf' or 'meta'"):
        convert(hf, tmp_path / "out", "gguf")


def test_damaged_source_leaves_nothing(tmp_path):
    state = random_state(SMALL)
    state["norm.weight"][0] = torch.nan  # found when all else is written
    write_hf(tmp_path / "hf", SMALL, state)
    for to in ("hf", "meta"):
        with pytest.raises(CheckpointError, match="not finite"):
            convert(tmp_path / "hf", tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_interrupt_leaves_nothing(hf, tmp_path):
    def interrupt(done, total, name):
        if done > total // 2:
            raise KeyboardInterrupt

    for to in ("hf", "meta"):
        with pytest.raises(KeyboardInterrupt):
            convert(hf, tmp_path / "out", to, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_disk_without_room_is_refused_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for write in (write_hf, write_meta):
        with pytest.raises(CheckpointError, match=r"needs 0\.00 GB and its disk has 0\.00 GB free"):
            write(tmp_path / "out", SMALL, random_state(SMALL))
    assert not any(tmp_path.iterdir())


_FULL_DISK = """
import pathlib, resource, sys
from llama_fast.checkpoint import write_hf, write_meta
from llama_fast.errors import CheckpointError
from tests.checkpoints import SMALL, random_state

folder, *limits = sys.argv[1:]
state = random_state(SMALL)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in map(int, limits):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    for write in (write_hf, write_meta):
        try:
            write(folder, SMALL, state)
        except CheckpointError as error:
            assert "cannot be written: File too large" in str(error), error
            assert "Nothing was left behind" in str(error), error
        else:
            raise SystemExit(f"{write.__name__} wrote more than the limit of {limit}")
        if left := list(pathlib.Path(folder).parent.iterdir()):
            raise SystemExit(f"with a limit of {limit}, {write.__name__} left {left}")
print(len(limits))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_full_disk_leaves_nothing(tmp_path):
    """The kernel refuses to let files grow past a limit, as a full disk refuses all writes."""
    write_hf(tmp_path / "whole", SMALL, random_state(SMALL))
    # What is refused last is a matrix only just, and then the archive's directory.
    last = (tmp_path / "whole" / "model.safetensors").stat().st_size - 1
    shutil.rmtree(tmp_path / "whole")
    limits = [str(limit) for limit in (0, 100, 100_000, last)]
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path / "out"), *limits]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stderr
    assert result.stderr == "" and result.stdout == "4\n"
    assert not any(tmp_path.iterdir())


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    for write in (write_hf, write_meta):
        with pytest.raises(CheckpointError, match="cannot be written"):
            write(tmp_path / "file" / "out", SMALL, random_state(SMALL))
