"""Load every shipped model in other versions of Keras, and compare its output with that of this environment.

    python tests/check_keras_versions.py [VERSION ...]

By hand, since it installs each version with pip, beside the newest TensorFlow that goes with it, into a fresh
virtual environment, which it deletes again: 2 GB of disk and one to two minutes each. Prints a line for each
model and version; exit code 1 if a model does not load there or its output differs by more than 1e-5 of the
largest value. Keras 3.5 needs Python 3.12 or older.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import keras
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("autoencoder", "encoder", "decoder")
AUTOENCODERS = ("simple_cifar10", "stacked_cifar10", "stacked_photographs")
NAMES = [f"{part}_{run}" for run in AUTOENCODERS for part in PARTS] + ["classifier_cifar10"]
TOLERANCE = 1e-5


def output(name):
    """All outputs of a model, in one vector, for seeded input of 32x32, for codes of level two 16x16."""
    model = keras.models.model_from_json((ROOT / f"models/{name}.json").read_text(encoding="utf-8"))
    model.load_weights(str(ROOT / f"weights/{name}.weights.h5"))
    random = np.random.default_rng(0)
    sizes = [16 if code.name.endswith("2") else 32 for code in model.inputs]
    inputs = [
        random.random((2, size, size, code.shape[-1]), np.float32)
        for size, code in zip(sizes, model.inputs, strict=True)
    ]
    outputs = keras.tree.flatten(model(inputs if len(inputs) > 1 else inputs[0], training=False))
    return np.concatenate([np.ravel(keras.ops.convert_to_numpy(each)) for each in outputs])


def compare(path):
    """Compare with the outputs that another environment has written; return whether all agree."""
    here = f"keras {keras.__version__}, tensorflow {importlib.metadata.version('tensorflow')}"
    agree = True
    with np.load(path) as expected:
        for name in NAMES:
            try:
                difference = np.abs(output(name) - expected[name]).max() / np.abs(expected[name]).max()
                fits, told = difference <= TOLERANCE, f"differs by {difference:.1e}"
            except Exception as error:  # whatever this version stumbles over
                fits, told = False, str(error).strip().splitlines()[-1][-200:]
            print(f"{here}: {name}: {'ok' if fits else 'FAILED'}, {told}", flush=True)
            agree &= bool(fits)
    return agree


def check(version, path):
    """Compare in a fresh virtual environment; return whether all agree."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / ("Scripts" if os.name == "nt" else "bin") / "python"
        install = [python, "-m", "pip", "install", "--quiet", f"keras=={version}", "tensorflow"]
        if subprocess.run(install).returncode:
            print(f"keras {version}: FAILED, cannot be installed", flush=True)
            return False
        environment = os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [python, __file__, "--compare", path]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
        return done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", default=["3.5.0", "3.12.0"], help="default: 3.5.0 3.12.0")
    parser.add_argument("--compare", help=argparse.SUPPRESS)  # what runs in the fresh environments
    args = parser.parse_args()
    if args.compare:
        return not compare(args.compare)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "expected.npz"
        np.savez(path, **{name: output(name) for name in NAMES})
        failed = [version for version in args.versions if not check(version, path)]
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
