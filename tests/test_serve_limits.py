"""The server at its limits: hostile requests, keys, clients that leave, a full queue, its end."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from llama_fast.cli import main
from llama_fast.serve import bodies

from .serving import demo, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "Hi"}
LONG = {"prompt": "Once upon a time", "max_tokens": 480, "temperature": 1, "top_p": 1, "seed": 4}
# Never ends of itself.
ENDLESS = LONG | {"regex": "[a-z ]{9999}"}


@pytest.fixture(scope="module")
def served():
    return demo()


@pytest.fixture(scope="module")
def server(served):
    with serving(served, rows=2, queue=2) as running:
        yield running


def connect(server) -> http.client.HTTPConnection:
    host, port = server.url.removeprefix("http://").split(":")
    return http.client.HTTPConnection(host, int(port), timeout=30)


def ask(server, path, body=None, headers=None, raw=None):
    """Status, headers and JSON of one request."""
    connection = connect(server)
    data = raw if raw is not None else None if body is None else json.dumps(body)
    headers = {"content-type": "application/json"} | (headers or {})
    connection.request("GET" if data is None else "POST", path, data, headers)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, dict(response.getheaders()), json.loads(text)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.01)


DEEP = "[" * 100_000 + "]" * 100_000
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "Hi"}, "messages"),
        (CHAT, {"messages": [5]}, "messages[0]"),
        (CHAT, {"messages": [{"role": "user"}, {"role": "king", "content": "x"}]}, "messages[1]"),
        (CHAT, {"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        (
            CHAT,
            {"messages": [{**USER, "tool_calls": [{"function": {"name": "f"}}]}]},
            "messages[0]",
        ),
        (CHAT, {"messages": [{**USER, "evil": 1}]}, "messages[0].evil"),
        (CHAT, {"messages": [USER], "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"messages": [USER], "tools": [TOOL], "tool_choice": "f"}, "tool_choice"),
        (
            CHAT,
            {"messages": [USER], "tools": [TOOL], "tool_choice": {"type": "function"}},
            "tool_choice.function",
        ),
        (CHAT, {"messages": [USER], "tools": [TOOL, TOOL]}, "tools[1].function.name"),
        (CHAT, {"messages": [USER], "tools": [{"type": "custom"}]}, "tools[0].type"),
        (CHAT, {"messages": [USER], "tools": [5]}, "tools[0]"),
        (CHAT, {"messages": [USER], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        (
            CHAT,
            {"messages": [USER], "tools": [TOOL], "response_format": {"type": "json_object"}},
            "response_format",
        ),
        (CHAT, {"messages": [USER], "response_format": {"type": "xml"}}, "response_format.type"),
        (CHAT, {"messages": [USER], "response_format": SCHEMA}, None),
        (CHAT, {"messages": [USER], "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"messages": [USER], "modalities": ["audio"]}, "modalities"),
        (CHAT, {"messages": [USER], "functions": []}, "functions"),
        (TEXT, {}, "prompt"),
        (TEXT, {"prompt": 5}, "prompt"),
        (TEXT, {"prompt": [True]}, "prompt"),
        (TEXT, {"prompt": [[1, 2], 3]}, "prompt"),
        (TEXT, {"prompt": [-1]}, None),
        (TEXT, {"prompt": [99999999999999999999]}, None),
        (TEXT, {"prompt": [[]]}, None),
        (TEXT, {"prompt": "\ud800"}, None),
        (TEXT, {"prompt": "x", "regex": "\ud800"}, None),
        (TEXT, {"prompt": "x" * 50_000}, "prompt"),
        (TEXT, {"prompt": "x", "n": 0}, "n"),
        (TEXT, {"prompt": "x", "n": 5}, "n"),
        (TEXT, {"prompt": ["x", "y", "z"], "n": 2}, "n"),
        (TEXT, {"prompt": "x", "n": 10**30}, "n"),
        (TEXT, {"prompt": "x", "max_tokens": -1}, "max_tokens"),
        (TEXT, {"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
        (TEXT, {"prompt": "x", "max_tokens": True}, "max_tokens"),
        (TEXT, {"prompt": "x", "temperature": -0.1}, "temperature"),
        (TEXT, {"prompt": "x", "temperature": "hot"}, "temperature"),
        (TEXT, {"prompt": "x", "top_p": 0}, None),
        (TEXT, {"prompt": "x", "top_p": 1.01}, "top_p"),
        (TEXT, {"prompt": "x", "top_k": -1}, "top_k"),
        (TEXT, {"prompt": "x", "seed": 2**80}, "seed"),
        (TEXT, {"prompt": "x", "stop": [""]}, "stop"),
        (TEXT, {"prompt": "x", "stop": ["a"] * 17}, "stop"),
        (TEXT, {"prompt": "x", "stop": {"a": 1}}, "stop"),
        (TEXT, {"prompt": "x", "stream": 1}, "stream"),
        (TEXT, {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        (TEXT, {"prompt": "x", "best_of": 2}, "best_of"),
        (TEXT, {"prompt": "x", "echo": True}, "echo"),
        (TEXT, {"prompt": "x", "logit_bias": {"5": 100}}, "logit_bias"),
        (TEXT, {"prompt": "x", "presence_penalty": 0.5}, "presence_penalty"),
        (TEXT, {"prompt": "x", "regex": "(a"}, None),
        (TEXT, {"prompt": "x", "regex": "a", "grammar": 'start: "a"'}, None),
        (TEXT, {"prompt": "x", "k" * 5000: 1}, "k" * 57 + "..."),
        (TEXT, [1], None),
        (TEXT, "x", None),
    ],
)
def test_a_bad_request_is_told_why(server, path, body, param):
    status, _, found = ask(server, path, body)
    error = found["error"]
    assert status == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and 10 < len(error["message"]) < 600


@pytest.mark.parametrize(
    ("raw", "headers", "status"),
    [
        (b"", {}, 400),
        (b'{"prompt": ', {}, 400),
        (b'{"prompt": "\xff"}', {}, 400),
        (DEEP.encode(), {}, 400),
        (b'{"prompt": "x", "temperature": NaN}', {}, 400),
        (b'{"prompt": "x", "temperature": 1e999}', {}, 400),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", {}, 400),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, 415),
        (b'{"prompt": "' + b"x" * bodies.MOST_BODY + b'"}', {}, 413),
    ],
)
def test_a_body_that_is_no_request(server, raw, headers, status):
    found = ask(server, TEXT, raw=raw, headers=headers)
    assert found[0] == status and found[2]["error"]["message"]


def test_a_body_without_a_length_is_bounded(server, monkeypatch):
    monkeypatch.setattr(bodies, "MOST_BODY", 1000)

    def parts():
        yield b'{"prompt": "'
        for _ in range(20):
            yield b"x" * 100
        yield b'"}'

    connection = connect(server)
    connection.request("POST", TEXT, parts(), {"content-type": "application/json"})
    assert connection.getresponse().status == 413


def test_a_body_that_does_not_come(server, monkeypatch):
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.1)
    connection = connect(server)
    connection.putrequest("POST", TEXT)
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", "10")
    connection.endheaders(b"{")
    assert connection.getresponse().status == 408


def test_other_paths_and_methods(server):
    assert ask(server, "/v1/embeddings", {})[0] == 404
    assert ask(server, "/")[0] == 404
    status, headers, found = ask(server, CHAT)
    assert status == 405 and headers["allow"] == "POST" and "error" in found


def test_without_a_key_only_this_machine_is_served(server):
    body = {"prompt": "x", "max_tokens": 1}
    for host, status in (("evil.example", 403), ("localhost:1", 200), ("[::1]:8000", 200)):
        assert ask(server, TEXT, body, {"host": host})[0] == status
        assert ask(server, "/v1/models", headers={"host": host})[0] == status


def test_after_all_that_it_answers(server):
    assert ask(server, "/health")[2] == {"status": "ok"}
    assert ask(server, TEXT, {"prompt": "Once", "max_tokens": 3})[0] == 200
    until(lambda: server.batch.rows_in_use == 0 == server.batch.waiting)


def opened(server, body, headers=None):
    """A stream that has begun: its connection and its response."""
    connection = connect(server)
    data = json.dumps(body | {"stream": True})
    headers = {"content-type": "application/json"} | (headers or {})
    connection.request("POST", TEXT, data, headers)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    assert response.getheader("content-type").startswith("text/event-stream")
    assert response.readline().startswith(b"data: ")
    return connection, response


def leave(connection, response):
    response.close()
    connection.close()


def test_a_client_that_leaves_frees_its_row(server):
    streams = [opened(server, ENDLESS | {"seed": seed}) for seed in (1, 2)]
    assert server.batch.rows_in_use == 2
    made = server.batch.metrics._counts["generated_tokens"]
    for stream in streams:
        leave(*stream)
    until(lambda: server.batch.rows_in_use == 0, 2)
    assert server.batch.metrics._counts["generated_tokens"] - made < 900
    assert server.batch.metrics._requests[TEXT, 200] >= 2


def test_a_client_that_leaves_before_its_answer(server):
    """One that waits for the whole answer, and one that waits in the queue."""
    sockets = [connect(server) for _ in range(3)]
    for connection in sockets:
        data = json.dumps(ENDLESS)
        connection.request("POST", TEXT, data, {"content-type": "application/json"})
    until(lambda: server.batch.rows_in_use == 2 and server.batch.waiting == 1)
    for connection in sockets:
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
    until(lambda: server.batch.rows_in_use == 0 == server.batch.waiting, 2)


def test_a_full_queue_refuses(server):
    streams = [opened(server, ENDLESS | {"seed": seed}) for seed in (1, 2)]
    waiting = [
        threading.Thread(target=ask, args=(server, TEXT, LONG | {"max_tokens": 2}))
        for _ in range(2)
    ]
    for thread in waiting:
        thread.start()
    until(lambda: server.batch.waiting == 2)
    for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}, {"prompt": "x", "n": 2}):
        status, headers, found = ask(server, TEXT, body)
        assert status == 503 and int(headers["retry-after"]) >= 1
        assert found["error"]["code"] == "server_busy"
    text = metrics(server)
    assert "llama_fast_queue_length 2\n" in text and "llama_fast_rows_in_use 2\n" in text
    for stream in streams:
        leave(*stream)
    for thread in waiting:
        thread.join(20)
    assert ask(server, TEXT, {"prompt": "x", "max_tokens": 1})[0] == 200


def metrics(server, **headers) -> str:
    connection = connect(server)
    connection.request("GET", "/metrics", headers=headers)
    response = connection.getresponse()
    assert response.status == 200
    return response.read().decode()


def test_metrics_are_of_prometheus(server):
    ask(server, TEXT, {"prompt": "Once", "max_tokens": 3})
    for line in metrics(server).splitlines():
        if not line.startswith("# "):
            name, value = line.rsplit(" ", 1)
            assert name.startswith("llama_fast_") and float(value) >= 0
    text = metrics(server)
    assert 'llama_fast_requests_total{path="/v1/completions",status="200"}' in text
    assert 'llama_fast_time_to_first_token_seconds_bucket{le="+Inf"}' in text


def test_a_key(served):
    with serving(served, rows=1, key="secret-1") as server:
        body = {"prompt": "x", "max_tokens": 1}
        for wrong in ("", "Bearer", "Bearer ", "Bearer secret-2", "Basic secret-1", "Bearer ü"):
            headers = {"authorization": wrong.encode("latin-1")} if wrong else {}
            status, given, found = ask(server, TEXT, body, headers)
            assert status == 401 and found["error"]["code"] == "invalid_api_key"
            assert given["www-authenticate"] == "Bearer"
        right = {"authorization": "Bearer secret-1"}
        assert ask(server, TEXT, body, right)[0] == 200
        assert ask(server, "/v1/models")[0] == 401
        assert ask(server, "/v1/models", headers=right)[0] == 200
        assert ask(server, "/metrics")[0] == 401
        assert "llama_fast_rows 1\n" in metrics(server, **right)
        assert ask(server, "/health")[0] == 200


def test_the_end_waits_for_answers_that_have_begun(served):
    with serving(served, rows=1, queue=4) as server:
        connection, response = opened(server, ENDLESS | {"max_tokens": 150})
        found = []
        waiting = threading.Thread(target=lambda: found.append(ask(server, TEXT, LONG)))
        waiting.start()
        until(lambda: server.batch.waiting == 1)
        server.end()
        waiting.join(20)
        status, headers, body = found[0]
        assert status == 503 and headers["retry-after"] and "shutting down" in str(body)
        rest = response.read().decode()
        assert rest.rstrip().endswith("data: [DONE]") and '"finish_reason":"length"' in rest
        connection.close()


def test_the_command(tmp_path):
    """`llama-fast serve`, from its first line to a termination while it answers."""
    key = tmp_path / "key.txt"
    key.write_text("secret-2\n")
    command = [sys.executable, "-m", "llama_fast", "serve", "--port", "0", "--max-batch", "2"]
    process = subprocess.Popen(
        [*command, "--api-key", f"@{key}", "--kv-cache", "int8", "--name", "small"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = []
        while not (found := re.search(r"listening on (http://127\.0\.0\.1:\d+);", "".join(lines))):
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        assert "2 answers at once of 512 tokens" in lines[-2]
        server = SimpleNamespace(url=found[1])
        right = {"authorization": "Bearer secret-2"}
        assert ask(server, "/v1/models", headers=right)[2]["data"][0]["id"] == "small"
        assert ask(server, TEXT, {"prompt": "x"})[0] == 401
        connection, response = opened(server, ENDLESS | {"max_tokens": 60}, headers=right)
        process.send_signal(signal.SIGTERM)
        assert response.read().decode().rstrip().endswith("data: [DONE]")
        connection.close()
        assert process.stderr.read().endswith("stopped\n") and process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_what_the_command_refuses(capsys, monkeypatch):
    assert main(["serve", "--api-key", "two words"]) == 1
    assert "--api-key" in capsys.readouterr().err
    assert main(["serve", "--api-key", "@/no/such/file"]) == 1
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port, "--max-seq-len", "64"]) == 1
    assert f"cannot listen on 127.0.0.1, port {port}; give another" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 1
    assert "llama_fast[serve]" in capsys.readouterr().err
