"""Measure how fast the saved models denoise a picture, beside a network of FFDNet's shape.

    python tests/benchmark_speed.py

Prints megapixels per second of the verb `denoise` for every autoencoder in `models/`, in both precisions, and
for the colour network of Zhang, Zuo, Zhang, "FFDNet: Toward a Fast and Flexible Solution for CNN-Based Image
Denoising", 2018: twelve 3x3 convolutions of 96 filters at half resolution, with random weights, in the same
framework and precision and by the same tiles. Then the same for a window of the picture, without tiles: the
two ratios differ by what the overlap of tiles costs, which is as wide as the receptive field.
"""

import argparse
import time
from functools import partial
from unittest import mock

import benchmark_common as common
import util

import keras
import numpy as np
from keras import layers

SIDE = 1536
WINDOW = 1024
PRECISIONS = ("float32", "mixed_bfloat16")
PEER, PEER_REACH = "FFDNet's shape", 24  # pixels that it looks beyond a cell


def ffdnet(precision, filters=96, convolutions=12):
    """Network of FFDNet's shape, whose cells of 2x2 pixels have 12 channels and 3 of the noise map."""
    image = keras.Input((None, None, 3))
    x = layers.Conv2D(15, 2, strides=2, dtype=precision)(image)
    for _ in range(convolutions - 1):
        x = layers.Conv2D(filters, 3, padding="same", activation="relu", dtype=precision)(x)
    x = layers.Conv2D(12, 3, padding="same", dtype=precision)(x)
    return keras.Model(image, layers.Conv2DTranspose(3, 2, strides=2)(x))


def denoise_in_tiles(model, picture, reach):
    """Denoise a picture by tiles that overlap by what this model looks at, in pixels."""
    with mock.patch.object(util, "REACH", reach):
        util.denoise_picture(model, picture)


def least_seconds(calls, rounds=3):
    """Least seconds of each function in a dict by label; taken in turns, since other work comes and goes."""
    seconds = {label: [] for label in calls}
    for _ in range(1 + rounds):  # the first one compiles
        for label, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[label].append(time.perf_counter() - started)
    return {label: min(times[1:]) for label, times in seconds.items()}


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    models = {(PEER, precision): ffdnet(precision) for precision in PRECISIONS}
    for name in util.saved_runs(util.HERE, "autoencoder"):
        for precision in PRECISIONS:
            models[name, precision] = util.load_model(util.HERE, name, "autoencoder", precision)
    picture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    window = picture[None, :WINDOW, :WINDOW] / np.float32(255)
    calls = {}
    for (label, precision), model in models.items():
        reach = PEER_REACH if label == PEER else util.REACH
        calls["", label, precision] = partial(denoise_in_tiles, model, picture, reach)
        calls["window, ", label, precision] = partial(model.predict_on_batch, window)
    seconds = least_seconds(calls)
    rows = []
    for (label, precision), model in models.items():
        cost = common.multiply_accumulates(model)
        rows.append({"model": label, "precision": precision, "million multiply-accumulates, 32x32": cost})
        for way, side in (("", SIDE), ("window, ", WINDOW)):
            own, peer = seconds[way, label, precision], seconds[way, PEER, precision]
            rows[-1] |= {f"{way}megapixels/s": side**2 / 1e6 / own, f"{way}ratio": peer / own}
    common.print_table(f"A picture of {SIDE}x{SIDE}, a window of {WINDOW}x{WINDOW}", rows)


if __name__ == "__main__":
    util.run_script(main)
