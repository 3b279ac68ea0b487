"""Kill a process that saves all that the scripts save, at random moments; see what is left.

    KERAS_BACKEND=numpy python tests/kill_savings.py SEED KILLS

On Keras's numpy backend, whose processes can be forked after the imports, so that a kill costs milliseconds.
After every kill whatever has a name must be whole and of one piece, and nothing older than before. Prints how
many kills came in the middle of a save.
"""

import contextlib
import csv
import functools
import io
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import load_data
import util

import h5py
import keras
import numpy as np

UNIT = 1 / 1024
HIDDEN = 100
IMAGES = np.random.default_rng(0).integers(0, 256, (60, 24, 24, 3), np.uint8)
PARTS = ("encoder", "autoencoder")


def model_of(version, part="encoder"):
    """A model with the shapes of a part of a run, all of whose weights are `version` units."""
    image = keras.Input((None, None, 3))
    hidden = keras.layers.Dense(HIDDEN)(image)
    code = [keras.layers.Dense(16)(hidden), keras.layers.Dense(16)(hidden)]
    model = keras.Model(image, code if part == "encoder" else keras.layers.Dense(3)(hidden))
    fill(model, version)
    return model


def fill(model, version):
    model.set_weights([np.full_like(weight, version * UNIT) for weight in model.get_weights()])


def only(model):
    """The version that all weights of a model are of."""
    (value,) = np.unique(np.concatenate([weight.ravel() for weight in model.get_weights()]))
    return value / UNIT


def checkpoint_of(out, model):
    checkpoint = util.Checkpoint(out / "logs/run.training", "val_psnr")
    checkpoint.set_model(model)
    return checkpoint


def save(out, version):
    """Save a run, its feature maps, an epoch's checkpoint and a cache."""
    with util.publishing(out, "run") as draft:
        for part in PARTS:
            util.save_model(draft, model_of(version, part), f"{part}_run")
        util.write_csv(draft / "logs/run.csv", [{"version": version}])
        util.write_record(draft, "run", {"version": version})
    encode = functools.partial(util.encode, util.load_model(out, "run", "encoder"))
    with util.atomic(out / "feature_maps/run_test.h5") as path:
        util.write_feature_maps(path, encode, IMAGES, np.arange(len(IMAGES)), {"version": version})
    checkpoint = checkpoint_of(out, model_of(0))
    epoch = checkpoint.restore()
    fill(checkpoint.model, epoch + 1)
    checkpoint.on_epoch_begin(epoch)
    checkpoint.on_epoch_end(epoch, {"val_psnr": float(epoch)})
    (out / "cache.npy").unlink(missing_ok=True)
    load_data._cached_resize(IMAGES, 12, out / "cache.npy")


def check(out):
    """Check all that there is.

    Returns:
        Version of the run and number of epochs.
    """
    models = [util.load_model(out, "run", part) for part in PARTS]
    version = util.read_record(out, "run")["version"]
    with (out / "logs/run.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert [only(model) for model in models] + [int(row["version"])] == [version] * 3
    path = out / "feature_maps/run_test.h5"
    if path.exists():
        with h5py.File(path) as file:
            features, labels = file["features"][()], file["labels"][()]
            value = int(file.attrs["version"])
        assert value <= version
        hidden = value * UNIT * (IMAGES.sum(axis=3) / 255 + 1)
        expected = value * UNIT * (HIDDEN * hidden + 1)
        assert labels.tolist() == list(range(len(IMAGES)))
        np.testing.assert_allclose(features[..., 0], expected.astype(np.float16), rtol=2e-3)
    checkpoint = checkpoint_of(out, model_of(0))
    epochs = checkpoint.restore()
    if epochs:
        assert only(checkpoint.model) == epochs
        best = model_of(0)
        best.load_weights(checkpoint.best_path)
        assert only(best) in (epochs, epochs + 1)
    if (out / "cache.npy").exists():
        cache = load_data._open_cache(out / "cache.npy", (len(IMAGES), 12, 12, 3))
        np.testing.assert_array_equal(cache, load_data.resize(IMAGES, 12))
    return version, epochs


def main(seed, kills):
    rng = random.Random(seed)
    amid = 0
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        out = Path(temporary)
        save(out, 1)
        started = time.monotonic()
        save(out, 2)
        span = time.monotonic() - started
        version, epochs = check(out)
        for _ in range(kills):
            child = os.fork()
            if not child:
                while True:
                    version += 1
                    save(out, version)
            time.sleep(rng.uniform(0, 2 * span))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            assert status == signal.SIGKILL, "the saving failed before the kill"
            temporaries = [path for path in out.rglob(".*") if not path.name.endswith(".lock")]
            amid += bool(temporaries)
            reached = check(out)
            assert reached >= (version, epochs)
            version, epochs = reached
            for path in temporaries:
                if path.is_file():
                    path.unlink()
    print(f"{amid} of {kills} kills amid a save; {version} saves of the run, {epochs} of the checkpoint")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
