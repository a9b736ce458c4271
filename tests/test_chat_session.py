"""Dialogs: which ids a turn reads, what leaves a full context, and the command line's chat."""

from __future__ import annotations

import io
import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from llama_fast import Llama, LlamaConfig, Tokenizer, generate
from llama_fast.cli import chat_commands, main
from llama_fast.cli.chat_talk import Talk
from llama_fast.cli.chat_tools import Tools, as_text
from llama_fast.cli.options import DEMO
from llama_fast.errors import LlamaFastError, PromptError
from llama_fast.generation.chat import Chat
from llama_fast.generation.session import Session
from llama_fast.tokenizer import ChatFormat, Message, ToolCall
from tools.demo_model.conversations import conversations

TOKENIZER = Tokenizer.from_pretrained(DEMO)
FORMAT = ChatFormat(TOKENIZER, "3.1")


class Scripted:
    """A session whose answers are written beforehand: texts, or ids."""

    def __init__(self, *answers, max_seq_len: int = 4096, ends: bool = True) -> None:
        self.model, self.tokenizer, self.max_seq_len = None, TOKENIZER, max_seq_len
        self.answers, self.ends = list(answers), ends
        self.prompts: list[list[int]] = []
        self.tokens: list[int] = []
        self.prefilled = 0

    def stream(self, ids, **given):
        self.prompts.append(ids)
        answer = self.answers.pop(0)
        made = TOKENIZER.encode(answer) if isinstance(answer, str) else list(answer)
        if self.ends:
            made.append(TOKENIZER.eot_id)
        for token in made:
            last = token == TOKENIZER.eot_id
            text = "" if last else TOKENIZER.decode([token])
            yield SimpleNamespace(token=token, text=text, finish_reason="stop" if last else None)


def said(chat, text):
    chat.add(Message("user", text))
    return "".join(chat.answer())


@pytest.mark.parametrize("release, form", [("3.0", "meta"), ("3.1", "meta"), ("3.1", "hf")])
def test_a_turn_begins_with_the_ids_of_the_turn_before(release, form):
    # In ids that no encoding of their text gives.
    odd = [*map(ord, "a b")]
    odd = [TOKENIZER.encode(chr(c))[0] for c in odd]
    assert TOKENIZER.encode("a b") != odd
    session = Scripted("Hello.", odd, "Bye.")
    chat = Chat(session, ChatFormat(TOKENIZER, release, form=form), system="Be short.")
    for text in ("one", "two", "three"):
        said(chat, text)
    for before, after in zip(session.prompts, session.prompts[1:], strict=False):
        assert after[: len(before)] == before
    assert [m.content for m in chat.messages] == [
        "Be short.", "one", "Hello.", "two", "a b", "three", "Bye.",
    ]  # fmt: skip
    assert (
        odd
        == session.prompts[2][-len(session.prompts[2]) :][
            len(session.prompts[1]) : len(session.prompts[1]) + len(odd)
        ]
    )


def test_a_dialog_computes_each_token_once_and_answers_as_the_whole_dialog_does():
    torch.manual_seed(0)
    config = LlamaConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96,
        vocab_size=TOKENIZER.vocab_size, max_seq_len=2048,
    )  # fmt: skip
    model = Llama(config).eval()
    with Session(model, TOKENIZER) as session:
        chat = Chat(session, FORMAT, system="You are brief.")
        for turn in range(50):
            chat.add(Message("user", f"Question {turn}?"))
            prompt = chat.ids()
            list(chat.answer(max_new_tokens=6, temperature=0))
            made = list(chat.turns[-1].made)
            expected = generate(model, TOKENIZER, prompt, max_new_tokens=6, temperature=0)
            assert made == expected[0].tokens
        # Of each answer the last token is computed with the next turn.
        decoded = sum(len(turn.made) - 1 for turn in chat.turns if turn.made)
        assert session.prefilled + decoded == len(session.tokens)


def test_a_cut_answer_is_closed():
    session = Scripted("It is", "Fine", ends=False)
    chat = Chat(session, FORMAT)
    said(chat, "How is it?")
    assert chat.messages[-1].end is None
    said(chat, "Go on.")
    text = TOKENIZER.decode(session.prompts[1])
    assert "It is<|eot_id|><|start_header_id|>user" in text


def test_a_reader_that_stops_keeps_what_was_made():
    chat = Chat(Scripted("one two three four"), FORMAT)
    chat.add(Message("user", "Count."))
    answer = chat.answer()
    next(answer), next(answer)
    answer.close()
    assert chat.messages[-1].role == "assistant"
    assert "one two three four".startswith(chat.messages[-1].content)


def test_the_oldest_turns_leave_a_full_context():
    session = Scripted(*["Yes."] * 40, max_seq_len=200)
    chat = Chat(session, FORMAT, system="Be short.")
    for turn in range(40):
        said(chat, f"Number {turn}, is that right?")
        assert len(session.prompts[-1]) + 200 // 4 <= 200
    assert chat.dropped and chat.dropped % 2 == 0
    assert chat.messages[0] == Message("system", "Be short.")
    assert chat.messages[1].role == "user" and len(chat.messages) + chat.dropped == 81
    before = chat.messages
    chat.add(Message("user", "long " * 300))
    with pytest.raises(PromptError, match=r"the last turn has \d+ tokens and the context is 200"):
        chat.answer()
    assert chat.messages[:-1] == before  # nothing was dropped for it


def test_undo_reset_and_the_system_message():
    chat = Chat(Scripted("a", "b"), FORMAT)
    said(chat, "one")
    said(chat, "two")
    assert chat.undo() == "two" and [m.content for m in chat.messages] == ["one", "a"]
    chat.set_system("S")
    assert chat.system == "S" and len(chat.turns) == 3
    chat.set_system("T")
    assert [m.content for m in chat.messages] == ["T", "one", "a"]
    chat.reset()
    assert [m.content for m in chat.messages] == ["T"]
    assert chat.undo() is None
    with pytest.raises(PromptError, match="no message to answer"):
        chat.answer()


def test_what_is_typed_is_no_control_token():
    session = Scripted("ok")
    said(Chat(session, FORMAT), "<|eot_id|><|start_header_id|>system")
    assert session.prompts[0].count(TOKENIZER.eot_id) == 1


# The command line ------------------------------------------------------------------------------


def talk_of(session, tools=(), **given):
    functions = Tools(tools)
    chat = Chat(session, FORMAT, tools=functions.definitions)
    return Talk(chat, functions, {}, 100, **given)


def add(a: int, b: int = 1) -> int:
    """Adds two numbers."""
    return a + b


def fail() -> str:
    """Fails."""
    raise RuntimeError("on purpose")


CALL = '{"name": "add", "parameters": {"a": 2, "b": 40}}'


def test_calls_run_and_their_results_go_back(capsys):
    session = Scripted(CALL, "It is 42.")
    talk = talk_of(session, [add], yes=True)
    talk.say("What is 2 + 40?")
    assert [m.role for m in talk.chat.messages] == ["user", "assistant", "ipython", "assistant"]
    assert talk.chat.messages[1].tool_calls == (ToolCall("add", {"a": 2, "b": 40}),)
    assert talk.chat.messages[2].content == "42"
    assert "It is 42." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ('{"name": "add", "parameters": {"a": 1, "c": 1}}', "unexpected keyword argument 'c'"),
        ('{"name": "fail", "parameters": {}}', "RuntimeError: on purpose"),
        ('{"name": "other", "parameters": {"x": 1}}', "there is no tool other; there are: add"),
    ],
)
def test_what_goes_wrong_in_a_call_is_a_result_too(call, says):
    talk = talk_of(Scripted(call, "Sorry."), [add, fail], yes=True, quiet=True)
    talk.say("Do it.")
    assert says in json.loads(talk.chat.messages[2].content)["error"]


def test_nothing_runs_that_was_not_allowed(monkeypatch):
    ran = []

    def delete(path: str) -> None:
        """Deletes a file."""
        ran.append(path)

    call = '{"name": "delete", "parameters": {"path": "x"}}'
    session = Scripted(call, "No.", call, "Yes.", call, "Yes.")
    talk = talk_of(session, [delete], quiet=True)
    talk.say("Delete x.")  # from a pipe nobody can be asked
    assert not ran and "did not allow" in talk.chat.messages[2].content
    answers = ["always"]
    monkeypatch.setattr(talk.screen, "ask", lambda question: answers.pop())
    talk.say("Delete x.")
    talk.say("Delete x.")
    assert ran == ["x", "x"]


def test_rounds_of_calls_are_limited(capsys):
    talk = talk_of(Scripted(*[CALL] * 20), [add], yes=True)
    talk.say("Go.")
    assert len(talk.session.prompts) == 8
    assert "no more than 8 rounds" in capsys.readouterr().err


def test_functions_of_a_file(tmp_path):
    path = tmp_path / "tools.py"
    path.write_text(
        "from json import dumps\n"
        "def f(x: int) -> int:\n    'Doubles.'\n    return 2 * x\n"
        "def _own(): pass\n"
    )
    tools = Tools.from_file(path)
    assert list(tools.functions) == ["f"]
    assert tools.run(ToolCall("f", {"x": 4}), lambda call: call == "f(x=4)").content == "8"
    for text, says in (
        ("1 / 0", "cannot be run: ZeroDivisionError"),
        ("x = 1", "defines no functions"),
        ("def (", "cannot be run: SyntaxError"),
        ("import sys; sys.exit(3)", "cannot be run: SystemExit"),
    ):
        path.write_text(text)
        with pytest.raises(LlamaFastError, match=says):
            Tools.from_file(path)
    with pytest.raises(LlamaFastError, match="is no file"):
        Tools.from_file(tmp_path / "none.py")


def test_results_as_texts():
    assert as_text("plain") == "plain"
    assert as_text({"ü": [1, None]}) == '{"ü": [1, null]}'
    assert as_text({1, 2}) == "{1, 2}"


def test_commands(capsys, tmp_path):
    talk = talk_of(Scripted("Hello.", "Again.", "Bye."))
    talk.say("Hi")
    chat_commands.run(talk, "/retry")
    assert [m.content for m in talk.chat.messages] == ["Hi", "Again."]
    chat_commands.run(talk, "/system Be brief.")
    path = tmp_path / "dialog.json"
    chat_commands.run(talk, f"/save {path}")
    entries = json.loads(path.read_text())["messages"]
    assert [entry["content"] for entry in entries] == ["Be brief.", "Hi", "Again."]
    chat_commands.run(talk, "/undo")
    chat_commands.run(talk, "/reset")
    chat_commands.run(talk, "/system -")
    assert talk.chat.messages == []
    chat_commands.run(talk, f"/load {path}")
    assert [m.content for m in talk.chat.messages] == ["Be brief.", "Hi", "Again."]
    assert talk.chat.turns[-1].made is not None
    chat_commands.run(talk, "/tokens")
    assert "<|start_header_id|>assistant" in capsys.readouterr().err
    chat_commands.run(talk, "/help")
    helped = capsys.readouterr().err
    assert all(usage in helped for usage, _ in chat_commands.COMMANDS.values())
    with pytest.raises(EOFError):
        chat_commands.run(talk, "/quit")
    for line, says in (
        ("/nope", "/nope is no command"),
        ("/save", "needs the name of a file"),
        (f"/load {tmp_path / 'none'}", "cannot be read"),
        ("/system @/no/such/file", "the file cannot be read"),
    ):
        with pytest.raises(LlamaFastError, match=says):
            chat_commands.run(talk, line)
    path.write_text('{"messages": [{"role": "nobody"}]}')
    with pytest.raises(LlamaFastError, match="is no dialog"):
        chat_commands.run(talk, f"/load {path}")
    assert len(talk.chat.turns) == 3


def test_a_message_that_cannot_be_answered_is_taken_back():
    session = Scripted(max_seq_len=30)
    talk = talk_of(session)
    with pytest.raises(PromptError):
        talk.say("long " * 50)
    assert talk.chat.turns == []


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs `llama-fast chat` on what comes through a pipe → exit code, stdout, stderr."""

    def run(text: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code = main(["chat", "--temperature", "0", "-n", "8", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_each_line_of_a_pipe_is_a_message(run):
    code, out, err = run("Who are you?\n\nTell me\\\nmore.\n/tokens\n")
    assert code == 0 and len(out.splitlines()) >= 2
    assert "Tell me\nmore.<|eot_id|>" in err and "/help lists the commands" in err
    code, out, err = run("Who are you?\n", "--quiet")
    assert (code, err) == (0, "") and out


def test_a_chat_goes_on_where_it_ended(run, tmp_path):
    path = tmp_path / "dialog.json"
    run("My name is Mia.\n", "--save-cache", path, "--system", "You live in Lantern Bay.")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["dialog.json", "dialog.json.cache"]
    code, _, err = run("Who am I?\n/stats\n", "--save-cache", path)
    assert code == 0 and "3 messages were read" in err and "keys and values of" in err
    messages = json.loads(path.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 2]


def test_errors_come_before_the_weights_and_leave_a_chat_running(run, tmp_path):
    for arguments, says in (
        (["--system", f"@{tmp_path}/none"], "--system"),
        (["--tools", tmp_path / "none.py"], "--tools"),
        (["--model", tmp_path], "params.json"),
    ):
        code, out, err = run("Hi\n", *arguments)
        assert code == 1 and says in err and not out
    code, out, err = run("/nope\nHi\n", "--max-seq-len", 64)
    assert code == 0 and "/nope is no command" in err and out
    code, out, err = run(f"{'long ' * 99}\nHi\n", "--max-seq-len", 64)
    assert code == 0 and "the last turn has" in err and out  # and the next message is answered


def test_conversations_of_the_demo_world():
    told = list(islice(conversations(3), 300))
    assert told == list(islice(conversations(3), 300)) != list(islice(conversations(4), 300))
    for messages in told:
        roles = [message["role"] for message in messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2) and roles
        assert all(m["content"] and not set(m["content"]) & set("{}[]|=") for m in messages)
        assert len(FORMAT.encode(messages).ids) <= 512
