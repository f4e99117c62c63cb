"""Questions to an OpenAI-compatible server, here a stand-in on this machine; its answers are not trusted."""

import base64
import contextlib
import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.journal import Journal
from vlmprune_jax.io.data.records import Record
from vlmprune_jax.run.evaluation import server as server_file
from vlmprune_jax.run.evaluation.server import Server, ask_server


class StandIn(BaseHTTPRequestHandler):
    """Answers from `server.replies` (path -> function of the request's JSON -> (status, headers, bytes))."""

    def do_GET(self):
        self.answer(None)

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body):
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        status, headers, content = self.server.replies[self.path](body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side read enough
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


MODELS, CHAT = "/v1/models", "/v1/chat/completions"


def sent(value, status=200, **headers):
    return lambda body: (status, headers, value if isinstance(value, bytes) else json.dumps(value).encode())


def completion(text, tokens=3):
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": {"completion_tokens": tokens}}


@pytest.fixture
def stand_in():
    """A server that serves "org/m" and answers every question with the text of its last part."""

    def repeat(body):
        return sent(completion(f" {body['messages'][-1]['content'][-1]['text']} "))(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as server:
        server.asked, server.replies = [], {MODELS: sent({"data": [{"id": "org/m"}]}), CHAT: repeat}
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(stand_in, records, journal=None, **settings):
    settings = {"prompt_suffix": " Short.", "max_new_tokens": 5, "parallel": 2, **settings}
    server = Server.connect(stand_in.url)
    return ask_server(server, records, progress=lambda done: None, journal=journal, **settings)


def test_questions_go_out_with_their_images_and_come_back_in_order(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    for name, content in (("a.png", b"\x89PNG one"), ("b.jpg", b"\xff\xd8 two")):
        (tmp_path / name).write_bytes(content)
    images = (tmp_path / "a.png", tmp_path / "b.jpg")
    turns = (("human", "<image>\nCompare with\n<image> this."), ("gpt", "Yes."), ("human", "Why?"), ("gpt", "So."))
    records = [Record("r0", turns, images), Record("r1", (("human", "One?"), ("gpt", "x")), images[:1])]
    records += [Record(f"r{i}", (("human", f"{i}?"),), ()) for i in range(2, 5)]
    replies = ask(stand_in, records)
    assert [reply.prediction for reply in replies] == [
        "Why? Short.",
        "One? Short.",
        *(f"{i}? Short." for i in (2, 3, 4)),
    ]
    assert [(reply.record.id, reply.tokens) for reply in replies] == [(f"r{i}", 3) for i in range(5)]
    bodies = [body for path, body, _ in stand_in.asked if path == CHAT]
    first, second = (next(b for b in bodies if text in json.dumps(b)) for text in ("Why?", "One?"))
    assert {key: first[key] for key in ("model", "max_tokens", "temperature")} == {
        "model": "org/m", "max_tokens": 5, "temperature": 0,
    }  # fmt: skip
    urls = [f"data:image/{kind};base64,{base64.b64encode(p.read_bytes()).decode()}" for kind, p in
            zip(("png", "jpeg"), images, strict=True)]  # fmt: skip
    picture = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    text = lambda said: {"type": "text", "text": said}  # noqa: E731
    assert first["messages"] == [
        {"role": "user", "content": [picture[0], text("Compare with"), picture[1], text("this.")]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [text("Why? Short.")]},
    ]
    assert second["messages"] == [{"role": "user", "content": [picture[0], text("One? Short.")]}]
    assert {key for _, _, key in stand_in.asked} == {"Bearer secret"}


def test_videos_go_out_as_data_urls(stand_in, tmp_path):
    clip, frames = tmp_path / "a.mp4", (tmp_path / "1.jpg", tmp_path / "2.jpg")
    for path in (clip, *frames):
        path.write_bytes(path.name.encode())
    record = Record("r", (("human", "<video><video>What moves?"),), (), videos=(clip, frames))
    ask(stand_in, [record])
    encoded = [base64.b64encode(path.read_bytes()).decode() for path in (clip, *frames)]
    urls = [f"data:video/mp4;base64,{encoded[0]}", f"data:video/jpeg;base64,{encoded[1]},{encoded[2]}"]
    content = stand_in.asked[-1][1]["messages"][0]["content"]
    assert [part["video_url"]["url"] for part in content[:2]] == urls
    assert content[2]["text"] == "What moves? Short."
    with pytest.raises(UserError, match="record r: uses a part of its video, and servers take whole files: cut the"):
        ask(stand_in, [dataclasses.replace(record, part=(0.0, 1.0))])


@pytest.mark.parametrize(
    ("as_served", "with_begin", "asks"), [([5, 6], [1, 5, 6], True), ([1, 5], [1, 1, 5], False), ([5], [5], False)]
)
def test_the_begin_token_of_vllm(stand_in, as_served, with_begin, asks):
    """Templates such as LLaVA's leave the token to the processor; a server that hides /tokenize is asked as before."""
    records = [Record("r0", (("human", "?"),), ())]
    stand_in.replies[MODELS] = sent({"data": [{"id": "org/m", "owned_by": "vllm"}]})
    for replies in (
        {"/tokenize": lambda body: sent({"tokens": with_begin if body["add_special_tokens"] else as_served})(body)},
        {"/tokenize": sent({}, status=404)},
    ):
        stand_in.replies |= replies
        ask(stand_in, records)
        assert stand_in.asked[-1][1].get("add_special_tokens", False) == asks
        asks = False


def test_an_interrupted_pass_continues(stand_in, tmp_path):
    records = [Record(f"r{i}", (("human", f"{i}?"),), ()) for i in range(6)]
    repeat, count = stand_in.replies[CHAT], []

    def fails_later(body):
        count.append(1)
        return repeat(body) if len(count) <= 4 else sent({"error": "busy"}, status=503)(body)

    stand_in.replies[CHAT] = fails_later
    with pytest.raises(
        UserError, match=r'chat/completions: the server returned HTTP error 503 \({"error": "busy"}\): check its log'
    ):
        ask(stand_in, records, Journal(tmp_path / "j", {"batches": 3}))
    stand_in.replies[CHAT], before = repeat, len(stand_in.asked)
    replies = ask(stand_in, records, Journal(tmp_path / "j", {"batches": 3}))
    assert [reply.prediction for reply in replies] == [f"{i}? Short." for i in range(6)]
    assert len(stand_in.asked) - before == 1 + 2  # the models, and the batch that failed


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (sent(b"<html>"), "is not valid JSON"),
        (sent({"choices": [], "usage": {"completion_tokens": 1}}), "does not have the expected content"),
        (sent(completion("x", tokens=-1)), "does not have the expected content"),
        (sent(completion("x" * 2**21)), "does not have the expected content"),
        (sent(b" " * 2000), "has more than 1,000 bytes"),
        (sent(b"", status=302, Location="http://127.0.0.1:9/other"), "HTTP error 302"),
        (sent(b"no \x1b[31m such model", status=404), r"HTTP error 404 \(no \\x1b\[31m such model\)"),
    ],
)
def test_answers_are_bounded_and_told_in_a_line(stand_in, monkeypatch, answer, message):
    if "bytes" in message:
        monkeypatch.setattr(server_file, "MAX_ANSWER_BYTES", 1000)
    stand_in.replies[CHAT] = answer
    with pytest.raises(UserError, match=message) as error:
        ask(stand_in, [Record("r", (("human", "?"),), ())])
    assert str(error.value).startswith(f"{stand_in.url}/chat/completions: ")
    assert "\n" not in str(error.value)
    assert [path for path, *_ in stand_in.asked] == [MODELS, CHAT]


def test_servers_that_cannot_be_asked(stand_in):
    for url in ("file:///etc/passwd", "localhost:8000", "http://"):
        with pytest.raises(UserError, match="must be an address such as"):
            Server.connect(url)
    with pytest.raises(
        UserError, match=r"127\.0\.0\.1:1/v1/models: the server does not answer \(.*refused.*\): start it"
    ):
        Server.connect("http://127.0.0.1:1/v1")
    stand_in.replies[MODELS] = sent({"data": [{"id": "a"}, {"id": "b"}]})
    with pytest.raises(UserError, match="lists 2 models, expected 1"):
        Server.connect(stand_in.url)
