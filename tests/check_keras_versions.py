"""Load every shipped model in other versions of Keras, and compare its output with that of this environment.

    python tests/check_keras_versions.py [VERSION ...]       # by default 3.5.0 and 3.12.0

By hand, since it installs each version with pip, beside the newest TensorFlow that goes with it, into a fresh
virtual environment, which it deletes again: 2 GB of disk and one to two minutes each. Prints a line for each
model and version; exit code 1 if a model does not load there or its output differs by more than 1e-5 of the
largest value. Keras 3.5 needs Python 3.12 or older.
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import keras
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(path.stem for path in ROOT.glob("models/*.json"))
TOLERANCE = 1e-5


def output(name):
    """All outputs of a model, in one vector, for seeded input of 32x32, for codes of level two 16x16."""
    model = keras.models.model_from_json((ROOT / f"models/{name}.json").read_text(encoding="utf-8"))
    model.load_weights(str(ROOT / f"weights/{name}.weights.h5"))
    random, inputs = np.random.default_rng(0), []
    for code in model.inputs:
        side = 16 if code.name.endswith("2") else 32
        inputs.append(random.random((2, side, side, code.shape[-1]), np.float32))
    outputs = keras.tree.flatten(model(inputs if len(inputs) > 1 else inputs[0], training=False))
    return np.concatenate([np.ravel(keras.ops.convert_to_numpy(each)) for each in outputs])


def compare(path):
    """Compare with the outputs that another environment has written; return whether all agree."""
    agree = True
    with np.load(path) as expected:
        for name in NAMES:
            try:
                difference = np.abs(output(name) - expected[name]).max() / np.abs(expected[name]).max()
                fits, found = difference <= TOLERANCE, f"differs by {difference:.1e}"
            except Exception as error:  # whatever this version stumbles over
                fits, found = False, str(error).strip().splitlines()[-1][-200:]
            print(f"keras {keras.__version__}: {name}: {'ok' if fits else 'FAILED'}, {found}", flush=True)
            agree &= bool(fits)
    return agree


def check(version, path):
    """Compare in a fresh virtual environment; return whether all agree."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / ("Scripts" if os.name == "nt" else "bin") / "python"
        install = [python, "-m", "pip", "install", "--quiet", f"keras=={version}", "tensorflow"]
        subprocess.run(install, check=True)
        environment = os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
        return not subprocess.run([python, __file__, "--compare", path], env=environment).returncode


def main(arguments):
    if arguments[:1] == ["--compare"]:  # in one of the fresh environments
        return not compare(arguments[1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "expected.npz"
        np.savez(path, **{name: output(name) for name in NAMES})
        agree = [check(version, path) for version in arguments or ("3.5.0", "3.12.0")]
    return not all(agree)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
