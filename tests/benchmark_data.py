"""Measure how many training images a denoiser needs: the stacked autoencoder beside plain DnCNNs.

    python tests/benchmark_data.py          # CIFAR-10, 500 to 49,000 images, an hour and a half on two cores

All are trained from scratch, with the same optimizer, noise, steps and images, and take nearly the same
arithmetic. Prints PSNR at sigma 25 on the first 1,000 test images, and writes `figures/benchmark_data.png`.

DnCNN is that of Zhang, Zuo, Chen, Meng, Zhang, "Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for
Image Denoising", 2017: 17 convolutions at full resolution, here of 39 filters instead of 64; and
once more without batch normalization, which mixes images of all noise levels here.
"""

import argparse
import itertools

import benchmark_common as common
import simple_autoencoder as simple
import stack_autoencoder as stack
import util
from load_data import Batches, add_data_options, load_data

import keras
from keras import layers

LIMITS = (500, 2000, 10_000, 49_000)
STEPS = 3200  # an epoch of the 49,000
SIGMA = 25
FILTERS = 39  # of DnCNN, for the arithmetic of the stack


def stacked():
    return simple.DenoisingVAE(*common.untrained("stacked"), kl_weight=stack.KL_WEIGHT)


class FeedForward(simple.DenoisingVAE):
    """Trains a plain network the same way: noise and likelihood, but no code."""

    def call(self, images, training=False):
        return self.decoder(self.noisy(images)), []


def dncnn(normalize=True):
    """DnCNN; without batch normalization, its convolutions have a bias instead."""
    image = x = keras.Input((None, None, 3))
    x = layers.Conv2D(FILTERS, 3, padding="same", activation="relu")(x)
    for _ in range(15):
        x = layers.Conv2D(FILTERS, 3, padding="same", use_bias=not normalize)(x)
        x = layers.BatchNormalization()(x) if normalize else x
        x = layers.Activation("relu")(x)
    residual = layers.Conv2D(3, 3, padding="same", dtype="float32")(x)
    network = keras.Model(image, layers.Add(dtype="float32")([image, residual]))
    return FeedForward(None, network)


def dncnn_without_bn():
    return dncnn(normalize=False)


def endless(batches):
    """Batches of one epoch after another."""
    for epoch in itertools.count():
        batches.go_to(epoch)
        yield from (batches[index] for index in range(len(batches)))


def trained(build, images):
    """The denoising network that `build` makes, trained on `images`."""
    keras.config.set_dtype_policy(util.fast_precision())
    keras.utils.set_random_seed(0)
    vae = build()
    vae.compile(optimizer=simple.build_optimizer(simple.LEARNING_RATE, STEPS))
    batches = Batches(images, simple.BATCH_SIZE)
    vae.fit(endless(batches), steps_per_epoch=STEPS, shuffle=False, verbose=0)
    keras.config.set_dtype_policy("float32")
    if vae.encoder is None:
        return util.portable_copy(vae.decoder)
    return util.portable_copy(simple.build_autoencoder(vae.encoder, vae.decoder))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data_options(parser)
    parser.add_argument("--limits", type=int, nargs="+", default=LIMITS, help="training images")
    args = parser.parse_args()
    data = load_data(args.dataset, args.data_dir, args.size, max(args.limits))
    clean = data.first("test", simple.TEST_IMAGES)
    rows, costs = [], {}
    for limit in args.limits:
        rows.append({"training images": limit})
        for build in (stacked, dncnn, dncnn_without_bn):
            label = build.__name__
            model = trained(build, data.images[data.denoiser_split][:limit])
            (row,) = simple.evaluate(simple.blind({label: model}), clean, (SIGMA,))
            rows[-1][f"{label} PSNR"] = row[f"{label} PSNR"]
            costs[label] = common.multiply_accumulates(model)
        print(util.format_table(rows[-1:]), flush=True)
    title = f"{data.name}, first {len(clean):,} test images, sigma {SIGMA}, {STEPS:,} steps"
    common.print_table(f"{title} of {simple.BATCH_SIZE}", rows)
    print("million multiply-accumulates, 32x32:", ", ".join(f"{k} {v:.0f}" for k, v in costs.items()))
    curves = {label: (args.limits, [row[f"{label} PSNR"] for row in rows]) for label in costs}
    figure = util.curves_figure([("training images", "PSNR in dB", curves)], title)
    figure.axes[0].set_xscale("log")
    figure.axes[0].set_xticks(args.limits, args.limits)
    figure.axes[0].minorticks_off()
    common.write_figures(data=figure)


if __name__ == "__main__":
    util.run_script(main)
