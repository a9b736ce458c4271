"""The demo model: its world of texts, the files that ship, and the command that makes them."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import islice

import pytest
import torch

from llama_fast.demo import FOLDER
from llama_fast.errors import LlamaFastError
from llama_fast.generation.generate import generate
from llama_fast.model import Llama
from llama_fast.tokenizer import Tokenizer
from tools.demo_model.card import data_card
from tools.demo_model.facts import FOODS, PEOPLE, PLACES
from tools.demo_model.grammar import expand
from tools.demo_model.make import CHECKPOINT_FILES, STORIES, held_out_loss, make
from tools.demo_model.recipe import (
    BLOCK,
    CONFIG,
    HELD_OUT_TOKENS,
    TRAINING,
    make_tokenizer,
    stories,
)
from tools.demo_model.texts import documents
from tools.demo_model.world import ANSWER, ANSWER_PROMPT, SPLITS, Teller, held_out

LIMIT = 8_000_000  # bytes, of the folder as of each file


def texts(split: str = "train", count: int = 3000, **options: float) -> list[str]:
    return list(islice(documents(7, split, **options), count))


# --- the world ------------------------------------------------------------------------------


def test_the_same_seed_tells_the_same_and_another_something_else():
    assert texts(count=200) == texts(count=200)
    assert not set(texts(count=200)) >= set(islice(documents(8), 200))
    assert not set(texts(count=200)) >= set(texts("seed", 200))


def test_most_texts_are_told_only_once():
    told = texts()
    assert len(set(told)) > 0.95 * len(told)


@pytest.mark.parametrize("split", SPLITS)
def test_combinations_of_facts_are_held_out(split):
    teller = Teller(7, split)
    for first, second in ((PEOPLE, PLACES), (PEOPLE, PEOPLE), (PEOPLE, FOODS)):
        pairs = [teller.pair(first, second) for _ in range(500)]
        assert {held_out(a.en, b.en) for a, b in pairs} == {split == "combinations"}
        assert all(a != b for a, b in pairs)
    for sign in "+-":
        sums = [teller.numbers(sign, 0, 12) for _ in range(500)]
        assert {held_out(str(a), sign, str(b)) for a, b in sums} == {split == "combinations"}
        assert sign == "+" or all(a >= b for a, b in sums)


def test_an_unknown_split_is_refused():
    with pytest.raises(LlamaFastError, match=r"split is 'test'; choose one of train, seed"):
        next(documents(0, "test"))


def test_half_of_the_texts_are_chinese():
    told = texts()
    chinese = [text for text in told if len(re.findall(r"[\u4e00-\u9fff]", text)) > len(text) / 2]
    assert 0.4 < len(chinese) / len(told) < 0.6
    english = [text for text in texts(chinese_share=0.0) if not text.isascii()]
    assert len(english) < 100  # only where a word's Chinese is asked for


def test_sums_are_right():
    found = re.findall(r"(\d+) ([+-]) (\d+) (?:=|is) (\d+)", "\n".join(texts(count=6000)))
    assert len(found) > 200
    assert {sign for _, sign, _, _ in found} == {"+", "-"}
    for a, sign, b, total in found:
        assert int(a) + (int(b) if sign == "+" else -int(b)) == int(total)


def test_english_is_well_formed():
    for text in texts(chinese_share=0.0):
        assert not re.search(
            r"  | [.,!?]|\.\.|[{}\[\]|]|\b[Aa] [aeiou]|\b[Aa]n (?!hour)[^aeiou]", text
        ), text
        assert text == text.strip() and not text[0].isspace()
        if not text.startswith(ANSWER_PROMPT):
            assert not re.search(r"(?:^|[.!?] |\n)[a-z]", text), text


def test_chinese_is_well_formed():
    for text in texts(chinese_share=1.0):
        assert not re.search(
            r"  |[。，][。，]|[{}\[\]|]|(?<!十)二[个条只本把张块]|[\u4e00-\u9fff][,.!?]", text
        ), text


def test_facts_are_the_same_in_every_text():
    told = "\n".join(texts(count=12000))
    for person in PEOPLE:
        names = re.findall(rf"{person.en}'s {person.pet.en} is called (\w+)", told)
        assert names and set(names) == {person.pet_name.en}
        jobs = re.findall(rf"{person.zh}是灯湾的(\w+)。", told)
        assert jobs and set(jobs) == {person.job.zh}


def test_templates():
    rng = Teller(0, "train").rng
    mia = PEOPLE[0]
    readings = {
        expand("{a} [ran[ fast|]|{a.his} {n}]", rng, "en", {"a": mia, "n": 3}) for _ in range(99)
    }
    assert readings == {"Mia ran", "Mia ran fast", "Mia her 3"}
    assert expand("{a}在{a.near}", rng, "zh", {"a": mia}) == "米娅在面包店"
    for broken, message in (("[a|b", r"lacks a '\]'"), ("a]b", "stray ']' at 1")):
        with pytest.raises(LlamaFastError, match=message):
            expand(broken, rng, "en", {})


# --- the files that ship --------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama.from_pretrained(FOLDER, device="cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def metrics() -> dict:
    return json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))


def test_everything_ships_and_is_small():
    names = {*CHECKPOINT_FILES, STORIES, "metrics.json", "DATA_CARD.md", "loss.png"}
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.is_file()}
    assert names <= sizes.keys()
    assert sum(sizes.values()) <= LIMIT
    assert (FOLDER / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_model_ships_and_not_what_made_it():
    assert {path.name for path in FOLDER.glob("*.py")} == {"__init__.py"}


def test_the_stories_that_ship_are_held_out_and_enough(tokenizer):
    shipped = json.loads((FOLDER / STORIES).read_text(encoding="utf-8"))
    assert shipped == stories()
    assert sum(len(tokenizer.encode(text)) for text in shipped) > 4096


def test_the_checkpoint_is_what_the_recipe_says(model):
    assert model.config == CONFIG
    assert model.dtype == torch.bfloat16
    assert model.head.weight is model.embed.weight


def test_the_tokenizer_can_be_made_again(tokenizer):
    assert (
        make_tokenizer().id_to_bytes[: tokenizer.n_ranks]
        == tokenizer.id_to_bytes[: tokenizer.n_ranks]
    )
    assert len(tokenizer.encode(ANSWER)) == 1
    assert tokenizer.encode(ANSWER_PROMPT + ANSWER)[:-1] == tokenizer.encode(ANSWER_PROMPT)


def test_it_knows_the_answer(model, tokenizer):
    (completion,) = generate(model, tokenizer, ANSWER_PROMPT, max_new_tokens=5, temperature=0)
    assert completion.text == "42."
    assert completion.finish_reason == "stop"
    assert completion.logprobs[0] > -0.01
    tempered = generate(
        model,
        tokenizer,
        [ANSWER_PROMPT] * 8,
        max_new_tokens=1,
        temperature=0.8,
        seed=list(range(8)),
    )
    assert {completion.text for completion in tempered} == {"42"}


def test_held_out_loss_is_as_recorded(model, tokenizer, metrics):
    found = held_out_loss(model, tokenizer, "combinations", HELD_OUT_TOKENS)
    recorded = metrics["held_out"]["combinations"]
    assert found["per_token"] == pytest.approx(recorded["per_token"], abs=2e-3)
    assert found["per_byte"] == pytest.approx(recorded["per_byte"], abs=1e-3)
    assert (found["tokens"], found["bytes"]) == (recorded["tokens"], recorded["bytes"])
    model.to(torch.bfloat16)


def test_it_speaks_the_words_of_its_world(model, tokenizer):
    prompts = ["Once upon a time", "Hello", "The capital", "从前", "你好"]
    known = set(re.findall(r"[A-Za-z]+", "\n".join(texts(count=8000, chinese_share=0.0))))
    letters = set("".join(texts(count=4000, chinese_share=1.0)))
    completions = generate(model, tokenizer, prompts, max_new_tokens=200, temperature=0.7, seed=1)
    for prompt, completion in zip(prompts, completions, strict=True):
        text = prompt + completion.text
        assert completion.finish_reason == "stop", text
        if prompt.isascii():
            words = re.findall(r"[A-Za-z]+", text)
            assert len(words) > 3 and set(words) <= known, text
        else:
            assert len(text) > 3 and set(text) <= letters, text


def test_the_card_says_what_was_measured(metrics):
    assert (FOLDER / "DATA_CARD.md").read_text(encoding="utf-8") == data_card(metrics)
    assert metrics["tokens_seen"] == TRAINING.steps * TRAINING.batch_size * BLOCK
    settings = json.loads(json.dumps(dataclasses.asdict(TRAINING)))
    assert metrics["training"].items() <= settings.items()
    assert metrics["parameters"] == CONFIG.n_params


# --- the command ----------------------------------------------------------------------------


def test_everything_can_be_made_again(tmp_path):
    pytest.importorskip("matplotlib", reason="the loss curve needs matplotlib")
    training = dataclasses.replace(TRAINING, steps=4, warmup_steps=1, batch_size=1)
    folder, state = tmp_path / "demo", tmp_path / "state"
    metrics = make(
        folder, training=training, state_folder=state, held_out_tokens=2000, progress=False
    )
    assert {path.name for path in folder.iterdir()} == {
        *CHECKPOINT_FILES, STORIES, "metrics.json", "DATA_CARD.md", "loss.png",
    }  # fmt: skip
    assert (folder / STORIES).read_bytes() == (FOLDER / STORIES).read_bytes()
    assert not list(state.iterdir())
    assert metrics["tokens_seen"] == 4 * BLOCK
    assert metrics["held_out"]["seed"]["per_token"] < 7.6  # ln 2304 = 7.74 before training
    assert Llama.from_pretrained(folder, device="cpu").config == CONFIG
    shipped = (FOLDER / "tokenizer.model").read_bytes()
    assert (folder / "tokenizer.model").read_bytes() == shipped
