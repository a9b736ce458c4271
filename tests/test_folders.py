"""Folders as people have them: fine-tunes' tokenizers, and what looks like a model and is none."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest
import tokenizers
import torch

from llama_fast.checkpoint import convert, open_checkpoint, write_hf, write_meta, write_random
from llama_fast.config import LlamaConfig
from llama_fast.errors import CheckpointError, ConfigError, LlamaFastError, TokenizerError
from llama_fast.model import Llama
from llama_fast.quantization.folder import quantize_folder
from llama_fast.tokenizer import Tokenizer
from llama_fast.tokenizer.bpe import train_bpe
from llama_fast.tokenizer.special_tokens import special_ids

from .checkpoints import SMALL, random_state
from .test_tokenizer import SAMPLE, hf_json, rank_lines

RANKS = 400
WIDE = dataclasses.replace(SMALL, vocab_size=RANKS + 256 + 8)
INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    return train_bpe([SAMPLE], RANKS)


def listed(*names: str, words: tuple[str, ...] = ()) -> dict[str, tuple[int, bool]]:
    """Special tokens, and then ordinary words, after the ranks: name → (id, special)."""
    return {name: (RANKS + i, name not in words) for i, name in enumerate((*names, *words))}


def template(begin: str) -> dict:
    """A post-processor that puts a token before a text, as Llama 3's tokenizer.json has it."""
    single = [
        {"SpecialToken": {"id": begin, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {begin: {"id": begin, "ids": [RANKS], "tokens": [begin]}},
    }


# --- tokenizers of fine-tunes -----------------------------------------------------------------

# What a fine-tune has instead of Llama 3's 256 special tokens, and what its settings name.
FINE_TUNES = {
    "renamed": (
        listed(
            "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", words=("<think>",)
        ),
        {
            "bos_token": {"content": "<｜begin▁of▁sentence｜>", "__type": "AddedToken"},
            "eos_token": {"content": "<｜end▁of▁sentence｜>", "__type": "AddedToken"},
        },
    ),
    "begin and end": (
        listed("<|begin_of_text|>", "<|end_of_text|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
    ),
    "chat words": (
        listed("<|begin_of_text|>", "<|end_of_text|>", words=("<|im_start|>", "<|im_end|>")),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"},
    ),
}


def fine_tune(folder: Path, tokens: list[bytes], name: str) -> Path:
    """Only the files of its tokenizer."""
    added, settings = FINE_TUNES[name]
    data = hf_json(tokens, added) | {"post_processor": template(next(iter(added)))}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    settings = settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", FINE_TUNES)
def test_fine_tunes_have_the_ids_that_transformers_gives(tmp_path, tokens, name):
    transformers = pytest.importorskip("transformers", reason="compares with its tokenizer")
    folder = fine_tune(tmp_path / "fine", tokens, name)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_pretrained(folder)
    text = "hello 狐狸" + "".join(FINE_TUNES[name][0]) + " the fox"
    assert ours.encode(text, bos=True, allowed_special="all") == theirs(text).input_ids
    assert ours.bos_id == theirs.bos_token_id
    assert theirs.eos_token_id in ours.stop_ids
    assert ours.decode(ours.encode(text, allowed_special="all")) == text
    assert ours.vocab_size == len(theirs)


def test_what_a_vocabulary_lacks_is_none(tmp_path, tokens):
    renamed = Tokenizer.from_pretrained(fine_tune(tmp_path / "renamed", tokens, "renamed"))
    assert (renamed.bos_id, renamed.eos_id) == (RANKS, RANKS + 1)
    assert (renamed.eot_id, renamed.eom_id, renamed.pad_id) == (None, None, None)
    assert renamed.stop_ids == {RANKS + 1}
    chat = Tokenizer.from_pretrained(fine_tune(tmp_path / "chat", tokens, "chat words"))
    assert chat.eos_id == RANKS + 1 and chat.stop_ids == {RANKS + 1, RANKS + 3}

    config = tmp_path / "renamed" / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": "<s>"}))  # which it has not
    assert Tokenizer.from_pretrained(config.parent).bos_id == RANKS
    alone = Tokenizer.from_file(tmp_path / "renamed" / "tokenizer.json")
    assert (alone.bos_id, alone.eos_id) == (RANKS, None)  # the begin is what it puts first
    with pytest.raises(TokenizerError, match=r"eos=True, .* no token for it \(<\|end_of_text\|>\)"):
        alone.encode("a", bos=True, eos=True)
    bare = Tokenizer(tokens, specials={})
    assert bare.vocab_size == RANKS and bare.stop_ids == frozenset()
    assert bare.decode(bare.encode(SAMPLE)) == SAMPLE
    with pytest.raises(TokenizerError, match=r"bos=True.*no token for it.*leave it out"):
        bare.encode("a", bos=True)


def test_older_settings_name_the_ends_too(tmp_path, tokens):
    folder = fine_tune(tmp_path / "fine", tokens, "renamed")
    (folder / "tokenizer_config.json").rename(folder / "special_tokens_map.json")
    assert Tokenizer.from_pretrained(folder).eos_id == RANKS + 1


def test_a_begin_that_a_vocabulary_lacks_is_left_out_of_prompts(tokens):
    from llama_fast.generation.arguments import encode_prompts

    bare = Tokenizer(tokens, specials={})
    assert encode_prompts(bare, "the fox") == [bare.encode("the fox")]


# --- tokenizer.model beside a tokenizer.json --------------------------------------------------

TEXT = "x<tool_call>y 狐狸</tool_call><|eot_id|>"


def both_files(folder: Path, tokens: list[bytes], model: bytes | None = None) -> Path:
    """A Hugging Face folder whose tokenizer.json has two words that tokenizer.model has not."""
    write_hf(folder, WIDE, random_state(WIDE))
    added = {name: (id_, True) for name, id_ in special_ids("hf", RANKS).items()}
    added |= {"<tool_call>": (RANKS + 256, False), "</tool_call>": (RANKS + 257, False)}
    (folder / "tokenizer.json").write_text(json.dumps(hf_json(tokens, added)))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|eot_id|>"}')
    (folder / "tokenizer.model").write_bytes(model or rank_lines(tokens))
    return folder


@pytest.mark.parametrize("where", ["beside", "original"])
def test_tokenizer_json_decides_and_is_kept(tmp_path, tokens, where):
    source = both_files(tmp_path / "a", tokens)
    if where == "original":
        (source / "original").mkdir()
        (source / "tokenizer.model").rename(source / "original" / "tokenizer.model")
    theirs = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).encode(TEXT).ids
    convert(source, tmp_path / "hf", "hf")
    convert(source, tmp_path / "meta", "meta")
    convert(tmp_path / "meta", tmp_path / "back", "hf")
    quantize_folder(source, tmp_path / "int8", "int8")
    quantize_folder(tmp_path / "meta", tmp_path / "from-meta", "int8")
    for name in ("a", "hf", "meta", "back", "int8", "from-meta"):
        ours = Tokenizer.from_pretrained(tmp_path / name)
        assert ours.encode(TEXT, allowed_special="all") == theirs, name
        assert (tmp_path / name / "tokenizer_config.json").exists(), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["bos_token_id"] == RANKS
    assert config["eos_token_id"] == [RANKS + 1, RANKS + 8, RANKS + 9]


def test_words_that_settings_list_beside_meta_s_file_are_kept(tmp_path, tokens):
    source = both_files(tmp_path / "a", tokens)
    data = json.loads((source / "tokenizer.json").read_text())
    theirs = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).encode(TEXT).ids
    words = {str(token["id"]): token for token in data["added_tokens"]}
    (source / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": words}))
    (source / "tokenizer.json").unlink()
    convert(source, tmp_path / "meta", "meta")
    convert(tmp_path / "meta", tmp_path / "back", "hf")
    for name in ("a", "meta", "back"):
        ours = Tokenizer.from_pretrained(tmp_path / name)
        assert ours.encode(TEXT, allowed_special="all") == theirs, name


def test_settings_of_generation_come_and_go(tmp_path, tokens):
    source = both_files(tmp_path / "a", tokens)
    (source / "generation_config.json").write_text('{"eos_token_id": [7], "temperature": 0.1}')
    convert(source, tmp_path / "meta", "meta")
    convert(tmp_path / "meta", tmp_path / "back", "hf")
    back = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert back == {"eos_token_id": [7], "temperature": 0.1}


def test_renamed_ends_come_and_go(tmp_path, tokens):
    write_hf(tmp_path / "a", WIDE, random_state(WIDE))
    fine_tune(tmp_path / "a", tokens, "renamed")
    convert(tmp_path / "a", tmp_path / "meta", "meta")
    convert(tmp_path / "meta", tmp_path / "back", "hf")
    for name in ("a", "meta", "back"):
        assert Tokenizer.from_pretrained(tmp_path / name).bos_id == RANKS, name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (RANKS, [RANKS + 1])


# --- folders that hold no model ---------------------------------------------------------------


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "meta/Llama-3.2-1B"}')
    (folder / "adapter_model.safetensors").touch()


def shards(prefix: str):
    def make(folder: Path) -> None:
        for i in (1, 3):
            (folder / f"{prefix}-0000{i}-of-00004.safetensors").touch()

    return make


def file(name: str):
    return lambda folder: (folder / name).touch()


OTHERS = {
    "adapter": (adapter, r"a LoRA adapter of meta/Llama-3\.2-1B .*with --adapter"),
    "torchtune meta": (file("meta_model_0.pt"), r"meta_model_0\.pt .*torchtune.*consolidated\.00"),
    "torchtune hf": (file("hf_model_0001_0.pt"), r"hf_model_0001_0\.pt .*torchtune"),
    "torchtune own": (file("torchtune_model_0.pt"), r"torchtune_model_0\.pt .*torchtune"),
    "torchtune shards": (
        shards("ft-model"),
        rf"2 of 4 torchtune's shards but no {INDEX}.*ft-model-00001-of-00004",
    ),
    "shards": (shards("model"), rf"2 of 4 shards but no {INDEX}.*model-00001-of-00004"),
    "gpt-fast": (file("model.pth"), r"model\.pth .*gpt-fast"),
    "gpt-fast int4": (file("model_int4.g32.pth"), r"model_int4\.g32\.pth .*gpt-fast"),
    "litgpt": (file("lit_model.pth"), r"lit_model\.pth .*LitGPT"),
    "llama.cpp": (file("llama-3.Q4_K_M.gguf"), r"Q4_K_M\.gguf .*llama\.cpp"),
}


@pytest.mark.parametrize("beside", ["nothing", "config.json", "params.json"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_weights_are_refused_by_name(tmp_path, kind, beside):
    make, message = OTHERS[kind]
    make(tmp_path)
    if beside == "config.json":
        (tmp_path / beside).write_text(json.dumps(SMALL.to_hf()))
    if beside == "params.json":
        (tmp_path / beside).write_text(json.dumps(SMALL.to_meta()))
    for call in (
        open_checkpoint,
        Llama.from_pretrained,
        lambda folder: convert(folder, tmp_path / "new", "hf"),
        lambda folder: quantize_folder(folder, tmp_path / "new", "int8"),
    ):
        with pytest.raises(CheckpointError, match=message):
            call(tmp_path)
    assert not (tmp_path / "new").exists()


def test_a_whole_model_beside_others_is_read(tmp_path):
    write_hf(tmp_path / "hf", SMALL, random_state(SMALL))
    for make, _ in (OTHERS["adapter"], OTHERS["gpt-fast"]):
        make(tmp_path / "hf")
    assert open_checkpoint(tmp_path / "hf").config == SMALL


def test_pointers_of_git_lfs_are_named(tmp_path):
    write_hf(tmp_path / "hf", SMALL, random_state(SMALL), max_shard_bytes=50_000)
    write_meta(tmp_path / "meta", SMALL, random_state(SMALL), n_files=2)
    quantize_folder(tmp_path / "hf", tmp_path / "int8", "int8")
    shard = sorted((tmp_path / "hf").glob("model-*"))[1].name
    for place in (
        "hf/config.json", f"hf/{INDEX}", f"hf/{shard}",
        "meta/params.json", "meta/consolidated.01.pth",
        "int8/config.json", "int8/model.safetensors",
    ):  # fmt: skip
        folder = tmp_path / "lfs"
        shutil.copytree((tmp_path / place).parent, folder)
        (folder / Path(place).name).write_bytes(LFS)
        with pytest.raises(
            CheckpointError, match=rf"{Path(place).name}.* Git LFS pointer.*git lfs"
        ):
            open_checkpoint(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
def test_pointers_of_git_lfs_instead_of_tokenizers(tmp_path, tokens, name):
    if name == "tokenizer_config.json":
        fine_tune(tmp_path, tokens, "renamed")
    (tmp_path / name).write_bytes(LFS)
    with pytest.raises(TokenizerError, match=rf"{name}: .*Git LFS pointer.*git lfs pull"):
        Tokenizer.from_pretrained(tmp_path)


def test_the_cache_of_a_hub_names_its_snapshots(tmp_path):
    hub = tmp_path / "hub"
    root = hub / "models--meta-llama--Llama-3.2-1B"
    for commit in ("aaa", "bbb"):
        (root / "snapshots" / commit).mkdir(parents=True)
        write_hf(root / "snapshots" / commit, SMALL, random_state(SMALL))
    (root / "refs").mkdir()
    (root / "blobs").mkdir()
    (root / "refs" / "main").write_text("aaa\n")
    for folder in (root, root / "snapshots", hub, tmp_path):
        for read, error in (
            (open_checkpoint, CheckpointError),
            (Tokenizer.from_pretrained, TokenizerError),
        ):
            with pytest.raises(error, match=r"cache.*snapshot.* .*/snapshots/aaa"):
                read(folder)
    (root / "refs" / "main").unlink()
    with pytest.raises(CheckpointError, match=r"give its snapshot .*/snapshots/(aaa|bbb)"):
        open_checkpoint(root)


# --- what a config may say --------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hf", "meta", "int8"])
def test_too_many_layers_are_refused_at_once(tmp_path, form):
    write_hf(tmp_path / "hf", SMALL, random_state(SMALL))
    write_meta(tmp_path / "meta", SMALL, random_state(SMALL))
    quantize_folder(tmp_path / "hf", tmp_path / "int8", "int8")
    name, key = ("params.json", "n_layers")
    if form != "meta":
        name, key = ("config.json", "num_hidden_layers")
    path = tmp_path / form / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: 300_000}))
    start = time.process_time()
    with pytest.raises(CheckpointError, match=rf"{name} has {key}=300000, and its weights are"):
        open_checkpoint(tmp_path / form)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_json_that_is_nested_too_deeply(tmp_path, tokens, text):
    write_hf(tmp_path / "hf", SMALL, random_state(SMALL), max_shard_bytes=50_000)
    write_meta(tmp_path / "meta", SMALL, random_state(SMALL))
    for place in ("hf/config.json", f"hf/{INDEX}", "meta/params.json"):
        kept = (tmp_path / place).read_text()
        (tmp_path / place).write_text(text)
        with pytest.raises(CheckpointError, match="nested too deeply"):
            open_checkpoint((tmp_path / place).parent)
        (tmp_path / place).write_text(kept)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        fine_tune(tmp_path / "fine", tokens, "renamed")
        (tmp_path / "fine" / name).write_text(text)
        with pytest.raises(TokenizerError, match=rf"{name}: .*nested too deeply"):
            Tokenizer.from_pretrained(tmp_path / "fine")


OURS = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "norm_eps", "max_seq_len", "tied")
SCALING = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings is 'no'"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps is -1.0"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps is 1000"]),
        ({"head_dim": 15}, ["head_dim=15 is odd"]),
        ({"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1},
         ["hidden_size", "intermediate_size", "num_hidden_layers"]),
        ({"rope_scaling": SCALING | {"original_max_position_embeddings": 0}},
         ["original_max_position_embeddings is 0"]),
        ({"rope_scaling": SCALING | {"low_freq_factor": 4.0}}, ["low_freq_factor=4.0"]),
    ],
)  # fmt: skip
def test_errors_of_a_hugging_face_config_use_its_names(change, names):
    with pytest.raises(ConfigError) as error:
        LlamaConfig.from_hf(SMALL.to_hf() | change)
    text = str(error.value)
    assert all(name in text for name in names), text
    words = text.replace("=", " ").replace(",", " ").replace(";", " ").split()
    assert not set(words) & set(OURS), text


def test_missing_layers_are_counted_by_the_name_in_the_file(tmp_path):
    write_hf(tmp_path / "hf", SMALL, random_state(SMALL))
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"config\.json \(num_hidden_layers=3\) needs"):
        open_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize("multiplier", [0, 1e300, 1e308])
def test_errors_of_meta_s_params_use_their_names(multiplier):
    params = SMALL.to_meta() | {"ffn_dim_multiplier": multiplier}
    with pytest.raises(ConfigError, match="ffn_dim_multiplier") as error:
        LlamaConfig.from_meta(params)
    assert "hidden_dim" not in str(error.value)


# --- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, "", b"folder", 3])
def test_what_is_no_path_is_refused(tmp_path, path):
    write_hf(tmp_path / "hf", SMALL, random_state(SMALL))
    for call in (
        open_checkpoint,
        Llama.from_pretrained,
        Tokenizer.from_pretrained,
        Tokenizer.from_file,
        lambda p: convert(p, tmp_path / "new", "hf"),
        lambda p: convert(tmp_path / "hf", p, "hf"),
        lambda p: quantize_folder(p, tmp_path / "new", "int8"),
        lambda p: quantize_folder(tmp_path / "hf", p, "int8"),
        lambda p: write_random(p, WIDE),
        lambda p: Llama(SMALL).save_pretrained(p),
        lambda p: Tokenizer([bytes([b]) for b in range(256)]).save(p),
    ):
        with pytest.raises(LlamaFastError, match=r"the path is .*; give "):
            call(path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "bfloat16", torch.float8_e4m3fn])
def test_dtypes_that_weights_cannot_have(tmp_path, dtype):
    write_hf(tmp_path / "hf", SMALL, random_state(SMALL))
    for call in (
        lambda: Llama.from_pretrained(tmp_path / "hf", dtype=dtype),
        lambda: Llama(SMALL, dtype=dtype),
        lambda: convert(tmp_path / "hf", tmp_path / "new", "hf", dtype=dtype),
        lambda: quantize_folder(tmp_path / "hf", tmp_path / "new", "int8", dtype=dtype),
        lambda: write_random(tmp_path / "new", WIDE, dtype=dtype),
    ):
        with pytest.raises(ConfigError, match=r"dtype is .*; it must be one of torch\.float32"):
            call()
    assert not (tmp_path / "new").exists()


def test_other_arguments_of_from_pretrained(tmp_path):
    write_hf(tmp_path / "hf", SMALL, random_state(SMALL))
    for wrong, message in (
        ({"device": "gpu"}, "device is 'gpu'; it must be"),
        ({"device": 1.5}, "device is 1.5; it must be"),
        ({"device": "mps"}, "device is 'mps'; it must be"),
        ({"device": "cuda:99"}, r"device is 'cuda:99', and torch .* sees .* GPUs"),
        ({"max_seq_len": "64"}, "max_seq_len is '64'"),
        ({"max_seq_len": 0}, "max_seq_len is 0"),
        ({"quantize": "int3"}, "int3"),
    ):
        with pytest.raises(ConfigError, match=message):
            Llama.from_pretrained(tmp_path / "hf", **wrong)


def test_a_file_that_is_no_tokenizer_is_refused_before_anything_is_written(tmp_path, tokens):
    story, model = tmp_path / "story.txt", tmp_path / "tokenizer.model"
    story.write_text("Once upon a time")
    model.write_bytes(rank_lines(tokens))
    shutil.copy(model, tmp_path / "other.name")
    state = random_state(SMALL)
    for wrong, message in (
        (story, r"story\.txt: line 1 is not"),
        (tmp_path / "none", "cannot be read"),
        (tmp_path / "other.name", r"is named tokenizer\.model or tokenizer\.json there; rename it"),
        (model, "656 tokens and the model 320"),
    ):
        config = SMALL if wrong == model else WIDE
        with pytest.raises(TokenizerError, match=message):
            write_random(tmp_path / "new", config, tokenizer_file=wrong)
        for write in (write_hf, write_meta):
            with pytest.raises(TokenizerError):
                write(tmp_path / "new", SMALL, state, tokenizer_file=wrong)
        assert not (tmp_path / "new").exists()
