"""Rows of a model for a longer and a shorter vocabulary, in memory and in folders; transformers
reads the folders to the same ids and logits."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from llama_fast import training as train
from llama_fast.checkpoint import open_checkpoint, write_hf, write_meta
from llama_fast.checkpoint.vocabulary import (
    extend_folder,
    padded_config,
    prune_folder,
    read_pruned_ids,
)
from llama_fast.config import LlamaConfig
from llama_fast.config.rope_scaling import RopeScaling
from llama_fast.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LlamaFastError,
    TokenizerError,
)
from llama_fast.generation.generate import generate
from llama_fast.model import Llama
from llama_fast.tokenizer import Tokenizer
from llama_fast.tokenizer.bpe import train_bpe
from llama_fast.training import vocabulary

ENGLISH = "the cat sat on the mat and the other cat sat there; banana, bananas, bandana!\n"
CHINESE = "有中文字幕的电影，没有文字幕的电影。你好，世界！猫和狗在花园里玩，太阳很大，花很红。\n"
V = 300 + 256
SIZES = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 48}
# With scaled RoPE, so that a folder of Meta's has the special tokens of 3.1.
CONFIG = LlamaConfig(**SIZES, vocab_size=V, max_seq_len=96, rope_scaling=RopeScaling(8.0))


@pytest.fixture(scope="module")
def old():
    return Tokenizer(train_bpe([ENGLISH * 3 + CHINESE * 2], 300), specials="3.1")


@pytest.fixture(scope="module")
def longer(old):
    return vocabulary.extend(old, [CHINESE * 3, ENGLISH * 2], 30)


def model_of(tied: bool, dtype: torch.dtype = torch.float32) -> Llama:
    torch.manual_seed(0)
    return Llama(replace(CONFIG, tied=tied), dtype=dtype).eval()


@pytest.fixture(params=["hf", "meta", "hf tied", "meta tied"])
def folder(request, tmp_path, old) -> Path:
    kind, *tied = request.param.split()
    model = model_of(bool(tied), torch.bfloat16)
    file = tmp_path / ("tokenizer.json" if kind == "hf" else "tokenizer.model")
    (old.save_json if kind == "hf" else old.save)(file)
    write = write_hf if kind == "hf" else write_meta
    write(tmp_path / "old", model.config, model.state_dict(), tokenizer_file=file)
    if kind == "hf":
        settings = {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "pad_token": "<|finetune_right_pad_id|>",
            "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "additional_special_tokens": ["<|reserved_special_token_7|>", "<|eom_id|>"],
        }
        (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(settings))
        edit(tmp_path / "old" / "config.json", pad_token_id=old.pad_id)
        edit(tmp_path / "old" / "generation_config.json", pad_token_id=old.pad_id)
    return tmp_path / "old"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def in_transformers(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


# --- extend


def test_extended_folder(folder, old, longer, tmp_path):
    new = extend_folder(folder, longer, tmp_path / "new")
    before = dict(open_checkpoint(folder).tensors())
    found = open_checkpoint(tmp_path / "new")
    after = dict(found.tensors())
    assert found.config.vocab_size == 640 and found.config.vocab_padding == 640 - V - 30
    assert before.keys() == after.keys() and found.config.tied == ("head.weight" not in after)
    for name, weight in before.items():
        if name not in ("embed.weight", "head.weight"):
            assert torch.equal(weight, after[name])
            continue
        assert torch.equal(weight, after[name][:V]), "old rows keep every bit"
        for id_, spelled in new.items():
            mean = weight[spelled].double().mean(0)
            assert torch.equal(after[name][id_], mean.to(weight.dtype))
        assert not after[name][V + 30 :].any()
    read = Tokenizer.from_pretrained(tmp_path / "new")
    assert read.id_to_bytes == longer.id_to_bytes and read.stop_ids >= longer.stop_ids


def test_extended_model_in_transformers(folder, longer, tmp_path):
    extend_folder(folder, longer, tmp_path / "new")
    ours = Llama.from_pretrained(tmp_path / "new", device="cpu", dtype=torch.float32)
    theirs, tokenizer = in_transformers(tmp_path / "new")
    text = CHINESE + ENGLISH + "<|x|>"
    ids = tokenizer(text)["input_ids"]
    assert ids == longer.encode(text, bos=True) and set(ids) & set(range(V, V + 30))
    tokens = torch.tensor([ids])
    with torch.no_grad():
        expected, got = theirs(tokens).logits, ours(tokens)
    torch.testing.assert_close(got[..., : V + 30], expected[..., : V + 30], atol=1e-5, rtol=1e-5)
    assert (got[..., V + 30 :] == -torch.inf).all()
    # Their generation never draws a row of no token either.
    drawn = theirs.generate(tokens, do_sample=True, temperature=9.0, max_new_tokens=40)
    assert drawn.max() < V + 30
    assert theirs.generation_config.suppress_tokens == list(range(V + 30, 640))


def test_extended_twice(folder, longer, tmp_path):
    """Rows that were padding become tokens', which nothing suppresses then."""
    again = vocabulary.extend(longer, ["我们去山上看月亮。" * 4], 5)
    extend_folder(folder, longer, tmp_path / "new")
    new = extend_folder(tmp_path / "new", again, tmp_path / "newer")
    assert list(new) == list(range(V + 30, V + 35))
    found = open_checkpoint(tmp_path / "newer")
    assert found.config.vocab_size == 640 and found.config.vocab_padding == 640 - V - 35
    settings = json.loads((tmp_path / "newer" / "generation_config.json").read_text())
    assert settings["suppress_tokens"] == list(range(V + 35, 640))


def test_generation_from_an_extended_folder(folder, longer, tmp_path):
    extend_folder(folder, longer, tmp_path / "new")
    model = Llama.from_pretrained(tmp_path / "new", device="cpu")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "new")
    (found,) = generate(model, tokenizer, "猫和狗", max_new_tokens=50, temperature=5.0, seed=1)
    assert found.tokens and max(found.tokens) < V + 30


def test_reserved_rows(folder, old, tmp_path):
    new = vocabulary.extend(old, [CHINESE * 3], 20, use_reserved=True)
    made = extend_folder(folder, new, tmp_path / "new", multiple=1)
    before = dict(open_checkpoint(folder).tensors())
    after = dict(open_checkpoint(tmp_path / "new").tensors())
    kept = [id_ for id_ in range(V) if id_ not in made]
    for name in before.keys() & {"embed.weight", "head.weight"}:
        assert after[name].shape == before[name].shape
        assert torch.equal(after[name][kept], before[name][kept])
        assert not torch.equal(after[name][list(made)], before[name][list(made)])
    assert "vocab_padding" not in json.loads((tmp_path / "new" / "config.json").read_text())
    assert in_transformers(tmp_path / "new")[1].encode(CHINESE)[1:] == new.encode(CHINESE)


def test_a_padding_token_that_gave_its_id_away(tmp_path, old):
    model = model_of(False)
    old.save_json(tmp_path / "tokenizer.json")
    write_hf(
        tmp_path / "old", CONFIG, model.state_dict(), tokenizer_file=tmp_path / "tokenizer.json"
    )
    settings = {"pad_token": "<|reserved_special_token_0|>"}
    (tmp_path / "old" / "tokenizer_config.json").write_text(json.dumps(settings))
    new = vocabulary.extend(old, [CHINESE * 3], 20, use_reserved=True)
    with pytest.raises(CheckpointError, match=r"reserved_special_token_0.*pad_token"):
        extend_folder(tmp_path / "old", new, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_refusals_of_extend(folder, old, longer, tmp_path):
    other = Tokenizer(train_bpe([CHINESE * 4], 290), specials="3.1")
    with pytest.raises(TokenizerError, match="no extension"):
        extend_folder(folder, other, tmp_path / "new")
    with pytest.raises(CheckpointError, match="multiple"):
        extend_folder(folder, longer, tmp_path / "new", multiple=0)
    with pytest.raises(LlamaFastError, match="not empty"):
        extend_folder(folder, longer, folder)
    assert not (tmp_path / "new").exists()
    longer.save_json(folder / "tokenizer.json")
    with pytest.raises(TokenizerError, match="belongs to another model"):
        extend_folder(folder, longer, tmp_path / "new")


@pytest.mark.parametrize("tied", [False, True])
def test_resize_in_memory_is_the_folder_s(tied, old, longer, tmp_path):
    model = model_of(tied)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    old.save_json(tmp_path / "tokenizer.json")
    file = tmp_path / "tokenizer.json"
    write_hf(tmp_path / "old", model.config, model.state_dict(), tokenizer_file=file)
    extend_folder(tmp_path / "old", longer, tmp_path / "new")
    ids = vocabulary.resize(model, longer)
    assert ids == list(range(V, V + 30))
    state = dict(open_checkpoint(tmp_path / "new").tensors())
    for name, weight in state.items():
        assert torch.equal(weight, model.state_dict()[name])
    assert (model.head.weight is model.embed.weight) == tied
    assert torch.equal(model.embed.weight[:V], before["embed.weight"])
    assert model.config == open_checkpoint(tmp_path / "new").config
    again = vocabulary.extend(longer, ["我们去山上看月亮。" * 4], 5)
    with pytest.raises(TokenizerError, match="old=tokenizer"):
        vocabulary.resize(model, again)
    assert vocabulary.resize(model, again, old=longer) == list(range(V + 30, V + 35))
    assert model.config.vocab_size == 640 and model.config.vocab_padding == 640 - V - 35


@pytest.mark.parametrize("tied", [False, True])
def test_padding_takes_no_part_in_the_loss(tied, longer):
    """Loss and gradients are those of a model that has no padding."""
    model, plain = model_of(tied), model_of(tied)
    vocabulary.resize(model, longer)
    vocabulary.resize(plain, longer, multiple=1)
    with torch.no_grad():
        model.embed.weight[V + 30 :] = torch.nan  # poison: what reads them shows it
        if not tied:
            model.head.weight[V + 30 :] = torch.nan
    tokens = torch.tensor([longer.encode(CHINESE)])
    targets = tokens.roll(-1, 1)
    losses = [each.loss(tokens, targets) for each in (model, plain)]
    torch.testing.assert_close(*losses)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(tokens)[0, :, : V + 30].double(), targets[0]
        )
    torch.testing.assert_close(losses[0].detach().double(), expected, atol=1e-5, rtol=1e-5)
    for loss in losses:
        loss.backward()
    for name in ("embed", "head"):
        padded, bare = (getattr(each, name).weight.grad for each in (model, plain))
        assert not padded[V + 30 :].any(), "no gradient, and not NaN"
        torch.testing.assert_close(padded[: V + 30], bare)


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "lm_head")])
def test_padding_under_an_adapter_with_trained_rows(targets, longer):
    """New rows alone are trained in embedding and head; with "lm_head" the logits are whole."""
    losses, gradients = [], []
    for multiple in (64, 1):
        model = model_of(False)
        new = vocabulary.resize(model, longer, multiple=multiple)
        with torch.no_grad():
            # Where the logits are whole, zero times NaN would be NaN in the gradient of x.
            model.head.weight[V + 30 :] = 1e3 if "lm_head" in targets else torch.nan
        rows = None if "lm_head" in targets else new
        torch.manual_seed(1)
        train.lora(model, rank=2, targets=targets, rows=rows)
        tokens = torch.tensor([longer.encode(CHINESE)])
        loss = model.loss(tokens, tokens.roll(-1, 1))
        loss.backward()
        losses.append(loss.detach())
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        gradients.append({n: p.grad for n, p in trained.items() if "head.lora" not in n})
    torch.testing.assert_close(*losses)
    assert len(gradients[0]) >= 2 and gradients[0].keys() == gradients[1].keys()
    for name, found in gradients[0].items():
        torch.testing.assert_close(found, gradients[1][name])


def test_padding_of_a_quantised_head(longer):
    model = model_of(False)
    vocabulary.resize(model, longer)
    tokens = torch.tensor([longer.encode(CHINESE)])
    targets = tokens.roll(-1, 1)
    from llama_fast.config.quantization import Quantization
    from llama_fast.ops.quantized_weight import round_weight

    form = Quantization.of("int8").of_weight("head.weight")
    model.set_weight("head.weight", round_weight(model.head.weight.detach(), form))
    with torch.no_grad():
        logits = model(tokens)
        loss = model.loss(tokens, targets)
    expected = torch.nn.functional.cross_entropy(logits[0, :, : V + 30], targets[0])
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="quantised"):
        vocabulary.resize(model, longer)


def test_compiled_and_in_every_mode(longer):
    model = model_of(False)
    vocabulary.resize(model, longer)
    tokens = torch.tensor([longer.encode(CHINESE)[:12]])
    expected = model(tokens).detach()
    with torch.inference_mode():
        assert torch.equal(model(tokens), expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), expected)


@pytest.mark.parametrize("padding", [-1, V, 1.5, True])
def test_padding_that_no_model_can_have(padding):
    with pytest.raises(ConfigError, match="vocab_padding"):
        replace(CONFIG, vocab_padding=padding)


def test_configs_keep_the_padding():
    config = padded_config(CONFIG, V + 1)
    assert (config.vocab_size, config.vocab_padding) == (576, 19)
    assert LlamaConfig.from_hf(config.to_hf()) == config
    assert LlamaConfig.from_meta(config.to_meta()) == config
    assert "vocab_padding" not in CONFIG.to_hf() | CONFIG.to_meta()


# --- distill


@pytest.mark.parametrize("tied", [False, True])
def test_distilled_rows_give_the_old_hidden_states(tied, old, longer):
    model, mean = model_of(tied), model_of(tied)
    vocabulary.resize(mean, longer, old=old)
    vocabulary.resize(model, longer, old=old)
    texts = [CHINESE, ENGLISH] * 20
    steps = []
    settings = {"lr": 3e-3, "batch": 2, "length": 20, "snippets": 60}
    found = vocabulary.distill(
        model, old, longer, texts, progress=lambda *at: steps.append(at), **settings
    )
    new = {*longer.encode(CHINESE), *longer.encode(ENGLISH)} & set(range(V, V + 30))
    assert found.seen == len(new) > 3
    assert found.steps == len(steps) > 10 and steps[-1][:2] == (len(steps),) * 2
    assert found.last < 0.8 * found.first, found
    changed = (model.embed.weight != mean.embed.weight).any(1)
    assert changed.nonzero().flatten().tolist() == sorted(new)
    for name, weight in model.state_dict().items():
        if name not in ("embed.weight", *(["head.weight"] if tied else [])):
            assert torch.equal(weight, mean.state_dict()[name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.embed._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())

    def error(each: Llama) -> float:
        """Of the hidden states where tokens of both spellings end, new against old."""
        states = []
        for tokenizer in (old, longer):
            ids = tokenizer.encode(CHINESE)
            ends = accumulate(len(tokenizer.id_to_bytes[id_]) for id_ in ids)
            with torch.no_grad():
                h = each.hidden(torch.tensor([[tokenizer.bos_id, *ids]]))[0, 1:]
            states.append(dict(zip(ends, h, strict=True)))
        both = states[0].keys() & states[1].keys()
        return sum((states[0][end] - states[1][end]).square().mean().item() for end in both)

    assert error(model) < 0.7 * error(mean)


def test_resize_by_distillation_and_its_refusals(old, longer):
    model = model_of(False, torch.bfloat16)
    with pytest.raises(ConfigError, match="needs texts"):
        vocabulary.resize(model, longer, "distill")
    with pytest.raises(ConfigError, match="'random'"):
        vocabulary.resize(model, longer, "random")
    assert model.config.vocab_size == V
    assert vocabulary.resize(model, longer, "distill", texts=[CHINESE])[0] == V
    assert model.embed.weight.dtype == torch.bfloat16
    with pytest.raises(DataError, match="no new token"):
        vocabulary.distill(model, old, longer, ["zzz"])
    with pytest.raises(ConfigError, match="length is 0"):
        vocabulary.distill(model, old, longer, [CHINESE], length=0)


# --- prune


def test_pruned_folder(folder, old, tmp_path):
    text = "猫和狗在花园里玩，the cat sat"
    before = Tokenizer.from_pretrained(folder)
    pruned = vocabulary.prune(before, [text])
    prune_folder(folder, pruned, tmp_path / "new")
    short, kept = pruned
    assert read_pruned_ids(tmp_path / "new") == kept
    maps = json.loads((tmp_path / "new" / "pruned_ids.json").read_text())
    assert all(kept[new] == int(old_id) for old_id, new in maps["new_ids"].items())
    read = Tokenizer.from_pretrained(tmp_path / "new")
    assert read.id_to_bytes == short.id_to_bytes and read.stop_ids == short.stop_ids
    assert {kept[id_] for id_ in read.stop_ids} == before.stop_ids

    for name in ("config.json", "generation_config.json"):
        new = json.loads((tmp_path / "new" / name).read_text())
        assert kept[new["bos_token_id"]] == before.bos_id
        assert {kept[id_] for id_ in new["eos_token_id"]} <= before.stop_ids
        if (folder / "generation_config.json").exists():
            was = json.loads((folder / name).read_text())
            assert [kept[id_] for id_ in new["eos_token_id"]] == was["eos_token_id"]
        if "pad_token_id" in new:
            assert kept[new["pad_token_id"]] == before.pad_id

    theirs, tokenizer = in_transformers(tmp_path / "new")
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") == short.eot_id
    ids = tokenizer(text)["input_ids"]
    assert [kept[id_] for id_ in ids] == before.encode(text, bos=True)
    model = Llama.from_pretrained(folder, device="cpu", dtype=torch.float32)
    pruned_model = Llama.from_pretrained(tmp_path / "new", device="cpu", dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([before.encode(text, bos=True)]))[..., kept]
        got = pruned_model(torch.tensor([ids]))[..., : len(kept)]
        other = theirs(torch.tensor([ids])).logits[..., : len(kept)]
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(other, expected, atol=1e-5, rtol=1e-5)
    if (tmp_path / "new" / "chat_template.jinja").exists() or tokenizer.chat_template:
        said = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], return_dict=False, add_special_tokens=False
        )
        assert said == ids


def test_refusals_of_prune(folder, longer, old, tmp_path):
    with pytest.raises(TokenizerError, match="was not made from"):
        prune_folder(folder, vocabulary.prune(longer, [CHINESE]), tmp_path / "new")
    if (folder / "generation_config.json").exists():
        edit(folder / "generation_config.json", suppress_tokens=[old.ranks[b" cat"]])
        with pytest.raises(CheckpointError, match=r"generation_config\.json has suppress_tokens"):
            prune_folder(folder, vocabulary.prune(old, ["x"]), tmp_path / "new")
    assert not (tmp_path / "new").exists()
