"""The 256 special tokens of each Llama 3 release, as one table."""

from __future__ import annotations

from ..errors import TokenizerError

BOS, EOS, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
EOM, PAD = "<|eom_id|>", "<|finetune_right_pad_id|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
PYTHON_TAG = "<|python_tag|>"
N_SPECIALS = 256
# The file of Meta and that of Hugging Face.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
# Hugging Face's settings of a tokenizer, and their entry of tokens by their ids.
TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
ADDED_TOKENS = "added_tokens_decoder"
TABLES = ("3.0", "3.1", "hf")
# Offset from the first special id: its name in 3.0, in Meta's 3.1+ and in Hugging Face's 3.1+.
# Every offset without a name is the column's next <|reserved_special_token_N|>, N from 0.
_NAMED = {
    0: (BOS, BOS, BOS),
    1: (EOS, EOS, EOS),
    4: (None, PAD, PAD),
    5: (None, "<|step_id|>", None),
    6: (START_HEADER, START_HEADER, START_HEADER),
    7: (END_HEADER, END_HEADER, END_HEADER),
    8: (None, EOM, EOM),
    9: (EOT, EOT, EOT),
    10: (None, PYTHON_TAG, PYTHON_TAG),
    11: (None, "<|image|>", None),
}


def special_ids(table: str, first: int) -> dict[str, int]:
    """The 256 specials of `table` ("3.0", "3.1" or "hf"), name to id; the first has id `first`."""
    if table not in TABLES:
        raise TokenizerError(f"specials={table!r} is unknown; give one of {', '.join(TABLES)}")
    column, reserved, ids = TABLES.index(table), 0, {}
    for offset in range(N_SPECIALS):
        name = _NAMED.get(offset, (None,) * len(TABLES))[column]
        if name is None:
            name, reserved = f"<|reserved_special_token_{reserved}|>", reserved + 1
        ids[name] = first + offset
    return ids
