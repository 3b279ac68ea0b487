"""Train a single-layer variational convolutional autoencoder to denoise images.

    python simple_autoencoder.py                       # CIFAR-10 (downloads 170 MB)
    python simple_autoencoder.py --dataset photos      # built-in photographs, no download
    python simple_autoencoder.py --resume              # go on after an interruption
    python simple_autoencoder.py evaluate              # measure the saved model again
    python simple_autoencoder.py denoise IN --to OUT   # your own pictures
    python simple_autoencoder.py --start simple_cifar10 --dataset holiday/   # go on with your own
    python simple_autoencoder.py evaluate --pictures CLEAN --noise white camera   # your own test set

Blind: one model for all noise levels, sigma 0 to 75. Writes, under the run's name (`simple_cifar10`), the
models and weights of encoder, decoder and autoencoder, a log and a run record, figures, feature maps (0.4
GB for CIFAR-10) and GIFs. A training of CIFAR-10 with the defaults takes 50 to 80 minutes on two CPU cores
with AVX512-BF16.

The encoder maps the noisy image to mean and log-variance of two Gaussian codes on a grid, one of each for
every 2x2 pixels: z holds what the noise has left, the detail code what it has destroyed. The decoder maps
them to a clean image. The detail code's mean is zero and stands for the best guess; draws of it are the clean
images that may have been.

A fault is a `DataError` or `ModelError`, both `OSError`, whose message is one line: the file and the remedy.

Kingma, Welling, "Auto-Encoding Variational Bayes", ICLR 2014.
"""

import math
import re
import sys
import time
from collections import Counter, defaultdict
from functools import cache, partial
from pathlib import Path

import util
from load_data import (
    MARGIN,
    NOISE_KINDS,
    OWN,
    SHRINKING,
    SIGMAS,
    SUFFIXES,
    TEST_NOISE_SEED,
    VALIDATION_NOISE_SEED,
    Batches,
    DataError,
    add_data_options,
    add_noise,
    clean_of,
    dataset_name,
    draw_neighbours,
    evenly,
    format_for,
    image_files,
    load_data,
    noise_shares,
    picture_pairs,
    pictures_with_noise,
    read_pair,
    read_pixels,
    upright,
    validation_pair,
    write_pixels,
)

import keras
import numpy as np
from keras import layers, ops
from matplotlib.figure import Figure
from scipy.stats import norm

# architecture: 108 million multiply-accumulates for a 32x32 image, 77 million more for the detail code
FILTERS = 48
ENCODER_BLOCKS, DECODER_BLOCKS = 4, 6
LATENT_DIM = 48
DETAIL_ENCODER_BLOCKS, DETAIL_DECODER_BLOCKS = 3, 4
DETAIL_DEVIATION = 0.04  # of the detail decoder's last kernel at the start: its pixels deviate by 0.28
MAX_LOG_VAR = 10.0  # an outlier beyond it would make the KL term infinite
INITIAL_LOG_VAR = -10.0  # of the code: its standard deviation starts at 0.007, about 2 grey levels

# optimization
EPOCHS = 20
DETAIL_EPOCHS = 6  # of the detail code, with the rest frozen
BATCH_SIZE = 16  # 64 is 0.2 dB behind after 77,000 images
LEARNING_RATE = 1e-3
WARMUP_STEPS = 500  # and at most a tenth of the training
FALL = 0.5  # share of the training in which the learning rate falls
CLIP_NORM = 0.5  # without it the first steps can destroy the identity that the model starts as
KL_WEIGHT = 1e-3
DETAIL_KL_WEIGHT = 1e-3
DETAIL_LEARNING_RATE = 1e-3  # at most; and twice --learning-rate at most
CRPS_WEIGHTS = {1: 1.6, 2: 1.7, 4: 2.8, 8: 4.8}  # by side of a block: each adds about as much to the loss
SIGMA_RANGE = (0, 75)  # of the training noise, on the 0-255 scale
GREY_LEVEL = 1 / 255

# what is measured and shown
MEASURES = {"PSNR": util.psnr, "SSIM": util.ssim}  # of uint8 images, clean and denoised, one for each image
TEST_IMAGES = 1000
SHOWN = 8  # images in a figure
SHOWN_SIGMA, RECONSTRUCTED_SIGMAS = 50, (25, 50)
GIF_FRAMES = 50  # at most
SWEEP = tuple(range(5, 80, 5))  # sigmas of the curve PSNR against sigma
SWEEP_IMAGES = 200
ALL_DRAWS = 256_000, 64  # pixels of 250 images of CIFAR-10, and draws of each
QUICK_DRAWS = 48_000, 25  # after a training
POSTERIOR_SIGMAS = (15, 25, 50, 75)
POSTERIOR_AT_ONCE = 25  # images of up to 48x48 whose draws are made together
INTERVALS = (0.5, 0.9)  # shares of the draws in them
SHOWN_DRAWS, RANK_BINS = 3, 13  # of 26 or 65 ranks among the draws
CALIBRATION_IMAGES, CALIBRATION_SAMPLES = 500, 8
CALIBRATION_PARTS = 4  # of the range of strengths, which count alike
FEATURE_MAP_TRAIN_IMAGES = 5000
METRICS = {"psnr": "PSNR in dB", "kl": "KL of z in nats", "crps": "CRPS", "detail_kl": "KL of detail code"}
CALIBRATION_EXPLAINED = """Spread/skill is the draws' deviation over the error of their mean: 1 is right.
The central 50 % and 90 % of the draws are to hold that share of the true values. CRPS, the error of all
draws in grey levels, stands beside that of a Gaussian of the true width for each image; lower is better."""
QUALITY_EXPLAINED = """PSNR in dB of the denoised images (the posterior mean), of the mean of all draws and of
one draw (3 dB lower is right); the PSNR that draws make expect, and its correlation with the true one:"""

# one's own pictures
PHOTOGRAPHS_RUN = "stacked_photographs"  # whose model denoises them
WITHOUT_CLEAN = "learnt from noisy pictures alone"
DEVIATIONS = "deviation"  # folder of the errors to expect, beside the pictures
DEVIATION_SCALE = 10  # brightness for a grey level of deviation: white from 25.5 on
EXPECTED_ERRORS_ARE = (
    "right on the 15 real pairs of CC15 (37.16 dB expected, 37.11 true), but too small on those of PolyU "
    "(40.8 dB for 37.1), whose references are JPEGs with errors of their own"
)


def residual_blocks(x, filters, count, name, use_bias=True):
    """Apply `count` blocks x + conv(relu(conv(x))), 3x3; the second convolutions start at zero."""
    for index in range(count):
        block, same = f"{name}_{index}", {"padding": "same", "use_bias": use_bias}
        y = layers.Conv2D(filters, 3, activation="relu", name=f"{block}_a", **same)(x)
        y = layers.Conv2D(filters, 3, kernel_initializer="zeros", name=f"{block}_b", **same)(y)
        x = layers.Add(name=f"{block}_add")([x, y])
    return x


def log_var_head(x, latent_dim, name="detail", start="zeros"):
    """Log-variance of a Gaussian code on the grid of x; starts at that of N(0, I), or another constant."""
    # float32, since a log-variance of -10 in bfloat16 has steps of 0.06
    options = {"kernel_initializer": "zeros", "bias_initializer": start, "dtype": "float32"}
    return layers.Conv2D(latent_dim, 1, name=f"{name}_log_var", **options)(x)


def code_heads(x, latent_dim, name="z"):
    """Mean and log-variance of a Gaussian code on the grid of x."""
    z_mean = layers.Conv2D(latent_dim, 1, name=f"{name}_mean")(x)
    return z_mean, log_var_head(x, latent_dim, name, keras.initializers.Constant(INITIAL_LOG_VAR))


def build_encoder(filters=FILTERS, blocks=ENCODER_BLOCKS, latent_dim=LATENT_DIM):
    """Encoder: noisy image (N, H, W, 3), H and W even, to [z_mean, z_log_var], (N, H/2, W/2, latent_dim)."""
    noisy = keras.Input((None, None, 3), name="noisy")
    x = layers.Conv2D(filters, 2, strides=2, name="to_cells")(noisy)
    x = residual_blocks(x, filters, blocks, "encoder")
    return keras.Model(noisy, list(code_heads(x, latent_dim)), name="z_encoder")


def build_decoder(filters=FILTERS, blocks=DECODER_BLOCKS, latent_dim=LATENT_DIM):
    """Decoder: code z (N, h, w, latent_dim) to image (N, 2h, 2w, 3)."""
    z = keras.Input((None, None, latent_dim), name="z")
    x = layers.Conv2D(filters, 1, name="from_code")(z)
    x = residual_blocks(x, filters, blocks, "decoder")
    image = layers.Conv2DTranspose(3, 2, strides=2, dtype="float32", name="to_pixels")(x)
    return keras.Model(z, image, name="z_decoder")


def detail_features(level_input, z_mean, filters, blocks, name="detail"):
    """Features that predict a detail code's variance, from the level's input and the mean of its z."""
    x = layers.Conv2D(filters, 2, strides=2, name=f"{name}_to_cells")(level_input)
    x = layers.Conv2D(filters, 1, name=f"{name}_mix")(layers.Concatenate(name=f"{name}_input")([x, z_mean]))
    return residual_blocks(x, filters, blocks, f"{name}_encoder")


def build_detail_encoder(filters=FILTERS, blocks=DETAIL_ENCODER_BLOCKS, latent_dim=LATENT_DIM):
    """Detail encoder: [noisy image (N, H, W, 3), z_mean (N, H/2, W/2, latent_dim)] to detail_log_var."""
    noisy = keras.Input((None, None, 3), name="noisy")
    z_mean = keras.Input((None, None, latent_dim), name="z_mean")
    x = detail_features(noisy, z_mean, filters, blocks)
    return keras.Model([noisy, z_mean], log_var_head(x, latent_dim), name="detail_encoder")


def build_detail_decoder(filters=FILTERS, blocks=DETAIL_DECODER_BLOCKS, latent_dim=LATENT_DIM):
    """Detail decoder: detail code (N, h, w, latent_dim) to what it adds to an image, (N, 2h, 2w, 3).

    It has no biases, so that a code of zero, the mean, adds exactly nothing.
    """
    detail = keras.Input((None, None, latent_dim), name="detail")
    x = layers.Conv2D(filters, 1, use_bias=False, kernel_initializer="orthogonal", name="from_detail")(detail)
    x = residual_blocks(x, filters, blocks, "detail_decoder", use_bias=False)
    start = keras.initializers.RandomNormal(stddev=DETAIL_DEVIATION)
    added = layers.Conv2DTranspose(
        3, 2, strides=2, use_bias=False, kernel_initializer=start, dtype="float32", name="detail_to_pixels"
    )
    return keras.Model(detail, added(x), name="detail_decoder")


def join_encoders(encoder, detail_encoder):
    """Encoder that ships: noisy image to [mean, log-variance] of each level's z, then of the detail codes."""
    noisy = keras.Input((None, None, 3), name="noisy")
    outputs = list(encoder(noisy))
    means = [mean for mean, _ in util.code_pairs(outputs)]
    for log_var in keras.tree.flatten(detail_encoder([noisy, *means])):
        outputs += [layers.Rescaling(0.0, dtype="float32")(log_var), log_var]
    return keras.Model(noisy, outputs, name="encoder")


def join_decoders(decoder, detail_decoder):
    """Decoder that ships: z of each level and the detail codes, one after another, to an image."""
    z, details = (
        [keras.Input(code.shape[1:], name=code.name) for code in part.inputs]
        for part in (decoder, detail_decoder)
    )
    parts = [util.decode(decoder, z), util.decode(detail_decoder, details)]
    return keras.Model([*z, *details], layers.Add(dtype="float32", name="image")(parts), name="decoder")


def start_as_identity(encoder, decoder):
    """Set the weights so that decoder(z_mean of an image) is the image: no step is spent on learning to copy.

    The first convolution puts the twelve values of a 2x2 cell, minus 1/2, into the first twelve channels
    (space-to-depth), the 1x1 convolutions around the code pass them on, the last one puts them back. The
    other channels of the first convolution keep their random weights.
    """
    cell = np.zeros((2, 2, 3, encoder.get_layer("to_cells").filters), np.float32)
    for row, column, colour in np.ndindex(2, 2, 3):
        cell[row, column, colour, 6 * row + 3 * column + colour] = 1
    used = cell.any(axis=(0, 1, 2))
    kernel, bias = encoder.get_layer("to_cells").get_weights()
    encoder.get_layer("to_cells").set_weights([np.where(used, cell, kernel), np.where(used, -0.5, bias)])
    for layer in (encoder.get_layer("z_mean"), decoder.get_layer("from_code")):
        kernel, bias = layer.get_weights()
        layer.set_weights([np.eye(*kernel.shape[2:])[None, None], bias])
    decoder.get_layer("to_pixels").set_weights([cell, np.full(3, 0.5)])


def build_autoencoder(encoder, decoder):
    """Autoencoder: noisy image to denoised image, by way of the posterior means alone."""
    noisy = keras.Input((None, None, 3), name="noisy")
    means = [mean for mean, _ in util.code_pairs(encoder(noisy))]
    return keras.Model(noisy, util.decode(decoder, means), name="autoencoder")


class DenoisingVAE(keras.Model):
    """Trains an encoder and a decoder, of any number of variational levels, to denoise.

    It is fed noisy images; in training, images and the deviation of the white noise to add to each. Training
    samples the codes, else their means are taken. The loss of an image, in nats per pixel value, is

        1/2 log(MSE + g^2) + kl_weight * KL(q(z|x) || N(0, I)),    g one grey level.

    The first term is the likelihood of a Gaussian decoder with the best variance for each image (optimal
    sigma-VAE: Rybkin, Daniilidis, Levine, ICML 2021): a decibel counts alike at every sigma. g keeps images
    without noise from outweighing the rest. A kl_weight far below 1 makes it a beta-VAE (Higgins et al., ICLR
    2017), not a bound of the likelihood.
    """

    monitor, metric_names = "val_psnr", ("psnr", "kl")
    hint = "Held-out images may be smoother than those of the training: then val_psnr is above psnr."

    def __init__(self, encoder, decoder, kl_weight=KL_WEIGHT, seed=0):
        super().__init__(dtype="float32")  # images stay exact; the layers compute in their own precision
        self.encoder, self.decoder = encoder, decoder
        self.kl_weight, self.seed = kl_weight, seed
        self.random = keras.random.SeedGenerator(seed)
        self.measured = {name: keras.metrics.Mean(name) for name in self.metric_names}

    def call(self, images, training=False):
        outputs = [ops.cast(output, "float32") for output in self.encoder(self.noisy(images))]
        codes = [(mean, ops.minimum(log_var, MAX_LOG_VAR)) for mean, log_var in util.code_pairs(outputs)]
        z = [self.sample(mean, log_var) if training else mean for mean, log_var in codes]
        return util.decode(self.decoder, z), codes

    def noisy(self, images):
        """Noisy images (N, H, W, 3): white noise of the deviation that comes with them, if any, is added."""
        if not isinstance(images, (tuple, list)):
            return ops.cast(images, "float32")
        images, sigma = (ops.cast(part, "float32") for part in images)
        return images + sigma * keras.random.normal(ops.shape(images), seed=self.random)

    def sample(self, z_mean, z_log_var):
        return z_mean + ops.exp(0.5 * z_log_var) * keras.random.normal(ops.shape(z_mean), seed=self.random)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        denoised, codes = y_pred
        mse = ops.mean(ops.square(y - denoised), axis=(1, 2, 3))
        kl = kl_divergence(codes, y)
        self.measured["psnr"].update_state(-10 * ops.log10(ops.maximum(mse, 1e-10)))
        self.measured["kl"].update_state(kl)
        return self.loss_of(mse, kl)

    def loss_of(self, mse, kl):
        return ops.mean(0.5 * ops.log(mse + GREY_LEVEL**2) + self.kl_weight * kl)


class NeighbourVAE(DenoisingVAE):
    """Trains an encoder and a decoder to denoise without one clean image (`load_data.draw_neighbours`).

    What it makes of an image g1(y) of one pixel of each cell of a noisy image y is compared with the image
    g2(y) of their neighbours, whose noise it cannot know. The loss is that of `DenoisingVAE` with

        mean((f(g1(y)) - g2(y))^2) + mean((f(g1(y)) - g2(y) - (g1(f(y)) - g2(f(y))))^2)

    in the place of the MSE: neighbours differ without noise, too, by as much as they do in f(y), which is
    taken as a constant (Neighbor2Neighbor, eq. 6 and 9, with a weight of 1).
    """

    monitor, metric_names = "val_loss", ("kl",)
    hint = "Nothing clean is known: the loss compares noisy neighbours, on validation images, too."

    def __init__(self, *models, distance=1, **options):
        super().__init__(*models, **options)
        self.distance = distance

    def call(self, images, training=False):
        return super().call(images)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        whole = ops.stop_gradient(y_pred[0])
        (first, second), expected = draw_neighbours([y, whole], self.distance, self.random)
        denoised, codes = super().call(first, training)
        error, difference = denoised - second, expected[0] - expected[1]
        squares = ops.square(error) + ops.square(error - difference)
        kl = kl_divergence(codes, first)
        self.measured["kl"].update_state(kl)
        return self.loss_of(ops.mean(squares, axis=(1, 2, 3)), kl)


class DetailVAE(DenoisingVAE):
    """Trains the detail code, so that decoded draws are the clean images that may have been.

    A draw is `decoder(z_mean) + detail_decoder(d)`, d from N(0, s(x)^2), whose variance the detail encoder
    predicts. Encoder and decoder of z are frozen: no draw improves the mean. The loss of an image is

        w(x) * sum over k of v_k * CRPS_k + kl_weight * KL(N(0, s(x)^2) || N(0, I)),
        CRPS = 1/2 (|a - y| + |b - y|) - 1/2 |a - b|    of two draws a and b, y the clean image.

    This estimate of the continuous ranked probability score is unbiased, and only the true distribution
    minimizes its expectation (Gneiting, Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation",
    2007, eq. 21; for few draws: Lang et al., "AIFS-CRPS", 2024). CRPS_k is of means of k x k pixels, since
    errors of neighbours correlate. w(x) is one over the image's mean |a - b|, at least a grey level, as a
    constant: flat and textured images count alike. It rewards draws that are too wide, so the plain CRPS of
    pixels decides which epoch is the best.
    """

    monitor, metric_names = "val_crps", ("crps", "detail_kl")
    hint = "crps is the error of draws, in grey levels."

    def __init__(self, encoder, decoder, detail_encoder, detail_decoder, **options):
        super().__init__(encoder, decoder, **options)
        self.encoder.trainable = self.decoder.trainable = False
        self.detail_encoder, self.detail_decoder = detail_encoder, detail_decoder

    def call(self, images, training=False):
        noisy = self.noisy(images)
        means = [mean for mean, _ in util.code_pairs(self.encoder(noisy))]
        denoised = util.decode(self.decoder, means)
        log_vars = keras.tree.flatten(self.detail_encoder([noisy, *means]))
        codes = [(ops.zeros_like(log_var), ops.minimum(log_var, MAX_LOG_VAR)) for log_var in log_vars]
        draws = []
        for _ in range(2):
            details = [self.sample(mean, log_var) for mean, log_var in codes]
            draws.append(denoised + util.decode(self.detail_decoder, details))
        return draws, codes

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        draws, codes = y_pred
        distance = ops.mean(ops.abs(draws[0] - draws[1]), axis=(1, 2, 3), keepdims=True)
        weight = 1 / ops.maximum(GREY_LEVEL, ops.stop_gradient(distance))
        kl = kl_divergence(codes, y)
        loss = self.kl_weight * ops.mean(kl)
        for side, share in CRPS_WEIGHTS.items():
            a, b, clean = (ops.average_pool(images, side, strides=side) for images in (*draws, y))
            crps = (ops.abs(a - clean) + ops.abs(b - clean) - ops.abs(a - b)) / 2
            loss += share * ops.mean(weight * crps)
            if side == 1:
                self.measured["crps"].update_state(crps / GREY_LEVEL)
        self.measured["detail_kl"].update_state(kl)
        return loss


def kl_divergence(codes, images):
    """KL of codes from N(0, I) in nats per pixel value of each image (Kingma, Welling 2014, appendix B)."""
    terms = [ops.square(mean) + ops.exp(log_var) - 1 - log_var for mean, log_var in codes]
    values = ops.cast(ops.prod(ops.shape(images)[1:]), "float32")  # of an image: H * W * 3
    return 0.5 * sum(ops.sum(term, axis=(1, 2, 3)) for term in terms) / values


class EpochStart(keras.callbacks.Callback):
    """Set order and noise by the epoch, counted over all stages: a resumed training draws the same."""

    def __init__(self, batches, epochs_before):
        super().__init__()
        self.batches, self.epochs_before = batches, epochs_before

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.go_to(self.epochs_before + epoch)
        self.restart_draws(self.model.seed, self.epochs_before + epoch)

    def on_test_begin(self, logs=None):
        self.restart_draws(VALIDATION_NOISE_SEED)  # the same after every epoch: epochs are compared

    def restart_draws(self, *seed):
        # hashed, since a SeedGenerator counts its draws from its state on: neighbours would overlap
        self.model.random.state.assign(np.random.SeedSequence(seed).generate_state(2))


class Frames(keras.callbacks.Callback):
    """Keep denoised images for the GIFs, by step: 0, 1, 2, 4, 8, ... of the first epoch, then every epoch."""

    def __init__(self, folder, noisy, steps_before):
        super().__init__()
        self.folder, self.noisy, self.steps_before = folder, noisy, steps_before

    def on_epoch_begin(self, epoch, logs=None):
        self.first_step = self.steps_before + epoch * self.params["steps"]
        if self.first_step == 0:
            self.keep(0)

    def on_train_batch_end(self, batch, logs=None):
        step = batch + 1
        is_power_of_two = step.bit_count() == 1
        if self.first_step == 0 and is_power_of_two:
            self.keep(step)

    def on_epoch_end(self, epoch, logs=None):
        self.keep(self.first_step + self.params["steps"])

    def keep(self, step):
        denoised = ops.convert_to_numpy(self.model(self.noisy)[0])
        with util.atomic(self.folder / f"{step:08d}.npy") as path:
            np.save(path, util.to_uint8(denoised))


class RiseStayFall(keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate that rises linearly to `highest`, stays, and falls linearly to zero, over `steps`.

    While it stays high, a training may be made longer: the rate knows nothing of its end yet. (Hägele et al.,
    "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", 2024.)
    """

    def __init__(self, highest, steps):
        super().__init__()
        self.highest, self.steps = highest, steps
        self.rise = max(1, min(WARMUP_STEPS, steps // 10))

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rising, falling = (step + 1) / self.rise, (self.steps - step) / (FALL * self.steps)
        return self.highest * ops.clip(ops.minimum(rising, falling), 0, 1)


def build_optimizer(learning_rate, steps):
    """Muon whose learning rate rises, stays and falls over `steps`."""
    rate = RiseStayFall(learning_rate, steps)
    return util.ConvolutionMuon(rate, weight_decay=None, adam_weight_decay=None, global_clipnorm=CLIP_NORM)


def build_vae(encoder, decoder, args):
    """What trains an encoder and a decoder of z, with clean images or without."""
    options = {"kl_weight": args.kl_weight, "seed": args.seed}
    if args.noise == [OWN]:
        return NeighbourVAE(encoder, decoder, distance=args.distance, **options)
    return DenoisingVAE(encoder, decoder, **options)


def load_training_data(args):
    """The data of a training, in whole cells; pictures that are noisy already are not shrunk."""
    own = args.noise == [OWN]
    shrinking, side = ((), 2 * args.distance * util.STRIDE) if own else (SHRINKING, util.STRIDE)
    data = load_data(args.dataset, args.data_dir, args.size, args.limit, MARGIN, shrinking)
    return data.in_cells(side)


def gif_images(data, args):
    """Noisy and clean validation images of the GIFs, (SHOWN, H, W, 3); None where no clean ones are known."""
    images = data.shown("validation", SHOWN)
    if args.noise == [OWN]:
        return util.to_float(images), None
    return add_noise(images, SHOWN_SIGMA, np.random.default_rng(VALIDATION_NOISE_SEED)), images


def fit_stage(vae, data, args, stage, epochs, epochs_before=0):
    """Train `vae`, from a checkpoint if there is one; return a row of metrics for each epoch of the stage."""
    if not epochs:
        return []
    folder, images = util.training_folder(args.out, args.name), data.images[data.denoiser_split]
    noise, shape = noise_shares(args.noise), data.images["validation"].shape[1:3]
    batches = Batches(images, args.batch_size, args.seed, noise, args.sigma, shape)
    validation = validation_pair(data.images["validation"], noise, args.sigma)
    is_detail = isinstance(vae, DetailVAE)
    rate = min(DETAIL_LEARNING_RATE, 2 * args.learning_rate) if is_detail else args.learning_rate
    vae.compile(optimizer=build_optimizer(rate, epochs * len(batches)))
    vae(validation[0][:1])
    callbacks = [EpochStart(batches, epochs_before)]
    if not is_detail:  # which changes no denoised image
        callbacks.append(Frames(folder / "frames", gif_images(data, args)[0], epochs_before * len(batches)))
    print(f"\n{len(images):,} training images. {vae.hint}", flush=True)
    rows = util.fit(vae, batches, validation, epochs, folder, vae.monitor, callbacks, stage)
    seen = {"stage": stage, "images": len(batches) * batches.batch_size}
    seen["pixels"] = seen["images"] * math.prod(shape)
    return [seen | row | {"epoch": epochs_before + row["epoch"]} for row in rows]


def fit_detail(vae, detail, joined, data, args, epochs_before):
    """Train the code of the `detail` encoder and decoder, then calibrate it in the `joined` models."""
    trainer = DetailVAE(vae.encoder, vae.decoder, *detail, kl_weight=DETAIL_KL_WEIGHT, seed=args.seed)
    rows = fit_stage(trainer, data, args, "detail", args.detail_epochs, epochs_before)
    if rows:
        ratio = calibrate(*joined, data.first("validation", CALIBRATION_IMAGES), args)
        print(f"Spread/skill on validation images was {ratio:.3f}: the draws' deviations are divided by it.")
    vae.encoder.trainable = vae.decoder.trainable = True  # as others will want to train what is saved
    return rows


def calibrate(encoder, decoder, clean, args):
    """Divide the detail codes' deviations by spread/skill of validation images, which is returned.

    It is the geometric mean over strengths and blocks. Detail decoders have no biases, so that draws deviate
    by as much less as their codes do. As temperature scaling: Guo et al., "On Calibration of Modern Neural
    Networks", ICML 2017.
    """
    models = util.portable_copy(encoder), util.portable_copy(decoder)
    noisy, clean = validation_pair(clean, noise_shares(args.noise), args.sigma)
    parts, logarithms = min(CALIBRATION_PARTS, len(clean)), []
    for images, targets in zip(np.array_split(noisy, parts), np.array_split(clean, parts), strict=True):
        _, draws = decoded_draws(*models, images, CALIBRATION_SAMPLES)
        for compared in compare_draws(targets, draws).values():
            logarithms.append(math.log(spread_to_skill(compared, CALIBRATION_SAMPLES)))
    ratio = math.exp(np.mean(logarithms))
    for weight in encoder.weights:
        if re.search("detail[0-9]*_log_var/bias$", weight.path):
            weight.assign(weight - 2 * math.log(ratio))
    return ratio


def load_start(args, encoder, decoder):
    """Load the weights of the run that --start names."""
    util.start_from(encoder, args.out, args.start, "encoder")
    util.start_from(decoder, args.out, args.start, "decoder")


def train(args, data):
    """Train z, then the detail code; return encoder and decoder of both, autoencoder, and rows of metrics."""
    encoder = build_encoder(args.filters, ENCODER_BLOCKS, args.latent_dim)
    decoder = build_decoder(args.filters, DECODER_BLOCKS, args.latent_dim)
    detail_encoder = build_detail_encoder(args.filters, DETAIL_ENCODER_BLOCKS, args.latent_dim)
    detail_decoder = build_detail_decoder(args.filters, DETAIL_DECODER_BLOCKS, args.latent_dim)
    joined = join_encoders(encoder, detail_encoder), join_decoders(decoder, detail_decoder)
    start_as_identity(encoder, decoder)
    if args.start:
        load_start(args, *joined)
    vae = build_vae(encoder, decoder, args)
    rows = fit_stage(vae, data, args, "z", args.epochs)
    rows += fit_detail(vae, (detail_encoder, detail_decoder), joined, data, args, len(rows))
    if not (args.detail_epochs or args.start):
        print("The detail code is not trained: draws of it mean nothing.")
    return *joined, build_autoencoder(encoder, decoder), rows


def evaluate(denoisers, clean, sigmas=SIGMAS, kind="white"):
    """Measure denoisers: seeded noise, output clipped and rounded, mean over images.

    Args:
        denoisers: Dict of functions by label: (noisy float32 (n, H, W, 3), sigma) to denoised uint8.
        clean: uint8 array (N, H, W, 3), or a list of such arrays where images differ in size.

    Returns:
        A dict for each sigma: `sigma`, then PSNR in dB and SSIM of noisy images and of each output.
    """
    if isinstance(clean, np.ndarray):
        clean = np.split(clean, range(util.BATCH, len(clean), util.BATCH))
    advance, table = util.progress(len(sigmas) * len(clean), "batches of images measured"), []
    for sigma in sigmas:
        rng, measured = np.random.default_rng(TEST_NOISE_SEED), defaultdict(list)
        for images in clean:
            noisy, images = add_noise(images, sigma, rng, kind), clean_of(images, kind)
            outputs = {"noisy": util.to_uint8(noisy)}
            outputs |= {label: denoise(noisy, sigma) for label, denoise in denoisers.items()}
            for name, measure in MEASURES.items():
                for label, output in outputs.items():
                    measured[f"{label} {name}"].extend(measure(images, output))
            advance()
        table.append({"sigma": sigma} | {key: float(np.mean(values)) for key, values in measured.items()})
    return table


def blind(models):
    """Saved autoencoders by label as what `evaluate` measures; sigma is not an input of theirs."""
    return {run: lambda noisy, _, model=model: util.denoise(model, noisy) for run, model in models.items()}


def decoded_draws(encoder, decoder, noisy, samples, seed=util.DRAWS_SEED):
    """Images (N, H, W, 3) decoded from the posterior's mean, and (samples, N, H, W, 3) from draws of it."""
    codes = util.code_pairs(encoder.predict(noisy, verbose=0))
    draws = np.stack(list(util.draws(decoder, codes, samples, seed)))
    return decoder.predict([mean for mean, _ in codes], verbose=0), draws


def block_means(images, side):
    """Means of blocks of side x side pixels, (..., H, W, 3) to (..., H // side, W // side, 3)."""
    height, width = (length // side for length in images.shape[-3:-1])
    images = images[..., : height * side, : width * side, :]
    return images.reshape(*images.shape[:-3], height, side, width, side, 3).mean(axis=(-4, -2))


def compare_draws(clean, draws):
    """Compare draws (samples, N, H, W, 3) with the truth (N, H, W, 3), as means of blocks.

    Returns:
        Dict by side of the blocks in pixels of dicts of arrays, one number for each true value: `error` of
        the draws' mean; their `deviation`; `crps` by the estimate that is fair with any number of draws
        (Ferro, "Fair Scores for Ensemble Forecasts", 2014); `gaussian`, the CRPS of a Gaussian around the
        same mean whose deviation is each image's true error (Gneiting, Raftery, 2007, eq. 5); and `rank`:
        how many draws are below the truth.
    """
    samples, compared = len(draws), {}
    order = np.arange(1 - samples, samples, 2, dtype=np.float32) / (samples * (samples - 1))
    for side in CRPS_WEIGHTS:
        truth, drawn = block_means(clean, side), block_means(draws, side)
        error = truth - drawn.mean(axis=0)
        distance = 2 * np.tensordot(order, np.sort(drawn, axis=0), 1)  # mean one of two different draws
        rmse = np.sqrt(np.square(error).mean(axis=(1, 2, 3), keepdims=True))
        x = error / rmse
        values = {
            "error": error,
            "deviation": drawn.std(axis=0, ddof=1),
            "crps": np.abs(drawn - truth).mean(axis=0) - distance / 2,
            "gaussian": rmse * (x * (2 * norm.cdf(x) - 1) + 2 * norm.pdf(x) - 1 / math.sqrt(math.pi)),
            "rank": (drawn < truth).sum(axis=0),
        }
        compared[side] = {key: array.ravel() for key, array in values.items()}
    return compared


def measure_posterior(encoder, decoder, clean, sigma, samples):
    """Measure draws for uint8 images (N, H, W, 3) of whole cells under the protocol's noise.

    Returns:
        What `compare_draws` returns; and a dict of arrays (N,), PSNR in dB: of the `posterior mean` that
        ships as the autoencoder, of the `mean of draws`, of `one draw`, and the `expected` one of the
        posterior mean, from what draws differ from it.
    """
    rng = np.random.default_rng(TEST_NOISE_SEED)
    parts, count = [], util.batch_size_for(clean, POSTERIOR_AT_ONCE, 48)
    advance = util.progress(len(clean), f"images with draws, sigma {sigma}")
    for start in range(0, len(clean), count):
        images = clean[start : start + count]
        noisy = add_noise(images, sigma, rng)
        mean, draws = decoded_draws(encoder, decoder, noisy, samples, (util.DRAWS_SEED, start))
        decoded = {"posterior mean": mean, "mean of draws": draws.mean(axis=0), "one draw": draws[0]}
        psnrs = {label: util.psnr(images, util.to_uint8(output)) for label, output in decoded.items()}
        square = np.square(np.clip(draws, 0, 1) - np.clip(mean, 0, 1)).mean(axis=(0, 2, 3, 4))
        psnrs["expected"] = -10 * np.log10(square)
        parts.append((compare_draws(util.to_float(images), draws), psnrs))
        advance(len(images))
    return keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *parts)


def coverage(rank, samples, share):
    """Share of the true values in the central interval that holds `share` of the draws.

    Among K draws a true value has one of K + 1 ranks, equally likely if draws are calibrated. A rank that an
    end of the interval divides counts in part.
    """
    low, margin = rank / (samples + 1), (1 - share) / 2
    inside = np.minimum(low + 1 / (samples + 1), 1 - margin) - np.maximum(low, margin)
    return float(np.clip(inside * (samples + 1), 0, 1).mean())


def spread_to_skill(compared, samples):
    """Root mean square of the draws' deviation over that of their mean's error, 1 if they are calibrated."""
    variance = np.square(compared["deviation"]).mean(dtype=np.float64) * (1 + 1 / samples)
    return math.sqrt(variance / np.square(compared["error"]).mean(dtype=np.float64))


def calibration_rows(blocks, samples, sigma):
    """Rows of the table of calibration, one for each side of a block; CRPS in grey levels."""
    rows = []
    for side, compared in blocks.items():
        row = {"sigma": sigma, "block": f"{side}x{side}", "spread/skill": spread_to_skill(compared, samples)}
        for share in INTERVALS:
            row[f"in central {share:.0%}"] = coverage(compared["rank"], samples, share)
        for label, score in (("CRPS", "crps"), ("CRPS of Gaussian", "gaussian")):
            row[label] = 255 * float(compared[score].mean(dtype=np.float64))
        rows.append(row)
    return rows


def denoised_rows(models, noisy, label="noisy", clean=None):
    """Rows of a figure: noisy images, and denoised by each model; with PSNR where clean ones are known."""
    outputs = {label: util.to_uint8(noisy)}
    outputs |= {run: util.denoise(model, noisy) for run, model in models.items()}
    return [(row, images, util.psnr_captions(clean, images)) for row, images in outputs.items()]


def reconstruction_figure(models, clean):
    """Rows noisy, denoised by each model, for each sigma, and clean, with PSNR."""
    rows = []
    for sigma in RECONSTRUCTED_SIGMAS:
        rows += denoised_rows(models, add_noise(clean, sigma), f"noisy, sigma {sigma}", clean)
    return util.rows_figure([*rows, ("clean", clean, None)], "Denoising of test images")


def picture_figure(model, noisy, clean=None):
    """A held-out photograph (H, W, 3) noisy, denoised and, if known, clean."""
    denoised, _ = util.denoise_picture(model, noisy)
    pictures, captions = [util.to_uint8(noisy), util.to_uint8(denoised)], ["noisy", "denoised"]
    if clean is not None:
        psnr = util.psnr(np.stack([clean, clean]), np.stack(pictures))
        captions = [f"noisy, sigma {SHOWN_SIGMA}, {psnr[0]:.1f} dB", f"denoised, {psnr[1]:.1f} dB", "clean"]
        pictures.append(clean)
    rows = [("", np.stack(pictures), captions)]
    return util.rows_figure(rows, "A photograph held out of the training", cell=4)


def sweep_figure(models, clean):
    """PSNR and SSIM against sigma of the noisy images and of each model's output."""
    table, labels, panels = evaluate(blind(models), clean, SWEEP), ("noisy", *models), []
    for name in MEASURES:
        curves = {label: (SWEEP, [row[f"{label} {name}"] for row in table]) for label in labels}
        panels.append(("sigma", "PSNR in dB" if name == "PSNR" else name, curves))
    return util.curves_figure(panels, f"Mean over {len(clean)} test images", ticks=SIGMAS)


def posterior_figure(encoder, decoder, clean, blocks, samples):
    """Draws of some images, deviation beside error on one scale, and how well both agree over many images."""
    noisy = add_noise(clean, SHOWN_SIGMA)
    mean, draws = decoded_draws(encoder, decoder, noisy, samples)
    deviation = 255 * np.sqrt(np.square(draws - mean).mean(axis=(0, -1)))
    error = 255 * np.sqrt(np.square(mean - util.to_float(clean)).mean(axis=-1))
    shown = {f"noisy, sigma {SHOWN_SIGMA}": util.to_uint8(noisy), "mean": util.to_uint8(mean)}
    shown |= {f"draw {index + 1}": util.to_uint8(draws[index]) for index in range(SHOWN_DRAWS)}
    rows = [(label, images, util.psnr_captions(clean, images)) for label, images in shown.items()]
    for label, maps in (("deviation", deviation), ("error", error)):
        rows.append((label, maps, [f"{np.sqrt(np.square(values).mean()):.1f}" for values in maps]))
    figure = Figure(figsize=(1.35 * SHOWN + 5.4, 1.55 * (len(rows) + 1)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.35 * SHOWN + 0.6, 4.8))
    title = "Draws of the codes; deviation of the draws beside the error of the mean"
    util.rows_figure([*rows, ("clean", clean, None)], title, figure=left, unit="grey levels")
    panels, chance = calibration_panels(blocks, samples)
    util.curves_figure(panels, f"{samples} draws, sigma {SHOWN_SIGMA}", figure=right)
    right.axes[1].axhspan(1 - chance, 1 + chance, color="0.9", zorder=0)
    return figure


def calibration_panels(blocks, samples):
    """Panels of `util.curves_figure`; and how far from 1 chance moves as many independent means of 8x8."""
    shares, edges = np.linspace(0.05, 0.95, 19), np.linspace(-0.5, samples + 0.5, RANK_BINS + 1)
    reliability, histogram = {}, {}
    for side, compared in blocks.items():
        label = f"means of {side}x{side}" if side > 1 else "pixels"
        reliability[label] = shares, [coverage(compared["rank"], samples, share) for share in shares]
        counts, _ = np.histogram(compared["rank"], edges)
        histogram[label] = (edges[:-1] + edges[1:]) / 2 / samples, RANK_BINS * counts / counts.sum()
    reliability["calibrated"], histogram["calibrated"] = (shares, shares), ((0, 1), (1, 1))
    chance = 2 * math.sqrt((RANK_BINS - 1) / counts.sum())  # two deviations
    return [
        ("central interval of the draws", "share of true values in it", reliability),
        ("share of draws below the truth", "density; grey: by chance", histogram),
    ], chance


def feature_figure(encoder, clean):
    """The channels of each level's z_mean of an image (1, H, W, 3), each scaled to its own range."""
    rows = []
    for level, mean in enumerate(util.level_means(encoder.predict(util.to_float(clean), verbose=0)), start=1):
        maps = mean[0].transpose(2, 0, 1)
        low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
        maps = (maps - low) / np.maximum(high - low, 1e-6)
        for start in range(0, len(maps), 16):
            rows.append((f"level {level}\nfrom {start}", maps[start : start + 16], None))
    return util.rows_figure(rows, "Feature maps of a test image: channels of z_mean, by level", cell=0.7)


def write_gifs(draft, name, folder, noisy, clean):
    """Write GIFs of what `Frames` has kept in a folder: noisy, denoised, clean of one image and of all.

    Clean images are None if nobody knows them.
    """
    paths = sorted(folder.glob("[0-9]*.npy"))  # a kill may have left a temporary file among them
    chosen = np.unique(np.linspace(0, len(paths) - 1, GIF_FRAMES).round().astype(int))
    for kind, count, cell in (("single", 1, 2.4), ("group", SHOWN, 1.35)):
        figures, known = [], None if clean is None else clean[:count]
        for path in (paths[index] for index in chosen):
            denoised, title = np.load(path)[:count], f"training step {int(path.stem):,}"
            captions = util.psnr_captions(known, denoised)
            rows = [("noisy", util.to_uint8(noisy[:count]), None), ("denoised", denoised, captions)]
            if clean is not None:
                rows.append(("clean", known, None))
                title += f", sigma {SHOWN_SIGMA}"
            figures.append(util.rows_figure(rows, title, cell))
        util.save_gif(figures, draft / f"gifs/{name}_{kind}.gif")


def write_sample_maps(draft, name, encoder, data):
    """Write the feature maps of the clean test images and of some clean training images, and a figure."""
    height, width = data.images["test"].shape[1:3]
    for split, count in (("test", len(data.images["test"])), ("train", FEATURE_MAP_TRAIN_IMAGES)):
        chosen = evenly(len(data.images[split]), count)
        images, labels = data.images[split][chosen, :height, :width], data.labels[split][chosen]
        attributes = {"run": name, "dataset": data.name, "split": split, "sigma": 0.0, "pooling": 0}
        path = draft / f"feature_maps/{name}_{split}.h5"
        util.write_feature_maps(path, partial(util.encode, encoder), images, labels, attributes)
    figure = feature_figure(encoder, data.shown("test", 1))
    util.save_figure(figure, draft / f"feature_maps/{name}.png")


def write_run(args, models, encoder, decoder, data, rows, more=None):
    """Write all that a training leaves behind; `models` are autoencoders to compare, by run, its own last."""
    name, frames = args.name, util.training_folder(args.out, args.name) / "frames"
    models = {label: util.portable_copy(model) for label, model in models.items()}
    encoder, decoder = util.portable_copy(encoder), util.portable_copy(decoder)
    without_clean = args.noise == [OWN]
    monitor = (NeighbourVAE if without_clean else DenoisingVAE).monitor
    with util.publishing(args.out, name) as draft:
        for part, model in (("encoder", encoder), ("decoder", decoder), ("autoencoder", models[name])):
            util.save_model(draft, model, f"{part}_{name}")
        util.write_csv(draft / f"logs/{name}.csv", rows)
        record = util.describe_run(args, rows) | {"data": data.identity}
        record["best"] = util.best_row(rows, monitor)
        record["training_images"] = len(data.images[data.denoiser_split])
        record["pixels_seen"] = sum(row["pixels"] for row in rows)
        metrics, results = METRICS, {}
        if without_clean:
            metrics = {"loss": "loss"} | METRICS
            draw_without_clean(draft, name, models, data)
        else:
            results, blocks = measure_and_print(models, encoder, decoder, data, TEST_IMAGES, *QUICK_DRAWS)
            print("Writing figures and feature maps", flush=True)
            draw_results(draft, name, models, encoder, decoder, data, blocks, QUICK_DRAWS[1])
        util.save_figures(draft, name, {"history": util.history_figure(rows, metrics, name)})
        if frames.exists():
            write_gifs(draft, name, frames, *gif_images(data, args))
        write_sample_maps(draft, name, encoder, data)
        util.write_record(draft, name, record | (more or {}) | results)
    shown = "reconstructions" if data.shown_picture is None else "picture"
    print(f"Written to {args.out}: all files of {name}; first look at figures/{name}_{shown}.png")


def draw_without_clean(draft, name, models, data):
    """Write the figures of a run whose images are noisy: as they are, and denoised."""
    rows = denoised_rows(models, util.to_float(data.shown("test", SHOWN)))
    figures = {"reconstructions": util.rows_figure(rows, "Denoising of held-out images")}
    if data.shown_picture is not None:
        figures["picture"] = picture_figure(models[name], util.to_float(data.shown_picture))
    util.save_figures(draft, name, figures)


def draw_results(draft, name, models, encoder, decoder, data, blocks, samples):
    """Write the figures of what `measure_and_print` measured, `figures/NAME_*.png`."""
    shown = data.shown("test", SHOWN)
    figures = {
        "reconstructions": reconstruction_figure(models, shown),
        "sweep": sweep_figure(models, data.first("test", SWEEP_IMAGES)),
        "posterior": posterior_figure(encoder, decoder, shown, blocks, samples),
    }
    if data.shown_picture is not None:
        clean = data.shown_picture
        figures["picture"] = picture_figure(models[name], add_noise(clean[None], SHOWN_SIGMA)[0], clean)
    util.save_figures(draft, name, figures)


def measure_and_print(models, encoder, decoder, data, count, pixels, samples):
    """Measure and print; return the tables for the record, and the draws compared at SHOWN_SIGMA."""
    clean = data.first("test", count)
    size = f"images of {clean.shape[2]}x{clean.shape[1]}"
    table = evaluate(blind(models), clean)
    print(f"\nPSNR in dB and SSIM of the first {len(clean):,} test {size} of {data.name}, white noise:")
    print(util.format_table(table), flush=True)
    results = {"evaluation": {f"{data.name}, {len(clean)} {size}": table}}
    clean = clean[: max(1, pixels // math.prod(clean.shape[1:3]))]
    calibration, quality, shown_blocks = [], [], None
    for sigma in POSTERIOR_SIGMAS:
        blocks, psnrs = measure_posterior(encoder, decoder, clean, sigma, samples)
        if sigma == SHOWN_SIGMA:
            shown_blocks = blocks
        calibration += calibration_rows(blocks, samples, sigma)
        row = {"sigma": sigma} | {f"{label} PSNR": float(values.mean()) for label, values in psnrs.items()}
        row["correlation"] = float(np.corrcoef(psnrs["posterior mean"], psnrs["expected"])[0, 1])
        quality.append(row)
    print(f"\n{samples} draws of each of the first {len(clean):,}. {CALIBRATION_EXPLAINED}")
    print(util.format_table(calibration))
    print(f"\n{QUALITY_EXPLAINED}")
    print(util.format_table(quality), flush=True)
    results["posterior"] = {f"{data.name}, {len(clean)} {size}, {samples} draws": (calibration, quality)}
    return results, shown_blocks


def learnt_without_clean(record):
    """Whether the run of a record has seen noisy images alone."""
    return record.get("arguments", {}).get("noise") == [OWN]


def evaluate_saved(args):
    """Evaluate a saved run; draw its figures anew if data, --size and --images are those of the training."""
    record = util.read_record(args.out, args.name)
    if learnt_without_clean(record):
        raise DataError(f"{args.name}: {WITHOUT_CLEAN}; measure it with --pictures and --noisy")
    names = [record["base"], args.name] if record.get("base") else [args.name]
    models = {run: util.load_model(args.out, run, "autoencoder") for run in names}
    parts = [util.load_model(args.out, args.name, part) for part in ("encoder", "decoder")]
    dataset = args.dataset or record.get("data", {}).get("name", "cifar10")
    trained_size = util.size_of_run(record, dataset_name(dataset))
    data = load_data(dataset, args.data_dir, args.size or trained_size).in_cells(util.STRIDE)
    results, blocks = measure_and_print(models, *parts, data, args.images, *ALL_DRAWS)
    for section in ("evaluation", "posterior"):
        results[section] = record.get(section, {}) | results[section]
    written = f"record of {args.name}"
    with util.publishing(args.out, args.name) as draft:
        same_data = record.get("data") == data.identity and args.size in (None, trained_size)
        if same_data and args.images == TEST_IMAGES:
            draw_results(draft, args.name, models, *parts, data, blocks, ALL_DRAWS[1])
            written += " and figures"
        util.write_record(draft, args.name, record | results)
    print(f"Written to {args.out}: {written}")


def root_mean_square(errors):
    """Root mean square of an array."""
    return math.sqrt(np.square(errors, dtype=np.float64).mean())


def psnr_of(error):
    """PSNR in dB of a root mean square error in grey levels; infinite where there is none."""
    return 20 * math.log10(255 / error) if error else math.inf


def load_parts(args, precision="float32"):
    """Saved autoencoder; with --samples, the encoder and decoder of the same run after it."""
    if args.samples and learnt_without_clean(util.read_record(args.out, args.name)):
        raise DataError(f"{args.name}: {WITHOUT_CLEAN}, which tell no errors to expect; leave out --samples")
    parts = ("autoencoder", "encoder", "decoder") if args.samples else ("autoencoder",)
    return [util.load_model(args.out, args.name, part, precision) for part in parts]


def print_model(args):
    """Say which model denoises and, with --samples, what its expected errors are worth."""
    print(f"Denoised by {args.name}", flush=True)
    if args.samples:
        print(f"Expected errors are {EXPECTED_ERRORS_ARE}.", flush=True)


def picture_row(clean, noisy, models, samples=0, ensemble=1):
    """Denoise a picture of a test set; its row of the table."""
    autoencoder, *posterior = models
    denoised, errors = util.denoise_picture(autoencoder, noisy, 1, posterior, samples, ensemble)
    noisy, denoised = (util.to_uint8(util.to_float(picture)) for picture in (noisy, denoised))
    row = {}
    for name, measure in MEASURES.items():
        for label, picture in (("noisy ", noisy), ("", denoised)):
            row[f"{label}{name}"] = float(measure(clean[None], picture[None])[0])
    if samples:
        true = np.abs(clean - denoised.astype(np.float32))
        row["expected PSNR"] = psnr_of(root_mean_square(errors))
        # 0.9 if errors are Gaussian and as large as expected; 0.88 of 16 draws, which tell the size roughly
        row["below 1.645 expected errors"] = float((true <= 1.645 * errors[..., None]).mean())
    return row


def readable_pairs(pairs):
    """Those of `picture_pairs` that can be measured; the others are named, before the work."""
    readable = {}
    for name, paths in pairs.items():
        try:
            read_pair(*paths)
            readable[name] = paths
        except OSError as error:
            print(util.error_line(error), file=sys.stderr, flush=True)
    return readable


def evaluate_pictures(args):
    """Measure a saved model on a folder of pictures of any size; print a row for each and their mean."""
    models = load_parts(args)
    pairs = picture_pairs(args.pictures, args.noisy or args.pictures)
    readable = readable_pairs(pairs)
    if not readable:
        raise DataError(f"{args.pictures}: no picture in it can be measured, for the reasons above")
    print_model(args)
    noises = [(kind, sigma) for kind in args.noise for sigma in SIGMAS]
    summary = []
    for kind, sigma in [("as given", None)] if args.noisy else noises:
        rows, label = [], f"{kind} {sigma}" if sigma else kind
        for name, clean, noisy in pictures_with_noise(readable, kind, sigma):
            row = picture_row(clean, noisy, models, args.samples, args.self_ensemble)
            rows.append({"noise": label, "picture": name} | row)
        means = {key: float(np.mean([row[key] for row in rows])) for key in list(rows[0])[2:]}
        summary.append({"noise": label, "picture": f"mean of {len(rows)}"} | means)
        print(util.format_table([*rows, summary[-1]]), flush=True)
    if len(summary) > 1:
        print(util.format_table(summary))
    if failed := len(pairs) - len(readable):
        raise DataError(f"{args.pictures}: {failed} of {len(pairs)} pictures were not measured, see above")


def deviation_path(target):
    """Where the error to expect at each pixel of a denoised picture is written."""
    return target.parent / DEVIATIONS / f"{target.stem}.png"


def denoise_file(source, target, load, args):
    """Denoise a picture file by the models that `load` gives for a precision; a line of what came out."""
    started = time.monotonic()
    pixels, alpha, metadata = read_pixels(source)
    format_for(target, pixels, alpha)  # before the work
    deep = pixels.dtype == np.uint16  # which bfloat16 would change by up to a grey level
    autoencoder, *posterior = load("float32" if deep else args.precision)
    denoised, errors = util.denoise_picture(
        autoencoder, pixels, args.strength, posterior, args.samples, args.self_ensemble
    )
    removed = root_mean_square(pixels - denoised.astype(np.float32)) / (257 if deep else 1)
    line = f"{target}: {pixels.shape[1]}x{pixels.shape[0]}, noise of {removed:.2f} grey levels removed"
    if posterior:
        brightness = np.minimum(np.round(DEVIATION_SCALE * errors), 255).astype(np.uint8)
        write_pixels(deviation_path(target), upright(brightness[..., None], metadata))
        error = root_mean_square(errors)
        line += f", expected error {error:.2f} (PSNR {psnr_of(error):.2f} dB)"
    write_pixels(target, denoised, alpha, metadata)
    return f"{line}, {time.monotonic() - started:.1f} s"


def pictures_in(folder, to):
    """Pictures of a folder and its subfolders, without what `denoise` has written there."""
    results = to.resolve()
    nested = results.is_relative_to(folder.resolve())
    return [
        path
        for path in image_files(folder)
        if not (nested and path.parent.resolve().is_relative_to(results))
        and DEVIATIONS not in path.relative_to(folder).parent.parts
    ]


def sources_and_targets(pictures, to, samples=0):
    """Pairs of a picture file and the one to write; `to` is a folder, or a file name for a single picture."""
    if len(pictures) == 1 and to.suffix and not pictures[0].is_dir() and not to.is_dir():
        pairs = [(pictures[0], to)]
    elif to.suffix.lower() in SUFFIXES and not to.is_dir():
        raise DataError(f"{to}: the name of one file, for what may be several; choose a folder")
    else:
        pairs = []
        for path in pictures:
            if path.is_dir():
                pairs += [(file, to / file.relative_to(path)) for file in pictures_in(path, to)]
            else:
                pairs.append((path, to / path.name))
    sources = {source.resolve() for source, _ in pairs}
    results = [target for _, target in pairs]
    if samples:
        results += [deviation_path(target) for target in results]
    for path, count in Counter(results).items():
        if count > 1:
            raise DataError(f"{path}: {count} results would have this name; denoise into several folders")
        if path.resolve() in sources:
            raise DataError(f"{path}: a picture to denoise, which is never replaced; choose another --to")
    if not pairs:
        raise DataError(f"{to}: holds all the pictures, and what it holds are results; choose another --to")
    return pairs


def denoise_pictures(args):
    """Denoise picture files; one that fails is named, and the others go on."""
    pairs = sources_and_targets(args.pictures, args.to, args.samples)
    pairs[0][1].parent.mkdir(parents=True, exist_ok=True)
    load = cache(partial(load_parts, args))
    load(args.precision)  # a model that is missing is named before the work
    print_model(args)
    written = kept = failed = 0
    for source, target in pairs:
        if target.exists() and not args.force:
            kept += 1
            continue
        try:
            line = denoise_file(source, target, load, args)
        except Exception as error:  # the others go on whatever it is, as too little memory
            failure = error if isinstance(error, OSError) else OSError(f"{source}: {util.first_line(error)}")
            print(util.error_line(failure), file=sys.stderr, flush=True)
            failed += 1
        else:
            print(line, flush=True)
            written += 1
    counted = f"{args.to}: {written} written, {kept} there already (--force replaces them), {failed} failed"
    if failed:
        raise DataError(f"{counted}, for the reasons above")
    print(counted)


def add_train_options(parser):
    """Add the options of a training run."""
    add_data_options(parser)
    util.add_training_options(parser, EPOCHS, BATCH_SIZE)
    add, number = parser.add_argument, util.number
    strength, share = number(float, 0, 255), number(float, 0)
    words = "range of the training noise's standard deviation, on the 0-255 scale"
    add("--sigma", type=strength, nargs=2, default=SIGMA_RANGE, metavar=("LOW", "HIGH"), help=words)
    add("--detail-epochs", type=number(int, 0), default=DETAIL_EPOCHS, help="passes for the detail code")
    add("--filters", type=number(int, 12), default=FILTERS, help="channels; of a stack, those of level two")
    add("--latent-dim", type=number(int, 12), default=LATENT_DIM, help="channels of z; of a stack, of z2")
    add("--kl-weight", type=share, default=KL_WEIGHT, help="weight of the KL term")
    add("--learning-rate", type=share, default=LEARNING_RATE, help="highest learning rate")
    kinds = (*NOISE_KINDS, "photographs", OWN)
    words = f"kinds of training noise, in equal shares: {', '.join(NOISE_KINDS)}; or photographs, a mix; "
    words += f"or {OWN}, that of a folder's noisy pictures, none of which has a clean version"
    add("--noise", choices=kinds, nargs="+", default=["white"], metavar="KIND", help=words)
    words = f"with --noise {OWN}: pixels between two whose noise is independent; of cameras 2 or more"
    add("--distance", type=number(int, 1, 4), default=1, help=words)


def add_saved_model_options(parser, default="from the data set"):
    """Add what `evaluate` and `denoise` share: which saved model, and how it is applied to pictures."""
    util.add_saved_run_options(parser, default)
    add = parser.add_argument
    words = f"print the error to expect, {EXPECTED_ERRORS_ARE}, from K draws of the code, in about ten times "
    words += f"the time; denoise also writes it for each pixel, as {DEVIATIONS}/NAME.png of brightness "
    words += f"{DEVIATION_SCALE} for a grey level"
    add("--samples", type=util.number(int, 0), default=0, metavar="K", help=words)
    counts = {"type": int, "nargs": "?", "choices": (2, 4, 8), "default": 1, "const": 8, "metavar": "N"}
    words = "mean of the results for N positions, mirrored and turned: 2, 4, or 8, which is meant without N"
    add("--self-ensemble", **counts, help=words)


def add_evaluate_options(parser):
    """Add the options of the verb `evaluate`."""
    add_data_options(parser, default=None)
    add_saved_model_options(parser)
    add = parser.add_argument
    add("--images", type=util.number(int, 1), default=TEST_IMAGES, help="how many test images to use")
    words = f"measure {PHOTOGRAPHS_RUN}, or --name, on whole pictures of this folder instead"
    add("--pictures", type=Path, metavar="CLEAN", help=words)
    add("--noisy", type=Path, help="folder of the same pictures with real noise")
    words = f"noise to add to --pictures, of sigma {SIGMAS[0]} to {SIGMAS[-1]}: {', '.join(NOISE_KINDS)}"
    add("--noise", choices=NOISE_KINDS, nargs="+", default=["white"], metavar="KIND", help=words)


def add_denoise_options(parser):
    """Add the options of the verb `denoise`."""
    add = parser.add_argument
    add("pictures", metavar="IN", type=Path, nargs="+", help="picture files, or folders of them")
    add("--to", type=Path, required=True, help="folder to write to, or a file name for a single picture")
    add_saved_model_options(parser, PHOTOGRAPHS_RUN)
    words = "from 0, the picture itself, to 1, all of the model's result"
    add("--strength", type=util.number(float, 0, 1), default=1.0, help=words)
    util.add_precision_option(parser)
    add("--force", action="store_true", help="replace pictures that are there already")


def check_train(args, parser):
    """End in a usage error if options of `train` do not go together."""
    if args.sigma[0] > args.sigma[1]:
        parser.error(f"argument --sigma: LOW {args.sigma[0]} is above HIGH {args.sigma[1]}")
    if len(args.noise) > 1 and {"photographs", OWN} & set(args.noise):
        parser.error(f"argument --noise: photographs, a mix of kinds, and {OWN} are given alone")
    if args.noise == [OWN]:
        if args.dataset in ("cifar10", "stl10"):
            parser.error(
                f"argument --noise: {OWN} is that of a folder of noisy pictures; name it with --dataset"
            )
        args.detail_epochs = 0  # what noise has destroyed is not seen without clean images
    if not (args.epochs or args.start):
        parser.error("argument --epochs: 0 keeps what --start names; add --start, or train for an epoch")


def check_evaluate(args, parser):
    """End in a usage error if options of `evaluate` do not go together."""
    excluded, reason = ("noisy", "noise", "samples", "self_ensemble"), "of --pictures only"
    if args.pictures:
        excluded, reason = ("dataset", "size", "images"), "not with --pictures"
    for option in excluded:
        if getattr(args, option) != parser.get_default(option):
            parser.error(f"argument --{option.replace('_', '-')}: {reason}")
    if args.noisy and args.noise != parser.get_default("noise"):
        parser.error("argument --noise: not with --noisy, whose pictures have noise")


def parse_args(argv=None, kind="simple", description=__doc__, add_own_options=lambda parser: None):
    """Parse the command line of this script, or of one that trains another `kind` of model the same way.

    `add_own_options` adds to the options of its `train`, or changes their defaults.
    """

    def default_name(args):
        own_pictures = getattr(args, "pictures", None)
        return PHOTOGRAPHS_RUN if own_pictures else f"{kind}_{dataset_name(args.dataset or 'cifar10')}"

    argv, parser, add_verb = util.verb_parser(argv, description)
    train_parser = add_verb("train", help="train a model and save it")
    add_train_options(train_parser)
    add_own_options(train_parser)
    evaluate_parser = add_verb("evaluate", help="measure a saved model")
    add_evaluate_options(evaluate_parser)
    add_denoise_options(add_verb("denoise", help="denoise your own pictures"))
    args = util.parse_resumable(parser, train_parser, argv, default_name)
    if args.verb == "train":
        check_train(args, train_parser)
    elif args.verb == "evaluate":
        check_evaluate(args, evaluate_parser)
    return args


def use_saved(args):
    """Do what the verbs `denoise` and `evaluate` ask for."""
    if args.verb == "denoise":
        denoise_pictures(args)
    elif args.pictures:
        evaluate_pictures(args)
    else:
        evaluate_saved(args)


def main(argv=None):
    args = parse_args(argv)
    if args.verb != "train":
        use_saved(args)
        return
    data = load_training_data(args)
    with util.training(__file__, args, data.checksums, "autoencoder"):
        encoder, decoder, autoencoder, rows = train(args, data)
        write_run(args, {args.name: autoencoder}, encoder, decoder, data, rows)


if __name__ == "__main__":
    util.run_script(main)
