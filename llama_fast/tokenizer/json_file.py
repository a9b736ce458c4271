"""A vocabulary as Hugging Face's `tokenizer.json`, the one format that holds tokens after the
special ones.

What readers need, and differ in where it is missing (facts found by trying `tokenizers`):

- The special tokens stand in `added_tokens` and in `model.vocab`. Without the second, `tokenizers`
  numbers them anew after the last token of the vocabulary.
- `ignore_merges`: a piece that is a token is emitted whole. Some tokens no merge can reach.
- `merges` hold every way to make a token of two others, by the id of what is made, then of the
  left part, then of the right. The first merge that fits is then the one of the lowest rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .files import BYTE_TO_CHAR, PATTERN


def tokenizer_json(
    ranks: Mapping[bytes, int],
    specials: dict[str, int],
    added: dict[str, int],
    begin: str | None,
) -> str:
    """Returns the text of a tokenizer.json of a vocabulary's parts: token to rank, special token
    and added word to id, and the token to put before a text, as Llama 3's own file does."""
    chars = {token: "".join(map(BYTE_TO_CHAR.get, token)) for token in ranks}
    words = [(id_, name, True) for name, id_ in specials.items()]
    words += [(id_, name, False) for name, id_ in added.items()]
    vocab = {chars[token]: id_ for token, id_ in ranks.items()}
    # A word that is a token of the merging too is written in characters of its bytes already.
    taken = set(vocab.values())
    vocab |= {name: id_ for id_, name, _ in words if id_ not in taken}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id_, "content": name, **flags, "special": special}
            for id_, name, special in sorted(words)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "use_regex": False}],
        },
        "post_processor": _post_processor(begin, (specials | added).get(begin)),
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": dict(sorted(vocab.items(), key=lambda entry: entry[1])),
            "merges": [[chars[a], chars[b]] for a, b in merges(ranks)],
        },
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Returns every pair of tokens whose bytes are a token, by its rank, then by those of the left
    and of the right token."""
    found = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = ranks.get(token[:cut]), ranks.get(token[cut:])
            if left is not None and right is not None:
                found.append((rank, left, right, cut, token))
    found.sort()
    return [(token[:cut], token[cut:]) for *_, cut, token in found]


def _post_processor(name: str | None, id_: int | None) -> dict[str, Any]:
    """What adds the begin token, where there is one."""
    plain = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    plain["use_regex"] = True
    if name is None:
        return plain
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": s, "type_id": n}} for n, s in enumerate("AB"))
    again = {"SpecialToken": {"id": name, "type_id": 1}}
    template = {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, again, second],
        "special_tokens": {
            name: {"id": name, "ids": [id_], "tokens": [name]},
        },
    }
    return {"type": "Sequence", "processors": [plain, template]}
