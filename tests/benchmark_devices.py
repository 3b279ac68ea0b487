"""Measure what a second process brings, and what share of a training step goes to communication.

    python tests/benchmark_devices.py                  # 32x32, the simple model; Linux, two cores at least
    python tests/benchmark_devices.py 48 stacked

Prints seconds a step and images a second of `util.fit` with 16 images on each device, for one process, for
two that know nothing of each other, and for two that train together by gloo; each process has a core of its
own. What two that train together take longer than two that do not is communication, waiting included. The
machine should be idle.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}
import benchmark_common as common
import simple_autoencoder as simple
import util
from load_data import Batches

import keras
import numpy as np

IMAGES = simple.BATCH_SIZE  # on each device
STEPS = 10
ROUNDS = 8


class Stopwatch(keras.callbacks.Callback):
    """Seconds of the training steps of each epoch."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_test_begin(self, logs=None):  # when the metrics of all steps have been computed
        self.seconds.append((time.perf_counter() - self.started) / STEPS)


def step(side, kind, core):
    """Train in this process, on one core; the fastest round counts, since other work comes and goes."""
    os.sched_setaffinity(0, {core})
    util.join_processes()
    images = IMAGES * util.processes()[1]
    clean = np.random.default_rng(0).integers(0, 256, (STEPS * images, side, side, 3), np.uint8)
    vae = simple.DenoisingVAE(*common.untrained(kind))
    vae.compile(optimizer=simple.build_optimizer(simple.LEARNING_RATE, 10**6))
    few = util.to_float(clean[: util.processes()[1]])
    vae(few[:1])
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        batches = Batches(clean, images)
        util.fit(vae, batches, (few, few), 1 + ROUNDS, Path(folder), "val_psnr", [watch])
    gradient = 4 * sum(int(np.prod(weight.shape)) for weight in vae.trainable_variables)  # bytes
    print(json.dumps({"step": min(watch.seconds[1:]), "gradient": gradient}))  # the first one compiles


def measured(side, kind, count, joined):
    """What `step` prints in the first of some processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    cores, started = sorted(os.sched_getaffinity(0)), []
    for number in range(count):
        joining = {"JOB_ADDRESSES": address, "NUM_PROCESSES": count, "PROCESS_ID": number} if joined else {}
        environment = os.environ | {f"KERAS_DISTRIBUTION_{key}": str(value) for key, value in joining.items()}
        command = [sys.executable, __file__, str(side), kind, str(cores[number])]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate()[0] for process in started]
    return json.loads(printed[0].splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", type=int, nargs="?", default=32, help="of an image in pixels (default: 32)")
    parser.add_argument("kind", nargs="?", default="simple", choices=("simple", "stacked"), help="of model")
    parser.add_argument("core", type=int, nargs="?", help="measure this process alone, on this core")
    side, kind, core = vars(parser.parse_args()).values()
    if core is not None:
        step(side, kind, core)
        return
    setups = {"1 process": (1, False), "2 processes apart": (2, False), "2 processes": (2, True)}
    results = {label: measured(side, kind, *setup) for label, setup in setups.items()}
    gradient = results["1 process"]["gradient"] / 1e6
    rows = []
    for label, (count, _) in setups.items():
        seconds = results[label]["step"]
        rows.append({"": label, "s/step": seconds, "images/s": count * IMAGES / seconds})
    common.print_table(f"{kind} model, {side}x{side}, gradient of {gradient:.1f} MB", rows)
    share = 1 - results["2 processes apart"]["step"] / results["2 processes"]["step"]
    print(f"communication: {share:.1%} of the step of 2 processes")


if __name__ == "__main__":
    main()
