import contextlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import classifier
import simple_autoencoder as simple
import util
from load_data import SIGMAS, Batches, Data, add_noise, picture_pairs, pictures_with_noise, validation_pair
from stl10_input import read_all_images

import h5py
import imageio.v3 as iio
import keras
import numpy as np
import pytest
from conftest import (
    NAME,
    TINY,
    assert_same_weights,
    curves_of,
    files_of,
    labels_of,
    largest_file,
    legend_of,
    pixels_of,
    printed_by,
    random_images,
    rows_of,
    run,
    save_run,
    shaken,
    small_detail_models,
    small_models,
    start,
    stop_at,
    table_rows,
    told_line,
    usage_error,
    wait_for,
    without_greeting,
)
from scipy.stats import norm


def joined_models():
    """Autoencoder, encoder and decoder with all codes, shaken."""
    z, detail = ([shaken(model) for model in models()] for models in (small_models, small_detail_models))
    encoder, decoder = simple.join_encoders(z[0], detail[0]), simple.join_decoders(z[1], detail[1])
    return simple.build_autoencoder(*z), encoder, decoder


def test_untrained_model_is_the_identity():
    encoder, decoder = small_models()
    images = np.random.default_rng(0).random((2, 10, 6, 3)).astype(np.float32)
    np.testing.assert_allclose(simple.build_autoencoder(encoder, decoder)(images), images, atol=1e-6)


def test_autoencoder_is_the_decoder_of_the_encoders_means():
    autoencoder, encoder, decoder = joined_models()
    images = np.random.default_rng(0).random((2, 8, 8, 3)).astype(np.float32)
    means = [mean for mean, _ in util.code_pairs(encoder.predict(images, verbose=0))]
    expected = autoencoder.predict(images, verbose=0)
    np.testing.assert_array_equal(decoder.predict(means, verbose=0), expected)
    means[1] += 1  # the detail code reaches the image, too
    assert np.abs(decoder.predict(means, verbose=0) - expected).max() > 1e-3


def test_order_of_the_encoders_outputs():
    # Keras keys weights by class and order: swapped, heads of one shape would load each other's kernels
    encoder = simple.join_encoders(small_models()[0], small_detail_models()[0])
    z_mean, z_log_var, detail_mean, detail_log_var = encoder(np.zeros((1, 4, 4, 3), np.float32))
    assert float(z_mean[0, 0, 0, 0]) == pytest.approx(-0.5)
    for output, value in ((z_log_var, simple.INITIAL_LOG_VAR), (detail_mean, 0), (detail_log_var, 0)):
        np.testing.assert_array_equal(output, np.full((1, 2, 2, 14), value))


def test_kl_divergence_against_sampling():
    rng = np.random.default_rng(0)
    mean, log_var = rng.normal(0, 1, (1, 1, 1, 4)), rng.normal(0, 1, (1, 1, 1, 4))
    z = mean + np.exp(log_var / 2) * rng.normal(0, 1, (400_000, 1, 1, 4))
    log_ratio = 0.5 * (z**2 - (z - mean) ** 2 / np.exp(log_var) - log_var)  # log q(z) - log p(z)
    estimate = log_ratio.sum(axis=(1, 2, 3))
    error = estimate.std() / np.sqrt(len(z))
    codes = [(mean.astype(np.float32), log_var.astype(np.float32))]
    (found,) = simple.kl_divergence(codes, np.zeros((1, 1, 1, 3)))  # of three pixel values
    assert 3 * float(found) == pytest.approx(estimate.mean(), abs=4 * error)


def test_loss_against_its_formula():
    vae = simple.DenoisingVAE(*map(shaken, small_models()), kl_weight=0.25)
    clean = random_images(3, 8, 8, 3).astype(np.float32) / 255
    noisy = add_noise(random_images(3, 8, 8, 3), 25)
    loss = float(vae.compute_loss(noisy, clean, vae(noisy, training=False), training=False))
    mean, log_var = (np.asarray(code) for code in vae.encoder(noisy))
    mse = ((np.asarray(vae.decoder(mean)) - clean) ** 2).mean(axis=(1, 2, 3))
    kl = 0.5 * (mean**2 + np.exp(log_var) - 1 - log_var).sum(axis=(1, 2, 3)) / (8 * 8 * 3)
    assert loss == pytest.approx(np.mean(0.5 * np.log(mse + 255.0**-2) + 0.25 * kl), rel=1e-4)
    assert float(vae.measured["kl"].result()) == pytest.approx(kl.mean(), rel=1e-4)
    assert float(vae.measured["psnr"].result()) == pytest.approx(np.mean(-10 * np.log10(mse)), rel=1e-4)


def test_training_noise_has_a_sigma_of_its_own_for_each_image():
    vae = simple.DenoisingVAE(*small_models())
    batches = Batches(np.full((400, 16, 16, 3), 128, np.uint8), 400, sigma=(10, 50))
    (clean, told), _ = batches[0]
    sigma = (np.asarray(vae.noisy((clean, told))) - clean).std(axis=(1, 2, 3)) * 255
    np.testing.assert_allclose(sigma, 255 * told[:, 0, 0, 0], rtol=0.12)
    assert 9 < sigma.min() < 12
    assert 47 < sigma.max() < 53
    assert abs(sigma.mean() - 30) < 4 * 40 / np.sqrt(12 * 400)  # uniform: deviation 40 / sqrt(12)
    np.testing.assert_array_equal(vae.noisy(clean), clean)


def test_no_epoch_repeats_the_noise_of_another():
    vae = simple.DenoisingVAE(*small_models())
    batches = Batches(random_images(4, 8, 8, 3), 2)
    start_of = simple.EpochStart(batches, epochs_before=2)
    start_of.set_model(vae)
    clean = np.full((2, 8, 8, 3), 0.5, np.float32)
    seen = []
    for epoch in (0, 1, 2, 3, 0):
        start_of.on_epoch_begin(epoch)
        assert batches.epoch == epoch + 2
        for _ in range(4):
            noisy = np.asarray(vae.noisy((clean, np.full((2, 1, 1, 1), 0.1, np.float32))))
            seen.append(noisy.tobytes())
    assert len(set(seen)) == 16
    assert seen[:4] == seen[16:]  # the same epoch again draws the same


def test_codes_are_sampled_with_the_posteriors_deviation():
    vae = simple.DenoisingVAE(*small_models())
    mean, log_var = np.full((1, 50, 50, 14), 3.0, np.float32), np.full((1, 50, 50, 14), -2.0, np.float32)
    z = np.asarray(vae.sample(mean, log_var))
    assert z.mean() == pytest.approx(3, abs=0.01)
    assert z.std() == pytest.approx(np.exp(-1), abs=0.01)


def test_noise_and_samples_only_in_training():
    vae = simple.DenoisingVAE(*map(shaken, small_models()))
    images = np.random.default_rng(0).random((1, 8, 8, 3)).astype(np.float32)
    first, second = (np.asarray(vae(images)[0]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    first, second = (np.asarray(vae(images, training=True)[0]) for _ in range(2))
    assert np.abs(first - second).max() > 0.01


def test_evaluation_against_a_plain_loop():
    autoencoder = simple.build_autoencoder(*map(shaken, small_models()))
    clean = random_images(3, 12, 12, 3)
    (row,) = simple.evaluate(simple.blind({"simple": autoencoder}), clean, [25])
    noise = np.random.default_rng(0).normal(0, 25 / 255, clean.shape)
    noisy = (clean / 255 + noise).astype(np.float32)
    for label, output in {"noisy": noisy, "simple": np.asarray(autoencoder(noisy))}.items():
        output = np.round(np.clip(output, 0, 1) * 255)
        psnr = [10 * np.log10(255**2 / np.mean((a - b) ** 2)) for a, b in zip(output, clean, strict=True)]
        assert row[f"{label} PSNR"] == pytest.approx(np.mean(psnr), abs=0.01)


def test_detail_loss_against_its_formula():
    detail = [shaken(model) for model in small_detail_models()]
    vae = simple.DetailVAE(*map(shaken, small_models()), *detail, kl_weight=0.25)
    clean = random_images(3, 16, 16, 3).astype(np.float32) / 255
    noisy = add_noise(random_images(3, 16, 16, 3), 25)
    (a, b), codes = vae(noisy, training=False)
    a, b = np.array(a), np.array(b)
    b[2] = a[2] + 1e-4  # which is less than a grey level
    loss = float(vae.compute_loss(noisy, clean, ((a, b), codes), training=False))
    weight = 1 / np.maximum(1 / 255, abs(a - b).mean(axis=(1, 2, 3), keepdims=True))
    assert list(weight.ravel() > 254) == [False, False, True]
    mean, log_var = map(np.asarray, *codes)
    assert not mean.any()
    kl = 0.5 * (np.exp(log_var) - 1 - log_var).sum(axis=(1, 2, 3)) / clean[0].size
    expected = 0.25 * kl.mean()
    for side, share in simple.CRPS_WEIGHTS.items():
        one, two, true = (simple.block_means(images, side) for images in (a, b, clean))
        expected += share * (weight * (abs(one - true) + abs(two - true) - abs(one - two)) / 2).mean()
    assert loss == pytest.approx(expected, rel=1e-4)
    assert float(vae.measured["detail_kl"].result()) == pytest.approx(kl.mean(), rel=1e-4)
    assert [model.trainable for model in (vae.encoder, vae.decoder)] == [False, False]


def test_score_of_draws_is_best_for_the_true_distribution():
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, (20, 50, 50, 3))
    scores = {}
    for mean, deviation in ((0, 1), (0, 0.6), (0, 1.6), (0.4, 1)):
        draws = rng.normal(mean, deviation, (8, *truth.shape)).astype(np.float32)
        scores[mean, deviation] = simple.compare_draws(truth, draws)[1]["crps"].mean()
    assert min(scores, key=scores.get) == (0, 1)
    assert scores[0, 1] == pytest.approx(1 / np.sqrt(np.pi), abs=0.01)  # of a Gaussian by itself


def test_draws_are_compared_with_the_truth_as_by_hand():
    clean = np.random.default_rng(0).random((2, 8, 9, 3)).astype(np.float32)
    draws = np.random.default_rng(1).random((5, 2, 8, 9, 3)).astype(np.float32)
    compared = simple.compare_draws(clean, draws)[1]
    distances = [abs(draws[a] - draws[b]) for a in range(5) for b in range(5) if a != b]
    expected = {
        "error": clean - draws.mean(axis=0),
        "deviation": draws.std(axis=0, ddof=1),
        "crps": abs(draws - clean).mean(axis=0) - np.mean(distances, axis=0) / 2,
        "rank": (draws < clean).sum(axis=0),
    }
    for key, values in expected.items():
        np.testing.assert_allclose(compared[key], values.ravel(), atol=1e-6)
    blocks = clean[:, :, :8].reshape(2, 4, 2, 4, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(simple.block_means(clean, 2), blocks)


@pytest.mark.parametrize(
    # what the central 90 % of 64 draws cover of a Gaussian, from the binomial distribution of its rank;
    # how high its rank histogram is at its ends
    ("factor", "share", "ends"),
    [(1, 0.9, 1), (0.5, 0.602, 3.1), (2, 0.997, 0.03)],
)
def test_draws_of_a_deviation_of_their_own_are_found_to_have_it(factor, share, ends):
    rng = np.random.default_rng(0)
    clean = rng.normal(0.5, 0.1, (20, 32, 32, 3))
    draws = rng.normal(0.5, 0.1 * factor, (64, *clean.shape)).astype(np.float32)
    blocks = simple.compare_draws(clean, draws)
    row = simple.calibration_rows(blocks, 64, 25)[0]
    assert (row["sigma"], row["block"]) == (25, "1x1")
    assert row["spread/skill"] == pytest.approx(factor, rel=0.03)
    assert row["in central 90%"] == pytest.approx(share, abs=0.01)
    assert row["CRPS of Gaussian"] == pytest.approx(25.5 * np.sqrt((1 + factor**2 / 64) / np.pi), rel=0.01)
    panels, chance = simple.calibration_panels(blocks, 64)
    reliability, histogram = (curves for *_, curves in panels)
    assert reliability["pixels"][1][-2] == pytest.approx(share, abs=0.01)
    assert histogram["pixels"][1][0] == pytest.approx(ends, abs=0.15)
    farthest = np.abs(np.array(histogram["means of 8x8"][1]) - 1).max()
    assert farthest < 2 * chance if factor == 1 else farthest > 2 * chance


def test_central_interval_is_one_of_quantiles_whatever_the_distribution():
    ranks = np.arange(5)  # of 4 draws
    for share, inside in ((0.6, [0, 1, 1, 1, 0]), (0.5, [0, 0.75, 1, 0.75, 0])):
        np.testing.assert_allclose([simple.coverage(rank, 4, share) for rank in ranks], inside)
    rng = np.random.default_rng(0)
    clean, draws = rng.laplace(size=(40, 32, 32, 3)), rng.laplace(size=(64, 40, 32, 32, 3))
    compared = simple.compare_draws(clean, draws.astype(np.float32))[1]
    for share in simple.INTERVALS:
        assert simple.coverage(compared["rank"], 64, share) == pytest.approx(share, abs=0.01)


def test_draws_are_calibrated_by_one_number():
    _, encoder, decoder = joined_models()
    clean, args = random_images(40, 16, 16, 3), Namespace(sigma=(0, 40), noise=["white"])
    noisy = clean[:1] / np.float32(255)
    before = encoder.predict(noisy, verbose=0)
    assert simple.spread_to_skill({"deviation": np.ones(3), "error": np.ones(3)}, 4) == pytest.approx(
        1.25**0.5
    )
    ratios, models = [], (util.portable_copy(encoder), util.portable_copy(decoder))
    for part in zip(
        *(np.split(each, 4) for each in validation_pair(clean, {"white": 1}, (0, 40))), strict=True
    ):
        compared = simple.compare_draws(part[1], simple.decoded_draws(*models, part[0], 8)[1])
        ratios += [simple.spread_to_skill(block, 8) for block in compared.values()]
    ratio = simple.calibrate(encoder, decoder, clean, args)
    assert ratio == pytest.approx(np.prod(ratios) ** (1 / 16), rel=1e-4)
    assert abs(np.log(ratio)) > 0.1
    after = encoder.predict(noisy, verbose=0)
    for index in range(3):
        np.testing.assert_array_equal(before[index], after[index])
    np.testing.assert_allclose(after[3], before[3] - 2 * np.log(ratio), atol=1e-5)
    # the mean of draws moves a little with their deviation
    again = [simple.calibrate(encoder, decoder, clean, args) for _ in range(4)]
    assert again[-1] == pytest.approx(1, abs=0.03)


def test_posterior_is_measured_as_by_a_plain_loop(monkeypatch):
    monkeypatch.setattr(simple, "POSTERIOR_AT_ONCE", 2)
    autoencoder, encoder, decoder = joined_models()
    clean = random_images(3, 8, 8, 3)
    measured, psnrs = simple.measure_posterior(encoder, decoder, clean, 25, samples=4)
    noisy, rng = add_noise(clean, 25), np.random.default_rng((2, 0))
    outputs = encoder.predict(noisy[:2], verbose=0)
    draws = []
    for _ in range(4):
        noise = [rng.standard_normal(outputs[0].shape, np.float32) for _ in range(2)]
        z, detail = (
            mean + np.exp(log_var / 2) * values
            for mean, log_var, values in zip(outputs[::2], outputs[1::2], noise, strict=True)
        )
        draws.append(decoder.predict([z, detail], verbose=0))
    draws = np.stack(draws)
    mean = autoencoder.predict(noisy, verbose=0)
    squares = (np.clip(draws, 0, 1) - np.clip(mean[:2], 0, 1)) ** 2
    expected = {
        "posterior mean": util.psnr(clean, util.to_uint8(mean))[:2],
        "one draw": util.psnr(clean[:2], util.to_uint8(draws[0])),
        "mean of draws": util.psnr(clean[:2], util.to_uint8(draws.mean(axis=0))),
        "expected": -10 * np.log10(squares.mean(axis=(0, 2, 3, 4))),
    }
    for label, values in expected.items():
        assert psnrs[label].shape == (3,)
        np.testing.assert_allclose(psnrs[label][:2], values, atol=0.01)
    for side in (1, 4):
        error = simple.block_means(clean[:2] / 255, side) - simple.block_means(draws, side).mean(axis=0)
        np.testing.assert_allclose(measured[side]["error"][: error.size], error.ravel(), atol=1e-4)


def test_draws_have_the_posteriors_deviation():
    encoder, decoder = small_models()  # the identity, with a log-variance of -10 for each value of a cell
    decoder = keras.Model([decoder.input], decoder.output)  # takes a list, as all that are saved
    noisy = np.full((2, 8, 8, 3), 0.4, np.float32)
    mean, draws = simple.decoded_draws(encoder, decoder, noisy, 200)
    assert draws.shape == (200, 2, 8, 8, 3)
    np.testing.assert_allclose(mean, noisy, atol=1e-6)
    assert draws.std() == pytest.approx(np.exp(-5), rel=0.02)
    assert draws.mean() == pytest.approx(0.4, abs=1e-4)


def test_learning_rate_rises_and_falls():
    rate = simple.build_optimizer(1e-3, 1000)._learning_rate
    found = [float(rate(step)) for step in (0, 49, 99, 500, 750, 1000)]
    assert found == pytest.approx([1e-5, 5e-4, 1e-3, 1e-3, 5e-4, 0])


def evaluation_of(out, name=NAME, part="evaluation"):
    draws = ", 25 draws" if part == "posterior" else ""
    return util.read_record(out, name)[part][f"photos, 16 images of 24x24{draws}"]


@pytest.fixture
def shown(photographs):
    """The test images that the figures of a shrunk run show."""
    return photographs.shown("test", 2)


def test_every_file_of_the_run_is_there(trained):
    expected = {f"logs/{NAME}.csv", f"logs/{NAME}.json", f"feature_maps/{NAME}.png"}
    for part in ("encoder", "decoder", "autoencoder"):
        expected |= {f"models/{part}_{NAME}.json", f"weights/{part}_{NAME}.weights.h5"}
    kinds = ("reconstructions", "picture", "history", "sweep", "posterior")
    expected |= {f"figures/{NAME}_{kind}.png" for kind in kinds}
    expected |= {f"gifs/{NAME}_{kind}.gif" for kind in ("single", "group")}
    expected |= {f"feature_maps/{NAME}_{split}.h5" for split in ("test", "train")}
    found = {path.relative_to(trained.out).as_posix() for path in files_of(trained.out)}
    assert found == expected
    for split, count in (("test", 16), ("train", 64)):
        with h5py.File(trained.out / f"feature_maps/{NAME}_{split}.h5") as file:
            assert file["features"].shape == (count, 12, 12, 12)
            described = {"run": NAME, "dataset": "photos", "split": split, "sigma": 0.0, "pooling": 0}
            assert dict(file.attrs) == described


def test_saved_models_can_be_trained_further(trained):
    for part in ("encoder", "decoder", "autoencoder"):
        model = util.load_model(trained.out, NAME, part)
        assert len(model.trainable_weights) == len(model.weights) > 0


def test_curves_show_what_was_measured(trained):
    psnr = {row["sigma"]: row[f"{NAME} PSNR"] for row in evaluation_of(trained.out)}
    (x, y, (noisy, denoised)), ssim = curves_of(trained.figures[f"{NAME}_sweep.png"])
    assert (x, y, *ssim[:2]) == ("sigma", "PSNR in dB", "sigma", "SSIM")
    assert denoised == ([25, 50], pytest.approx([psnr[25], psnr[50]], abs=1e-4))
    assert (np.array(noisy[1]) < denoised[1]).all()
    assert legend_of(trained.figures[f"{NAME}_sweep.png"]) == ["noisy", NAME]
    rows = rows_of(trained.out / f"logs/{NAME}.csv")
    assert [(row["stage"], row["epoch"]) for row in rows] == [("z", 1), ("z", 2), ("detail", 3)]
    panels = curves_of(trained.figures[f"{NAME}_history.png"])
    assert [label for _, label, _ in panels] == ["PSNR in dB", "KL of z in nats"]  # draws have one epoch
    for name, (*_, (training, validation)) in zip(("psnr", "kl"), panels, strict=True):
        assert training == ([1, 2], [row[name] for row in rows[:2]])
        assert validation == ([1, 2], [row[f"val_{name}"] for row in rows[:2]])


def test_images_are_shown_with_their_psnr(trained, shown):
    autoencoder = util.load_model(trained.out, NAME, "autoencoder")
    rows, labels = [], []
    for sigma in (25, 50):
        noisy = add_noise(shown, sigma)
        for label, images in (
            (f"noisy, sigma {sigma}", util.to_uint8(noisy)),
            (NAME, util.denoise(autoencoder, noisy)),
        ):
            rows.append(images)
            captions = [f"{value:.1f} dB" for value in util.psnr(shown, images)]
            labels += zip((label, ""), captions, strict=True)
    figure = trained.figures[f"{NAME}_reconstructions.png"]
    assert labels_of(figure) == [*labels, ("clean", ""), ("", "")]
    np.testing.assert_array_equal(pixels_of(figure), np.concatenate([*rows, shown]))


def test_held_out_photograph_is_shown_noisy_denoised_and_clean(trained, photographs):
    clean = photographs.shown_picture
    noisy = add_noise(clean[None], 50)[0]
    denoised, _ = util.denoise_picture(util.load_model(trained.out, NAME, "autoencoder"), noisy)
    pictures = [util.to_uint8(noisy), util.to_uint8(denoised), clean]
    figure = trained.figures[f"{NAME}_picture.png"]
    np.testing.assert_array_equal(pixels_of(figure), pictures)
    psnr = [util.psnr(clean[None], picture[None])[0] for picture in pictures[:2]]
    captions = [f"noisy, sigma 50, {psnr[0]:.1f} dB", f"denoised, {psnr[1]:.1f} dB", "clean"]
    assert [caption for _, caption in labels_of(figure)] == captions
    assert trained.printed.splitlines()[-1].endswith(f"first look at figures/{NAME}_picture.png")


@pytest.mark.parametrize(("kind", "count"), [("single", 1), ("group", 2)])
def test_gif_shows_the_images_at_steps_1_2_4_and_after_each_epoch(trained, kind, count):
    frames = trained.figures[f"{NAME}_{kind}.gif"]
    titles = [f"training step {step}, sigma 50" for step in (0, 1, 2, 4, 8)]  # an epoch has four
    assert [frame.get_suptitle() for frame in frames] == titles
    first, last = np.array(pixels_of(frames[0])), np.array(pixels_of(frames[-1]))
    assert len(first) == 3 * count
    for row, changes in enumerate([False, True, False]):  # noisy, denoised, clean
        images = slice(row * count, (row + 1) * count)
        assert (first[images] != last[images]).any() == changes
    assert len(iio.imread(trained.out / f"gifs/{NAME}_{kind}.gif")) == len(titles)


def test_posterior_is_shown_by_draws_and_by_its_calibration(trained, shown):
    encoder, decoder = (util.load_model(trained.out, NAME, part) for part in ("encoder", "decoder"))
    _, draws = simple.decoded_draws(encoder, decoder, add_noise(shown, 50), 25)
    left, right = trained.figures[f"{NAME}_posterior.png"].subfigs
    labels, pixels = labels_of(left), pixels_of(left)
    names = ["noisy, sigma 50", "mean", "draw 1", "draw 2", "draw 3", "deviation", "error", "clean"]
    assert [label for label, _ in labels[::2]] == names
    np.testing.assert_array_equal(pixels[4:6], util.to_uint8(draws[0]))
    autoencoder = util.load_model(trained.out, NAME, "autoencoder")
    mean = autoencoder.predict(add_noise(shown, 50), verbose=0)
    for index, maps in ((10, np.square(draws - mean).mean(axis=0)), (12, np.square(mean - shown / 255))):
        np.testing.assert_allclose(pixels[index], 255 * np.sqrt(maps[0].mean(axis=-1)), rtol=1e-3)
        assert labels[index][1] == f"{255 * np.sqrt(maps[0].mean()):.1f}"
    scales = {axis.images[0].get_clim() for axis in left.axes[10:14]}
    assert len(scales) == 1  # deviation and error can be compared by colour
    assert [bar.get_ylabel() for bar in left.axes[-2:]] == 2 * ["grey levels"]
    (x, y, reliability), (_, _, histogram) = curves_of(right)
    assert (x, y) == ("central interval of the draws", "share of true values in it")
    calibration = evaluation_of(trained.out, part="posterior")[0]
    (row,) = (row for row in calibration if (row["sigma"], row["block"]) == (50, "1x1"))
    assert reliability[0][1][-2] == pytest.approx(row["in central 90%"], abs=1e-3)
    assert reliability[-1][0] == reliability[-1][1]  # the calibrated one
    assert np.mean(histogram[0][1]) == pytest.approx(1)


def test_feature_maps_are_shown_each_in_its_own_range(trained, photographs):
    image = photographs.in_cells(util.STRIDE).shown("test", 1)
    (maps,) = util.encode(util.load_model(trained.out, NAME, "encoder"), image)
    figure = trained.figures[f"{NAME}.png"]
    assert labels_of(figure)[0] == ("level 1\nfrom 0", "")
    low, high = maps.min(axis=(0, 1)), maps.max(axis=(0, 1))
    expected = (maps - low) / np.maximum(high - low, 1e-6)
    np.testing.assert_allclose(np.stack(pixels_of(figure), axis=-1), expected, atol=1e-4)


def test_output_without_a_terminal_is_plain_lines(trained):
    assert "val_psnr" in trained.printed
    assert f"| sigma | noisy PSNR | {NAME} PSNR | noisy SSIM | {NAME} SSIM |" in trained.printed
    assert not set("\r\b\x1b") & set(trained.printed)
    stages = [line for line in trained.printed.splitlines() if line.startswith("Stage ")]
    assert stages == ["Stage z:", "Stage detail:"]
    for vae in (simple.DenoisingVAE, simple.DetailVAE):
        assert f"64 training images. {vae.hint}" in trained.printed


def test_record_tells_how_the_run_came_about(trained):
    record = util.read_record(trained.out, NAME)
    assert (record["name"], record["arguments"]["epochs"], record["epochs"]) == (NAME, 2, 3)
    assert (record["training_images"], record["pixels_seen"]) == (64, 3 * 64 * 24 * 24)
    assert (record["data"]["name"], len(record["data"]["checksums"])) == ("photos", 2)
    assert [row["sigma"] for row in evaluation_of(trained.out)] == [15, 25, 35, 50, 75]
    rows = rows_of(trained.out / f"logs/{NAME}.csv")
    assert record["best"]["val_psnr"] == max(row["val_psnr"] for row in rows if "val_psnr" in row)
    assert len(record["files"]) == 6
    for path, checksum in record["files"].items():
        assert util.sha256_of(trained.out / path) == checksum


def test_evaluate_from_elsewhere_prints_records_and_draws_what_the_training_did(trained, trained_copy):
    record = util.read_record(trained_copy, NAME)
    kinds = ("reconstructions", "picture", "sweep", "posterior")
    figures = [f"figures/{NAME}_{kind}.png" for kind in kinds]
    for figure in figures:
        (trained_copy / figure).unlink()
    arguments = ["evaluate", "--name", NAME, "--out", trained_copy]  # on its own data set
    code, again, err = run("simple_autoencoder.py", *arguments, small=True, cwd=trained_copy)
    assert (code, err) == (0, "")
    assert len(table_rows(again)) == 5 + 8 + 2
    assert table_rows(again) == table_rows(trained.printed)
    assert util.read_record(trained_copy, NAME) == record
    for figure in figures:
        np.testing.assert_array_equal(iio.imread(trained_copy / figure), iio.imread(trained.out / figure))


@pytest.mark.parametrize("option", ["--size=32", "--images=2"])
def test_evaluate_draws_nothing_of_other_images(option, trained_copy):
    figures = {path: path.read_bytes() for path in trained_copy.glob("figures/*")}
    printed_by(simple, "evaluate", "--dataset=photos", option, "--out", trained_copy)
    assert {path: path.read_bytes() for path in trained_copy.glob("figures/*")} == figures


def test_nothing_trained_draws_no_history(trained_copy):
    nothing = [*TINY, "--epochs=0", "--detail-epochs=0", f"--start={NAME}", "--name=kept"]
    printed_by(simple, *nothing, "--out", trained_copy)
    assert (trained_copy / "figures/kept_sweep.png").exists()
    assert not (trained_copy / "figures/kept_history.png").exists()


def test_detail_code_is_trained_with_the_rest_as_it_is(trained, tmp_path):
    out = shutil.copytree(trained.out, tmp_path / "out")
    printed_by(simple, *TINY, "--epochs=0", f"--start={NAME}", "--name=simple_again", "--out", out)
    for part in ("encoder", "decoder"):
        before, after = (util.load_model(out, name, part) for name in (NAME, "simple_again"))
        for kind in ("z", "detail"):
            pairs = zip(*(m.get_layer(f"{kind}_{part}").get_weights() for m in (before, after)), strict=True)
            assert all(np.array_equal(*pair) for pair in pairs) == (kind == "z")
    rows = rows_of(out / "logs/simple_again.csv")
    assert [(row["stage"], row["epoch"]) for row in rows] == [("detail", 1)]
    assert not list(out.glob("gifs/simple_again*"))
    usage = usage_error(simple.parse_args, ["--epochs=0"])
    assert "argument --epochs: 0 keeps what --start names" in usage
    before, after = (
        [list(row.values()) for row in evaluation_of(out, name)] for name in (NAME, "simple_again")
    )
    assert before == after


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_saved_model_needs_nothing_but_keras(trained, predicted_by_keras_alone, backend):
    pytest.importorskip(backend)
    noisy = add_noise(random_images(2, 16, 16, 3), 25)
    found = predicted_by_keras_alone(trained.out, f"autoencoder_{NAME}", noisy, backend)
    expected = util.load_model(trained.out, NAME, "autoencoder").predict(noisy, verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_script_trains_under_jax(tmp_path):
    pytest.importorskip("jax")
    arguments = [*TINY, "--epochs=1", "--out", tmp_path]
    environment = {"KERAS_BACKEND": "jax", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    code, _, err = run("simple_autoencoder.py", *arguments, small=True, env=environment)
    assert code == 0, err
    record = util.read_record(tmp_path, NAME)
    assert record["environment"]["backend"].startswith("jax ")
    noisy = add_noise(random_images(2, 16, 16, 3), 25)
    denoised = util.load_model(tmp_path, NAME, "autoencoder").predict(noisy, verbose=0)
    assert np.abs(denoised - noisy).max() > 0.01  # no longer the identity that it starts as


@pytest.mark.usefixtures("unmeasured")
def test_mixed_precision_trains_a_folder_of_pictures_to_a_model_in_float32(tmp_path):
    (tmp_path / "holiday").mkdir()
    for index in range(3):
        iio.imwrite(tmp_path / f"holiday/{index}.png", random_images(80, 200, 3, seed=index))
    arguments = [f"--dataset={tmp_path}/holiday", "--data-dir", tmp_path, "--out", tmp_path, "--epochs=1"]
    printed_by(simple, *TINY, *arguments, "--precision=mixed_bfloat16", "--noise", "white", "camera")
    model = util.load_model(tmp_path, "simple_holiday", "autoencoder")
    assert {weight.dtype for weight in model.weights} == {"float32"}
    assert "bfloat16" not in (tmp_path / "models/autoencoder_simple_holiday.json").read_text()
    assert util.read_record(tmp_path, "simple_holiday")["arguments"]["dataset"] == "holiday"
    assert str(tmp_path) not in (tmp_path / "logs/simple_holiday.json").read_text()


def fit_images(vae, images, stage, out, **options):
    """Train an epoch of a stage on images by split."""
    labels = {split: np.full(len(part), -1) for split, part in images.items()}
    data = Data("some", images, labels, ("none",), {})
    args = Namespace(out=out, name="some", seed=0, sigma=(0, 50), noise=["white"], **options)
    return simple.fit_stage(vae, data, args, stage, 1)


def test_training_on_a_mapped_file_larger_than_a_batch(tmp_path):
    random_images(20 * 96 * 96 * 3).tofile(tmp_path / "unlabeled_X.bin")
    mapped = read_all_images(tmp_path / "unlabeled_X.bin")
    images = {split: np.array(mapped[:4]) for split in ("train", "validation", "test")}
    vae, options = simple.DenoisingVAE(*small_models()), {"batch_size": 8, "learning_rate": 1e-3}
    (row,) = fit_images(vae, images | {"unlabeled": mapped}, "z", tmp_path, **options)
    assert np.isfinite(row["val_psnr"])


@pytest.mark.parametrize("asked, taken", [(1e-2, 1e-3), (5e-4, 1e-3), (1e-4, 2e-4)])
def test_a_low_learning_rate_slows_the_detail_code_too(tmp_path, monkeypatch, asked, taken):
    rates, build_optimizer = [], simple.build_optimizer
    monkeypatch.setattr(util, "fit", lambda *arguments: [])
    monkeypatch.setattr(simple, "build_optimizer", lambda *a: rates.append(a[0]) or build_optimizer(*a))
    images = {split: random_images(4, 16, 16, 3) for split in ("train", "validation")}
    vae = simple.DetailVAE(*small_models(), *small_detail_models())
    fit_images(vae, images, "detail", tmp_path, batch_size=2, learning_rate=asked)
    assert rates == [taken]


RESUME = ["--resume", f"--name={NAME}"]


@pytest.mark.usefixtures("unmeasured")
def test_terminated_and_killed_training_resumes_to_the_same_weights(trained, tmp_path):
    process = start("simple_autoencoder.py", *TINY, "--epochs=2", "--out", tmp_path, small=True)
    wait_for("Epoch 1/2", process)
    process.send_signal(signal.SIGTERM)
    err = without_greeting(process.communicate()[1])
    assert process.returncode == 130
    assert err.strip().startswith(f"Stopped. Go on with: {sys.executable} ")
    assert err.endswith(f"simple_autoencoder.py --resume --name {NAME} --out {tmp_path}")
    process = start("simple_autoencoder.py", *RESUME, "--out", tmp_path, small=True)
    wait_for("Epoch 2/2", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "models").exists()
    assert "Epoch 1/2" not in printed_by(simple, *RESUME, "--out", tmp_path)
    losses = [[row["loss"] for row in rows_of(out / f"logs/{NAME}.csv")] for out in (tmp_path, trained.out)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert_same_weights(tmp_path, trained.out)
    assert len(iio.imread(tmp_path / f"gifs/{NAME}_single.gif")) == 5


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Output folder of a training that was stopped in its second epoch."""
    out = tmp_path_factory.mktemp("interrupted")
    stop_at("Epoch 2/2", simple, *TINY, "--epochs=2", "--out", out)
    return out


@pytest.fixture
def stopped(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "out")


def checkpoint_of(out):
    return out / f"logs/{NAME}.training/z/checkpoint.weights.h5"


def test_interrupted_run_is_resumed_by_its_own_script_and_arguments_alone(stopped):
    before, resume = files_of(stopped), [*RESUME, f"--out={stopped}"]
    line = told_line(printed_by, simple, *TINY, "--out", stopped)
    assert line.startswith(f"{stopped}/logs/{NAME}.training: of a run that was interrupted, or is going on")
    line = told_line(classifier.parse_args, resume)
    assert line.startswith(f"--resume: {NAME} is a run of simple_autoencoder.py, or of an older one")
    for option in ("--size=32", "--seed=5", "--limit=32", "--batch-size=8", "--filters=16", "--kl-weight=1"):
        line = told_line(simple.parse_args, [*resume, option])
        assert line.startswith(f"{option.split('=')[0]}: the interrupted run has ")
        assert line.endswith("; --resume takes other epochs and another --learning-rate only")
    assert simple.parse_args([*TINY, *resume]).filters == 12  # what it has may be said again
    changed = simple.parse_args([*resume, "--epochs=3", "--detail-epochs=2", "--learning-rate=1e-4"])
    assert (changed.epochs, changed.detail_epochs, changed.learning_rate) == (3, 2, 1e-4)
    assert files_of(stopped) == before
    path = stopped / f"logs/{NAME}.training/arguments.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"detail_epochs": 0}))
    line = told_line(simple.parse_args, [*resume, "--detail-epochs=1"])
    assert line.startswith("--detail-epochs: the interrupted run has 0; --resume takes other epochs and")


def test_damaged_files_of_an_interrupted_run(stopped):
    checkpoint, arguments = checkpoint_of(stopped), stopped / f"logs/{NAME}.training/arguments.json"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    line = told_line(printed_by, simple, *RESUME, "--out", stopped)
    assert line == f"{checkpoint}: damaged checkpoint; delete {checkpoint.parent} to train this stage anew"
    for text in ("", "[]", "[" * 100_000):
        arguments.write_text(text)
        line = told_line(simple.parse_args, [*RESUME, f"--out={stopped}"])
        assert line == f"{arguments}: damaged; delete {arguments.parent} and train without --resume"


@pytest.mark.usefixtures("unmeasured")
def test_training_that_diverges_and_is_stopped_amid_its_publishing_ends_with_the_same_weights(
    trained, stopped, monkeypatch
):
    before = checkpoint_of(stopped).read_bytes()
    line = told_line(printed_by, simple, *RESUME, "--out", stopped, "--learning-rate=1e9")
    assert "the training diverged" in line
    assert line.endswith("--resume and a lower --learning-rate")
    assert checkpoint_of(stopped).read_bytes() == before
    move, moved = shutil.move, []

    def stop_amid(source, target):
        if len(moved) == 8:
            raise KeyboardInterrupt
        moved.append(move(source, target))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stopping:
        patch.setattr(shutil, "move", stop_amid)
        printed_by(simple, *RESUME, "--out", stopped, f"--learning-rate={simple.LEARNING_RATE}")
    assert str(stopping.value).startswith(f"Stopped. Go on with: {sys.executable} ")
    assert str(stopping.value).endswith(f"simple_autoencoder.py --resume --name {NAME} --out {stopped}")
    assert not (stopped / f"logs/{NAME}.json").exists()
    printed_by(simple, *RESUME, "--out", stopped)
    for part in ("autoencoder", "encoder", "decoder"):
        assert_same_weights(stopped, trained.out, part=part)
    assert len(util.read_record(stopped, NAME)["files"]) == 6


def other_file_system():
    """A new folder on another file system than the temporary one; None if there is no other."""
    for folder in ("/dev/shm", f"/run/user/{os.getuid()}", Path.home()):
        with contextlib.suppress(OSError):
            if os.stat(folder).st_dev != os.stat(tempfile.gettempdir()).st_dev:
                return Path(tempfile.mkdtemp(prefix="other-", dir=folder))
    return None


@pytest.mark.usefixtures("unmeasured")
def test_training_stopped_at_its_start_then_on_a_full_disk_on_another_file_system(trained, tmp_path):
    out = other_file_system() or tmp_path
    try:
        save_run(out, NAME)
        earlier = files_of(out)
        stop_at("Epoch 1/2", simple, *TINY, "--epochs=2", "--out", out)
        with largest_file(200_000):  # the checkpoints are smaller, the feature maps larger
            line = told_line(printed_by, simple, *RESUME, "--out", out)
        assert line.endswith("File too large; free some space and run again")
        training = out / f"logs/{NAME}.training"
        assert {path: raw for path, raw in files_of(out).items() if training not in path.parents} == earlier
        printed_by(simple, *RESUME, "--out", out)
        assert_same_weights(out, trained.out)
        assert not training.exists()
    finally:
        if out != tmp_path:
            shutil.rmtree(out)


def test_resume_with_nothing_to_resume(tmp_path):
    line = told_line(printed_by, simple, "--resume", "--dataset=photos", "--out", tmp_path)
    path = tmp_path / f"logs/{NAME}.training/arguments.json"
    assert line == f"{path}: not found, nothing to resume; train without --resume"


def test_file_in_the_place_of_a_folder_is_found_before_the_training(tmp_path):
    (tmp_path / "out").write_text("a file in its place")
    assert f"{tmp_path}/out" in told_line(printed_by, simple, *TINY, f"--out={tmp_path}/out")


def test_gifs_do_without_what_a_kill_has_left_and_keep_equal_frames(tmp_path):
    clean = random_images(2, 8, 8, 3)
    for name in ("00000000.npy", "00000001.npy", ".ab_12x.npy"):
        np.save(tmp_path / name, clean)
    (tmp_path / "gifs").mkdir()
    simple.write_gifs(tmp_path, "run", tmp_path, clean, clean)
    assert len(iio.imread(tmp_path / "gifs/run_single.gif")) == 2


def test_resumed_folder_is_known_by_its_whole_path(tmp_path, monkeypatch):
    (tmp_path / "logs/simple_mine.training").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    stored = json.dumps(vars(simple.parse_args(["--dataset=mine"])), default=str)
    (tmp_path / "logs/simple_mine.training/arguments.json").write_text(stored)
    args = simple.parse_args(["--name=simple_mine", "--resume", f"--out={tmp_path}"])
    assert args.dataset == str(tmp_path / "mine")


def test_crps_of_a_gaussian_against_its_integral():
    rng = np.random.default_rng(0)
    clean, draws = rng.normal(0.5, 0.1, (2, 8, 8, 3)), rng.normal(0.5, 0.1, (5, 2, 8, 8, 3))
    found = simple.compare_draws(clean, draws)[1]["gaussian"].reshape(clean.shape)
    mean, x = draws.mean(axis=0), np.linspace(-2, 3, 50_001)
    for image in range(2):
        rmse = np.sqrt(np.square(clean - mean)[image].mean())
        for value, centre, crps in zip(
            *(array[image].ravel() for array in (clean, mean, found)), strict=True
        ):
            integral = np.square(norm.cdf(x, centre, rmse) - (x >= value)).sum() * (x[1] - x[0])
            assert crps == pytest.approx(integral, abs=2e-4)


def test_detail_of_zero_adds_nothing_and_its_training_leaves_the_mean_alone():
    models, detail = list(map(shaken, small_models())), list(map(shaken, small_detail_models()))
    images = random_images(64, 16, 16, 3)
    encoder, decoder = simple.join_encoders(models[0], detail[0]), simple.join_decoders(models[1], detail[1])
    autoencoder = simple.build_autoencoder(*models)
    noisy = add_noise(images[:4], 25)
    before = autoencoder.predict(noisy, verbose=0)
    vae = simple.DetailVAE(*models, *detail)
    vae.compile(optimizer=simple.build_optimizer(1e-2, 8))
    weights = detail[1].get_weights()[0]
    vae.fit(Batches(images, 16), epochs=2, verbose=0, shuffle=False)
    assert np.abs(detail[1].get_weights()[0] - weights).max() > 1e-4
    outputs = encoder.predict(noisy, verbose=0)
    assert np.abs(outputs[2]).max() == 0
    assert np.ptp(outputs[3]) > 0
    np.testing.assert_array_equal(autoencoder.predict(noisy, verbose=0), before)
    means = [mean for mean, _ in util.code_pairs(outputs)]
    np.testing.assert_allclose(decoder.predict(means, verbose=0), before, atol=1e-5)


def test_training_makes_draws_as_wide_as_the_error():
    """Clean images are 1/2 plus white noise of a tenth, so that their posterior is known (Gaussian)."""
    models, detail = small_models(), small_detail_models()
    truth = 0.5 + 0.1 * np.random.default_rng(5).standard_normal((256, 8, 8, 3))
    images = util.to_uint8(truth)
    # a decoder that shrinks what it sees to the posterior's mean at sigma 25.5: half way to 1/2
    kernel, bias = models[1].get_layer("to_pixels").get_weights()
    models[1].get_layer("to_pixels").set_weights([kernel / 2, bias])
    vae = simple.DetailVAE(*models, *detail, kl_weight=1e-3)
    vae.compile(optimizer=simple.build_optimizer(1e-3, 320))
    vae.fit(Batches(images, 16, sigma=(25.5, 25.5)), epochs=20, verbose=0, shuffle=False)
    encoder, decoder = simple.join_encoders(models[0], detail[0]), simple.join_decoders(models[1], detail[1])
    blocks, _ = simple.measure_posterior(encoder, decoder, images[:100], 25.5, 32)
    rows = simple.calibration_rows(blocks, 32, 25.5)
    assert rows[0]["spread/skill"] == pytest.approx(1, abs=0.15)
    assert rows[-1]["spread/skill"] == pytest.approx(1, abs=0.3)


WRONG_USAGE = [
    ("--sigma -1 5", "-1 is not from 0"),
    ("--sigma 50 5", "--sigma: LOW 50.0 is above HIGH 5.0"),
    ("--noise grey photographs", "--noise: photographs, a mix"),
    ("--epochs 0", "--epochs: 0 keeps what --start names"),
    ("--name a/b", "--name"),
    ("--learning-rate nan", "--learning-rate"),
    ("--size 3", "--size"),
    ("denose a.png", "invalid choice: 'denose'"),
    ("denoise a.png --out results", "the following arguments are required: --to"),
    ("evaluate --noisy x", "--noisy: of --pictures only"),
    ("evaluate --noise camera", "--noise: of --pictures only"),
    ("evaluate --self-ensemble", "--self-ensemble: of --pictures only"),
    ("evaluate --pictures x --images 5", "--images: not with --pictures"),
    ("evaluate --pictures x --dataset photos", "--dataset: not with --pictures"),
    ("evaluate --pictures x --noisy y --noise grey", "--noise: not with --noisy"),
    ("denoise a --to b --self-ensemble 3", "--self-ensemble: invalid choice: 3"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_USAGE)
def test_wrong_usage(arguments, message):
    line = usage_error(simple.parse_args, arguments.split())
    assert "error: " in line and message in line


@pytest.mark.parametrize(
    ("arguments", "kind", "verb", "name"),
    [
        ("", "simple", "train", "simple_cifar10"),
        ("--dataset /some/holiday", "stacked", "train", "stacked_holiday"),
        ("evaluate", "stacked", "evaluate", "stacked_cifar10"),
        ("evaluate --pictures a", "simple", "evaluate", "stacked_photographs"),
        ("denoise a.png --to b", "simple", "denoise", "stacked_photographs"),
        ("denoise a.png --to b --name mine", "stacked", "denoise", "mine"),
    ],
)
def test_verb_and_name_by_default(arguments, kind, verb, name):
    args = simple.parse_args(arguments.split(), kind)
    assert (args.verb, args.name) == (verb, name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Output folder of a small model, never trained."""
    out = tmp_path_factory.mktemp("saved")
    save_run(out)
    return out


def saved_parts(out):
    return util.load_run(out, "small")


def denoise(out, *arguments):
    """Call the verb `denoise` with the small model; returns what was printed, line by line."""
    shared = ("--name=small", "--precision=float32", "--out", out)
    return printed_by(simple, "denoise", *arguments, *shared).splitlines()


@pytest.fixture
def holiday(tmp_path):
    """Folder of pictures as people have them: three sound ones, one of them in a subfolder; the rest odd."""
    folder, elsewhere = tmp_path / "in folder ä", tmp_path / "elsewhere"
    for name, shape in (("a ö.jpg", (30, 20, 3)), ("sub/grey.png", (9, 14)), ("sub/deviation/b.png", (8, 8))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(folder / name, random_images(*shape))
    elsewhere.mkdir()
    iio.imwrite(elsewhere / "c.tif", random_images(12, 11, 3))
    (folder / "link").symlink_to(elsewhere, target_is_directory=True)
    (folder / "notes.txt").write_text("no picture")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.jpg").write_bytes((folder / "a ö.jpg").read_bytes()[:300])
    return folder


def test_folder_is_denoised_with_its_subfolders_and_links(saved, holiday, tmp_path, capsys):
    target = holiday / "results"  # which are no pictures to denoise, when the command comes again
    for counted in ("3 written, 0 there", "0 written, 3 there"):
        line = told_line(denoise, saved, holiday, "--to", target)
        assert line.startswith(f"{target}: {counted} already (--force replaces them), 2 failed")
        named = sorted(line.split(" (")[0] for line in capsys.readouterr().err.splitlines())
        assert named == [f"{holiday / name}: not a readable image" for name in ("cut.jpg", "text.png")]
        written = [path for path in sorted(target.rglob("*")) if path.is_file()]
        assert written == [target / name for name in ("a ö.jpg", "link/c.tif", "sub/grey.png")]
    picture = iio.imread(holiday / "sub/grey.png")[..., None]
    expected, _ = util.denoise_picture(saved_parts(saved)[0], picture)
    np.testing.assert_array_equal(iio.imread(target / "sub/grey.png"), expected[..., 0])
    other = tmp_path / "other.png"
    model, line, counted = denoise(saved, holiday / "sub/grey.png", "--to", other)
    removed = np.sqrt(np.square(picture - expected.astype(float)).mean())
    pattern = rf"{other}: 14x9, noise of (\d+\.\d\d) grey levels removed, \d+\.\d s"
    assert float(re.fullmatch(pattern, line)[1]) == pytest.approx(removed, abs=0.006)
    assert (model, counted.split(",")[0]) == ("Denoised by small", f"{other}: 1 written")
    other.write_bytes(b"mine")
    denoise(saved, holiday / "sub/grey.png", "--to", other)
    assert other.read_bytes() == b"mine"
    denoise(saved, holiday / "sub/grey.png", "--to", other, "--force")
    np.testing.assert_array_equal(iio.imread(other), expected[..., 0])


def test_picture_that_fails_for_any_reason_does_not_stop_the_others(saved, tmp_path, monkeypatch, capsys):
    iio.imwrite(tmp_path / "a.png", random_images(8, 8, 3))
    iio.imwrite(tmp_path / "c.jpg", np.zeros((1, 66_000), np.uint8), extension=".png")
    iio.imwrite(tmp_path / "d.png", random_images(9, 8, 3))
    denoise_picture = util.denoise_picture

    def without_memory(model, pixels, *options):
        if len(pixels) == 8:
            np.empty(2**47)
        return denoise_picture(model, pixels, *options)

    monkeypatch.setattr(util, "denoise_picture", without_memory)
    sources = [tmp_path / name for name in ("a.png", "b.png", "c.jpg", "d.png")]
    line = told_line(denoise, saved, *sources, "--to", tmp_path / "out")
    assert line.startswith(f"{tmp_path}/out: 1 written, 0 there already (--force replaces them), 3 failed")
    failed = capsys.readouterr().err.splitlines()
    assert failed[0].startswith(f"{tmp_path}/a.png: Unable to allocate")
    assert failed[1] == f"[Errno 2] No such file or directory: '{tmp_path}/b.png'"
    assert failed[2].startswith(f"{tmp_path}/out/c.jpg: JPEG was not written (")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["d.png"]


@pytest.mark.parametrize("option", [["--self-ensemble", "2"], ["--self-ensemble"], ["--strength", "0.3"]])
def test_options_of_denoise(saved, tmp_path, option):
    picture = random_images(10, 12, 3)
    iio.imwrite(tmp_path / "a.png", picture)
    denoise(saved, tmp_path / "a.png", "--to", tmp_path / "out", *option)
    options = {"strength": 0.3} if "--strength" in option else {"ensemble": int([*option, 8][1])}
    model = saved_parts(saved)[0]
    expected, _ = util.denoise_picture(model, picture, **options)
    np.testing.assert_array_equal(iio.imread(tmp_path / "out/a.png"), expected)
    assert (expected != util.denoise_picture(model, picture)[0]).any()


def test_16_bits_are_computed_in_float32(saved, tmp_path):
    picture = random_images(16, 12, dtype=np.uint16)
    iio.imwrite(tmp_path / "a.png", picture)
    shared = ("--name=small", "--out", saved, "--precision=mixed_bfloat16")
    printed = printed_by(simple, "denoise", tmp_path / "a.png", "--to", tmp_path / "out", *shared)
    expected, _ = util.denoise_picture(saved_parts(saved)[0], picture[..., None])
    np.testing.assert_array_equal(iio.imread(tmp_path / "out/a.png"), expected[..., 0])
    removed = np.sqrt(np.square((picture - expected[..., 0].astype(float)) / 257).mean())
    assert f"noise of {removed:.2f} grey levels" in printed


def test_expected_error_is_printed_and_written_for_each_pixel(saved, tmp_path):
    source, first, second = tmp_path / "a ä.jpg", tmp_path / "first", tmp_path / "second"
    iio.imwrite(source, random_images(9, 14, 3))
    for target in (first, second):
        _, note, line, _ = denoise(saved, source, "--to", target, "--samples=3")
    assert "37.16 dB expected" in note and "40.8 dB for 37.1" in note
    autoencoder, *posterior = saved_parts(saved)
    _, errors = util.denoise_picture(autoencoder, iio.imread(source), posterior=posterior, samples=3)
    brightness = np.minimum(np.round(simple.DEVIATION_SCALE * errors), 255)
    np.testing.assert_array_equal(iio.imread(first / "deviation/a ä.png"), brightness)
    error = np.sqrt(np.square(errors.astype(float)).mean())
    shown = re.search(r"expected error (\d+\.\d\d) \(PSNR (\d+\.\d\d) dB\)", line)
    assert float(shown[1]) == pytest.approx(error, abs=0.006)
    assert float(shown[2]) == pytest.approx(20 * np.log10(255 / error), abs=0.006)
    for name in ("a ä.jpg", "deviation/a ä.png"):  # the same command draws the same
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert simple.sources_and_targets([first], tmp_path) == [(first / "a ä.jpg", tmp_path / "a ä.jpg")]


@pytest.mark.parametrize(
    ("pictures", "to", "message"),
    [
        (["a.jpg"], ".", "a.jpg: a picture to denoise, which is never replaced"),
        (["a.jpg", "b/a.jpg"], "c", "c/a.jpg: 2 results would have this name"),
        (["a.jpg", "a.png"], "c", "c/deviation/a.png: 2 results would have this name"),
        (["a.jpg", "b"], "c.jpg", "c.jpg: the name of one file, for what may be several"),
        (["b"], "b", "b: holds all the pictures"),
        (["empty"], "c", "empty: there are no images in it"),
    ],
)
def test_results_that_cannot_be_are_refused_before_the_work(tmp_path, monkeypatch, pictures, to, message):
    for folder in ("b", "empty"):
        (tmp_path / folder).mkdir()
    for name in ("a.jpg", "a.png", "b/a.jpg"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=re.escape(message)):
        simple.sources_and_targets([Path(path) for path in pictures], Path(to), samples=2)


def test_target_that_no_picture_fits_is_named_before_the_work(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(util, "denoise_picture", None)
    iio.imwrite(tmp_path / "a.png", random_images(8, 8, 3))
    told_line(denoise, saved, tmp_path / "a.png", "--to", tmp_path / "results.v2")
    assert "results.v2: no format to write has this ending; choose .png" in capsys.readouterr().err
    line = told_line(denoise, saved, tmp_path / "a.png", "--to", tmp_path / "a.png/b")
    assert line == f"[Errno 20] Not a directory: '{tmp_path}/a.png/b'"


@pytest.fixture
def test_set(tmp_path):
    """Folder of a colour, a grey and a nested picture of different sizes, and of what cannot be measured."""
    folder = tmp_path / "clean"
    for name, shape in (("a.png", (33, 40, 3)), ("grey.png", (24, 31)), ("inside/b.png", (26, 26, 3))):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(folder / name, random_images(*shape) // 8 + 100)
    (folder / "text.png").write_text("no picture")
    iio.imwrite(folder / "tiny.png", random_images(11, 40, 3))
    return folder


def measure(out, *arguments):
    """Call `evaluate` with the small model; cells of all table rows, and the line of its failure if any."""
    output, line = io.StringIO(), ""
    arguments = ("evaluate", "--name=small", "--out", out, *arguments)
    try:
        printed_by(simple, *arguments, output=output)
    except OSError as error:
        line = util.error_line(error)
    rows = [line.split("|")[1:-1] for line in output.getvalue().splitlines() if "|" in line]
    return [[cell.strip() for cell in row] for row in rows], line


def test_pictures_of_a_folder_are_measured_by_the_protocol(saved, test_set, capsys):
    options = ["--noise", "white", "grey", "--samples=2"]
    rows, line = measure(saved, "--pictures", test_set, *options)
    assert line == f"{test_set}: 2 of 5 pictures were not measured, see above"
    named = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[0] for line in named] == [f"{test_set}/{name}.png:" for name in ("text", "tiny")]
    assert rows[0][2:] == [
        *("noisy PSNR", "PSNR", "noisy SSIM", "SSIM", "expected PSNR", "below 1.645 expected errors")
    ]
    measured = {(noise, name): cells for noise, name, *cells in rows}
    levels = [f"{kind} {sigma}" for kind in ("white", "grey") for sigma in SIGMAS]
    assert [row[:2] for row in rows[-10:]] == [[level, "mean of 3"] for level in levels]
    model = saved_parts(saved)[0]
    for name in ("a", "grey"):
        picture = np.atleast_3d(iio.imread(test_set / f"{name}.png"))
        noisy = add_noise(picture[None], 25)
        denoised = util.to_uint8(util.denoise_picture(model, noisy[0])[0])[None]
        expected = [util.psnr(picture[None], image)[0] for image in (util.to_uint8(noisy), denoised)]
        assert [float(cell) for cell in measured["white 25", name][:2]] == pytest.approx(expected, abs=0.011)
    mean = np.mean([float(measured["white 25", name][1]) for name in ("a", "grey", "inside/b")])
    assert float(measured["white 25", "mean of 3"][1]) == pytest.approx(mean, abs=0.02)


def test_expected_errors_of_a_picture_are_those_of_the_draws(saved, test_set):
    picture, (autoencoder, *posterior) = iio.imread(test_set / "a.png"), saved_parts(saved)
    noisy = add_noise(picture[None], 25)[0]
    row = simple.picture_row(picture, noisy, [autoencoder, *posterior], 4)
    denoised, errors = util.denoise_picture(autoencoder, noisy, posterior=posterior, samples=4)
    denoised = util.to_uint8(denoised)
    mean_square = np.mean(errors.astype(np.float64) ** 2)
    assert row["expected PSNR"] == pytest.approx(10 * np.log10(255**2 / mean_square), abs=0.01)
    within = np.abs(picture - denoised.astype(float)) <= 1.645 * errors[..., None].astype(float)
    assert row["below 1.645 expected errors"] == pytest.approx(within.mean(), abs=1e-3)
    assert 0 < within.mean() < 1
    assert simple.psnr_of(simple.root_mean_square(np.zeros((4, 4), np.float16))) == np.inf


def test_white_noise_is_one_for_all_pictures_and_every_picture_has_its_own_camera(tmp_path):
    picture = np.full((24, 24, 3), 128, np.uint8)
    for name in ("a.png", "b.png"):
        iio.imwrite(tmp_path / name, picture)
    for kind in ("white", "camera"):
        (_, _, first), (_, _, second) = pictures_with_noise(picture_pairs(tmp_path, tmp_path), kind, 25)
        np.testing.assert_array_equal(first, add_noise(picture[None], 25, kind=kind)[0])
        assert np.array_equal(first, second) == (kind == "white")


def test_real_pairs_are_measured_by_their_names(saved, test_set, tmp_path):
    noisy = tmp_path / "noisy"
    shutil.copytree(test_set, noisy)
    picture = iio.imread(test_set / "a.png")
    iio.imwrite(noisy / "a.tif", picture + random_images(*picture.shape) // 32)
    (noisy / "a.png").unlink()
    iio.imwrite(noisy / "grey.png", random_images(30, 40))  # of another size than its partner
    rows, line = measure(saved, "--pictures", test_set, "--noisy", noisy, "--self-ensemble")
    assert line == f"{test_set}: 3 of 5 pictures were not measured, see above"
    assert [row[:2] for row in rows[2:]] == [["as given", name] for name in ("a", "inside/b", "mean of 2")]
    pair = iio.imread(noisy / "a.tif"), picture
    denoised, _ = util.denoise_picture(saved_parts(saved)[0], pair[0], ensemble=8)
    expected = [util.psnr(picture[None], image[None])[0] for image in (pair[0], denoised)]
    assert [float(cell) for cell in rows[2][2:4]] == pytest.approx(expected, abs=0.006)


def test_test_sets_that_do_not_fit_are_refused(saved, test_set, tmp_path):
    (tmp_path / "empty").mkdir()
    _, line = measure(saved, "--pictures", tmp_path / "empty")
    assert line.startswith(f"{tmp_path}/empty: there are no images in it")
    _, line = measure(saved, "--pictures", test_set, "--noisy", test_set / "inside")
    assert line == f"{test_set}/inside: has no picture named a, as the other folder does; add or remove it"
    iio.imwrite(test_set / "a.tif", random_images(30, 40, 3))
    _, line = measure(saved, "--pictures", test_set)
    assert line == f"{test_set}/a.tif: of the same name as {test_set}/a.png; remove one"
