"""``hf:NAME``: the real client downloads from a hub that this file plays, and finds it again without one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from irq_export.train.data_formats import load_conversations
from irq_formats.errors import UsageError

ROW = {"instruction": "a", "input": "c", "output": "b"}
EXPECTED = [{"role": "user", "content": "a", "context": "c"}, {"role": "assistant", "content": "b"}]
FILE = json.dumps(ROW).encode() + b"\n"
NAME, COMMIT = "someone/instructions", "0123456789abcdef0123456789abcdef01234567"
_LOAD = """
import sys
from irq_export.train.data_formats import load_conversations
from irq_formats.errors import UsageError
for source in sys.argv[1:]:
    try:
        print(load_conversations(source))
    except UsageError as error:
        print(type(error).__name__, str(error).splitlines()[0])
"""


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub's protocol that a data set of one file needs."""

    def log_message(self, *args: object) -> None:
        """Keep the paths instead of printing them."""

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, *, send: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)  # type: ignore[attr-defined]
        object_id = hashlib.sha1(b"blob %d\0" % len(FILE) + FILE).hexdigest()
        about = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": "train.jsonl"}]}
        tree = [{"type": "file", "oid": object_id, "size": len(FILE), "path": "train.jsonl"}]
        bodies = {
            f"/api/datasets/{NAME}": json.dumps(about).encode(),
            f"/api/datasets/{NAME}/revision/{COMMIT}": json.dumps(about).encode(),
            f"/api/datasets/{NAME}/tree/{COMMIT}": json.dumps(tree).encode(),
            f"/datasets/{NAME}/resolve/{COMMIT}/train.jsonl": FILE,
        }
        self.send_response(200 if path in bodies else 404)
        body = bodies.get(path, b"{}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{object_id}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if path not in bodies:
            self.send_header("X-Error-Code", "EntryNotFound" if NAME in path else "RepoNotFound")
        self.end_headers()
        if send:
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    """A hub on this machine; ``asked`` holds the paths of its requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def load(home: Path, hub: ThreadingHTTPServer, *sources: str, offline: bool = False) -> list[str]:
    """Load sources in a process of its own: the client reads the address of the hub when it is imported."""
    variables = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home)}
    variables["HF_HUB_OFFLINE"] = str(int(offline))  # whatever the tests themselves run under
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, *sources],
        env={**{k: v for k, v in os.environ.items() if k != "HF_DATASETS_OFFLINE"}, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_name_is_downloaded_and_found_again_offline(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    local = tmp_path / "local.jsonl"
    local.write_bytes(FILE)
    home = tmp_path / "home"
    found = load(home, hub, str(local))
    assert found == [str(("alpaca", [EXPECTED]))]
    assert hub.asked == []  # type: ignore[attr-defined]  # a file asks nobody
    found = load(home, hub, f"hf:{NAME}", f"hf:{NAME}:nothing", "hf:nobody/nothing")
    assert found[0] == str(("alpaca", [EXPECTED]))
    assert all("UsageError" in line and "no such data set" in line for line in found[1:])
    assert len(found) == 3
    asked = len(hub.asked)  # type: ignore[attr-defined]
    assert load(home, hub, f"hf:{NAME}", offline=True) == [str(("alpaca", [EXPECTED]))]
    assert len(hub.asked) == asked  # type: ignore[attr-defined]


def test_a_directory_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(FILE)
    (folder / "test.jsonl").write_text(json.dumps({**ROW, "output": "held out"}) + "\n" + FILE.decode())
    assert load_conversations(f"hf:{folder}") == ("alpaca", [EXPECTED])
    assert load_conversations(f"hf:{folder}:test")[1][0][1]["content"] == "held out"
    for source in (f"hf:{folder}:nothing", f"hf:{tmp_path / 'absent'}"):
        with pytest.raises(UsageError, match="no such data set"):
            load_conversations(source)
