import http.server
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# a background job of a shell ignores Ctrl-C, and so would the trainings within the tests and what they start
signal.signal(signal.SIGINT, signal.default_int_handler)

# what the local server sends
CONTENT = np.random.default_rng(0).bytes(3_000_000)

# a model and a training small enough for a test
TINY = ["--dataset=photos", "--limit=64", "--batch-size=16", "--filters=12", "--precision=float32"]


def start(script, *arguments, **options):
    """Start one of the scripts as a user would, from another folder than its own."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)


def run(script, *arguments, **options):
    """Run a script to its end: (exit code, stdout, stderr without the greeting of TensorFlow's libraries)."""
    process = start(script, *arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, without_greeting(err)


def on_numpy(script, *arguments):
    """Run a script of the tests on Keras's numpy backend, which starts fast and can be forked."""
    command = [sys.executable, str(ROOT / "tests" / script), *map(str, arguments)]
    environment = os.environ | {"KERAS_BACKEND": "numpy"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def table_rows(printed):
    """The lines of the evaluation tables that a script printed; each begins with sigma."""
    return [line for line in printed.splitlines() if re.match(r"\| +(15|25|35|50|75) \|", line)]


def without_greeting(err):
    greeting = ("WARNING: All log messages before absl", "I0000 ", "W0000 ", "E0000 ")
    return "\n".join(line for line in err.splitlines() if not line.startswith(greeting))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Output folder of a short training on the built-in photographs, and what it printed."""
    out = tmp_path_factory.mktemp("trained")
    environment = os.environ | {"COLUMNS": "100"}
    code, printed, err = run(
        "simple_autoencoder.py", *TINY, "--epochs", "2", "--out", out, cwd=out, env=environment
    )
    assert code == 0, err
    return out, printed


@pytest.fixture
def server():
    """Local HTTP server; `server.faults` holds what goes wrong in the next answers, one after another."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            fault = self.server.faults.pop(0) if self.server.faults else None
            content = self.server.content
            first = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.server.asked.append(first)
            if fault == "html":
                self.answer(200, b"<html>log in first</html>", {"Content-Type": "text/html"})
            elif isinstance(fault, int):
                self.send_error(fault)
            elif fault == "no range" or "Range" not in self.headers:
                self.answer(200, content, {}, fault)
            elif first >= len(content):
                self.send_error(416)
            else:
                span = f"bytes {first}-{len(content) - 1}/{len(content)}"
                self.answer(206, content[first:], {"Content-Range": span}, fault)

        def answer(self, status, body, headers, fault=None):
            self.send_response(status)
            for key, value in ({"Content-Length": len(body)} | headers).items():
                self.send_header(key, str(value))
            self.end_headers()
            body = b"x" + body[1:] if fault == "wrong" else body
            body = body[: len(body) // 2] if fault in ("drop", "stall") else body
            self.server.sent += len(body)
            self.wfile.write(body)
            if fault == "stall":
                self.server.ended.wait()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.content, httpd.ended = CONTENT, threading.Event()
        httpd.faults, httpd.asked, httpd.sent = [], [], 0
        httpd.url = f"http://127.0.0.1:{httpd.server_port}/file.tar.gz"
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield httpd
        httpd.ended.set()
        httpd.shutdown()
