import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# a model and a training small enough for a test
TINY = ["--dataset=photos", "--limit=64", "--batch-size=16", "--filters=12", "--precision=float32"]


def start(script, *arguments, **options):
    """Start one of the scripts as a user would, from another folder than its own."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a background job of a shell ignores Ctrl-C, and so would what it starts
    return subprocess.Popen(
        command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **pipes, **options
    )


def run(script, *arguments, **options):
    """Run a script to its end: (exit code, stdout, stderr without the greeting of TensorFlow's libraries)."""
    process = start(script, *arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, without_greeting(err)


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
