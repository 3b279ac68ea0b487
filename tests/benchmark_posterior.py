"""Compare draws of the detail code with a network that knows mean and variance of each pixel.

    python tests/benchmark_posterior.py                   # simple_cifar10, 15 minutes of training

The rival is told the same: the mean is that of the saved autoencoder, and a network of the same arithmetic as
the detail code's tells the variance of each pixel and channel around it. It is trained by the likelihood of a
Gaussian (Nix, Weigend, "Estimating the Mean and Variance of the Target Probability Distribution", 1994), on
the same images and noise, as long. Its draws are independent from pixel to pixel, so that they average out in
blocks, where errors do not. Prints calibration and CRPS of both.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import simple_autoencoder as simple
import util
from load_data import add_data_options, add_noise, dataset_name, load_data

import keras
import numpy as np
from keras import layers, ops

SIGMAS = (25, 50)
AT_ONCE = 50


def build_variance(filters=simple.FILTERS, latent_dim=simple.LATENT_DIM):
    """Network of [noisy image (N, H, W, 3), z_mean] to the log-variance of each pixel and channel."""
    noisy = keras.Input((None, None, 3), name="noisy")
    z_mean = keras.Input((None, None, latent_dim), name="z_mean")
    blocks = simple.DETAIL_ENCODER_BLOCKS + simple.DETAIL_DECODER_BLOCKS
    x = simple.detail_features(noisy, z_mean, filters, blocks, "variance")
    start = keras.initializers.Constant(2 * np.log(simple.DETAIL_DEVIATION))
    options = {"kernel_initializer": "zeros", "bias_initializer": start, "dtype": "float32"}
    return keras.Model([noisy, z_mean], layers.Conv2DTranspose(3, 2, strides=2, **options)(x))


class PixelGaussian(simple.DenoisingVAE):
    """Trains the variance of each pixel around the mean of a frozen encoder and decoder."""

    monitor, metric_names = "val_loss", ()

    def __init__(self, encoder, decoder, variance, **options):
        super().__init__(encoder, decoder, **options)
        self.encoder.trainable = self.decoder.trainable = False
        self.variance = variance

    def call(self, images, training=False):
        noisy = self.noisy(images)
        means = [mean for mean, _ in util.code_pairs(self.encoder(noisy))]
        return util.decode(self.decoder, means), self.variance([noisy, *means])

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        mean, log_var = y_pred
        return 0.5 * ops.mean(log_var + ops.square(y - mean) * ops.exp(-log_var))


def pixel_draws(mean, log_var, samples, seed):
    """Draws (samples, N, H, W, 3) of independent Gaussians, nominally in [0, 1]."""
    noise = np.random.default_rng(seed).standard_normal((samples, *mean.shape), np.float32)
    return mean + np.exp(log_var / 2) * noise


def measure_rival(rival, clean, sigma, samples=simple.POSTERIOR_SAMPLES):
    """Like `simple.measure_posterior`, by block side, for the draws of a `PixelGaussian`."""
    rng = np.random.default_rng(simple.TEST_NOISE_SEED)
    parts = []
    for start in range(0, len(clean), AT_ONCE):
        images = clean[start : start + AT_ONCE]
        mean, log_var = rival.predict(add_noise(images, sigma, rng), verbose=0)
        draws = pixel_draws(mean, log_var, samples, (util.DRAWS_SEED, start))
        parts.append(simple.compare_blocks(util.to_float(images), draws))
    joined = keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *parts)
    return joined | {"samples": samples}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=util.HelpFormatter)
    add_data_options(parser)
    util.add_training_options(parser, simple.DETAIL_EPOCHS, simple.BATCH_SIZE)
    parser.add_argument("--images", type=util.number(int, 1), default=simple.TEST_IMAGES, help="test images")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    run = args.start or f"simple_{dataset_name(args.dataset)}"
    args.name, args.precision = args.name or f"variance_{run}", args.precision or util.fast_precision()
    args.sigma, args.noise, args.learning_rate = simple.SIGMA_RANGE, {"white": 1.0}, simple.LEARNING_RATE
    data = load_data(args.dataset, args.data_dir, args.size, args.limit)
    encoder, decoder = (util.load_model(args.out, run, part) for part in ("encoder", "decoder"))
    clean = data.first("test", args.images)
    with util.training(__file__, args, data.checksums):
        z_parts = encoder.get_layer("z_encoder"), decoder.get_layer("z_decoder")
        rival = PixelGaussian(*z_parts, build_variance(), seed=args.seed)
        simple.fit_stage(rival, data, args, "variance", args.epochs)
        rows = []
        for sigma in SIGMAS:
            ours = simple.measure_posterior(encoder, decoder, clean, sigma)
            for label, measured in ((run, ours), ("mean and variance", measure_rival(rival, clean, sigma))):
                rows += [{"draws": label} | row for row in simple.calibration_rows(measured, sigma)]
        print(f"{data.name}, first {len(clean):,} test images; {util.environment()['hardware']}")
        print(util.format_table(rows))


if __name__ == "__main__":
    util.run_script(main)
