"""One machine trains on all its devices, several processes together: the weights are those of one device."""

import os
import shlex
import signal
import socket
import subprocess
import sys

import load_data
import util

import h5py
import keras
import numpy as np
import pytest
from conftest import (
    FULL,
    NAME,
    ROOT,
    SMALL,
    TINY,
    random_images,
    save_run,
    told_line,
    until,
    without_greeting,
)

# starts a script, shrunk, on a machine that has no TensorFlow; what is measured after the training is left
# out, the checkpoint is kept, and with GATE set, epoch EPOCH waits while the file of that name is there
DEVICE = f"""
import importlib, os, shutil, sys, time
from pathlib import Path
sys.modules["tensorflow"] = None
sys.path.insert(0, {str(ROOT / "tests")!r})
import conftest, util
import keras, simple_autoencoder as simple

def write_run(args, models, *parts):
    with util.publishing(args.out, args.name) as draft:
        util.save_model(draft, models.popitem()[1], f"autoencoder_{{args.name}}")
        shutil.copytree(util.training_folder(args.out, args.name), args.out / "kept")

def go_to(batches, epoch):
    batches_go_to(batches, epoch)
    if epoch == int(os.environ.get("EPOCH", 1)) and "GATE" in os.environ:
        gate = Path(os.environ["GATE"])
        gate.touch()
        while gate.exists():
            time.sleep(0.01)

conftest.shrink(setattr)
simple.build_optimizer = lambda rate, steps: keras.optimizers.Adam(rate)
simple.write_run, batches_go_to, simple.Batches.go_to = write_run, simple.Batches.go_to, go_to
util.run_script(importlib.import_module(sys.argv.pop(1)).main)
"""
TRAIN = [*TINY, "--detail-epochs=0", "--epochs=2"]
CHECKPOINT = "kept/z/checkpoint.weights.h5"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Folder of what JAX has compiled, which most of the time would go to."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def start(cache):
    """Function that starts one process of a training; all that are left are killed at the end."""
    started = []

    def start(out, *options, devices=1, code=DEVICE, script="simple_autoencoder", **environment):
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        environment |= {"KERAS_BACKEND": "jax", "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}
        environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0}
        command = [sys.executable, "-c", code, script, *options, "--out", out]
        out.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | {key: str(value) for key, value in environment.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def start_two(start):
    """Function that starts two processes of one training, each with an output folder of its own."""

    def start_two(folder, *options, gates=(None, None), own=((), ()), **others):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        processes = []
        for number, gate in enumerate(gates):
            joining = {"JOB_ADDRESSES": address, "NUM_PROCESSES": 2, "PROCESS_ID": number}
            environment = {f"KERAS_DISTRIBUTION_{key}": value for key, value in joining.items()}
            environment |= {"GATE": gate} if gate else {}
            out = folder / str(number)
            processes.append(start(out, *options, *own[number], **environment, **others))
        return processes

    return start_two


def ended(process, seconds=600):
    """Exit code, stdout and the lines of stderr of a process that ends within some seconds."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, without_greeting(err).strip().splitlines()


def at_gate(gate, *processes):
    """Wait until a process is at the gate."""
    until(lambda: gate.exists() or any(process.poll() is not None for process in processes), 600)
    assert gate.exists(), [process.communicate() for process in processes if process.poll() is not None]


def arrays_of(path):
    """All arrays of an HDF5 file of weights by name, the history of a checkpoint aside."""
    arrays = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: arrays.update({name: item[()]} if "/vars/" in name else {}))
    return arrays


def assert_same_arrays(path, other):
    """Check that two checkpoints hold the same weights and the same state of the optimizer, to 1e-6."""
    ours, theirs = arrays_of(path), arrays_of(other)
    assert ours.keys() == theirs.keys()
    assert any("optimizer" in name for name in ours)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def one(start, tmp_path_factory):
    """Output folder of a training on one device."""
    out = tmp_path_factory.mktemp("one")
    assert ended(start(out, *TRAIN))[0] == 0
    return out


@pytest.fixture(scope="module")
def two(start_two, tmp_path_factory):
    """Folder of a training by two processes, and how they ended."""
    folder = tmp_path_factory.mktemp("two")
    return folder, [ended(process) for process in start_two(folder, *TRAIN)]


def test_devices_train_together(start, one, tmp_path):
    code, printed, _ = ended(start(tmp_path, *TRAIN, devices=2))
    assert code == 0
    assert "Training on 2 devices, 8 images of a batch on each." in printed
    assert_same_arrays(tmp_path / CHECKPOINT, one / CHECKPOINT)


def test_devices_that_cannot_share_a_batch_are_refused(start, tmp_path):
    check_refused([start(tmp_path, *TRAIN, devices=3)], "--batch-size 16: not a multiple of the 3 devices")


def test_two_processes_train_what_one_trains_and_the_first_alone_writes_and_prints(two, one):
    folder, (first, second) = two
    assert (first[0], *second) == (0, 0, "", [])
    assert_same_arrays(folder / "0" / CHECKPOINT, one / CHECKPOINT)
    assert "Epoch 2/2" in first[1]
    assert not list((folder / "1").iterdir())


def test_killed_follower_ends_the_first_and_resume_goes_on(start_two, two, tmp_path):
    gate = tmp_path / "gate"
    first, second = start_two(tmp_path, *TRAIN, gates=(None, gate))
    at_gate(gate, first, second)
    second.kill()
    code, _, told = ended(first, 10)
    assert (code, len(told)) == (1, 1)
    assert told[0].startswith("another process has ended")
    assert told[0].endswith("--resume")
    second.communicate()
    # the second has no checkpoint, and is told the options
    again = start_two(tmp_path, "--resume", "--name", NAME)
    assert [ended(process)[0] for process in again] == [0, 0]
    assert_same_arrays(tmp_path / "0" / CHECKPOINT, two[0] / "0" / CHECKPOINT)


def test_killed_first_ends_its_follower(start_two, tmp_path):
    gate = tmp_path / "gate"
    first, second = start_two(tmp_path, *TRAIN, gates=(gate, None), EPOCH=0)
    at_gate(gate, first, second)
    first.kill()
    assert ended(second, 10)[0] != 0


def test_sigterm_tells_how_to_resume(start_two, tmp_path):
    gate = tmp_path / "gate"
    first, second = start_two(tmp_path, *TRAIN, gates=(gate, None))
    at_gate(gate, first, second)
    first.send_signal(signal.SIGTERM)
    gate.unlink()
    code, _, told = ended(first, 10)
    assert code == 130
    assert f"--resume --name {NAME} --out {shlex.quote(str(tmp_path / '0'))}" in told[-1]
    assert ended(second, 10)[0] != 0


def check_refused(processes, text):
    """Check that processes end in one line each."""
    for process in processes:
        code, _, lines = ended(process)
        assert (code, len(lines)) == (1, 1)
        assert text in lines[0]


def test_processes_of_other_arguments_are_refused(start_two, tmp_path):
    own = ["--precision=float32"], ["--precision=mixed_bfloat16", "--resume"]
    check_refused(start_two(tmp_path, *TRAIN, own=own), "differ in resume, precision;")


def test_processes_of_other_data_are_refused(start_two, tmp_path):
    own, all_images = [], [option for option in TRAIN if not option.startswith("--limit")]
    for number in range(2):
        folder = tmp_path / str(number) / "holiday"
        folder.mkdir(parents=True)
        for picture in range(10 + 6 * number):
            load_data.write_pixels(folder / f"{picture}.png", random_images(24, 24, 3, seed=picture))
        own.append([f"--dataset={folder}", f"--data-dir={folder.parent}"])
    check_refused(start_two(tmp_path, *all_images, own=own), "differ in data or batch size")


def test_process_that_finds_no_others_is_refused(start, tmp_path):
    check_refused([start(tmp_path, *TRAIN, KERAS_DISTRIBUTION_NUM_PROCESSES=2)], "cannot join")


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX joins")
def test_other_backends_refuse_to_join(monkeypatch):
    monkeypatch.setenv("KERAS_DISTRIBUTION_NUM_PROCESSES", "2")
    assert "KERAS_BACKEND=jax" in told_line(util.join_processes)


@pytest.mark.skipif(not FULL, reason="takes minutes")
@pytest.mark.parametrize(
    ("script", "options"),
    [("simple_autoencoder", ["--epochs=2"]), ("stack_autoencoder", ["--epochs=1", "--base=small"])],
)
def test_all_stages_on_two_devices_of_two_processes(start, start_two, tmp_path, script, options):
    for out in ("one", "0", "1"):
        save_run(tmp_path / out)
    options = [*TINY, *options]
    processes = start_two(tmp_path, *options, script=script, code=SMALL, devices=2)
    processes.append(start(tmp_path / "one", *options, script=script, code=SMALL))
    assert [ended(process)[0] for process in processes] == [0, 0, 0]
    for path in (tmp_path / "one/weights").iterdir():
        ours, theirs = arrays_of(path), arrays_of(tmp_path / "0/weights" / path.name)
        for key in ours:
            np.testing.assert_allclose(ours[key], theirs[key], 1e-3, 1e-4, err_msg=f"{path.name} {key}")
