"""Training on preferences: values, the reference, accumulation, resuming, and the command."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid

from llama_fast.cli import finetune as command
from llama_fast.cli.options import DEMO
from llama_fast.config import LlamaConfig
from llama_fast.errors import CheckpointError, ConfigError, DataError
from llama_fast.model import Llama
from llama_fast.tokenizer import Tokenizer, chat_format
from llama_fast.training import reference
from llama_fast.training.adapter import Adapter, lora
from llama_fast.training.config import TrainConfig
from llama_fast.training.data import Data
from llama_fast.training.dpo import DPO, finetune_dpo
from llama_fast.training.pairs import read_pairs
from llama_fast.training.reference import with_reference
from llama_fast.training.split import hold_out

from .small_training import assert_same_bits, bits, one_thread  # noqa: F401  a fixture
from .test_finetune import interrupted_at, tiny  # noqa: F401  a fixture
from .training_rows import dialog, write

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::llama_fast.errors.FallbackWarning"),
]

TOKENIZER = Tokenizer.from_pretrained(DEMO)
CHAT = chat_format(DEMO, TOKENIZER)
CONFIG = LlamaConfig(
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    hidden_dim=48,
    vocab_size=len(TOKENIZER.id_to_bytes),
    max_seq_len=64,
    tied=True,
)
ROWS = [
    {"prompt": f"The {i}th is", "chosen": " red" * (i % 3 + 1), "rejected": " blue and grey"}
    for i in range(9)
]


@pytest.fixture
def data(tmp_path) -> Data:
    return read_pairs(write(tmp_path, "pairs.jsonl", ROWS), TOKENIZER, block=24)


def new_model(dtype: torch.dtype = torch.float32) -> Llama:
    torch.manual_seed(3)
    model = Llama(CONFIG, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.to(dtype)


def moved(model: Llama, scale: float = 0.03) -> Llama:
    """Away from the reference, so that margins are not 0."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def answer(model: Llama, batch, piece: int) -> torch.Tensor:
    """log p of one answer from whole logits, in float64, apart from the others."""
    start, end = batch.cu_seqlens[piece : piece + 2].tolist()
    targets = batch.targets[0, start:end]
    logits = model(batch.tokens[:, start:end])[0]
    each = log_softmax(logits.double(), -1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return each[targets >= 0].sum()


def by_definition(model, first, batch, beta, smoothing):
    """trl's sigmoid loss with label smoothing, its margins and accuracies."""
    losses, margins = [], []
    for pair in range((len(batch.cu_seqlens) - 1) // 2):
        chosen, rejected = (answer(model, batch, 2 * pair + side) for side in (0, 1))
        with torch.no_grad():
            ref_chosen, ref_rejected = (answer(first, batch, 2 * pair + side) for side in (0, 1))
        logits = (chosen - rejected) - (ref_chosen - ref_rejected)
        losses.append(
            -logsigmoid(beta * logits) * (1 - smoothing) - logsigmoid(-beta * logits) * smoothing
        )
        margins.append(beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected))
    margins = torch.stack(margins)
    return torch.stack(losses).sum(), margins.sum(), (margins > 0).sum()


@pytest.mark.parametrize(
    ("dtype", "smoothing", "within"),
    [(torch.float64, 0.0, 1e-6), (torch.float32, 0.2, 1e-4)],
)
def test_loss_and_gradients_are_those_of_whole_logits(data, dtype, smoothing, within):
    first, model = new_model(dtype), moved(new_model(dtype))
    exact_first, exact = new_model(torch.float64), moved(new_model(torch.float64))
    with torch.no_grad():  # the same weights, rounded where the model rounds them
        for one, other in ((exact_first, first), (exact, model)):
            for to, given in zip(one.parameters(), other.parameters(), strict=True):
                to.copy_(given)
    batch = with_reference(first, data, progress=False).batch(range(len(data)))
    objective = DPO(0.3, smoothing)
    loss, measures = objective.loss(model, batch)
    loss.backward()
    expected, margins, right = by_definition(exact, exact_first, batch, 0.3, smoothing)
    expected.backward()
    assert objective.count(batch) == len(ROWS)
    # The reference's log-probabilities are kept in float32: no more than 1e-6 can be asked for.
    torch.testing.assert_close(loss.double(), expected, rtol=within, atol=1e-6)
    torch.testing.assert_close(measures[0].double(), margins, rtol=1e-4, atol=1e-5)
    assert measures[1] == right and 0 < right < len(ROWS)
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        most = other.grad.abs().max()
        assert (one.grad.double() - other.grad).abs().max() <= within * most


def with_adapter(model: Llama, dropout: float = 0.0) -> Adapter:
    torch.manual_seed(4)
    adapter = lora(model, 4, dropout=dropout, modules_to_save=("norm",))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return adapter


def test_the_adapter_off_is_the_reference_made_before(data):
    before = with_reference(new_model(), data, progress=False)
    model = new_model().train()
    adapter = with_adapter(model, dropout=0.5)
    rows = range(len(data))
    torch.manual_seed(1)
    off, off_measures = DPO(adapter=adapter).loss(model, data.batch(rows))
    assert adapter.enabled
    torch.manual_seed(1)  # of the dropout
    made, made_measures = DPO().loss(model, before.batch(rows))
    torch.testing.assert_close(off, made, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(off_measures, made_measures, rtol=1e-5, atol=1e-5)
    off.backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    with pytest.raises(ConfigError, match="needs the first model's log-probabilities"):
        DPO().loss(model, data.batch(rows))


def train(data, kind="full", **more):
    model = new_model(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    adapter = with_adapter(model, dropout=0.2) if kind == "lora" else None
    config = TrainConfig(
        **{"steps": 4, "batch_size": 3, "micro_batch_size": 1, "save_every": 2, "eval_every": 2}
        | {"learning_rate": 3e-3, "warmup_steps": 1} | more.pop("config", {})
    )  # fmt: skip
    return model, finetune_dpo(model, data, config, adapter=adapter, progress=False, **more)


def test_micro_batches_change_nothing(data):
    """Rows hold different numbers of pairs, and each pair weighs the same."""
    counts = {DPO().count(data.batch([row])) for row in range(len(data))}
    assert len(counts) > 1
    model, history = train(data)
    other, whole = train(data, config={"micro_batch_size": 3})
    # Before the first step the margins are nothing but rounding, so whose they are is chance.
    del history.train[0]["accuracy"], whole.train[0]["accuracy"]
    for one, two in zip(history.train, whole.train, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
    for (name, one), two in zip(bits(model).items(), bits(other).values(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["full", "bfloat16", "lora"])
def test_it_learns_and_goes_on_to_the_same_bits(data, tmp_path, monkeypatch, kind):
    rows, held_out = hold_out(data, 0.3)
    asked = {"held_out": held_out, "label_smoothing": 0.1}
    expected, whole = train(rows, kind, **asked)
    first, last = whole.train[0], whole.train[-1]
    assert last["loss"] < first["loss"] and last["reward_margin"] > first["reward_margin"]
    if kind != "lora":  # nothing has moved yet
        assert first["reward_margin"] == pytest.approx(0, abs=1e-3)
    assert set(whole.held_out[-1]) == {"step", "loss", "reward_margin", "accuracy"}

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        interrupted_at(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            train(rows, kind, folder=folder, **asked)
    monkeypatch.setattr(reference, "_made", None)  # not made a second time
    resumed, history = train(rows, kind, folder=folder, **asked)
    assert history.train == whole.train and history.held_out == whole.held_out
    assert_same_bits(expected, resumed)
    with open(folder / "log.csv", newline="") as table:
        lines = list(csv.DictReader(table))
    assert [float(line["accuracy"]) for line in lines] == [r["accuracy"] for r in whole.train]
    assert lines[-1]["held_out_accuracy"] and "held_out_perplexity" not in lines[-1]
    with pytest.raises(CheckpointError, match=r"beta=0.1, not 0.5"):
        train(rows, kind, folder=folder, beta=0.5, **asked)


def test_another_first_model_is_another_training(data, tmp_path):
    train(data, folder=tmp_path)
    with pytest.raises(CheckpointError, match="other data"):
        finetune_dpo(moved(new_model()), data, TrainConfig(
            steps=4, batch_size=3, micro_batch_size=1, learning_rate=3e-3, warmup_steps=1,
            eval_every=2,
        ), folder=tmp_path, progress=False)  # fmt: skip


def test_a_damaged_reference_is_made_anew(data, tmp_path):
    made = with_reference(new_model(), data, tmp_path, progress=False)
    (file,) = tmp_path.glob(reference.REFERENCE_FILES)
    file.write_bytes(file.read_bytes()[:50])
    again = with_reference(new_model(), data, tmp_path, progress=False)
    assert again.key == made.key and made.fingerprint() != data.fingerprint()
    assert all(torch.equal(*pair) for pair in zip(made.values, again.values, strict=True))
    assert file.stat().st_size > 50


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match="beta is 0"):
        DPO(0)
    with pytest.raises(ConfigError, match=r"label_smoothing is 0\.5"):
        DPO(label_smoothing=0.5)


def pair(chosen, rejected, prompt=None):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_the_answers_are_trained_from_where_they_differ(tmp_path):
    """In each of the forms in which files give them."""
    turns = [*dialog("Hi", "Yes?")["messages"], {"role": "user", "content": "Who?"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("Me.", "You."))
    forms = [
        pair(good, bad, turns),
        pair([*turns, *good], [*turns, *bad]),
        pair([*turns, *good], [*turns, *bad], "Who?"),
        {
            "conversations": [{"from": f, "value": v} for f, v in
                              (("human", "Hi"), ("gpt", "Yes?"), ("human", "Who?"))],
            "chosen": {"from": "gpt", "value": "Me."},
            "rejected": {"from": "gpt", "value": "You."},
        },
        {"instruction": "Who?", "history": [["Hi", "Yes?"]], "chosen": "Me.", "rejected": "You."},
    ]  # fmt: skip
    data = read_pairs(write(tmp_path, "a.jsonl", forms), TOKENIZER, block=64, chat=CHAT)
    batch = data.batch(range(len(data)))
    pieces = [
        piece[piece >= 0].tolist()
        for piece in batch.targets[0].split(batch.cu_seqlens.diff().tolist())
    ]
    texts = [TOKENIZER.decode([i for i in ids if i < TOKENIZER.n_ranks]) for ids in pieces]
    assert [text.strip() for text in texts] == ["Me.", "You."] * len(forms)
    assert data.report.rows == len(forms) and data.report.documents == 2 * len(forms)
    short = pair(good, bad, "Who?")
    alone = read_pairs(write(tmp_path, "b.jsonl", [short]), TOKENIZER, block=64, chat=CHAT)
    assert alone.report.kept == data.report.kept // len(forms)


def test_faults_of_preferences(tmp_path):
    same = {"prompt": "p", "chosen": "a", "rejected": "a"}
    long = {"prompt": "p", "chosen": "a b c d e f g h i j k l m n o p q r s t", "rejected": "a"}
    for name, row, reason in (
        ("same", same, "are the same"),
        ("other", dialog(), "no preference"),
        ("long", long, "more than 14"),
    ):
        path = write(tmp_path, f"{name}.jsonl", [ROWS[0], row])
        with pytest.raises(DataError, match=reason) as caught:
            read_pairs(path, TOKENIZER, block=14, chat=CHAT)
        assert caught.value.line == 2
    data = read_pairs(tmp_path, TOKENIZER, block=14, chat=CHAT, on_error="skip", too_long="drop")
    assert data.report.rows == 6 and sum(data.report.dropped.values()) == 3
    with pytest.raises(DataError, match="nothing is left"):
        only = write(tmp_path, "only.jsonl", [long])
        read_pairs(only, TOKENIZER, block=14, chat=CHAT, too_long="drop")


def test_the_demo_model_learns_to_prefer(run, tmp_path):
    """And it says the chosen answer, of which the other was the likelier before."""
    prompt, likes, dislikes = "Once upon a time there was a", " dragon", " school"
    rows = [
        {"prompt": f"{before}{prompt}", "chosen": f"{likes}{end}", "rejected": f"{dislikes}{end}"}
        for before in ("", "A story. ") for end in ("", " fox", " girl")
    ]  # fmt: skip
    asked = ("finetune", "demo", write(tmp_path, "p.jsonl", rows), "--out", tmp_path / "run")
    code, _, err = run(*asked, "--steps", 8, "--block", 32, "--threads", 1)
    assert code == 1 and "give --dpo" in err and not (tmp_path / "run").exists()
    code, _, err = run(*asked, "--dpo", "--steps", 8, "--block", 32, "--threads", 1)
    assert code == 0, err
    assert "DPO, beta 0.1" in err and "reward margin" in err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["accuracy_last_tenth"] == 1 and metrics["reward_margin_last_tenth"] > 0.5
    assert metrics["loss_last_tenth"] < 0.5 < metrics["loss_first"]
    say = ("generate", prompt, "--temperature", 0, "-n", 6, "-q")
    told = [run(*say, *more)[1].strip() for more in ((), ("--adapter", tmp_path / "run/adapter"))]
    assert told[0].startswith("school") and told[1].startswith("dragon")


def test_the_command_with_all_weights_goes_on(run, tiny, tmp_path, monkeypatch):  # noqa: F811
    prefs = write(tmp_path, "p.jsonl", ROWS)
    asked = ("finetune", tiny, prefs, "--dpo", "--full", "--steps", 4, "--block", 24,
             "--tokens-per-step", 96, "--threads", 1, "--beta", 0.2, "--held-out", 0.4)  # fmt: skip
    with monkeypatch.context() as patched:
        interrupted_at(patched, 2)
        assert run(*asked, "--out", tmp_path / "run")[0] == 130
    assert len(list((tmp_path / "run").glob(reference.REFERENCE_FILES))) == 2
    code, _, err = run(*asked[:-4], "--beta", 0.3, "--held-out", 0.4, "--out", tmp_path / "run")
    assert code == 1 and "--beta 0.2 and not 0.3" in err
    assert run(*asked, "--out", tmp_path / "run")[0] == 0
    there = {path.name for path in (tmp_path / "run").iterdir()} - {"tensorboard", "loss.png"}
    assert there == {"run.json", "log.csv", "metrics.json", "model"}
    for more, message in (
        (("--beta", 1), "Write: --dpo --beta X"),
        (("--dpo", "--train-on", "last"), "Leave it out"),
        (("--dpo", "--beta", 0), "beta is 0"),
    ):
        code, _, err = run("finetune", tiny, prefs, "--out", tmp_path / "new", *more)
        assert code in (1, 2) and message in " ".join(err.split())
        assert not (tmp_path / "new").exists()
    assert command.default_learning_rate(4096, True, True) == pytest.approx(9.5e-7)
