"""lm-evaluation-harness over a model of this package: its scores are the model's own."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm_eval")

from llama_fast.cli.options import CHAT_DEMO, DEMO
from llama_fast.engines.lm_eval import LlamaFast
from llama_fast.errors import LlamaFastError
from llama_fast.generation.generate import generate


@pytest.fixture(scope="module")
def scored() -> LlamaFast:
    return LlamaFast(str(DEMO), dtype="float32", batch_size=3)


def requests(*args):
    return [SimpleNamespace(args=one) for one in args]


def by_hand(scored, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """A token at a time."""
    ids, total, greedy = list(context), 0.0, True
    for token in continuation:
        logits = scored.model(torch.tensor([ids]))[0, -1].double()
        total += logits.log_softmax(-1)[token].item()
        greedy &= int(logits.argmax()) == token
        ids.append(token)
    return total, greedy


def test_the_harness_finds_it():
    from lm_eval.api.registry import get_model

    assert get_model("llama_fast") is LlamaFast


def test_likelihoods_of_continuations(scored):
    pairs = [
        ("Once upon a time", " there was a dog."),
        ("Once upon a time", ","),
        ("The capital of ", "France"),
        ("", "Hello"),
        ("In the morning the cat", " sat on the mat and looked out of the window"),
    ]
    found = scored.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        if context:
            before, scored_ids = scored._encode_pair(context, continuation)
        else:
            before = [scored.words.bos_id]
            scored_ids = scored.words.encode(continuation)
        expected = by_hand(scored, before, scored_ids)
        assert score == pytest.approx(expected[0], rel=1e-5, abs=1e-5) and greedy == expected[1]
    made = generate(scored.model, scored.words, "Once upon a time", max_new_tokens=6, temperature=0)
    (of_own,) = scored.loglikelihood(requests(("Once upon a time", made[0].text)), True)
    assert of_own[1]


def test_texts_longer_than_the_context(scored):
    text = "Once upon a time there was a little dog. " * 80
    ids = scored.words.encode(text)
    assert len(ids) > scored.max_length
    (score,) = scored.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    # The first window is that of a text as long as the context; and no token counts twice.
    first = scored.model(torch.tensor([[scored.words.bos_id, *ids[: scored.max_length - 1]]]))
    scores = first[0].log_softmax(-1).gather(1, torch.tensor(ids[: scored.max_length])[:, None])
    window = [*ids[-scored.max_length - 1 : -1]]
    rest = scored.model(torch.tensor([window]))[0].log_softmax(-1)
    left = len(ids) - scored.max_length
    scores_left = rest[-left:].gather(1, torch.tensor(ids[-left:])[:, None])
    assert left < scored.max_length
    assert score == pytest.approx((scores.sum() + scores_left.sum()).item(), rel=1e-5)
    with pytest.raises(LlamaFastError, match="larger max_seq_len"):
        scored.loglikelihood(requests(("Once", text)), disable_tqdm=True)


def test_answers_end_where_a_task_says(scored):
    whole = generate(
        scored.model, scored.words, "Once upon a time", max_new_tokens=24, temperature=0
    )
    word = whole[0].text.split()[4]
    found = scored.generate_until(
        requests(
            ("Once upon a time", {"until": [word], "max_gen_toks": 24}),
            ("The dog", {"until": "\n\n", "max_gen_toks": 4}),
            ("Once upon a time", {"until": [], "max_gen_toks": 24, "do_sample": False}),
        ),
        disable_tqdm=True,
    )
    assert found[0] == whole[0].text[: whole[0].text.index(word)] and found[2] == whole[0].text
    assert found[1]
    with pytest.raises(LlamaFastError, match="num_beams"):
        scored.generate_until(requests(("Hello", {"num_beams": 3})), True)
    with pytest.raises(LlamaFastError, match="smaller max_gen_toks"):
        scored.generate_until(requests(("Hello", {"max_gen_toks": 512})), True)
    with pytest.raises(LlamaFastError, match="batch_size is 'auto'"):
        LlamaFast(str(DEMO), batch_size="auto")
    with pytest.raises(LlamaFastError, match="dtype is 'halves'"):
        LlamaFast(str(DEMO), dtype="halves")


def test_a_dialog_is_the_folder_s_own():
    chat = LlamaFast(str(CHAT_DEMO))
    text = chat.apply_chat_template([{"role": "user", "content": "Hello"}])
    from llama_fast.tokenizer.chat_choice import chat_format

    format = chat_format(CHAT_DEMO, chat.words)
    assert chat.tok_encode(text) == format.encode([{"role": "user", "content": "Hello"}]).ids
    assert chat.chat_template(True)


def test_a_task_of_the_harness(tmp_path):
    """From a file of a question: a task of two choices, scored by the harness itself."""
    rows = [
        {"question": "Once upon a time", "choices": [", there", " zzzz qqqq"], "answer": 0},
        {"question": "The dog", "choices": [" xkcd vvv", " was"], "answer": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "two_choices",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
    }
    from lm_eval import simple_evaluate

    found = simple_evaluate(
        model="llama_fast", model_args={"pretrained": str(DEMO)}, tasks=[task], batch_size=2,
        device="cuda:0", bootstrap_iters=0, verbosity="ERROR",
    )  # fmt: skip
    assert found["results"]["two_choices"]["acc,none"] == 1.0
