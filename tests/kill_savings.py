"""Kill a process that saves runs and checkpoints, at random moments; see what is left.

    KERAS_BACKEND=numpy python tests/kill_savings.py SEED KILLS

On Keras's numpy backend, whose processes can be forked after the imports, so that a kill costs milliseconds.
After every kill a run must be whole, or be refused until it is saved again; nothing may be older than before.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import util

import keras
import numpy as np

PARTS = ("encoder", "autoencoder")


def model_of(version, part="encoder"):
    """A model with the shapes of a part of a run, all of whose weights are `version`."""
    image = keras.Input((None, None, 3))
    hidden = keras.layers.Dense(100)(image)
    code = [keras.layers.Dense(16)(hidden), keras.layers.Dense(16)(hidden)]
    model = keras.Model(image, code if part == "encoder" else keras.layers.Dense(3)(hidden))
    model.set_weights([np.full_like(weight, version) for weight in model.get_weights()])
    return model


def only(model):
    """The version that all weights of a model are of."""
    (value,) = np.unique(np.concatenate([weight.ravel() for weight in model.get_weights()]))
    return value


def save(out, version):
    """Save a run and an epoch's checkpoint."""
    with util.publishing(out, "run") as draft:
        for part in PARTS:
            util.save_model(draft, model_of(version, part), f"{part}_run")
        util.write_record(draft, "run", {"version": version})
    checkpoint = util.Checkpoint(out / "logs/run.training", "val_psnr")
    checkpoint.set_model(model_of(0))
    epoch = checkpoint.restore()
    checkpoint.set_model(model_of(epoch + 1))
    checkpoint.on_epoch_begin(epoch)
    checkpoint.on_epoch_end(epoch, {"val_psnr": float(epoch)})


def check(out):
    """Check all that there is: version of the run, saved again where its files are refused, and epochs."""
    checkpoint = util.Checkpoint(out / "logs/run.training", "val_psnr")
    checkpoint.set_model(model_of(0))
    epochs = checkpoint.restore()
    assert only(checkpoint.model) == epochs
    checkpoint.load(checkpoint.best_path)
    assert only(checkpoint.model) in (epochs, epochs + 1)
    version = util.read_record(out, "run")["version"]
    try:
        models = [util.load_model(out, "run", part) for part in PARTS]
    except util.ModelError as error:
        assert "SHA-256 differs" in str(error)
        save(out, version + 1)
        return check(out)
    assert [only(model) for model in models] == [version] * 2
    return version, epochs


def slow_move(source, target):
    time.sleep(0.01)
    os.replace(source, target)


def main(seed, kills):
    rng, amid = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as temporary:
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
            amid += any(out.rglob(".*"))
            for left in out.rglob(".unfinished-*"):
                left.unlink()
            found, reached = check(out)
            assert found >= version and reached >= epochs
            version, epochs = found, reached
    print(f"{amid} of {kills} kills amid a save; {version} saves, {epochs} epochs")


if __name__ == "__main__":
    # as slow as to another disk, so that some kills come between two files
    with mock.patch("shutil.move", slow_move):
        main(*map(int, sys.argv[1:]))
