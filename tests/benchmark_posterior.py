"""Compare draws of the detail code with a network that knows mean and variance of each pixel.

    python tests/benchmark_posterior.py                   # simple_cifar10, 15 minutes of training

The rival has the mean of the saved autoencoder, and for the variance around it a network of the same
arithmetic as the detail code's, trained as long by the likelihood of a Gaussian (Nix, Weigend, "Estimating
the Mean and Variance of the Target Probability Distribution", 1994). Prints calibration and CRPS of both, the
90 % interval's coverage in the tenths of the values by predicted deviation where it is least and most, and
how much each code of the run holds.
"""

import argparse

import benchmark_common as common
import simple_autoencoder as simple
import util
from load_data import add_data_options, add_noise, dataset_name, load_data

import keras
import numpy as np
from keras import layers, ops

SIGMAS = (25, 50)
SAMPLES = 64
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

    monitor, metric_names, hint = "val_loss", (), "loss is of the likelihood of pixels."

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


def coverage_by_tenth(clean, draws):
    """Coverage of the 90 % interval in each tenth of the values, from the least predicted deviation up.

    Deviation and interval are of different draws: else the first tenth would gather the values whose interval
    is too narrow by chance, 0.84 of 64 exact draws.
    """
    half = len(draws) // 2
    deviation = draws[:half].std(axis=0, ddof=1).ravel()
    ranks = (draws[half:] < clean).sum(axis=0).ravel()[np.argsort(deviation)]
    return [simple.coverage(tenth, len(draws) - half, 0.9) for tenth in np.array_split(ranks, 10)]


def measured_rows(draw, clean, sigma):
    """Rows of the table of calibration; `draw` is a function of noisy images and a seed."""
    noisy, draws = add_noise(clean, sigma), []
    for start in range(0, len(clean), AT_ONCE):
        draws.append(draw(noisy[start : start + AT_ONCE], (util.DRAWS_SEED, start)))
    truth, draws = util.to_float(clean), np.concatenate(draws, axis=1)
    blocks = simple.compare_draws(truth, draws)
    rows = simple.calibration_rows(blocks, SAMPLES, sigma)
    for row, side in zip(rows, blocks, strict=True):
        tenths = coverage_by_tenth(simple.block_means(truth, side), simple.block_means(draws, side))
        row.update({"least of the tenths": min(tenths), "most of the tenths": max(tenths)})
    return rows


def code_rows(encoder, clean):
    """Rows by code: its KL from N(0, I) in nats, mean over latents and images, and the share of active units.

    Active are the channels whose mean has a variance above 0.01 (Burda, Grosse, Salakhutdinov, "Importance
    Weighted Autoencoders", ICLR 2016); a detail code's mean is zero.
    """
    codes = util.code_pairs(encoder.predict(add_noise(clean, simple.SHOWN_SIGMA), verbose=0))
    levels = range(1, len(codes) // 2 + 1)
    names = [f"{kind} of level {level}" for kind in ("z", "detail") for level in levels]
    rows = []
    for name, (mean, log_var) in zip(names, codes, strict=True):
        kl = 0.5 * np.mean(mean**2 + np.exp(log_var) - 1 - log_var)
        active = np.mean(mean.var(axis=(0, 1, 2)) > 0.01)
        rows.append({"code": name, "KL of a latent in nats": float(kl), "active units": float(active)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=util.HelpFormatter)
    add_data_options(parser)
    util.add_training_options(parser, simple.DETAIL_EPOCHS, simple.BATCH_SIZE)
    parser.add_argument("--images", type=int, default=250, help="test images")
    args = parser.parse_args()
    run = args.start or f"simple_{dataset_name(args.dataset)}"
    args.name, args.precision = args.name or f"variance_{run}", args.precision or util.fast_precision()
    args.sigma, args.noise, args.learning_rate = simple.SIGMA_RANGE, ["white"], simple.LEARNING_RATE
    data = load_data(args.dataset, args.data_dir, args.size, args.limit)
    encoder, decoder = (util.load_model(args.out, run, part) for part in ("encoder", "decoder"))
    clean = data.first("test", args.images)
    with util.training(__file__, args, data.checksums):
        z_parts = encoder.get_layer("z_encoder"), decoder.get_layer("z_decoder")
        rival = PixelGaussian(*z_parts, build_variance(), seed=args.seed)
        simple.fit_stage(rival, data, args, "variance", args.epochs)

        def by_run(noisy, seed):
            return simple.decoded_draws(encoder, decoder, noisy, SAMPLES, seed)[1]

        def by_rival(noisy, seed):
            mean, log_var = rival.predict(noisy, verbose=0)
            noise = np.random.default_rng(seed).standard_normal((SAMPLES, *mean.shape), np.float32)
            return mean + np.exp(log_var / 2) * noise

        rows = []
        for sigma in SIGMAS:
            for label, draw in ((run, by_run), ("mean and variance", by_rival)):
                rows += [{"draws": label} | row for row in measured_rows(draw, clean, sigma)]
        common.print_table(f"{data.name}, first {len(clean):,} test images", rows)
        print(util.format_table(code_rows(encoder, clean)))


if __name__ == "__main__":
    util.run_script(main)
