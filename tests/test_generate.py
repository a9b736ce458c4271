"""Generation on a random model: batches, stops, streams and seeds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llama_fast.config import LlamaConfig
from llama_fast.dispatch import use_backend
from llama_fast.errors import LogitsError, PromptError
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


def say_ids(tokenizer, *rows: list[int], **arguments):
    arguments = {"max_new_tokens": 12, "temperature": 0} | arguments
    model = Script([list(row) for row in rows], tokenizer.vocab_size)
    return generate(model, tokenizer, ["x", "longer"][: len(rows)], **arguments)


RESERVED = "<|reserved_special_token_3|>"


@pytest.mark.parametrize(
    ("said", "stop", "text", "reason"),
    [
        # What is said: texts, with special tokens spelled between bars.
        (["bye", RESERVED, "never"], [RESERVED], "bye", "stop_string"),
        (["a", RESERVED, "b", RESERVED, "\nnever"], [RESERVED + "\n"], "ab", "stop_string"),
        (["a", RESERVED, "see"], ["a" + RESERVED + "s"], "", "stop_string"),
        (["a", "<|step_id|>", RESERVED, "c"], [RESERVED, "c"], "a", "stop_string"),
        (["a", "<|step_id|>", RESERVED], ["<|step_id|>" + RESERVED], "a", "stop_string"),
        (["one ", RESERVED, "two"], ["e two"], "on", "stop_string"),  # it is in no text
        (["one ", RESERVED, "two", "<|eot_id|>"], [RESERVED + "three"], "one two", "stop"),
        (["a", "<|eot_id|>"], ["<|eot_id|>"], "a", "stop"),
    ],
)
def test_stop_strings_that_spell_special_tokens(tokenizer, said, stop, text, reason):
    ids = [
        id_
        for part in said
        for id_ in ([tokenizer.specials[part]] if "<|" in part else tokenizer.encode(part))
    ]
    (found,) = say_ids(tokenizer, ids, stop=stop)
    assert (found.text, found.finish_reason) == (text, reason)
    # Spelled in ordinary characters it is the same text.
    plain = tokenizer.encode("".join(said).split("<|eot_id|>")[0])
    (found,) = say_ids(tokenizer, plain, stop=[RESERVED, "<|step_id|>"], max_new_tokens=90)
    assert "<|" not in found.text


def test_stop_ids_end_a_row_too(tokenizer):
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    for stop_ids in (b[0], b, torch.tensor(b), {b[0], 7}):
        one, two = say_ids(tokenizer, a * 3 + b, [*a, tokenizer.eot_id], stop_ids=stop_ids)
        assert (one.text, one.finish_reason, one.tokens[-1:]) == ("aaa", "stop", b)
        assert (two.text, two.finish_reason) == ("a", "stop")
    assert [c.text for c in say_ids(tokenizer, a, stop=None, stop_ids=None)] == ["a" * 12]


def test_prompts_of_other_kinds_are_continued_alike(model, tokenizer):
    ids = [tokenizer.encode(prompt, bos=True) for prompt in PROMPTS]
    arguments = {"max_new_tokens": 5, "temperature": 0.7, "seed": torch.tensor([1, 2, 3, 4])}
    expected = generate(model, tokenizer, PROMPTS, **arguments)
    for prompts in (map(np.array, ids), [*map(torch.tensor, ids)], (p for p in PROMPTS)):
        assert generate(model, tokenizer, prompts, **arguments) == expected
    found = list(stream(model, tokenizer, torch.tensor(ids[1]), max_new_tokens=np.int64(5), seed=2))
    assert 0 < len(found) <= 5 and {chunk.index for chunk in found} == {0}


@pytest.mark.parametrize("temperature", [0, 1.0, 5.0])
@pytest.mark.parametrize("padding", [1, 60])
def test_ids_that_the_tokenizer_lacks_are_never_drawn(tokenizer, temperature, padding):
    class Padded(Script):
        def forward(self, tokens, *, cache, last_only):
            logits = super().forward(tokens, cache=cache, last_only=last_only)
            logits[:, :, tokenizer.vocab_size :] = self.beyond
            return logits

    a = tokenizer.encode("a")
    arguments = {"max_new_tokens": 30, "temperature": temperature, "top_p": 1.0, "seed": 1}
    plain = Script([a], tokenizer.vocab_size)
    (expected,) = generate(plain, tokenizer, "x", **arguments)
    for beyond in (60.0, 1e30, float("nan"), float("inf")):
        model = Padded([a], tokenizer.vocab_size + padding)
        model.beyond = beyond
        assert generate(model, tokenizer, "x", **arguments) == [expected]


def test_a_model_of_a_padded_vocabulary(model, tokenizer):
    """Fine-tunes round the embedding's rows up; the others' texts stay what they were."""
    padded = Llama(replace(model.config, vocab_size=tokenizer.vocab_size + 37), device="cpu").eval()
    weights = model.state_dict()
    rows = torch.full((37, 64), 3.0)
    rows[1::2] *= -1
    for name in ("embed.weight", "head.weight"):
        weights[name] = torch.cat([weights[name], rows])
    padded.load_state_dict(weights)
    arguments = {"max_new_tokens": 30, "temperature": 1.5, "top_p": 1.0, "seed": 4}
    expected = generate(model, tokenizer, PROMPTS, **arguments)
    found = generate(padded, tokenizer, PROMPTS, **arguments)
    assert [c.tokens for c in found] == [c.tokens for c in expected]
    with torch.no_grad():
        logits = padded(torch.tensor([tokenizer.encode("x", bos=True)]))[0, -1]
    assert logits.argmax() >= tokenizer.vocab_size  # or nothing was masked


class Failing(Script):
    """Says "a" and "b", and at step 3 the logits of row 1 are what they are set to."""

    def __init__(self, tokenizer, set_to) -> None:
        super().__init__([tokenizer.encode("a"), tokenizer.encode("b")], tokenizer.vocab_size)
        self.set_to = set_to

    def forward(self, tokens, *, cache, last_only):
        logits = super().forward(tokens, cache=cache, last_only=last_only)
        if self.step == 3:
            self.set_to(logits[1, 0])
        return logits


def one_nan(logits):
    logits[5] = float("nan")


def infinite(logits):
    logits[5] = float("inf")


@pytest.mark.parametrize(
    ("set_to", "words"),
    [
        (one_nan, "1 are NaN"),
        (lambda x: x.fill_(float("nan")), "are NaN"),
        (infinite, "1 are infinite"),
        (lambda x: x.fill_(-float("inf")), "all are -infinite"),
    ],
)
@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0}, {"temperature": 1, "top_p": 0.5}, {"temperature": 1, "top_k": 3}],
    ids=str,
)
def test_logits_that_are_not_finite_are_an_error_of_their_step(tokenizer, set_to, words, sampling):
    chunks = stream(Failing(tokenizer, set_to), tokenizer, ["x", "y"], seed=1, **sampling)
    made = []
    message = rf"for token 3 of prompt 1: of its {tokenizer.vocab_size} logits .*{words}.*eager"
    with pytest.raises(LogitsError, match=message):
        for chunk in chunks:
            made.append(chunk.index)
    assert made == [0, 1, 0, 1, 0]  # what was made before it has been given


def test_some_logits_may_be_minus_infinity(tokenizer):
    def ban(logits):
        logits[:20] = -float("inf")

    found = generate(Failing(tokenizer, ban), tokenizer, ["x", "y"], max_new_tokens=5, seed=1)
    assert [c.text for c in found] == ["aaaaa", "bbbbb"]


def test_rows_that_have_ended_may_be_anything(tokenizer):
    script = Failing(tokenizer, one_nan)
    script.rows[1] = [tokenizer.eot_id]
    found = generate(script, tokenizer, ["x", "y"], max_new_tokens=5, temperature=0)
    assert [c.text for c in found] == ["aaaaa", ""]


def test_the_reason_of_logits_that_are_not_finite(model, tokenizer):
    def made(dtype, change) -> Llama:
        other = Llama(model.config, device="cpu", dtype=dtype).eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            change(other)
        return other

    def damage(other):
        other.layers[1].mlp.down.weight[3, 4] = float("nan")

    def enlarge(other):
        other.layers[0].mlp.down.weight.mul_(4000)
        other.layers[1].attention_norm.weight.fill_(60000)

    with use_backend("eager"):
        for change, dtype, message in (
            (damage, torch.float32, r"layers\.1\.mlp\.down\.weight has values that are not finite"),
            (enlarge, torch.float16, r"float16 holds numbers up to 65,504.*dtype=torch\.bfloat16"),
        ):
            with pytest.raises(LogitsError, match=f"token 1 of prompt 0: .*NaN.*{message}"):
                generate(made(dtype, change), tokenizer, "hello", max_new_tokens=5)
        (found,) = generate(made(torch.bfloat16, enlarge), tokenizer, "hello", max_new_tokens=5)
    assert len(found.tokens) >= 1
