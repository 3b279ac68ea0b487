"""Feed thousands of damaged files to all that reads files; tell what is neither read nor refused.

    KERAS_BACKEND=numpy python tests/fuzz_readers.py SEED [SHARE]

Runs in a process of its own, so that a crash is seen, and on Keras's numpy backend, which starts fast. Prints
how many files of each kind were read and refused; SHARE, by default 1, is that of the full counts. What a
reader may raise is DataError, ModelError or another OSError; anything else, and more than a minute
for a file, ends in a traceback.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import resource
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import KNN
import load_data
import stl10_input
import util

import keras
import numpy as np
from PIL import Image

SECONDS = 60


def damage(raw, rng):
    """The bytes cut short, or with some cut out, put in, zeroed as on a bad disk, or with flipped bits."""
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 5)):
        place, length = (int(rng.integers(0, most)) for most in (len(raw) + 1, 9))
        kind = rng.integers(0, 6)
        if kind == 0:
            del raw[place:]
        elif kind == 1:
            del raw[place : place + length]
        elif kind == 2:
            raw[place:place] = rng.bytes(length)
        elif kind == 3:
            raw[place : place + length] = bytes(length)
        elif place < len(raw):
            raw[place] ^= 1 << int(rng.integers(0, 8))
    return bytes(raw)


def put(path, raw):
    """Write a file anew: HDF5 may still hold the one of this name that it has refused."""
    with util.atomic(path) as temporary:
        temporary.write_bytes(raw)


def stl10_seeds(rng):
    image = rng.bytes(2 * stl10_input.IMAGE_BYTES)
    return [(image, stl10_input.read_all_images), (b"\x01\x05\x0a" * 20, stl10_input.read_labels)]


def small_model():
    image = keras.Input((None, None, 3))
    hidden = keras.layers.Dense(4, activation="relu")(image)
    return keras.Model(image, [keras.layers.Dense(5)(hidden), keras.layers.Dense(5)(hidden)])


def model_seeds(out):
    """A saved model without a record, whose checksums would refuse everything at once; and its files."""
    with util.publishing(out, "run") as draft:
        util.save_model(draft, small_model(), "encoder_run")
    architecture, weights = out / "models/encoder_run.json", out / "weights/encoder_run.weights.h5"

    def read(path):
        target = architecture if path.suffix == ".json" else weights
        before = target.read_bytes()
        put(target, path.read_bytes())
        try:
            util.load_model(out, "run", "encoder")
        finally:
            put(target, before)

    return [(architecture.read_bytes(), read)], [(weights.read_bytes(), read)]


def record_seeds(out):
    content = {"name": "run", "files": {"models/encoder_run.json": "0"}, "data": {}, "arguments": {"size": 1}}
    (out / "logs/damaged.training").mkdir(parents=True)

    def read_record(path):
        (out / "logs/damaged.json").write_bytes(path.read_bytes())
        util.read_record(out, "damaged")

    def read_arguments(path):
        (out / "logs/damaged.training/arguments.json").write_bytes(path.read_bytes())
        util.resumed_arguments(argparse.Namespace(out=out, name="damaged"))

    return [(json.dumps(content).encode(), read) for read in (read_record, read_arguments)]


def feature_map_seeds(out):
    arguments = out, "run", "test", np.zeros((4, 6, 6, 3), np.uint8), np.arange(4)
    whole = KNN.feature_maps(*arguments)
    (path,) = out.glob("feature_maps/*.h5")

    def read(damaged):
        put(path, damaged.read_bytes())
        for _ in range(2):  # made again, and read
            if not np.array_equal(KNN.feature_maps(*arguments), whole):
                raise AssertionError("damaged feature maps were taken for good ones")

    return [(path.read_bytes(), read)]


def checkpoint_seeds(out):
    checkpoint = util.Checkpoint(out / "logs/run.training", "val_psnr")
    checkpoint.set_model(small_model())
    checkpoint.on_epoch_begin(0)
    checkpoint.on_epoch_end(0, {"val_psnr": 1.0})

    def read(path):
        damaged = util.Checkpoint(out / "logs/run.training", "val_psnr")
        damaged.path = path
        damaged.set_model(small_model())
        damaged.restore()
        if damaged.rows and util.best_row(damaged.rows, "val_psnr")["val_psnr"] is None:
            raise AssertionError("a damaged history was taken for a good one")

    return [(checkpoint.path.read_bytes(), read)]


def picture_seeds(rng):
    """Pictures, read as those of a folder are: what cannot be read is left out."""

    def read(path):
        picture = load_data._readable_picture(path)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise AssertionError(f"read as {picture.dtype} {picture.shape}")
        if not picture.size:
            raise load_data.DataError("left out")

    image = Image.fromarray(rng.integers(0, 256, (12, 17, 3), np.uint8))
    for kind in load_data.FORMATS:
        file = io.BytesIO()
        image.save(file, kind)
        yield file.getvalue(), read


def fuzz(kind, seeds, count, rng, folder):
    """Read `count` damaged files of a kind, the undamaged ones first."""
    read = refused = 0
    seeds = list(seeds)
    path = folder / f"damaged{'.json' if kind == 'JSON' else '.weights.h5' if 'HDF5' in kind else ''}"
    for index in range(max(count, len(seeds))):
        raw, reader = seeds[index % len(seeds)]
        put(path, raw if index < len(seeds) else damage(raw, rng))
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                reader(path)
            read += 1
        except (OSError, MemoryError):
            refused += 1
        except Exception as error:
            error.add_note(f"{kind}, case {index}")
            raise
    faulthandler.cancel_dump_traceback_later()
    print(f"{kind}: {read} read, {refused} refused", flush=True)


def main(seed, share=1.0):
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        architectures, weights = model_seeds(out)
        kinds = {
            "STL-10": (stl10_seeds(rng), 1000),
            "JSON": (architectures, 600),
            "records": (record_seeds(out), 1000),
            "HDF5 weights": (weights, 400),
            "HDF5 feature maps": (feature_map_seeds(out), 300),
            "HDF5 checkpoint": (checkpoint_seeds(out), 300),
            "pictures": (picture_seeds(rng), 2000),
        }
        for kind, (seeds, count) in kinds.items():
            fuzz(kind, seeds, round(count * share), rng, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), *map(float, sys.argv[2:]))
