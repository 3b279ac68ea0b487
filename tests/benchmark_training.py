"""Measure what feeding costs: speed of `fit` against the bare training step, memory on a set larger than it.

    python tests/benchmark_training.py

Prints steps per second of the default model on CIFAR-10-sized images, fed by `Batches` with noise drawn on
the fly, and of the bare step, without noise, on a constant batch; then the resident memory while it trains on
a file the size of STL-10's unlabelled split (2.76 GB, made in a temporary folder, sparse on disk).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import simple_autoencoder as simple
import stl10_input
import util
from load_data import Batches

import keras
import numpy as np

STEPS = 240
ROUNDS = 3
STL10_IMAGES = 100_000
STL10_STEPS = 240


class BareVAE(simple.DenoisingVAE):
    def noisy(self, images):
        return images[0]


class SomeBatches(Batches):
    """The first STL10_STEPS batches of an epoch, from all over the file."""

    def __len__(self):
        return STL10_STEPS


def build(kind):
    keras.config.set_dtype_policy(util.fast_precision())
    encoder, decoder = simple.build_encoder(), simple.build_decoder()
    simple.start_as_identity(encoder, decoder)
    vae = kind(encoder, decoder)
    vae.compile(optimizer=simple.build_optimizer(simple.LEARNING_RATE, 10 * STEPS))
    return vae


def speed():
    """Best of several rounds each, taken in turns, since other work on the machine comes and goes."""
    images = np.random.default_rng(0).integers(0, 256, (STEPS * simple.BATCH_SIZE, 32, 32, 3), np.uint8)
    batches = Batches(images, simple.BATCH_SIZE)
    constant = keras.tree.map_structure(keras.ops.convert_to_tensor, batches[0])
    bare, fed = build(BareVAE), build(simple.DenoisingVAE)
    seconds = {"bare": [], "fit": []}
    for _ in range(1 + ROUNDS):  # the first one compiles
        started = time.perf_counter()
        for _ in range(STEPS):
            bare.train_on_batch(*constant)
        seconds["bare"].append(time.perf_counter() - started)
        started = time.perf_counter()
        fed.fit(batches, epochs=1, shuffle=False, verbose=0)
        seconds["fit"].append(time.perf_counter() - started)
    rates = {kind: STEPS / min(times[1:]) for kind, times in seconds.items()}
    print(f"bare step: {rates['bare']:.2f} steps/s; fit: {rates['fit']:.2f} steps/s", end="; ")
    print(f"ratio {rates['fit'] / rates['bare']:.1%} (best of {ROUNDS} rounds of {STEPS} steps)")


def resident():
    """Resident memory of this process in GB, now and at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    return [int(status[key].split()[0]) / 1e6 for key in ("VmRSS", "VmHWM")]


class Memory(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch % 80 == 79:
            print(
                "  after {:3d} steps: {:.2f} GB resident, {:.2f} GB at the peak".format(
                    batch + 1, *resident()
                )
            )


def memory(path):
    images = stl10_input.read_all_images(path)
    print(f"{len(images):,} images of {images.shape[1:]}, {images.nbytes / 1e9:.2f} GB on disk")
    build(simple.DenoisingVAE).fit(
        SomeBatches(images, simple.BATCH_SIZE), epochs=1, shuffle=False, verbose=0, callbacks=[Memory()]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="?", help="measure memory alone, on this file in STL-10's format")
    path = parser.parse_args().images
    if path:
        memory(path)
        return
    speed()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unlabeled_X.bin"
        rng = np.random.default_rng(0)
        with path.open("wb") as file:
            file.truncate(STL10_IMAGES * stl10_input.IMAGE_BYTES)
            for index in range(0, STL10_IMAGES, 100):  # every hundredth image takes room on disk
                file.seek(index * stl10_input.IMAGE_BYTES)
                file.write(rng.bytes(stl10_input.IMAGE_BYTES))
        subprocess.run([sys.executable, __file__, str(path)], check=True)  # memory of a process of its own


if __name__ == "__main__":
    main()
