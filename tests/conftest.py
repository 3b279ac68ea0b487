import collections
import contextlib
import csv
import functools
import http.server
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import one_core  # noqa: F401, isort: skip
import load_data
import simple_autoencoder as simple
import stack_autoencoder as stack
import util
from stl10_input import IMAGE_BYTES

import keras
import numpy as np
import pytest
from hypothesis import settings

# a background job of a shell ignores Ctrl-C, and so would the trainings within the tests and what they start
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = util.HERE
FULL = os.environ.get("FULL_TESTS") == "1"

# without a deadline, since a new shape compiles the model anew; the same examples every time
options = {"deadline": None, "derandomize": True, "database": None}
settings.register_profile("project", max_examples=300 if FULL else 15, **options)
settings.load_profile("project")

# what the local server sends
CONTENT = np.random.default_rng(0).bytes(3_000_000)

# a model and a training small enough for a test; their run
TINY = ["--dataset=photos", "--size=24", "--limit=64", "--batch-size=16", "--precision=float32"]
TINY += ["--filters=12", "--latent-dim=12", "--detail-epochs=1"]
NAME = "simple_photos"

Run = collections.namedtuple("Run", "out printed figures")


def random_images(*shape, seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def small_models(seed=0):
    """Encoder and decoder of z of a simple autoencoder, which start as the identity."""
    keras.utils.set_random_seed(seed)
    models = simple.build_encoder(16, 1, 14), simple.build_decoder(16, 1, 14)
    simple.start_as_identity(*models)
    return models


def small_detail_models():
    """Encoder and decoder of the detail code that fit `small_models`."""
    return simple.build_detail_encoder(16, 1, 14), simple.build_detail_decoder(16, 1, 14)


def fixed_draws(decoder, codes, samples, seed):
    """Stands for `util.draws` where tiles are compared: codes one deviation below, at and above the mean."""
    for draw in range(samples):
        z = [mean + (draw - 1) * np.exp(log_var / 2) for mean, log_var in codes]
        yield decoder.predict(z, verbose=0)


def shaken(model, seed=0):
    """The same model with every weight moved a little, so that no zero hides a difference."""
    rng = np.random.default_rng(seed)
    model.set_weights([weight + rng.normal(0, 0.05, weight.shape) for weight in model.get_weights()])
    return model


def save_run(out, name="small", seed=0):
    """Save a small denoiser with its record."""
    encoder, decoder = (shaken(model, seed) for model in small_models())
    detail = [shaken(model, seed) for model in small_detail_models()]
    models = {"autoencoder": simple.build_autoencoder(encoder, decoder)}
    models["encoder"] = simple.join_encoders(encoder, detail[0])
    models["decoder"] = simple.join_decoders(decoder, detail[1])
    with util.publishing(out, name) as draft:
        for part, model in models.items():
            util.save_model(draft, model, f"{part}_{name}")
        util.write_record(draft, name, {"seed": seed})


def assert_same_weights(out, other, name=NAME, part="autoencoder"):
    """Check that the runs of two folders have ended with the same weights."""
    models = [util.load_model(folder, name, part) for folder in (out, other)]
    for ours, theirs in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def shrink(patch):
    """Make models, photographs and figures of the scripts small; `patch` sets an attribute."""
    photographs = load_data.load_sample_images()
    photographs.images = [np.ascontiguousarray(image[100:196, 100:420]) for image in photographs.images]
    patch(load_data, "load_sample_images", lambda: photographs)
    for script in (simple, stack):
        for name in [name for name in vars(script) if name.endswith("CODER_BLOCKS")]:
            patch(script, name, 1)
    for name in ("stack_detail_encoder", "stack_detail_decoder"):
        patch(stack, name, functools.partial(getattr(stack, name), filters=12, blocks=1))
    patch(simple, "SHOWN", 2)
    patch(simple, "SWEEP", (25, 50))
    patch(simple, "POSTERIOR_SIGMAS", (25, 50))
    patch(simple, "ALL_DRAWS", simple.QUICK_DRAWS)


def printed_by(script, *arguments, output=None):
    """Call the `main` of a script within this process, shrunk; returns what it printed."""
    output = output or io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        shrink(patch.setattr)
        try:
            script.main([str(argument) for argument in arguments])
        finally:
            keras.config.set_dtype_policy("float32")
    return output.getvalue()


def run_of(script, out, *arguments):
    """Call a script as `printed_by` does; its output folder, what it printed, and its figures by file name.

    Of a GIF, its list of figures is kept.
    """
    kept, save_figure, save_gif = {}, util.save_figure, util.save_gif

    def keep_figure(figure, path):
        kept[path.name] = figure
        save_figure(figure, path)

    def keep_gif(figures, path):
        kept[path.name] = list(figures)
        save_gif(kept[path.name], path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(util, "save_figure", keep_figure)
        patch.setattr(util, "save_gif", keep_gif)
        printed = printed_by(script, *arguments, "--out", out)
    return Run(out, printed, kept)


def labels_of(figure):
    """Labels of a figure of images: (at the left, below) of each image, row by row."""
    return [(axis.get_ylabel(), axis.get_xlabel()) for axis in figure.axes if axis.images]


def pixels_of(figure):
    """The images that a figure shows, row by row."""
    return [np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images]


def curves_of(figure):
    """The panels of a figure of curves: (x label, y label, [(x values, y values) of each curve])."""
    lines = [
        [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines] for axis in figure.axes
    ]
    axes = [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes]
    return [(*labels, curves) for labels, curves in zip(axes, lines, strict=True)]


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# starts a script, shrunk, in a process of its own
SMALL = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import conftest, util
conftest.shrink(setattr)
util.run_script(importlib.import_module(sys.argv.pop(1)).main)
"""


def start(script, *arguments, small=False, **options):
    """Start one of the scripts as a user would, from another folder than its own."""
    command = ["-c", SMALL, script.removesuffix(".py")] if small else [str(ROOT / script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options["env"] = os.environ | {"PYTHONUNBUFFERED": "1"} | options.get("env", {})
    return subprocess.Popen([sys.executable, *command, *map(str, arguments)], **pipes | options)


def run(script, *arguments, **options):
    """Run a script to its end: (exit code, stdout, stderr without the greeting of TensorFlow's libraries)."""
    process = start(script, *arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, without_greeting(err)


def on_numpy(*arguments):
    """Run Python in the scripts' folder on Keras's numpy backend, which starts fast and can be forked."""
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"KERAS_BACKEND": "numpy"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)


def without_greeting(err):
    greeting = ("WARNING: All log messages before absl", "I0000 ", "W0000 ", "E0000 ")
    return "\n".join(line for line in err.splitlines() if not line.startswith(greeting))


def table_rows(printed):
    """The lines of the tables against sigma that a script printed."""
    return [line for line in printed.splitlines() if re.match(r"\| +(15|25|35|50|75) \|", line)]


def rows_of(path):
    """The rows of a CSV file, without empty cells, their numbers as numbers."""

    def parse(text):
        with contextlib.suppress(ValueError):
            return float(text) if "." in text or "e" in text else int(text)
        return text

    with open(path, newline="") as file:
        return [{key: parse(text) for key, text in row.items() if text} for row in csv.DictReader(file)]


def files_of(out):
    """Content of all files of a folder that bear a name of their own."""
    return {
        path: path.read_bytes() for path in out.rglob("*") if path.is_file() and not path.name.startswith(".")
    }


def told_line(call, *arguments):
    """The one line that a script would print of the failure that `call` ends in."""
    with pytest.raises(OSError) as failure:
        call(*arguments)
    line = util.error_line(failure.value)
    assert "\n" not in line
    return line


def usage_error(parse, arguments):
    """The last line that a script prints of wrong usage."""
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stderr(io.StringIO()) as told:
        parse(arguments)
    assert stopped.value.code == 2
    return told.getvalue().splitlines()[-1]


def until(condition, seconds=60):
    """Wait for something."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def wait_for(text, process):
    """Wait until a process prints a text."""
    while text not in process.stdout.readline():
        assert process.poll() is None


class Interrupting(io.StringIO):
    """Output that sends this process Ctrl-C when it is to show a text."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def write(self, printed):
        if self.text and self.text in printed:
            self.text = None
            signal.raise_signal(signal.SIGINT)
        return super().write(printed)


def stop_at(text, script, *arguments):
    """Stop a script within this process when it is to show a text; returns what the user is told."""
    with pytest.raises(KeyboardInterrupt) as stopped:
        printed_by(script, *arguments, output=Interrupting(text))
    return str(stopped.value)


@contextlib.contextmanager
def largest_file(size):
    """A disk that takes no file larger than `size`, for this process and what it starts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what pytest captures goes to a file
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stl10_files(folder, **counts):
    """A small STL-10 of so many images in each split; returns its folder."""
    (folder / "stl10_binary").mkdir(parents=True)
    for split, count in counts.items():
        random_images(count * IMAGE_BYTES).tofile(folder / f"stl10_binary/{split}_X.bin")
        listed = bytes(n % 10 + 1 for n in range(count))
        (folder / f"stl10_binary/{split}_y.bin").write_bytes(listed)
    return folder


def cifar_pickle(images, labels):
    """A batch in the form of the official ones: protocol 2, numpy names of 2009, byte strings."""
    raw = images.transpose(0, 3, 1, 2).tobytes()
    shape = b"J" + len(images).to_bytes(4, "little") + b"M\x00\x0c\x86"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
    array += shape + dtype + b"\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + listed + b"u."


def archive_of(path, members):
    """Write a tar archive of (name, bytes); returns its bytes."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.read_bytes()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Short training on the built-in photographs, for tests that leave its files as they are."""
    return run_of(simple, tmp_path_factory.mktemp("trained"), *TINY, "--epochs=2")


@pytest.fixture(scope="session")
def photographs():
    """The data that shrunk scripts work on."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        return load_data.load_data("photos", size=24)


LOAD = """
import sys, numpy, keras
architecture, weights, images, result = sys.argv[1:]
model = keras.models.model_from_json(open(architecture).read())
model.load_weights(weights)
assert not model.compiled and model.dtype_policy.name == "float32"
numpy.save(result, model.predict(numpy.load(images), verbose=0))
ours = {"util", "load_data", "stl10_input", "simple_autoencoder", "classifier"} & set(sys.modules)
print(keras.backend.backend(), sorted(ours))
"""


@pytest.fixture
def predicted_by_keras_alone(tmp_path):
    """Function that loads a saved model in a process without anything of ours, and predicts with it."""

    def predict(out, name, images, backend="tensorflow"):
        files = tmp_path / "images.npy", tmp_path / "result.npy"
        np.save(files[0], images)
        paths = out / f"models/{name}.json", out / f"weights/{name}.weights.h5", *files
        options = {"env": os.environ | {"KERAS_BACKEND": backend}, "capture_output": True, "text": True}
        command = [sys.executable, "-c", LOAD, *map(str, paths)]
        printed = subprocess.run(command, cwd=tmp_path, check=True, **options).stdout
        assert printed.split() == [backend, "[]"]
        return np.load(files[1])

    return predict


@pytest.fixture
def unmeasured(monkeypatch):
    """Trainings leave out what they measure and draw at their end, which takes most of their time here."""
    monkeypatch.setattr(simple, "measure_and_print", lambda *_: ({}, None))
    monkeypatch.setattr(simple, "draw_results", lambda *_: None)


@pytest.fixture
def trained_copy(trained, tmp_path):
    """Output folder of the short training, to change."""
    return shutil.copytree(trained.out, tmp_path / "out")


@pytest.fixture
def server():
    """Local HTTP server; `server.faults` holds what goes wrong in the next answers, one after another."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            fault = self.server.faults.pop(0) if self.server.faults else None
            content = self.server.content
            first = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.server.asked.append(first)
            if isinstance(fault, int):
                self.send_error(fault)
            elif fault == "html":
                self.answer(200, b"<html>log in first</html>", "text/html")
            elif fault == "no range" or not first:
                self.answer(200, content, fault=fault)
            elif first < len(content):
                self.answer(206, content[first:], fault=fault)
            else:
                self.send_error(416)

        def answer(self, status, body, kind="application/gzip", fault=None):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
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
        threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True).start()
        yield httpd
        httpd.ended.set()
        httpd.shutdown()
