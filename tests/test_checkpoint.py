"""Checkpoints of both formats: names, reading, writing, converting. Bad input: the next file."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_fast.checkpoint import (
    NAMES,
    convert,
    hf_to_meta_rows,
    meta_to_hf_rows,
    open_checkpoint,
    state_shapes,
    write_hf,
    write_meta,
)
from llama_fast.checkpoint.stored import PthFile, SafetensorsFile
from llama_fast.config import LlamaConfig, RopeScaling
from llama_fast.config.share import RowShare
from llama_fast.errors import CheckpointError
from llama_fast.quantization.folder import quantize_folder
from llama_fast.tokenizer import Tokenizer
from llama_fast.tokenizer.files import BYTE_ORDER
from llama_fast.tokenizer.special_tokens import special_ids
from tests.checkpoints import SMALL, load, meta_files, meta_state, random_state, save_meta

TIED = dataclasses.replace(SMALL, tied=True)


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


# --- names and order of rows ----------------------------------------------------------------


def test_table_of_names():
    """FACTS, section 2: the names of both formats and the dims on which Meta's files are cut."""
    assert [(name.meta, name.hf, name.cut) for name in NAMES] == [
        ("tok_embeddings.weight", "model.embed_tokens.weight", 0),
        *(
            (f"layers.{{i}}.{meta}.weight", f"model.layers.{{i}}.{hf}.weight", cut)
            for meta, hf, cut in (
                ("attention_norm", "input_layernorm", None),
                ("attention.wq", "self_attn.q_proj", 0),
                ("attention.wk", "self_attn.k_proj", 0),
                ("attention.wv", "self_attn.v_proj", 0),
                ("attention.wo", "self_attn.o_proj", 1),
                ("ffn_norm", "post_attention_layernorm", None),
                ("feed_forward.w1", "mlp.gate_proj", 0),
                ("feed_forward.w3", "mlp.up_proj", 0),
                ("feed_forward.w2", "mlp.down_proj", 1),
            )
        ),
        ("norm.weight", "model.norm.weight", None),
        ("output.weight", "lm_head.weight", 0),
    ]


def test_order_of_rotary_rows():
    """FACTS, section 2: HF row j = Meta row 2j, row D/2+j = 2j+1, in every head."""
    heads, head_dim = 3, 8
    rows = torch.arange(heads * head_dim).reshape(-1, 1)
    hf = meta_to_hf_rows(rows, heads).reshape(heads, head_dim)
    meta = rows.reshape(heads, head_dim)
    for j in range(head_dim // 2):
        assert torch.equal(hf[:, j], meta[:, 2 * j])
        assert torch.equal(hf[:, head_dim // 2 + j], meta[:, 2 * j + 1])
    assert torch.equal(hf_to_meta_rows(meta_to_hf_rows(rows, heads), heads), rows)


def test_state_shapes():
    assert state_shapes(SMALL) == {
        "embed.weight": (320, 64),
        **{
            f"layers.{i}.{name}.weight": shape
            for i in (0, 1)
            for name, shape in (
                ("attention_norm", (64,)),
                ("attention.qkv", ((4 + 2 * 2) * 16, 64)),
                ("attention.output", (64, 64)),
                ("mlp_norm", (64,)),
                ("mlp.gate_up", (2 * 176, 64)),
                ("mlp.down", (64, 176)),
            )
        },
        "norm.weight": (64,),
        "head.weight": (320, 64),
    }
    assert "head.weight" not in state_shapes(TIED)
    n_params = sum(torch.Size(shape).numel() for shape in state_shapes(TIED).values())
    assert n_params == TIED.n_params


# --- Hugging Face folders, against transformers ---------------------------------------------


def _transformers_model(config: LlamaConfig, dtype: torch.dtype):
    transformers = pytest.importorskip("transformers", reason="writes the checkpoint to be read")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf()))
    with torch.no_grad():
        for parameter in model.parameters():  # norms too, which start at one
            parameter.normal_(std=0.5)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_reads_what_transformers_writes(tmp_path, dtype, shard, tied):
    scaling = RopeScaling(32.0) if tied else None
    config = dataclasses.replace(SMALL, tied=tied, rope_scaling=scaling)
    model = _transformers_model(config, dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.format == "hf"
    assert checkpoint.config == config
    assert checkpoint.dtype == dtype
    assert (len(checkpoint.files) > 1) == (shard == "40KB")

    theirs = model.state_dict()
    ours = load(checkpoint)
    layer = "model.layers.1.self_attn."
    qkv = [theirs[f"{layer}{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(ours["layers.1.attention.qkv.weight"], torch.cat(qkv))
    layer = "model.layers.0.mlp."
    gate_up = [theirs[f"{layer}{x}_proj.weight"] for x in ("gate", "up")]
    assert torch.equal(ours["layers.0.mlp.gate_up.weight"], torch.cat(gate_up))
    for name, key in (
        ("embed", "model.embed_tokens"),
        ("norm", "model.norm"),
        ("layers.1.attention_norm", "model.layers.1.input_layernorm"),
        ("layers.1.attention.output", "model.layers.1.self_attn.o_proj"),
        ("layers.0.mlp_norm", "model.layers.0.post_attention_layernorm"),
        ("layers.0.mlp.down", "model.layers.0.mlp.down_proj"),
    ):
        assert torch.equal(ours[f"{name}.weight"], theirs[f"{key}.weight"]), name
    if not tied:
        assert torch.equal(ours["head.weight"], theirs["lm_head.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_what_we_write(tmp_path, dtype, max_shard_bytes, tied):
    transformers = pytest.importorskip("transformers", reason="reads the checkpoint")
    config = dataclasses.replace(SMALL, tied=tied, rope_scaling=RopeScaling(8.0))
    state = random_state(config, dtype)
    write_hf(tmp_path / "hf", config, state, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == (max_shard_bytes < 10**9)
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.dtype == dtype
    assert LlamaConfig.from_hf(model.config.to_dict()) == config
    theirs = model.state_dict()
    q, k, v = state["layers.0.attention.qkv.weight"].split([64, 32, 32])
    assert torch.equal(theirs["model.layers.0.self_attn.q_proj.weight"], q)
    assert torch.equal(theirs["model.layers.0.self_attn.k_proj.weight"], k)
    assert torch.equal(theirs["model.layers.0.self_attn.v_proj.weight"], v)
    head = state["embed.weight" if tied else "head.weight"]
    assert torch.equal(theirs["lm_head.weight"], head)
    # And the same weights come back when transformers saves them in its turn.
    model.save_pretrained(tmp_path / "again")
    assert_same(load(open_checkpoint(tmp_path / "again")), state)


def test_shards_hold_at_most_what_is_asked(tmp_path):
    state = random_state(SMALL, torch.float32)
    write_hf(tmp_path / "hf", SMALL, state, max_shard_bytes=100_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * SMALL.n_params
    shards = {name: load_file(tmp_path / "hf" / name) for name in index["weight_map"].values()}
    for name, tensors in shards.items():
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 100_000, name
    assert {key: name for name, tensors in shards.items() for key in tensors} == index["weight_map"]


def test_rotary_tables_of_old_writers_are_ignored(tmp_path):
    state = random_state(SMALL)
    write_hf(tmp_path / "hf", SMALL, state)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert_same(load(open_checkpoint(tmp_path / "hf")), state)


@pytest.mark.parametrize("keep", ["both", "head"])
def test_tied_with_the_head_stored(tmp_path, keep):
    state = random_state(TIED)
    write_hf(tmp_path / "hf", TIED, state)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if keep == "head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert_same(load(open_checkpoint(tmp_path / "hf")), state)


# --- Meta folders, against files made here from the published description -------------------


@pytest.mark.parametrize("n_files", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_meta(tmp_path, n_files, dtype):
    state = random_state(SMALL, dtype)
    save_meta(tmp_path, SMALL.to_meta(), meta_files(meta_state(SMALL, state), n_files))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.config, checkpoint.dtype) == ("meta", SMALL, dtype)
    assert [path.name for path in checkpoint.files] == [
        f"consolidated.{i:02d}.pth" for i in range(n_files)
    ]
    assert_same(load(checkpoint), state)


@pytest.mark.parametrize("n_files", [1, 2])
def test_writes_meta(tmp_path, n_files):
    state = random_state(SMALL)
    write_meta(tmp_path / "meta", SMALL, state, n_files=n_files)
    expected = meta_files(meta_state(SMALL, state), n_files)
    for i in range(n_files):
        path = tmp_path / "meta" / f"consolidated.{i:02d}.pth"
        for mmap in (False, True):
            assert_same(torch.load(path, weights_only=True, mmap=mmap), expected[i])
        assert zipfile.ZipFile(path).testzip() is None
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert LlamaConfig.from_meta(params) == SMALL


def test_meta_stores_a_tied_head_once_under_two_names(tmp_path):
    state = random_state(TIED)
    write_meta(tmp_path / "meta", TIED, state)
    path = tmp_path / "meta" / "consolidated.00.pth"
    stored = torch.load(path, weights_only=True)
    assert torch.equal(stored["output.weight"], state["embed.weight"])
    assert stored["output.weight"].data_ptr() == stored["tok_embeddings.weight"].data_ptr()
    assert path.stat().st_size < TIED.n_params * 2 + 20_000
    assert_same(load(open_checkpoint(tmp_path / "meta")), state)


@pytest.mark.parametrize("n_files", [1, 2])
@pytest.mark.parametrize("head", ["equal", "absent", "different"])
def test_meta_settles_whether_the_head_is_tied(tmp_path, n_files, head):
    state = random_state(SMALL)
    stored = meta_state(SMALL, state)
    if head == "absent":
        del stored["output.weight"]
    elif head == "equal":
        stored["output.weight"] = stored["tok_embeddings.weight"].clone()
    save_meta(tmp_path, SMALL.to_meta(), meta_files(stored, n_files))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.tied == (head != "different")
    if head != "different":
        del state["head.weight"]
    assert_same(load(checkpoint), state)


def test_meta_nested_under_model_with_rope_table(tmp_path):
    state = random_state(SMALL)
    stored = meta_state(SMALL, state) | {"rope.freqs": torch.ones(8)}
    save_meta(tmp_path, SMALL.to_meta(), [{"model": stored, "step": 7}])
    assert_same(load(open_checkpoint(tmp_path)), state)


def test_meta_embedding_cut_by_columns(tmp_path):
    """Llama 1 and 2 cut the embedding on dim 1 (FACTS, section 2)."""
    state = random_state(SMALL)
    stored = meta_state(SMALL, state)
    files = meta_files(stored, 2)
    for file, columns in zip(files, stored["tok_embeddings.weight"].chunk(2, 1), strict=True):
        file["tok_embeddings.weight"] = columns.clone()
    save_meta(tmp_path, SMALL.to_meta(), files)
    assert_same(load(open_checkpoint(tmp_path)), state)


def _with_kv_copies(config: LlamaConfig, state: dict[str, torch.Tensor], n_files: int):
    """Meta's files for more files than KV heads: each file has one head, some the same one."""
    files = meta_files(meta_state(config, state), n_files, skip=("wk.weight", "wv.weight"))
    for key, tensor in meta_state(config, state).items():
        if key.endswith(("wk.weight", "wv.weight")):
            heads = tensor.chunk(config.n_kv_heads)
            for i, file in enumerate(files):
                file[key] = heads[i * config.n_kv_heads // n_files].clone()
    return files


@pytest.mark.parametrize("n_kv_heads", [1, 2])
@pytest.mark.parametrize("counted", [True, False])
def test_copies_of_kv_heads_are_dropped(tmp_path, n_kv_heads, counted):
    """405B in 16 files has each of its 8 KV heads twice and says n_kv_heads=16."""
    config = dataclasses.replace(SMALL, n_kv_heads=n_kv_heads)
    state = random_state(config)
    params = config.to_meta() | ({"n_kv_heads": 4} if counted else {})
    save_meta(tmp_path, params, _with_kv_copies(config, state, 4))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == config
    assert_same(load(checkpoint), state)


def test_as_many_files_as_distinct_kv_heads(tmp_path):
    config = dataclasses.replace(SMALL, n_kv_heads=4)
    state = random_state(config)
    save_meta(tmp_path, config.to_meta(), meta_files(meta_state(config, state), 4))
    assert open_checkpoint(tmp_path).config == config
    assert_same(load(open_checkpoint(tmp_path)), state)


def test_rope_factor_override(tmp_path):
    config = dataclasses.replace(SMALL, rope_scaling=RopeScaling(8.0), max_seq_len=131072)
    write_meta(tmp_path / "meta", config, random_state(config))
    assert open_checkpoint(tmp_path / "meta").config == config
    changed = open_checkpoint(tmp_path / "meta", rope_factor=32).config
    assert changed == dataclasses.replace(config, rope_scaling=RopeScaling(32.0))


# --- loading --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hf", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_conversion(tmp_path, form, dtype):
    state = random_state(SMALL, torch.float32)
    (write_hf if form == "hf" else write_meta)(tmp_path / form, SMALL, state)
    checkpoint = open_checkpoint(tmp_path / form)
    converted = {name: tensor.to(dtype) for name, tensor in state.items()}
    assert_same(load(checkpoint, dtype), converted)
    assert_same(dict(checkpoint.tensors(dtype)), converted)


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_mixed_dtypes_are_kept(tmp_path, form):
    state = random_state(SMALL, torch.bfloat16)
    for name in state:
        if "norm" in name:
            state[name] = state[name].float()
    (write_hf if form == "hf" else write_meta)(tmp_path / form, SMALL, state)
    checkpoint = open_checkpoint(tmp_path / form)
    assert checkpoint.dtype == torch.bfloat16
    assert_same(dict(checkpoint.tensors()), state)


@pytest.mark.parametrize("form", ["hf", "meta", "meta-2"])
def test_rows_in_their_order_are_the_tensors(tmp_path, form, monkeypatch):
    """Also where they come a few at a time, permuted, or from several files."""
    monkeypatch.setattr("llama_fast.checkpoint.pieces.BLOCK_BYTES", 2500)
    state = random_state(SMALL, torch.bfloat16)
    if form == "hf":
        write_hf(tmp_path / form, SMALL, state)
    else:
        write_meta(tmp_path / form, SMALL, state, n_files=2 if form == "meta-2" else 1)
    parts = {name: list(rows) for name, rows in open_checkpoint(tmp_path / form).rows()}
    assert list(parts) == list(state_shapes(SMALL))
    assert len(parts["embed.weight"]) > 1
    assert_same({name: torch.cat(rows) for name, rows in parts.items()}, state)


@pytest.mark.parametrize("form", ["hf", "meta", "meta-2"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_read_their_rows(tmp_path, form, ranks, monkeypatch):
    """Also where a border lies within a head whose rows are ordered anew; and of the files hardly
    more is read than these rows."""
    monkeypatch.setattr("llama_fast.checkpoint.pieces.BLOCK_BYTES", 1000)
    config = dataclasses.replace(SMALL, vocab_size=322)  # no multiple of three
    state = random_state(config)
    if form == "hf":
        write_hf(tmp_path / form, config, state)
    else:
        write_meta(tmp_path / form, config, state, n_files=2 if form == "meta-2" else 1)
    checkpoint = open_checkpoint(tmp_path / form)
    found, read, progress = {name: [] for name in state}, [], []
    for kind in (SafetensorsFile, PthFile):
        own = kind.rows
        monkeypatch.setattr(
            kind, "rows", lambda *a, own=own: (rows := own(*a), read.append(rows.nbytes))[0]
        )
    for rank in range(ranks):
        share = RowShare(rank, ranks)
        runs = {name: slice(*share.of(len(x))) for name, x in state.items()}
        rows = {name: torch.full_like(state[name][run], torch.nan) for name, run in runs.items()}
        checkpoint.load_rows_into(rows, share, progress=lambda *call: progress.append(call))
        for name, part in rows.items():
            found[name].append(part)
        assert progress[-1][0] == progress[-1][1] == config.n_params * 2
    assert_same({name: torch.cat(parts) for name, parts in found.items()}, state)
    assert sum(read) < 1.5 * config.n_params * 2
    with pytest.raises(CheckpointError, match=r"rank 1 of 2: embed.weight .* its rows"):
        checkpoint.load_rows_into(state, RowShare(1, 2))


def test_rows_that_are_not_finite_are_refused(tmp_path):
    state = random_state(SMALL)
    state["layers.1.mlp.down.weight"][3, 5] = torch.nan
    write_hf(tmp_path / "hf", SMALL, state)
    checkpoint = open_checkpoint(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"down_proj.*not finite"):
        for _, rows in checkpoint.rows():
            list(rows)
    for _, rows in checkpoint.rows(check_finite=False):
        list(rows)


def test_load_into_a_state_with_its_tied_head(tmp_path):
    state = random_state(TIED)
    write_hf(tmp_path / "hf", TIED, state)
    target = {name: torch.full_like(tensor, torch.nan) for name, tensor in state.items()}
    parameter = torch.nn.Parameter(target["embed.weight"])  # in place, though it asks for grad
    load_into = open_checkpoint(tmp_path / "hf").load_into
    load_into({**target, "embed.weight": parameter, "head.weight": parameter})
    assert torch.equal(parameter, state["embed.weight"])
    apart = torch.full_like(parameter, torch.nan)
    load_into({**target, "head.weight": apart})
    assert torch.equal(apart, state["embed.weight"])


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_small_blocks_and_released_files(tmp_path, form, monkeypatch):
    """Blocks that divide nothing evenly, and files mapped anew after each of them."""
    state = random_state(SMALL)
    (write_hf if form == "hf" else write_meta)(tmp_path / form, SMALL, state)
    monkeypatch.setattr("llama_fast.checkpoint.pieces.BLOCK_BYTES", 2500)
    monkeypatch.setattr("llama_fast.checkpoint.read.MAPPED_BYTES", 1)
    assert_same(load(open_checkpoint(tmp_path / form)), state)


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_progress_counts_every_byte_once(tmp_path, form):
    (write_hf if form == "hf" else write_meta)(tmp_path / form, SMALL, random_state(SMALL))
    calls = []
    for _ in open_checkpoint(tmp_path / form).tensors(progress=lambda *call: calls.append(call)):
        pass
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert done[-1] == SMALL.n_params * 2
    assert {call[1] for call in calls} == {SMALL.n_params * 2}
    assert {call[2] for call in calls} == set(state_shapes(SMALL))


# --- converting -----------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("n_files", [1, 2])
def test_meta_to_hf_to_meta_is_bit_exact(tmp_path, config, n_files):
    write_meta(tmp_path / "a", config, random_state(config), n_files=n_files)
    convert(tmp_path / "a", tmp_path / "b", "hf")
    convert(tmp_path / "b", tmp_path / "c", "meta", n_files=n_files)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["untied", "tied"])
def test_hf_to_meta_to_hf_is_bit_exact(tmp_path, config):
    write_hf(tmp_path / "a", config, random_state(config), max_shard_bytes=50_000)
    convert(tmp_path / "a", tmp_path / "b", "meta", n_files=2)
    convert(tmp_path / "b", tmp_path / "c", "hf", max_shard_bytes=50_000)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes(), path.name


def test_convert_changes_dtype(tmp_path):
    state = random_state(SMALL, torch.float32)
    write_hf(tmp_path / "a", SMALL, state)
    convert(tmp_path / "a", tmp_path / "b", "hf", dtype=torch.bfloat16)
    expected = {name: tensor.bfloat16() for name, tensor in state.items()}
    assert_same(load(open_checkpoint(tmp_path / "b")), expected)


def _write_tokenizer(folder: Path, ordinary: int) -> None:
    lines = "".join(f"AAAA {rank}\n" for rank in range(ordinary))
    (folder / "tokenizer.model").write_text(lines)


def test_convert_carries_the_tokenizer(tmp_path):
    """The special tokens follow the ordinary ones that tokenizer.model lists."""
    write_meta(tmp_path / "a", SMALL, random_state(SMALL))
    _write_tokenizer(tmp_path / "a", 60)
    convert(tmp_path / "a", tmp_path / "b", "hf")
    convert(tmp_path / "b", tmp_path / "c", "meta")
    original = (tmp_path / "a" / "tokenizer.model").read_bytes()
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == original
    assert (tmp_path / "c" / "tokenizer.model").read_bytes() == original
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    generation = json.loads((tmp_path / "b" / "generation_config.json").read_text())
    assert config["bos_token_id"] == generation["bos_token_id"] == 60
    assert config["eos_token_id"] == generation["eos_token_id"] == [61, 69]


@pytest.mark.parametrize("table", ["3.0", "3.1"])
def test_the_table_of_special_tokens_comes_and_goes(tmp_path, table):
    """params.json says of which release a Meta folder is; tokenizer_config.json says it there."""
    scaling = None if table == "3.0" else RopeScaling(8.0, 1.0, 4.0, 8192)
    config = dataclasses.replace(SMALL, vocab_size=512, rope_scaling=scaling)
    write_meta(tmp_path / "a", config, random_state(config))
    tokens = [bytes([byte]) for byte in BYTE_ORDER]
    Tokenizer(tokens, specials=table).save(tmp_path / "a" / "tokenizer.model")
    convert(tmp_path / "a", tmp_path / "b", "hf")
    quantize_folder(tmp_path / "a", tmp_path / "q", "int8")
    convert(tmp_path / "b", tmp_path / "c", "meta")
    convert(tmp_path / "b", tmp_path / "d", "hf")
    quantize_folder(tmp_path / "b", tmp_path / "r", "int8")
    for name in "abcdqr":
        tokenizer = Tokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.specials == special_ids(table, 256), name
    assert (tokenizer.eom_id is None) == (table == "3.0")
    settings = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert settings["added_tokens_decoder"]["265"]["content"] == "<|eot_id|>"


def test_special_tokens_of_the_published_vocabulary(tmp_path):
    """FACTS, section 2: 3.0 stops at 128001 and 128009, 3.1 and later at 128008 too."""
    for scaling, stops in ((None, [128001, 128009]), (8.0, [128001, 128008, 128009])):
        config = LlamaConfig(
            dim=2, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=2, hidden_dim=2,
            vocab_size=128256, rope_scaling=scaling and RopeScaling(scaling),
        )  # fmt: skip
        folder = tmp_path / str(scaling)
        write_hf(folder, config, random_state(config))
        written = json.loads((folder / "generation_config.json").read_text())
        assert (written["bos_token_id"], written["eos_token_id"]) == (128000, stops)


def test_hf_to_hf_keeps_generation_and_tokenizer(tmp_path):
    write_hf(tmp_path / "a", SMALL, random_state(SMALL))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config |= {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 7}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    (tmp_path / "a" / "generation_config.json").write_text('{"temperature": 0.1}')
    (tmp_path / "a" / "tokenizer.json").write_text('{"added_tokens": []}')
    (tmp_path / "a" / "tokenizer_config.json").write_text("{}")
    convert(tmp_path / "a", tmp_path / "b", "hf", max_shard_bytes=50_000)
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert [written[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [5, 6, 7]
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        same = json.loads((tmp_path / "a" / name).read_text())
        assert json.loads((tmp_path / "b" / name).read_text()) == same


def test_write_copies_the_tokenizer(tmp_path):
    tokenizer = tmp_path / "tokenizer.model"
    Tokenizer([bytes([byte]) for byte in BYTE_ORDER]).save(tokenizer)
    config = dataclasses.replace(SMALL, vocab_size=512)
    write_hf(tmp_path / "hf", config, random_state(config), tokenizer_file=tokenizer)
    write_meta(tmp_path / "meta", config, random_state(config), tokenizer_file=tokenizer)
    for form in ("hf", "meta"):
        assert (tmp_path / form / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
