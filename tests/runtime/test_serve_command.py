"""``irq-export serve`` as a process: signals, ports, imports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.serving import HEAVY, PROMPT


class TestCommand:
    @contextmanager
    def started(self, demo: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
        command = [sys.executable, "-m", "irq_export", "serve", str(demo), "--json", "--port", "0", *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        with process:
            try:
                assert process.stdout is not None
                lines = iter(process.stdout.readline, "")
                ready = ""
                while not ready.endswith("}\n"):
                    line = next(lines)
                    ready += line if line != "}\n" else "}\n"
                url = json.loads(ready)["url"]
                with httpx.Client(base_url=url.removesuffix("/v1"), timeout=60) as client:
                    yield process, client
            finally:
                process.kill()

    @staticmethod
    def ended_quietly(process: subprocess.Popen[str]) -> None:
        """With exit code 0, and without nanobind's list of all that Python did not free."""
        assert process.wait(10) == 0
        assert process.stderr is not None
        said = process.stderr.read()
        assert "Finished server" in said
        assert "leaked" not in said

    def test_sigterm_lets_requests_finish(self, demo: Path) -> None:
        with self.started(demo) as (process, client):
            body = {"prompt": PROMPT, "max_tokens": 200, "stream": True, "seed": 1}
            with client.stream("POST", "/v1/completions", json=body) as reply:
                lines = reply.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in (
                "length",
                "stop",
            )
            self.ended_quietly(process)

    def test_sigterm_ends_what_takes_too_long(self, demo: Path) -> None:
        with self.started(demo, "--grace", "0.2", "--sequences", "1") as (process, client):
            body = {**HEAVY, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as reply:
                lines = reply.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "unavailable"
            self.ended_quietly(process)

    def test_ctrl_c(self, demo: Path) -> None:
        with self.started(demo) as (process, client):
            client.get("/health")  # signals are handled from here on
            process.send_signal(signal.SIGINT)
            self.ended_quietly(process)

    def test_port_in_use(self, demo: Path, client: httpx.Client) -> None:
        arguments = ["serve", str(demo), "--port", str(client.base_url.port)]
        done = subprocess.run(
            [sys.executable, "-m", "irq_export", *arguments], capture_output=True, text=True
        )
        assert done.returncode == 2
        assert "cannot listen" in done.stderr

    def test_imports_no_torch(self) -> None:
        program = (
            "import sys, irq_runtime.serve.server, irq_export.cli.serve\n"
            "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", program], check=True)
