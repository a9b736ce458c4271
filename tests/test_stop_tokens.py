"""What ends a text: Llama 3's own tokens, and those that a folder's settings name, as fine-tunes do
with words that they have added."""

from __future__ import annotations

import json

import pytest

from llama_fast.errors import TokenizerError
from llama_fast.tokenizer import Tokenizer
from llama_fast.tokenizer.files import BYTE_ORDER
from llama_fast.tokenizer.special_tokens import special_ids

from .test_tokenizer import hf_json

TOKENS = [bytes([b]) for b in BYTE_ORDER]
SPECIALS = special_ids("hf", 256)
OWN = {SPECIALS[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")}
IM_END, IM_START = 512, 513


@pytest.fixture
def folder(tmp_path):
    """Of a fine-tune with a word that is special and one that is not."""
    added = {name: (id_, True) for name, id_ in SPECIALS.items()}
    added |= {"<|im_end|>": (IM_END, False), "<|im_start|>": (IM_START, True)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(hf_json(TOKENS, added)))
    return tmp_path


CONFIG, GENERATION, SETTINGS = "config.json", "generation_config.json", "tokenizer_config.json"


@pytest.mark.parametrize(
    ("files", "more"),
    [
        ({}, set()),
        ({CONFIG: {"eos_token_id": IM_END}}, {IM_END}),
        ({CONFIG: {"eos_token_id": [IM_END, 3]}}, {IM_END, 3}),
        ({CONFIG: {"eos_token_id": None}, GENERATION: {}}, set()),
        ({GENERATION: {"eos_token_id": [IM_START]}}, {IM_START}),
        ({SETTINGS: {"eos_token": "<|im_end|>"}}, {IM_END}),
        ({SETTINGS: {"eos_token": "<|im_start|>"}}, {IM_START}),
        ({SETTINGS: {"eos_token": {"content": "<|im_end|>", "special": True}}}, {IM_END}),
        ({SETTINGS: {"eos_token": None}}, set()),
        ({SETTINGS: {"eos_token": "</s>"}}, set()),  # a word that the vocabulary has not
        ({CONFIG: {"eos_token_id": -1}}, set()),
        (
            {
                CONFIG: {"eos_token_id": SPECIALS["<|end_of_text|>"]},
                GENERATION: {"eos_token_id": [7]},
                SETTINGS: {"eos_token": "<|im_end|>"},
            },
            {7, IM_END},
        ),
    ],
)
def test_what_a_folder_names_ends_a_text_too(folder, files, more):
    for name, settings in files.items():
        (folder / name).write_text(json.dumps(settings))
    assert Tokenizer.from_pretrained(folder).stop_ids == OWN | more


def test_beside_metas_file_too(tmp_path):
    Tokenizer(TOKENS, specials="hf").save(tmp_path / "tokenizer.model")
    (tmp_path / GENERATION).write_text('{"eos_token_id": 300}')
    (tmp_path / SETTINGS).write_text('{"eos_token": "<|reserved_special_token_5|>"}')
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    reserved = tokenizer.specials["<|reserved_special_token_5|>"]
    assert tokenizer.stop_ids == OWN | {300, reserved}


@pytest.mark.parametrize("name", [CONFIG, GENERATION])
@pytest.mark.parametrize("value", ["<|im_end|>", 2.5, True, [None, "x"], {"a": 1}])
def test_ids_that_are_none_are_named(folder, name, value):
    (folder / name).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(TokenizerError, match=rf"{name}: eos_token_id is .*; ids are integers"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", [CONFIG, GENERATION, SETTINGS])
@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_damaged_settings_are_named(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(TokenizerError, match=rf"{name}: "):
        Tokenizer.from_pretrained(folder)
