"""`vlmprune evaluate --server`: a server's answers on disk, scored as those of a model of the workdir."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vlmprune_jax.run.cli.main import main
from vlmprune_jax.run.workdir.evaluation import read_evaluated

CONFIG = """
from vlmprune_jax.run.cli.config_files import experiment_config


def get_config():
    config = experiment_config()
    config.model.hf_dir = "{root}"
    config.evaluate.batch_size = 2
    config.evaluate.sets.colour = {{"data": "{root}/records.json", "questions": 3}}
    config.evaluate.sets.wiki = {{"text": "{root}/config.py"}}
    return config
"""


class Yes(BaseHTTPRequestHandler):
    """A server whose model says yes."""

    def answer(self, value):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def do_GET(self):
        self.answer({"data": [{"id": "runs/a model"}]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        self.answer({"choices": [{"message": {"content": "yes"}}], "usage": {"completion_tokens": 2}})

    def log_message(self, *arguments):
        pass


@pytest.fixture
def url():
    with ThreadingHTTPServer(("127.0.0.1", 0), Yes) as server:
        server.asked = 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_answers_of_a_server_are_kept_and_scored(tmp_path, url, capsys):
    answers = ["yes", "no", "yes", "no"]
    records = [
        {"id": f"r{i}", "conversations": [{"from": "human", "value": "Red?"}, {"from": "gpt", "value": answer}]}
        for i, answer in enumerate(answers)
    ]
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "config.py").write_text(CONFIG.format(root=tmp_path))
    flags = ["evaluate", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'w'}"]
    server = f"--server=http://127.0.0.1:{url.server_port}/v1"
    for _ in range(2):
        assert main([*flags, server, "--config.data.system=Be brief."]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "  no effect: data.system, because the server has" in out
    assert "serves runs/a model: its answers go to eval/served-runs-a-model*.json" in out
    assert "wiki: not evaluated" in out
    assert "evaluate served-runs-a-model colour: unchanged, skipped" in out
    assert url.asked == 3
    found = read_evaluated(tmp_path / "w/eval/served-runs-a-model.colour.json")
    assert found.values["accuracy"] == pytest.approx(2 / 3)
    assert found.mean_generated_tokens == 2
    lines = (tmp_path / "w/eval" / found.answers).read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["r0", "r1", "r2"]
    assert main([*flags, server, "--dry_run"]) == 2
    assert "--dry_run and --only are not for models behind --server" in capsys.readouterr().err
    assert main([*flags, "--server=ftp://x"]) == 2
    assert "--server=ftp://x: must be an address" in capsys.readouterr().err
