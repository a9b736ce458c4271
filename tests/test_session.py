"""Sessions: turns that compute only what is new, and sessions on disk."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_fast import Llama, LlamaConfig, Tokenizer, generate, use_backend
from llama_fast.cli.options import DEMO
from llama_fast.errors import CheckpointError, ConfigError, PromptError
from llama_fast.generation import session_file
from llama_fast.generation.session import Session
from llama_fast.generation.session_file import fingerprint, load_session, save_session

GREEDY = {"max_new_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(DEMO)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96,
        vocab_size=tokenizer.vocab_size, max_seq_len=128,
    )  # fmt: skip
    return Llama(config).eval()


def tokens_of(chunks):
    return [chunk.token for chunk in chunks]


@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("inference", [False, True])
def test_each_token_is_computed_once(model, tokenizer, kv_cache, inference):
    text = tokenizer.encode("Once upon", bos=True)
    given = 0
    with torch.inference_mode(inference), Session(model, tokenizer, kv_cache=kv_cache) as session:
        for turn in range(5):
            more = tokenizer.encode(f" and {turn}")
            text += more
            given += len(more) + (turn == 0) * (len(text) - len(more))
            answer = tokens_of(session.stream(text, **GREEDY))
            assert answer == generate(model, tokenizer, text, kv_cache=kv_cache, **GREEDY)[0].tokens
            text += answer
            # The last token of an answer is drawn, and not computed until the next turn.
            assert session.prefilled == given + turn
            assert session.tokens == text[:-1]


def test_another_text_goes_on_from_where_both_agree(model, tokenizer):
    text = tokenizer.encode("Once upon a time there was a cat", bos=True)
    other = [*text[:5], *tokenizer.encode(" quite another story")]
    with Session(model, tokenizer) as session:
        tokens_of(session.stream(text, **GREEDY))
        assert session.kept_of(other) == 5
        assert session.kept_of(text[:3]) == 2  # the last token is computed, for its logits
        answer = tokens_of(session.stream(other, **GREEDY))
    assert answer == generate(model, tokenizer, other, **GREEDY)[0].tokens


def change_weight(model):
    with torch.no_grad():
        model.layers[1].mlp.down.weight.mul_(1.5)


def change_module(model):
    model.norm.eps = 0.5


def replace_weight(model):
    model.norm.weight = torch.nn.Parameter(model.norm.weight.detach() * 2)


@pytest.mark.parametrize("change", [change_weight, change_module, replace_weight])
def test_what_another_model_computed_is_not_kept(model, tokenizer, change):
    text = tokenizer.encode("Once upon a time there was", bos=True)
    with Session(model, tokenizer) as session:
        tokens_of(session.stream(text, **GREEDY))
        assert session.kept_of([*text, 0]) == len(text)
        change(model)
        assert session.kept_of([*text, 0]) == 0
        answer = tokens_of(session.stream(text, **GREEDY))
    assert answer == generate(model, tokenizer, text, **GREEDY)[0].tokens


def test_what_another_backend_computed_is_not_kept(model, tokenizer):
    with Session(model, tokenizer) as session:
        tokens_of(session.stream([1, 2, 3], **GREEDY))
        with use_backend("eager"):
            assert session.kept_of([1, 2, 3, 4]) == 0


def test_a_reader_that_stops_early_and_one_that_comes_late(model, tokenizer):
    text = tokenizer.encode("Once upon a time there was", bos=True)
    whole = generate(model, tokenizer, text, **GREEDY)[0].tokens
    with Session(model, tokenizer) as session:
        early = session.stream(text, **GREEDY)
        first = [next(early).token, next(early).token]
        assert session.tokens == [*text, first[0]]
        rest = tokens_of(session.stream([*text, *first], **GREEDY))
        assert first + rest[:4] == whole
        with pytest.raises(PromptError, match="another turn of this session has begun"):
            next(early)
        session.reset()
        assert session.tokens == [] and session.kept_of(text) == 0


def test_an_error_in_the_middle_loses_nothing(model, tokenizer):
    text = tokenizer.encode("Once upon a time there was", bos=True)
    with Session(model, tokenizer) as session:
        answer = tokens_of(session.stream(text, **GREEDY))
        hook = model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tokens_of(session.stream([*text, *answer, 1, 2], **GREEDY))
        hook.remove()
        more = [*text, *answer, 1, 2]
        again = tokens_of(session.stream(more, **GREEDY))
    assert again == generate(model, tokenizer, more, **GREEDY)[0].tokens


def test_what_a_session_refuses(model, tokenizer):
    with pytest.raises(PromptError, match="max_seq_len is 129 and the model's context 128"):
        Session(model, tokenizer, max_seq_len=129)
    with pytest.raises(ConfigError, match="kv_cache is 'int3'"):
        Session(model, tokenizer, kv_cache="int3")
    with Session(model, tokenizer, max_seq_len=8) as session:
        with pytest.raises(PromptError, match="8 tokens and the session holds 8"):
            session.stream([1] * 8)
        chunks = list(session.stream([1] * 5, max_new_tokens=50, stop_ids=()))
        assert len(chunks) <= 3


@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_a_session_on_disk(model, tokenizer, kv_cache, tmp_path):
    text = tokenizer.encode("Once upon a time there was", bos=True)
    path = tmp_path / "text.session"
    with Session(model, tokenizer, kv_cache=kv_cache) as session:
        with pytest.raises(CheckpointError, match="holds no tokens"):
            save_session(session, path)
        text += tokens_of(session.stream(text, **GREEDY))
        assert save_session(session, path) == len(text) - 1
        expected = tokens_of(session.stream([*text, 5], **GREEDY))
    # Read by a model that has not been called yet, as in a new process.
    again = Llama(model.config).eval()
    again.load_state_dict(model.state_dict())
    with Session(again, tokenizer, kv_cache=kv_cache) as session:
        assert load_session(session, path) == len(text) - 1
        assert session.kept_of([*text, 5]) == len(text) - 1
        assert tokens_of(session.stream([*text, 5], **GREEDY)) == expected
        assert session.prefilled == 2


def test_files_that_are_of_no_such_session(model, tokenizer, tmp_path):
    path = tmp_path / "text.session"
    with Session(model, tokenizer) as session:
        tokens_of(session.stream([1, 2, 3], **GREEDY))
        save_session(session, path)
        held = session.tokens

        def refused(says, into=session):
            before = into.tokens
            with pytest.raises(CheckpointError, match=says):
                load_session(into, path)
            assert into.tokens == before

        with Session(model, tokenizer, kv_cache="int8") as other:
            refused("does not fit this session", other)
        with Session(model, tokenizer, max_seq_len=4) as other:
            refused("does not fit this session", other)
        data = path.read_bytes()
        path.write_bytes(data[:-7])
        refused("cannot be read as a session")
        path.write_bytes(data)
        with torch.no_grad():
            model.layers[0].mlp.down.weight.mul_(1.01)
        refused("made by another model")
        save_file(load_file(path), path)
        refused("is no session")
        path.unlink()
        refused("cannot be read")
        assert session.tokens == held


def test_a_model_over_ranks_is_said_to_be_that(model, tokenizer, tmp_path, monkeypatch):
    """And not another model: what a rank has of it has another fingerprint."""
    path = tmp_path / "text.session"
    with Session(model, tokenizer) as session:
        tokens_of(session.stream([1, 2, 3], **GREEDY))
        save_session(session, path)
        with torch.no_grad():
            model.layers[0].mlp.down.weight.mul_(1.01)
        monkeypatch.setattr(session_file, "share_of", lambda model: SimpleNamespace(ranks=2))
        for read_or_write in (load_session, save_session):
            with pytest.raises(CheckpointError, match=r"over 2 ranks.*start one process"):
                read_or_write(session, path)


def test_the_fingerprint_of_a_model(model):
    before = fingerprint(model)
    assert before == fingerprint(model)
    with torch.no_grad():
        model.norm.weight[0] += 1
    assert fingerprint(model) != before
