"""The two file formats of the Llama 3 vocabulary, read into byte strings in rank order.

Meta's `tokenizer.model` is lines of `base64 rank`; Hugging Face's `tokenizer.json` writes each byte
as a character. Both hold the same vocabulary, and in both a token's id is its merge rank.
"""

from __future__ import annotations

import base64
import json
import operator
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import JSON_ERRORS, LFS_POINTER, LFS_START, TokenizerError, json_fault
from .special_tokens import ADDED_TOKENS

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# GPT-2's byte order: printable characters first, the rest after them. A byte's place here is its
# rank, and the character that stands for it in tokenizer.json is itself or chr(256 + n).
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHER = tuple(b for b in range(256) if b not in _PRINTABLE)
BYTE_ORDER = bytes((*_PRINTABLE, *_OTHER))
BYTE_TO_CHAR = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + n) for n, b in enumerate(_OTHER)}
_CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def parse_ranks(data: bytes) -> list[bytes]:
    """The tokens of Meta's format in rank order."""
    if data.startswith(LFS_START.encode()):
        raise TokenizerError(LFS_POINTER)
    if b"<unk>" in data[:64] or b"\0" in data[:1024]:
        raise TokenizerError(
            "a sentencepiece model, as Llama 1 and 2 use it, or another binary file; "
            "this package needs Llama 3's tokenizer.model: lines of `base64 rank`"
        )
    tokens: list[bytes] = []
    seen: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError:
            raise TokenizerError(
                f"line {number} is not `base64 rank`: {line[:40]!r}; the file is cut off, "
                "damaged or no tokenizer"
            ) from None
        if rank != len(tokens):
            raise TokenizerError(
                f"line {number} has rank {rank} where {len(tokens)} is due; ranks must rise from 0 "
                "by one, so lines are missing, repeated or out of order: get a complete file"
            )
        if seen.setdefault(token, number) != number:
            raise TokenizerError(f"line {number} repeats the token of line {seen[token]}")
        tokens.append(token)
    if not tokens:
        raise TokenizerError("the file is empty; get a complete file")
    return tokens


def is_json(path: Path, data: bytes) -> bool:
    """Whether a tokenizer's file is Hugging Face's, told by its content."""
    return data.lstrip().startswith(b"{") or path.suffix == ".json"


def load_json(data: bytes) -> dict:
    try:
        value = json.loads(data)
    except JSON_ERRORS as error:
        raise TokenizerError(f"invalid JSON ({json_fault(error)}); get a complete file") from None
    if not isinstance(value, dict):
        raise TokenizerError("a JSON object is needed")
    return value


def json_beside(path: Path) -> dict:
    """Returns the object of a file that a folder may have; an empty one where it has not."""
    if not path.exists():
        return {}
    try:
        return load_json(path.read_bytes())
    except (TokenizerError, OSError) as error:
        raise TokenizerError(f"{path}: {error}") from error


def _fault(error: Exception) -> str:
    """What is wrong in an object that should describe tokens."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return "a value in it is of another kind than there"


def listed_tokens(config: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the special tokens and the added words that a tokenizer_config.json lists, text to
    id; it may list none."""
    listed = config.get(ADDED_TOKENS) or {}
    specials: dict[str, int] = {}
    added: dict[str, int] = {}
    try:
        for id_, token in listed.items():
            (specials if token["special"] else added)[token["content"]] = int(id_)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise TokenizerError(
            f"its {ADDED_TOKENS} are not tokens by their ids: {_fault(error)}"
        ) from None
    return specials, added


def named_ends(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns what a tokenizer_config.json or special_tokens_map.json calls the begin and the end
    of a text: "bos" and "eos", where it names them."""
    named = {}
    for end in ("bos", "eos"):
        token = config.get(f"{end}_token")
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str):
            named[end] = token
    return named


def _put_first(processor: Any) -> str | None:
    """Returns the token that a tokenizer.json's post-processor puts before every text."""
    steps = processor.get("processors", [processor]) if isinstance(processor, Mapping) else []
    for step in steps:
        first = (step.get("single") or [{}])[0]
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in first:
            return first["SpecialToken"]["id"]
    return None


class Vocabulary(NamedTuple):
    """What a tokenizer.json says: tokens by their ids, None where one is a word alone; special
    tokens and added words (text to id), and the token that it puts before a text."""

    tokens: list[bytes | None]
    specials: dict[str, int]
    added: dict[str, int]
    begin: str | None


def parse_json(data: bytes) -> Vocabulary:
    """Reads a tokenizer.json: the rank is the id.

    Some writers list the added tokens in the vocabulary too. Such a one is a token of the merging
    only where it is a single byte or a merge makes it; the others are whole words and nothing else.
    """
    root = load_json(data)
    try:
        vocab, added = root["model"]["vocab"], root.get("added_tokens") or []
        split = root["pre_tokenizer"]
        patterns = [s["pattern"]["Regex"] for s in split.get("pretokenizers", [split])[:1]]
        if patterns != [PATTERN] or root.get("normalizer") is not None:
            raise TokenizerError("it splits or normalizes text otherwise than Llama 3 does")
        words = {token["content"]: operator.index(token["id"]) for token in added}
        control = {token["content"] for token in added if token["special"]}
        for token in added:
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                raise TokenizerError(
                    f"added token {token['content']!r} has lstrip, rstrip or single_word set, "
                    "which this package does not follow"
                )
        keys = {operator.index(id_): key for key, id_ in vocab.items()}
        begin = _put_first(root.get("post_processor"))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise TokenizerError(
            f"not a byte-level BPE tokenizer.json as Llama 3 has it: {_fault(error)}"
        ) from None
    if len(keys) < len(vocab):
        raise TokenizerError("two tokens of its vocabulary have the same id")
    tokens = _tokens(keys, words, root["model"].get("merges") or ())
    specials = {name: id_ for name, id_ in words.items() if name in control}
    added_words = {name: id_ for name, id_ in words.items() if name not in control}
    return Vocabulary(tokens, specials, added_words, begin)


def _tokens(
    keys: Mapping[int, str], words: Mapping[str, int], merges: Collection[Any]
) -> list[bytes | None]:
    """The byte strings of a vocabulary by their ids, None for what is only a word; words at its
    end are left out."""
    n_ids = 1 + max(keys, default=-1)
    while n_ids and keys.get(n_ids - 1) in words:
        n_ids -= 1
    others = set(words.values())
    listed = {key for id_, key in keys.items() if id_ < n_ids and key in words and len(key) > 1}
    made = _made_by(merges) if listed else set()
    tokens: list[bytes | None] = []
    for id_ in range(min(n_ids, len(keys) + len(words) + 1)):
        key = keys.get(id_)
        if key is None and id_ not in others:
            raise TokenizerError(f"no token has the id {id_}; ids must be without gaps")
        if key is None or (key in listed and key not in made):
            tokens.append(None)
            continue
        if key in words:
            tokens.append(key.encode())
            continue
        try:
            tokens.append(bytes(_CHAR_TO_BYTE[char] for char in key))
        except KeyError as error:
            raise TokenizerError(
                f"token {key!r} (id {id_}) has the character {error}, which stands for no byte"
            ) from None
    return tokens


def _made_by(merges: Collection[Any]) -> set[str]:
    """What the merges of a tokenizer.json make; older files write a merge as "left right"."""
    try:
        return {"".join(m.split(" ") if isinstance(m, str) else m) for m in merges}
    except TypeError:
        raise TokenizerError("its merges are no pairs of texts; get a complete file") from None
