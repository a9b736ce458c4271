"""The Llama 3 tokenizer: byte-level BPE in which a token's id is its merge rank.

Reads Meta's `tokenizer.model` (lines of `base64 rank`) and Hugging Face's `tokenizer.json`; merging
is tiktoken's. A piece of text that is itself a token is emitted whole before any merging, which
is what Hugging Face calls `ignore_merges`. The special tokens follow the last rank: Llama 3 has
256, and a small vocabulary in the same format has the same at lower ids. A fine-tune may have
renamed them, or have fewer. A vocabulary that was extended (`vocabulary.extend`) has further tokens
after them, so that no id of the old one changes.
"""

from __future__ import annotations

import base64
import codecs
import functools
import operator
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import regex
import tiktoken

from ..errors import TokenizerError
from ..utils.files import atomic_file, given_path
from ..utils.hub import snapshot_hint
from .files import PATTERN, is_json, json_beside, listed_tokens, named_ends, parse_json, parse_ranks
from .json_file import tokenizer_json
from .special_tokens import (
    BOS,
    EOM,
    EOS,
    EOT,
    PAD,
    SPECIAL_TOKENS_MAP,
    TABLES,
    TOKENIZER_CONFIG,
    special_ids,
)
from .stop_tokens import folder_stop_ids

PIECES = regex.compile(PATTERN)
MAX_SLICE = 400_000  # characters handed to tiktoken at once
MAX_RUN = 25_000  # characters of one run of whitespace or of non-whitespace
_RUNS = re.compile(r"\s+|\S+")
_FILE = "a tokenizer.model or tokenizer.json"


class Tokenizer:
    """Text to ids and back.

    tokens: the vocabulary's byte strings by their ids, which are their ranks, all 256 single bytes
        among them; None at the id of a special token or added word that is no token of the merging.
    specials: the name of a table ("3.0", "3.1", "hf"), or name to id.
    added: further whole words, text to id, found in any text before the pattern splits it.
    bos, eos: which of these begin and end a text, where they do not have Llama 3's names.

    Attributes: ranks (token to id) and n_ranks, how many of them come before the first special
    token; vocab_size (ranks, specials and added words); specials (name to id),
    special_names (id to name) and added (word to id); bos_id, eos_id, eot_id, eom_id and pad_id,
    each None where the vocabulary has no such token (3.0 has no eom and no pad); stop_ids;
    id_to_bytes (tuple of bytes, a special's being its name in UTF-8).
    """

    def __init__(
        self,
        tokens: Sequence[bytes | None],
        *,
        specials: str | Mapping[str, int] = "3.1",
        added: Mapping[str, int] | None = None,
        bos: str | None = None,
        eos: str | None = None,
    ):
        ranks = {token: rank for rank, token in enumerate(tokens) if token is not None}
        if len(ranks) + tokens.count(None) < len(tokens):
            given = ((rank, token) for rank, token in enumerate(tokens) if token is not None)
            rank = next(rank for rank, token in given if ranks[token] != rank)
            raise TokenizerError(f"the tokens of ranks {rank} and {ranks[tokens[rank]]} are equal")
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        if missing:
            raise TokenizerError(
                f"{len(missing)} of the 256 single bytes are not in the vocabulary, the first of "
                f"them 0x{missing[0]:02x}; some text could not be encoded: get a complete file"
            )
        self.ranks: Mapping[bytes, int] = ranks
        self.n_ranks = tokens.index(None) if None in tokens else len(tokens)
        if isinstance(specials, str):
            specials = special_ids(specials, self.n_ranks)
        self.specials = dict(specials)
        self.special_names = {id_: name for name, id_ in self.specials.items()}
        self.added = dict(added or {})
        named = self.specials | self.added
        self.bos_id = named.get(BOS, named.get(bos))
        self.eos_id = named.get(EOS, named.get(eos))
        self.eot_id, self.eom_id, self.pad_id = (named.get(name) for name in (EOT, EOM, PAD))
        ends = {self.eos_id, self.eot_id, self.eom_id, named.get(eos)}
        self.stop_ids = frozenset(ends - {None})

        words = {id_: name.encode() for name, id_ in named.items()}
        if len(words) < len(self.specials) + len(self.added):
            raise TokenizerError("two special tokens or added words have the same name or id")
        self.vocab_size = max(len(tokens), 1 + max(words, default=-1))
        beyond = sum(id_ >= len(tokens) for id_ in words)
        if (
            min(words, default=0) < 0
            or len(tokens) + beyond < self.vocab_size
            or any(token is None and id_ not in words for id_, token in enumerate(tokens))
        ):
            raise TokenizerError(
                f"the ids of special tokens and added words leave gaps after {self.n_ranks - 1}, "
                "the last rank: the vocabulary is incomplete"
            )
        ids = range(self.vocab_size)
        self.id_to_bytes = tuple(words[i] if i in words else tokens[i] for i in ids)
        self._bpe = tiktoken.Encoding(
            "llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    @classmethod
    def from_file(
        cls, path: str | Path, *, specials: str | Mapping[str, int] = "auto"
    ) -> Tokenizer:
        """Reads Meta's `tokenizer.model` or Hugging Face's `tokenizer.json`, told apart by content.

        specials "auto" takes a tokenizer.json's own added tokens. Meta's file lists no specials, so
        there it means "3.1"; give "3.0" for the original Llama 3, or name to id. Raises
        TokenizerError.
        """
        return cls._read(given_path(path, _FILE, TokenizerError), specials)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, specials: str = "auto") -> Tokenizer:
        """Reads a folder's `tokenizer.json`, as transformers does, or else its `tokenizer.model`;
        what its other files say ends a text is among the stop_ids too.

        With Meta's file "auto" is the tokens that a `tokenizer_config.json` beside it lists; where
        it lists none and there is a `params.json`, "3.1" where `use_scaled_rope` is true and "3.0"
        where it is not. Such a vocabulary must then be of the model's size, which finds a file that
        was cut off at the end of a line. `tokenizer_config.json` or `special_tokens_map.json` name
        the begin and the end of a text where they have not Llama 3's names. Raises TokenizerError.
        """
        folder = given_path(folder, "the folder of a model", TokenizerError)
        tokenizer = cls._from_folder(folder, specials)
        tokenizer.stop_ids |= folder_stop_ids(folder)
        return tokenizer

    @classmethod
    def _from_folder(cls, folder: Path, specials: str) -> Tokenizer:
        if not folder.is_dir():
            raise TokenizerError(f"{folder} is not a folder; give one with a tokenizer.model in it")
        model, params = folder / "tokenizer.model", folder / "params.json"
        if not (folder / "tokenizer.json").exists() and not model.exists():
            hint = snapshot_hint(folder)
            raise TokenizerError(
                f"{folder} has neither tokenizer.model nor tokenizer.json{hint and f': {hint}'}"
            )
        settings = json_beside(folder / TOKENIZER_CONFIG)
        ends = named_ends(json_beside(folder / SPECIAL_TOKENS_MAP)) | named_ends(settings)
        if (folder / "tokenizer.json").exists():
            return cls._read(folder / "tokenizer.json", specials, **ends)
        try:
            listed, added = listed_tokens(settings) if specials == "auto" else ({}, {})
        except TokenizerError as error:
            raise TokenizerError(f"{folder / TOKENIZER_CONFIG}: {error}") from error
        if listed or added:
            return cls._read(model, listed, added=added, **ends)
        config = json_beside(params)
        if specials == "auto" and params.exists():
            specials = "3.1" if config.get("use_scaled_rope") else "3.0"
        tokenizer = cls._read(model, specials, **ends)
        rows = config.get("vocab_size")  # -1 where the file leaves it to the tokenizer
        padding = rows - tokenizer.vocab_size if isinstance(rows, int) and rows > 0 else 0
        if not 0 <= padding < 64:
            raise TokenizerError(
                f"{model} has {tokenizer.vocab_size} tokens, specials included, but the model has "
                f"{rows} (params.json): the file is cut off or belongs to another model"
            )
        return tokenizer

    @classmethod
    def _read(
        cls,
        path: Path,
        specials: str | Mapping[str, int],
        *,
        added: Mapping[str, int] | None = None,
        bos: str | None = None,
        eos: str | None = None,
    ) -> Tokenizer:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"{path} cannot be read ({error.strerror}); give {_FILE}"
            ) from error
        try:
            if is_json(path, data):
                tokens, found, added, begin = parse_json(data)
                if specials != "auto":
                    named = isinstance(specials, str)
                    first = tokens.index(None) if None in tokens else len(tokens)
                    wanted = special_ids(specials, first) if named else dict(specials)
                    taken = set(wanted.values())
                    found = {n: i for n, i in found.items() if i not in taken} | wanted
                if bos not in found | added:
                    bos = begin
                return cls(tokens, specials=found, added=added, bos=bos, eos=eos)
            specials = "3.1" if specials == "auto" else specials
            return cls(parse_ranks(data), specials=specials, added=added, bos=bos, eos=eos)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the ranks in Meta's format, which does not say which table of specials it is for.

        Raises TokenizerError where the file cannot be written or the format cannot hold the
        vocabulary: it has room for no added words, for no tokens after the specials, and for no
        other specials than the tables'.
        """
        if len(self.ranks) > self.n_ranks:
            raise TokenizerError(
                "Meta's format cannot hold the tokens that follow the special ones in this "
                "vocabulary; write a tokenizer.json: save_json"
            )
        if self.added or all(special_ids(t, self.n_ranks) != self.specials for t in TABLES):
            raise TokenizerError(
                "Meta's format cannot hold this vocabulary's own special tokens and added words; "
                "keep its tokenizer.json"
            )
        ranks = enumerate(self.id_to_bytes[: self.n_ranks])
        lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in ranks)
        with atomic_file(path, TokenizerError) as beside:
            beside.write_bytes(lines)

    def save_json(self, path: str | Path) -> None:
        """Writes a tokenizer.json, which `tokenizers`, transformers and this class read to the same
        ids: `json_file.tokenizer_json`. Raises TokenizerError where it cannot be written."""
        begin = self.name(self.bos_id)
        text = tokenizer_json(self.ranks, self.specials, self.added, begin)
        with atomic_file(path, TokenizerError) as beside:
            beside.write_text(text, encoding="utf-8")

    def encode(
        self,
        text: str,
        *,
        bos: bool = False,
        eos: bool = False,
        allowed_special: str | Collection[str] = frozenset(),
        disallowed_special: str | Collection[str] = (),
    ) -> list[int]:
        """The ids of `text`, with the begin and end tokens where asked.

        By default text that looks like a special token is encoded as the ordinary characters it is,
        so that text from outside cannot become a control token. allowed_special: the names (or
        "all") that become their ids. disallowed_special: the names (or "all", meaning all that are
        not allowed) that are refused. Text of any length is taken in slices, cut where the pattern
        splits it anyway; only a single piece longer than 25,000 characters is cut inside.

        Raises TokenizerError for anything but a str, a lone surrogate (which no UTF-8 holds; decode
        the input with errors="replace" to be rid of them), a refused or an unknown special, and a
        begin or end that the vocabulary does not have.
        """
        _check_text(text)
        allowed = self._names("allowed_special", allowed_special)
        refused = self._names("disallowed_special", disallowed_special)
        for name in refused - allowed if disallowed_special == "all" else refused:
            if name in text:
                raise TokenizerError(
                    f"the text holds {name}, which disallowed_special refuses; put it into "
                    "allowed_special, or leave both empty to encode it as ordinary text"
                )
        for end, asked, id_, name in (
            ("bos", bos, self.bos_id, BOS),
            ("eos", eos, self.eos_id, EOS),
        ):
            if asked and id_ is None:
                raise TokenizerError(
                    f"{end}=True, and this vocabulary has no token for it ({name}); "
                    f"leave it out, or name the token: Tokenizer(…, {end}=NAME), in a folder "
                    f'"{end}_token" of {TOKENIZER_CONFIG}'
                )
        ids = [self.bos_id] if bos else []
        ids += self.encode_words(text, self.added | {name: self.specials[name] for name in allowed})
        return [*ids, self.eos_id] if eos else ids

    def encode_words(self, text: str, words: Mapping[str, int]) -> list[int]:
        """The ids of `text`, in which these whole words, and no other specials and added words,
        become their ids. Raises as encode."""
        _check_text(text)
        ids: list[int] = []
        for n, part in enumerate(splitter(frozenset(words)).split(text) if words else (text,)):
            if n % 2:  # re.split: the separators stand at the odd places
                ids.append(words[part])
            else:
                for piece in slices(part):
                    ids += self._bpe.encode_ordinary(piece)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises as decode_bytes."""
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """The bytes of `ids`. Raises TokenizerError for an id outside 0 ... vocab_size - 1."""
        if not isinstance(ids, Iterable):
            raise TokenizerError(f"decode takes a sequence of ids, not {type(ids).__name__}")
        return b"".join(self._bytes(id_, skip_special) for id_ in ids)

    def _bytes(self, id_: int, skip_special: bool) -> bytes:
        try:
            index = operator.index(id_)
        except TypeError:
            raise TokenizerError(f"{id_!r} is not a token id; ids are integers") from None
        if not 0 <= index < self.vocab_size:
            raise TokenizerError(f"the id {index} is outside 0 ... {self.vocab_size - 1}")
        return b"" if skip_special and index in self.special_names else self.id_to_bytes[index]

    def name(self, id_: int | None) -> str | None:
        """Returns what a special token or added word is called, None for no such id."""
        named = self.specials | self.added
        return next((name for name, other in named.items() if other == id_), None)

    def _names(self, argument: str, value: str | Collection[str]) -> frozenset[str]:
        if value == "all":
            return frozenset(self.specials)
        names = frozenset([value] if isinstance(value, str) else value)
        if unknown := [name for name in names if name not in self.specials]:
            name = min(unknown)
            raise TokenizerError(f"{argument}: {name!r} is not a special token of this vocabulary")
        return names


class StreamDecoder:
    """Decodes ids one by one; bytes of an unfinished character wait until it is whole.

    All that push and flush return, joined, is what `Tokenizer.decode` gives for the same ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id_: int) -> str:
        """The characters that `id_` completes, perhaps none. Raises as Tokenizer.decode."""
        return self._utf8.decode(self._tokenizer._bytes(id_, self._skip_special))

    def flush(self) -> str:
        """What an unfinished character leaves (U+FFFD or nothing); the decoder starts anew."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TokenizerError(f"encode takes a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start} is a lone surrogate (U+{ord(text[error.start]):04X}), "
            'which is not text; decode the input with errors="replace"'
        ) from None


@functools.lru_cache(maxsize=16)
def splitter(names: frozenset[str]) -> re.Pattern[str]:
    """Returns a pattern that finds these names, the longest first, as its one group."""
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def slices(text: str) -> Iterator[str]:
    """Yields `text` cut to MAX_SLICE and MAX_RUN, beyond which tiktoken can overflow its stack."""
    start = 0
    while start < len(text):
        limit = min(start + MAX_SLICE, len(text))
        if limit - start > MAX_RUN:
            runs = (m.span() for m in _RUNS.finditer(text, start, limit))
            limit = next((a + MAX_RUN for a, b in runs if b - a > MAX_RUN), limit)
        if limit < len(text) and (line := _last_line(text, start, limit)):
            limit = line
        elif limit < len(text):
            # A piece that ends before the limit and not in whitespace ends there in the whole text
            # too: only whitespace looks further ahead than to the next character.
            ends = (m.end() for m in PIECES.finditer(text, start, limit))
            sure = [end for end in ends if end < limit and not text[end - 1].isspace()]
            limit = sure[-1] if sure else limit
        yield text[start:limit]
        start = limit


def _last_line(text: str, start: int, limit: int) -> int:
    """The last place of start+1 … limit-1 where a line begins with something else than whitespace,
    0 where there is none. No piece goes over such a place, so it needs no search for pieces."""
    at = text.rfind("\n", start, limit - 1)
    while at > start and text[at + 1].isspace():
        at = text.rfind("\n", start, at)
    return at + 1 if at > start else 0
