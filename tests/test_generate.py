"""Generation on a random model: batches, stops, streams and seeds."""

from __future__ import annotations

import pytest
import torch

from llama_fast.config import LlamaConfig
from llama_fast.errors import PromptError
from llama_fast.generation.generate import generate, stream
from llama_fast.model import Llama
from llama_fast.tokenizer import Tokenizer
from llama_fast.tokenizer.files import BYTE_ORDER

PROMPTS = ["a", "hello there", "你好，世界", "the quick brown fox jumps over the lazy dog"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer([bytes([b]) for b in BYTE_ORDER] + [b"he", b"ll", b"qu"])


@pytest.fixture(scope="module")
def model(tokenizer) -> Llama:
    torch.manual_seed(3)
    config = LlamaConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=96,
        vocab_size=tokenizer.vocab_size, max_seq_len=128,
    )  # fmt: skip
    model = Llama(config, device="cpu").eval()
    for parameter in model.parameters():  # sharp enough that argmax is no matter of rounding
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def step_by_step(model, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by running the whole sequence anew for each."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def until_stop(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    for i, token in enumerate(tokens):
        if token in tokenizer.stop_ids:
            return tokens[: i + 1]
    return tokens


def test_greedy_equals_running_the_whole_sequence(model, tokenizer):
    for completion, prompt in zip(
        generate(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0), PROMPTS, strict=True
    ):
        expected = step_by_step(model, tokenizer.encode(prompt, bos=True), 12)
        assert completion.tokens == until_stop(expected, tokenizer)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_neighbours_in_the_batch_change_nothing(model, tokenizer, temperature):
    arguments = {"max_new_tokens": 20, "temperature": temperature, "seed": 5}
    together = generate(model, tokenizer, PROMPTS, **arguments)
    for completion, prompt in zip(together, PROMPTS, strict=True):
        (alone,) = generate(model, tokenizer, prompt, **arguments)
        assert completion.tokens == alone.tokens
        assert completion.text == alone.text
        assert completion.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_a_seed_repeats_and_seeds_differ(model, tokenizer):
    def tokens(seed):
        return generate(model, tokenizer, "hello", max_new_tokens=20, temperature=1, seed=seed)[
            0
        ].tokens

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    both = generate(model, tokenizer, ["hello"] * 2, max_new_tokens=20, temperature=1, seed=[1, 2])
    assert [completion.tokens for completion in both] == [tokens(1), tokens(2)]


def test_logprobs_are_those_of_the_model(model, tokenizer):
    (completion,) = generate(model, tokenizer, "hello", max_new_tokens=6, temperature=0.7, seed=1)
    prompt = tokenizer.encode("hello", bos=True)
    with torch.no_grad():
        scores = model(torch.tensor([prompt + completion.tokens])).log_softmax(-1)[0]
    for i, (token, logprob) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
        assert logprob == pytest.approx(scores[len(prompt) - 1 + i, token].item(), abs=1e-4)


class Script(torch.nn.Module):
    """A model that says what it is told, token by token, whatever the prompts."""

    def __init__(self, rows: list[list[int]], vocab_size: int) -> None:
        super().__init__()
        self.config = LlamaConfig(
            dim=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, hidden_dim=8,
            vocab_size=vocab_size, max_seq_len=64,
        )  # fmt: skip
        self.rows, self.step, self.device, self.dtype = rows, 0, "cpu", torch.float32

    new_cache = Llama.new_cache

    @property
    def embed(self):
        return torch.nn.Embedding(1, 1)

    def forward(self, tokens, *, cache, last_only):
        cache.advance(tokens.shape[1])
        logits = torch.zeros(len(self.rows), 1, self.config.vocab_size)
        for row, script in enumerate(self.rows):
            logits[row, 0, script[min(self.step, len(script) - 1)]] = 50
        self.step += 1
        return logits


def say(tokenizer, *texts: str, end: bool = False, **arguments):
    rows = [tokenizer.encode(text, eos=end) for text in texts]
    script = Script(rows, tokenizer.vocab_size)
    arguments = {"max_new_tokens": 40, "temperature": 0} | arguments
    return script, tokenizer, ["x", "longer"][: len(texts)], arguments


def test_a_stop_token_ends_and_is_not_shown(tokenizer):
    model, tokenizer, prompts, arguments = say(tokenizer, "bye", end=True)
    (completion,) = generate(model, tokenizer, prompts, **arguments)
    assert completion.text == "bye" and completion.finish_reason == "stop"
    assert completion.tokens[-1] in tokenizer.stop_ids


def test_stop_strings_are_cut_and_never_shown_in_part(tokenizer):
    model, tokenizer, prompts, arguments = say(
        tokenizer, "one two STOP three", "a STO b STOP", stop=["STOP", "never"]
    )
    shown = {0: "", 1: ""}
    reasons = {}
    for chunk in stream(model, tokenizer, prompts, **arguments):
        shown[chunk.index] += chunk.text
        assert "STOP" not in shown[chunk.index]
        if chunk.finish_reason:
            reasons[chunk.index] = chunk.finish_reason
    assert shown == {0: "one two ", 1: "a STO b "}
    assert reasons == {0: "stop_string", 1: "stop_string"}


def test_held_back_text_is_shown_when_the_row_ends(tokenizer):
    model, tokenizer, prompts, arguments = say(tokenizer, "see ST", end=True, stop=["STOP"])
    assert generate(model, tokenizer, prompts, **arguments)[0].text == "see ST"


def test_characters_are_never_split(tokenizer):
    model, tokenizer, prompts, arguments = say(tokenizer, "你好，世界！🙂", end=True)
    chunks = list(stream(model, tokenizer, prompts, **arguments))
    assert "".join(chunk.text for chunk in chunks) == "你好，世界！🙂"
    assert all("\ufffd" not in chunk.text for chunk in chunks)


def test_a_row_that_ended_takes_no_room(tokenizer):
    # The long prompt fills the cache at once and ends; the short one goes on for 50 tokens.
    script = Script([[tokenizer.eos_id], tokenizer.encode("a")], tokenizer.vocab_size)
    completions = generate(script, tokenizer, ["y" * 60, "x"], max_new_tokens=50, temperature=0)
    assert [len(c.tokens) for c in completions] == [1, 50]


def test_the_context_ends_a_row(tokenizer):
    model, tokenizer, _, arguments = say(tokenizer, "a" * 80)
    (completion,) = generate(model, tokenizer, "y" * 50, **arguments)
    assert len(completion.tokens) == 64 - 51 and completion.finish_reason == "length"


def test_special_text_in_a_prompt_stays_text(tokenizer):
    ids = tokenizer.encode("<|eot_id|>")
    assert tokenizer.eot_id not in ids


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ("", {}, "empty"),
        ([], {}, "no prompt"),
        (["a", ""], {}, "prompt 1 is empty"),
        ([[]], {}, "empty"),
        ("y" * 200, {}, "context is 128"),
        ([[5, 10**6]], {}, "outside"),
        ([[-1]], {}, "outside"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens"),
        ("a", {"stop": [""]}, "stop"),
        ("a", {"stop": "end"}, "stop"),
        ("a", {"seed": [1, 2]}, "2 seeds"),
        ("a", {"top_p": 2.0}, "top_p"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(model, tokenizer, prompts, arguments, message):
    with pytest.raises(PromptError, match=message):
        stream(model, tokenizer, prompts, **arguments)
