import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import KNN
import load_data
import simple_autoencoder as simple
import stack_autoencoder as stack
import stl10_input
import util
from stl10_input import IMAGE_BYTES

import imageio.v3 as iio
import keras
import numpy as np
import pytest
from conftest import CONTENT, ROOT, TINY, on_numpy, start, without_greeting
from test_load_data import cifar_pickle
from test_stl10_input import archive_of

NAME = "simple_photos"


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def small_model(seed=0):
    keras.utils.set_random_seed(seed)
    image = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(40, 2, strides=2)(image)
    return keras.Model(image, [keras.layers.Conv2D(20, 1)(x), keras.layers.Conv2D(20, 1)(x)])


def save_run(out, name="small", seed=0):
    with util.staged(out, name) as stage:
        for part in ("encoder", "decoder"):
            util.save_model(stage, small_model(seed), f"{part}_{name}")
        util.write_record(stage, name, {"seed": seed})


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


def test_a_hundred_kills_lose_nothing():
    ended = on_numpy("kill_savings.py", 0)
    assert ended.returncode == 0, ended.stderr
    amid = int(ended.stdout.split(" of 100 kills amid a save")[0])
    assert amid > 30


def test_full_disk_leaves_the_earlier_run(tmp_path):
    save_run(tmp_path)
    before = files_of(tmp_path)
    largest = max(len(content) for content in before.values())
    for size in (0, 100, 2000, largest // 2, largest - 1):
        with largest_file(size):
            line = told_line(save_run, tmp_path, "small", 1)
        assert line == f"{tmp_path}: File too large; free some space and run again"
        assert files_of(tmp_path) == before
    assert not list((tmp_path / "logs").glob(".small.*"))
    with largest_file(largest + 1000):
        save_run(tmp_path, seed=1)
    assert util.read_record(tmp_path, "small")["seed"] == 1


def test_full_disk_leaves_the_earlier_feature_maps(tmp_path):
    save_run(tmp_path)
    arguments = tmp_path, "small", "test", random_images(50, 32, 32, 3), np.arange(50)
    expected = util.feature_maps(*arguments)
    before = files_of(tmp_path)
    others = *arguments[:3], random_images(50, 32, 32, 3, seed=1), np.arange(50)
    path = tmp_path / "feature_maps/small_test.h5"
    for size in (0, 1000, 3000, path.stat().st_size // 2, path.stat().st_size - 1):
        with largest_file(size):
            assert told_line(util.feature_maps, *others).startswith(f"{path}: File too large; free some")
    assert files_of(tmp_path) == before
    np.testing.assert_array_equal(util.feature_maps(*arguments), expected)


def write_array(path):
    np.save(path, np.zeros(10_000))


def write_figure(path):
    util.save_figure(util.rows_figure([("", random_images(8, 8, 8, 3), None)]), path)


def write_gif(path):
    util.save_gif([util.rows_figure([("", random_images(2, 8, 8, 3), None)])], path)


def write_text(path):
    path.write_text("text" * 1000)


@pytest.mark.parametrize(
    ("write", "ending"),
    [(write_array, "npy"), (write_figure, "png"), (write_gif, "gif"), (write_text, "csv")],
)
def test_full_disk_leaves_the_earlier_file_of_any_kind(tmp_path, write, ending):
    path = tmp_path / f"a.{ending}"
    path.write_text("earlier")

    def replace():
        with util.atomic(path) as temporary:
            write(temporary)

    for size in (0, 500):
        with largest_file(size):
            line = told_line(replace)
        assert line.startswith(f"{path}: ")
        assert "free some space" in line or "is the disk full?" in line
        assert files_of(tmp_path) == {path: b"earlier"}
        assert list(tmp_path.iterdir()) == [path]


DISK = """
import os, subprocess, sys
os.environ["KERAS_BACKEND"] = "numpy"
import util
mount = sys.argv[1]
for step in ("size=64k", "remount,ro"):
    subprocess.run(["mount", "-t", "tmpfs", "-o", step, "none", mount], check=True)
    try:
        with util.locked(mount, "run"):
            for _ in range(100):
                with util.atomic(mount + f"/logs/{os.urandom(4).hex()}.txt") as path:
                    path.write_text("x" * 2000)
    except OSError as error:
        print(util.error_line(error))
"""


def test_disk_that_is_really_full_or_read_only(tmp_path):
    command = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", DISK, str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*command[:4], "true"], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    full, read_only = ended.stdout.splitlines()
    assert full.startswith(f"{tmp_path}/logs/")
    assert full.endswith(".txt: No space left on device; free some space and run again")
    assert read_only.startswith(f"{tmp_path}: ")
    assert "Read-only file system" in read_only
    assert "choose another" in read_only


@pytest.mark.parametrize("folder", util.FOLDERS)
def test_folder_that_cannot_be_written_is_found_before_the_training(tmp_path, folder):
    (tmp_path / folder).write_text("a file in its place")
    arguments = [*TINY, "--out", str(tmp_path)]
    line = told_line(simple.main, arguments)
    assert line.startswith(f"{tmp_path / folder}")
    assert "choose another" in line
    assert list(tmp_path.rglob("*.training")) == []


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    for script in (simple, load_data):
        line = told_line(script.main, ["--dataset=photos", f"--out={tmp_path}/out"])
        assert line.startswith(f"{tmp_path}/out")
        assert line.endswith("a file is in the place of a folder: choose another folder")


def test_second_run_of_a_name_is_told_to_choose_another(tmp_path):
    with util.locked(tmp_path, "mine"):
        line = told_line(simple.main, [*TINY, "--name=mine", "--out", str(tmp_path)])
    assert line == f"{tmp_path}/logs/.mine.lock: another run named mine is going on; choose another --name"


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


def stop_at(text, call, *arguments):
    """Stop `call` when the output shows `text`; returns what the user is told."""
    with pytest.raises(KeyboardInterrupt) as stopped, contextlib.redirect_stdout(Interrupting(text)):
        call(*arguments)
    return str(stopped.value)


def train_until(text, out):
    """Train as `trained` was until the output shows `text`."""
    stop_at(text, simple.main, [*TINY, "--epochs=2", "--out", str(out)])


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Output folder of a training that was stopped in its second epoch."""
    out = tmp_path_factory.mktemp("interrupted")
    train_until("Epoch 2/2", out)
    return out


@pytest.fixture
def stopped(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "out")


def resume(out, *arguments):
    simple.main(["--resume", f"--name={NAME}", "--out", str(out), *arguments])


def test_interrupted_run_is_not_overwritten(stopped):
    before = files_of(stopped)
    line = told_line(simple.main, [*TINY, "--out", str(stopped)])
    assert line.endswith(f"{NAME}.training: holds an interrupted run; go on with --resume, or delete it")
    assert files_of(stopped) == before


def test_checkpoint_of_another_architecture(stopped):
    checkpoint = stopped / f"logs/{NAME}.training/checkpoint.weights.h5"
    before = checkpoint.read_bytes()
    line = told_line(resume, stopped, "--filters=16")
    assert line.startswith(f"{checkpoint}: does not fit this model (")
    assert line.endswith("; train without --resume")
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_truncated_checkpoint(stopped, share):
    checkpoint = stopped / f"logs/{NAME}.training/checkpoint.weights.h5"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(share * len(whole))])
    line = told_line(resume, stopped)
    assert line == f"{checkpoint}: damaged checkpoint; train without --resume"


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_damaged_arguments_of_an_interrupted_run(stopped, text):
    path = stopped / f"logs/{NAME}.training/arguments.json"
    path.write_text(text)
    line = told_line(resume, stopped)
    assert line == f"{path}: damaged; delete {path.parent} and train without --resume"


def same_weights(out, others):
    """Check that the runs of two folders ended with the same weights."""
    for part in ("encoder", "decoder", "autoencoder"):
        models = [util.load_model(folder, NAME, part) for folder in (out, others)]
        for ours, theirs in zip(*(model.get_weights() for model in models), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_training_that_diverges_and_is_stopped_again_ends_with_the_same_weights(trained, stopped):
    checkpoint = stopped / f"logs/{NAME}.training/checkpoint.weights.h5"
    before = checkpoint.read_bytes()
    line = told_line(resume, stopped, "--learning-rate=1e30")
    assert "the training diverged" in line
    assert line.endswith("--resume and a lower --learning-rate")
    assert checkpoint.read_bytes() == before
    told = stop_at("Codes of the first", resume, stopped, f"--learning-rate={simple.LEARNING_RATE}")
    assert told.startswith(f"Stopped. Go on with: {sys.executable} ")
    assert told.endswith(f"simple_autoencoder.py --resume --name {NAME} --out {stopped}")
    assert not (stopped / "models").exists()
    resume(stopped)
    same_weights(stopped, trained[0])


def other_file_system():
    """A new folder on another file system than the temporary one; None if there is no other."""
    for folder in ("/dev/shm", f"/run/user/{os.getuid()}", Path.home()):
        with contextlib.suppress(OSError):
            if os.stat(folder).st_dev != os.stat(tempfile.gettempdir()).st_dev:
                return Path(tempfile.mkdtemp(prefix="other-", dir=folder))
    return None


def test_training_stopped_at_its_start_then_on_a_full_disk_on_another_file_system(trained, tmp_path):
    out = other_file_system() or tmp_path
    try:
        save_run(out, NAME)
        earlier = files_of(out)
        train_until("Epoch 1/2", out)
        with largest_file(2_500_000):  # the checkpoints are smaller, the feature maps larger
            line = told_line(resume, out)
        assert line == f"{out}: File too large; free some space and run again"
        training = out / f"logs/{NAME}.training"
        assert {path: raw for path, raw in files_of(out).items() if training not in path.parents} == earlier
        resume(out)
        same_weights(out, trained[0])
        assert not training.exists()
    finally:
        if out != tmp_path:
            shutil.rmtree(out)


@pytest.mark.parametrize("damage", ["empty", "cut", "bit"])
@pytest.mark.parametrize("file", ["models/encoder_small.json", "weights/decoder_small.weights.h5"])
def test_damaged_file_of_a_model(tmp_path, file, damage):
    save_run(tmp_path)
    raw = (tmp_path / file).read_bytes()
    flipped = raw[:-50] + bytes([raw[-50] ^ 1]) + raw[-49:]
    (tmp_path / file).write_bytes({"empty": b"", "cut": raw[: len(raw) // 2], "bit": flipped}[damage])
    line = told_line(util.load_model, tmp_path, "small", Path(file).name.split("_")[0])
    assert line == (
        f"{tmp_path / file}: not the file that small wrote (SHA-256 differs); restore it or train again"
    )
    if damage != "bit":  # without the record there is no checksum
        (tmp_path / "logs/small.json").unlink()
        line = told_line(util.load_model, tmp_path, "small", Path(file).name.split("_")[0])
        assert line.startswith(f"{tmp_path / file}: not ")
        assert "restore it" in line


def test_encoder_and_decoder_of_different_runs(trained, tmp_path):
    out = shutil.copytree(trained[0], tmp_path / "out")
    save_run(out, "other")
    for folder, ending in (("models", "json"), ("weights", "weights.h5")):
        shutil.copy(out / f"{folder}/decoder_other.{ending}", out / f"{folder}/decoder_{NAME}.{ending}")
    before = files_of(out)
    line = told_line(simple.main, ["evaluate", "--dataset=photos", "--out", str(out)])
    assert line.startswith(f"{out}/models/decoder_{NAME}.json: not the file that {NAME} wrote")
    line = told_line(stack.main, [*TINY, "--out", str(out)])
    assert line.startswith(f"{out}/models/decoder_{NAME}.json: not the file that {NAME} wrote")
    assert {path: raw for path, raw in files_of(out).items() if ".training" not in str(path)} == before


def stl10_files(folder, images=3, labels=3):
    """A small STL-10; returns its folder."""
    (folder / "stl10_binary").mkdir(parents=True)
    for split in ("train", "test", "unlabeled"):
        random_images(images * IMAGE_BYTES).tofile(folder / f"stl10_binary/{split}_X.bin")
        (folder / f"stl10_binary/{split}_y.bin").write_bytes(bytes(range(1, labels + 1)))
    return folder


def test_stl10_labels_that_are_not_those_of_the_images(tmp_path):
    stl10_files(tmp_path, images=3, labels=2)
    line = told_line(load_data.main, ["--dataset=stl10", "--size=96", f"--data-dir={tmp_path}"])
    assert line == f"{tmp_path}/stl10_binary/train_y.bin: 2 labels of 3 images; delete it and run again"


def test_stl10_file_cut_amid_an_image(tmp_path):
    stl10_files(tmp_path)
    os.truncate(tmp_path / "stl10_binary/test_X.bin", 2 * IMAGE_BYTES + 5)
    line = told_line(simple.main, ["--dataset=stl10", "--size=96", f"--data-dir={tmp_path}", *TINY[1:]])
    assert line.startswith(
        f"{tmp_path}/stl10_binary/test_X.bin: 55,301 bytes is not a whole number of images"
    )


@pytest.mark.parametrize("other", ["shape", "type", "archive"])
def test_cache_that_is_not_what_its_name_says(tmp_path, other):
    path = tmp_path / "cache.npy"
    if other == "archive":
        with path.open("wb") as file:
            np.savez(file, random_images(3, 8, 8, 3))
    else:
        np.save(path, np.zeros((3, 9, 8, 3), np.uint8) if other == "shape" else np.zeros((3, 8, 8, 3)))
    line = told_line(load_data._open_cache, path, (3, 8, 8, 3))
    assert line.startswith(f"{path}: ")
    assert line.endswith("delete it and run again")


def test_cache_of_another_version_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    iio.imwrite(tmp_path / "mine/a.png", random_images(40, 120, 3))
    arguments = str(tmp_path / "mine"), tmp_path / "data", 16
    expected = np.array(load_data.load_data(*arguments).images["train"])
    others = []
    for path in (tmp_path / "data/cache").iterdir():
        others.append(path.with_name(path.name.replace(f"_v{load_data.PATCHES_VERSION}", "_v999")))
        path.unlink()
        others[-1].write_bytes(b"of a later version")
    np.testing.assert_array_equal(load_data.load_data(*arguments).images["train"], expected)
    assert {path.read_bytes() for path in others} == {b"of a later version"}


@pytest.fixture
def cifar10(server, monkeypatch):
    """The local server has a small CIFAR-10, and the scripts think it the official one."""
    files = {}
    for index, name in enumerate(load_data.CIFAR10_FILE_MD5):
        images = random_images(12, 8, 8, 3, seed=index).repeat(4, axis=1).repeat(4, axis=2)
        files[name] = cifar_pickle(images, [n % 10 for n in range(12)])
    with tempfile.TemporaryDirectory() as folder:
        archive_of(Path(folder) / "a.tar.gz", files.items())
        server.content = (Path(folder) / "a.tar.gz").read_bytes()
    assert len(server.content) < min(map(len, files.values()))
    monkeypatch.setattr(load_data, "CIFAR10_URL", server.url)
    monkeypatch.setattr(load_data, "CIFAR10_ARCHIVE_MD5", hashlib.md5(server.content).hexdigest())
    checksums = {name: hashlib.md5(raw).hexdigest() for name, raw in files.items()}
    monkeypatch.setattr(load_data, "CIFAR10_FILE_MD5", checksums)
    monkeypatch.setattr(stl10_input.time, "sleep", lambda seconds: None)
    return server


def prepare(tmp_path):
    load_data.main(["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        (["html"], "the server sent a web page instead of the file"),
        ([404], "HTTP Error 404"),
        ([503] * 5, "HTTP Error 503"),
        (["wrong"], "its MD5 is "),
    ],
)
def test_download_that_fails_says_what_to_do_and_succeeds_later(cifar10, tmp_path, faults, told):
    cifar10.faults = list(faults)
    line = told_line(prepare, tmp_path)
    assert line.startswith(f"{cifar10.url}: {told}")
    assert line.endswith(f"download it by other means and put it at {tmp_path}/data/file.tar.gz")
    assert list((tmp_path / "data").iterdir()) == []
    prepare(tmp_path)
    assert (tmp_path / "figures/data_cifar10.png").exists()


def test_download_over_a_bad_line(cifar10, tmp_path, capsys):
    cifar10.faults = ["drop", 500, "drop"]
    prepare(tmp_path)
    assert cifar10.sent == len(cifar10.content)
    assert "trying again" in capsys.readouterr().out


def test_missing_batch_is_taken_from_the_archive_or_downloaded(cifar10, tmp_path):
    prepare(tmp_path)
    batch = tmp_path / "data/cifar-10-batches-py/data_batch_3"
    raw = batch.read_bytes()
    for archive_is_there in (True, False):
        batch.unlink()
        if not archive_is_there:
            (tmp_path / "data/file.tar.gz").unlink()
        prepare(tmp_path)
        assert batch.read_bytes() == raw
    assert cifar10.sent == 2 * len(cifar10.content)


def test_batch_that_is_damaged_or_hostile(cifar10, tmp_path):
    prepare(tmp_path)
    batch = tmp_path / "data/cifar-10-batches-py/test_batch"
    batch.write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    assert told_line(prepare, tmp_path) == f"{batch}: wrong MD5; delete it and run again to download it"


def test_full_disk_amid_a_download_and_amid_the_extraction(cifar10, tmp_path):
    for size in (len(cifar10.content) // 2, len(cifar10.content) + 1):
        with largest_file(size):
            line = told_line(prepare, tmp_path)
        assert line == f"{tmp_path}/data: File too large; free some space and run again"
        assert not (tmp_path / "data/cifar-10-batches-py").exists()
        assert not list((tmp_path / "data").glob(".extracting*"))
    prepare(tmp_path)
    assert cifar10.sent < 1.6 * len(cifar10.content)  # it went on where it stopped


@pytest.mark.parametrize("folder", ["data", "data/inside"])
def test_data_folder_that_is_a_file(tmp_path, folder):
    (tmp_path / "data").write_text("")
    (tmp_path / "mine").mkdir()
    iio.imwrite(tmp_path / "mine/a.png", random_images(40, 400, 3))
    for script in (simple, load_data):
        arguments = [f"--data-dir={tmp_path}/{folder}", f"--out={tmp_path}/out"]
        line = told_line(script.main, arguments)
        assert line.startswith(f"{tmp_path}/{folder}: cannot be the data folder (")
        assert line.endswith("choose another --data-dir")
        line = told_line(script.main, [*arguments, f"--dataset={tmp_path}/mine", "--size=16"])
        assert line.endswith("a file is in the place of a folder: choose another folder")


FETCH = """
import sys, stl10_input
url, md5, name, checksum, folder = sys.argv[1:]
stl10_input.download_and_extract(folder, url, md5, {name: checksum})
"""


def test_killed_download_transfers_only_the_rest(server, tmp_path):
    archive_of(tmp_path / "a.tar.gz", [("set/a.bin", CONTENT)])
    server.content = (tmp_path / "a.tar.gz").read_bytes()
    checksums = [hashlib.md5(raw).hexdigest() for raw in (server.content, CONTENT)]
    arguments = [server.url, checksums[0], "set/a.bin", checksums[1], tmp_path / "data"]
    command = [sys.executable, "-c", FETCH, *map(str, arguments)]
    server.faults = ["stall"]
    half = len(server.content) // 2
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        part = tmp_path / "data/file.tar.gz.part"
        until(lambda: part.exists() and part.stat().st_size >= half // 2**20 * 2**20)
        process.kill()
    kept = part.stat().st_size
    assert 0 < kept <= half
    assert not (tmp_path / "data/set").exists()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert server.asked == [0, kept]
    assert server.sent == half + len(server.content) - kept
    assert (tmp_path / "data/set/a.bin").read_bytes() == CONTENT


def until(condition, seconds=60):
    """Wait for something."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def stl10_script(server, folder):
    """Start stl10_input.py with the local server in the place of the official one."""
    environment = os.environ | {"http_proxy": server.url.rsplit("/", 1)[0], "PYTHONUNBUFFERED": "1"}
    return start("stl10_input.py", "--data-dir", folder, env=environment)


@pytest.mark.parametrize(
    ("fault", "told"),
    [("html", "a web page instead of the file"), (404, "HTTP Error 404"), (None, "its MD5 is ")],
)
def test_stl10_script_tells_a_failed_download_in_one_line(server, tmp_path, fault, told):
    server.faults = [fault]
    process = stl10_script(server, tmp_path)
    printed, err = process.communicate()
    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    assert err.startswith(f"{stl10_input.DATA_URL}: ")
    assert told in err
    assert f"put it at {tmp_path}/stl10_binary.tar.gz" in err
    assert "\r" not in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["Ctrl-C", "closed output"])
def test_stl10_script_keeps_what_it_has(server, tmp_path, ending):
    server.faults = ["stall"]
    process = stl10_script(server, tmp_path)
    part = tmp_path / "stl10_binary.tar.gz.part"
    if ending == "Ctrl-C":
        until(lambda: part.exists() and part.stat().st_size)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
        assert (process.returncode, err.strip()) == (130, "Stopped; run again to go on where it stopped.")
        assert part.stat().st_size
    else:
        process.stdout.close()
        assert (process.wait(), process.stderr.read()) == (1, "")


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (stack, ["--greedy-epochs=0"]),
        (stack, ["--base=a/b"]),
        (stack, ["--sigma", "50", "5"]),
        (stack, ["denoise"]),
        (stack, ["evaluate", "--images=-1"]),
        (KNN, ["--clusters=1"]),
        (KNN, ["--pooling=-1"]),
        (KNN, ["--sigmas", "-5"]),
        (KNN, ["--sigmas", "nan"]),
        (KNN, ["--encoders", "a/b"]),
        (KNN, ["--encoders"]),
        (KNN, ["--name="]),
        (KNN, ["--unknown"]),
        (load_data, ["--energy=1"]),
        (load_data, ["--energy=nan"]),
        (load_data, ["--size=0"]),
        (load_data, ["unknown"]),
        (stl10_input, ["--save-images=-1"]),
        (stl10_input, ["--save-images=x"]),
        (stl10_input, ["--unknown"]),
    ],
)
def test_wrong_usage_of_any_script(script, arguments, capsys):
    parse = (
        script.parse_args
        if script is not stack
        else lambda argv: simple.parse_args(argv, "stacked", stack.__doc__, stack.add_stack_options)
    )
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "error: " in told.splitlines()[-1]
    assert "Traceback" not in told


def test_limit_larger_than_the_set(tmp_path):
    line = told_line(simple.main, ["--dataset=photos", "--limit=1000000", f"--out={tmp_path}"])
    assert line.startswith("photos: --limit 1000000 is more than its ")
    assert line.endswith("training images; lower it")
    assert list(tmp_path.iterdir()) == []


def test_output_that_nobody_reads_any_more():
    process = start("load_data.py", "--dataset=photos", "--out=/nonexistent")
    process.stdout.close()
    err = without_greeting(process.stderr.read())
    assert (process.wait(), err) == (1, "")


def test_output_without_a_terminal_is_plain_lines(trained):
    printed = trained[1]
    assert "\r" not in printed
    assert "\b" not in printed
    assert "\x1b" not in printed


def test_names_that_are_no_ascii_in_an_ascii_locale(tmp_path):
    pictures = tmp_path / "Urlaub ä"
    for index, name in enumerate((b"\xe4", "ö".encode(), b"\xff\xfe")):  # of other times and systems
        folder = os.path.join(os.fsencode(pictures), name)
        os.makedirs(folder)
        picture = iio.imwrite("<bytes>", random_images(60, 200, 3, seed=index), extension=".png")
        for kind, content in ((b"good", picture), (b"damaged", b"no picture")):
            with open(os.path.join(folder, kind + name + b".png"), "wb") as file:
                file.write(content)
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = ["--dataset", pictures, "--size=16", "--data-dir", tmp_path / "data", "--out", tmp_path]
    process = start("load_data.py", *arguments, env=environment, cwd="/", errors="replace")
    printed, err = process.communicate()
    assert (process.returncode, without_greeting(err)) == (0, "")
    assert printed.count("left out, not a readable image") == 3
    assert len(list((tmp_path / "figures").iterdir())) == 1


def test_record_of_a_folder_whose_name_is_no_unicode(tmp_path):
    dataset = os.fsdecode(b"/pictures/\xe4")
    with util.staged(tmp_path, "run") as stage:
        util.write_record(stage, "run", {"arguments": {"dataset": dataset}})
    assert util.read_record(tmp_path, "run")["arguments"]["dataset"] == dataset


CLOSED = """
import sys, util
sys.stdout = None  # what Python makes of a closed one
util.run_script(lambda: print(util.progress_verbosity()))
"""


def test_closed_output():
    environment = os.environ | {"KERAS_BACKEND": "numpy"}
    subprocess.run([sys.executable, "-c", CLOSED], cwd=ROOT, env=environment, check=True)


def test_interrupt_amid_the_imports():
    command = [sys.executable, "-X", "importtime", str(ROOT / "KNN.py")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while "keras" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        err = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode == 130
    assert without_greeting("".join(err)) == "\nStopped."


def test_record_of_another_shape(trained, tmp_path):
    out = shutil.copytree(trained[0], tmp_path / "out")
    record = json.loads((out / f"logs/{NAME}.json").read_text())
    for part in ("files", "data", "arguments", "evaluation", "costs", "posterior"):
        (out / f"logs/{NAME}.json").write_text(json.dumps(record | {part: [1]}))
        line = told_line(simple.main, ["evaluate", "--dataset=photos", "--out", str(out)])
        assert line.startswith(
            f"{out}/logs/{NAME}.json: damaged run record; delete it, or train {NAME} again"
        )
