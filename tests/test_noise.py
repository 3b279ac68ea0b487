"""Kinds of noise: their statistics against their definitions, seeds, and how `Batches` shares them out."""

import io

import load_data
from load_data import (
    CAMERA_SIGMA,
    NOISE_KINDS,
    TEST_NOISE_SEED,
    VALIDATION_NOISE_SEED,
    Batches,
    add_noise,
    clean_of,
    validation_pair,
)
from util import DRAWS_SEED, psnr, to_float, to_uint8

import numpy as np
import pytest
from conftest import random_images
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom
from scipy.stats import kurtosis

MID_GREY = 128


def flat(value=MID_GREY, count=4, side=96):
    return np.full((count, side, side, 3), value, np.uint8)


def scene(count=4, side=64, seed=0):
    """Smooth coloured images of all brightnesses."""
    pixels = np.random.default_rng(seed).standard_normal((count, side, side, 3))
    smooth = gaussian_filter(pixels, (0, 6, 6, 0.5))
    low, high = smooth.min(axis=(1, 2, 3), keepdims=True), smooth.max(axis=(1, 2, 3), keepdims=True)
    return to_uint8((smooth - low) / (high - low))


def residual(clean, kind, sigma=25, seed=0):
    """What noise changes, on the 0-255 scale."""
    noisy = add_noise(clean, sigma, np.random.default_rng(seed), kind)
    return noisy.astype(np.float64) * 255 - clean_of(clean, kind)


def neighbours(noise):
    """Correlation of horizontal neighbours."""
    return np.corrcoef(noise[:, :, 1:].ravel(), noise[:, :, :-1].ravel())[0, 1]


def channels(noise):
    return np.corrcoef(noise.reshape(-1, 3).T)[np.triu_indices(3, 1)]


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_noise_is_float32_repeatable_and_its_seed_matters(kind):
    clean = scene(3, 32)
    noisy = add_noise(clean, 20, np.random.default_rng(1), kind)
    assert noisy.dtype == np.float32
    assert noisy.shape == clean.shape
    np.testing.assert_array_equal(noisy, add_noise(clean, 20, np.random.default_rng(1), kind))
    assert (noisy != add_noise(clean, 20, np.random.default_rng(2), kind)).any()
    np.testing.assert_array_equal(
        add_noise(clean, 20, kind=kind), add_noise(clean, 20, np.random.default_rng(0), kind)
    )


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_sigma_of_each_image_counts_and_zero_is_the_picture(kind):
    clean = flat(100, 3, 32)
    noise = residual(clean, kind, [0, 5, 40])
    assert np.abs(noise[0]).max() <= (1.5 if kind == "jpeg" else 1e-2)
    assert 2 < noise[1].std() < 8 and 15 < noise[2].std() < 50


@pytest.mark.parametrize("kind", ["white", "grey", "correlated", "poisson", "speckle", "varying", "uniform"])
def test_deviation_at_mid_grey_is_sigma_and_the_mean_is_zero(kind):
    noise = residual(flat(count=16), kind)
    assert noise.std() == pytest.approx(25, rel=0.03)
    assert abs(noise.mean()) < 1


@pytest.mark.parametrize("kind", ["white", "poisson", "speckle", "varying", "uniform", "impulse"])
def test_these_kinds_have_independent_pixels_and_channels(kind):
    noise = residual(flat(), kind)
    assert abs(neighbours(noise)) < 0.02
    assert np.abs(channels(noise)).max() < 0.02


def test_white_noise_is_that_of_the_protocol_to_the_last_bit():
    clean = scene(2, 16)
    expected = clean / 255 + np.random.default_rng(0).normal(0, 1, clean.shape) * (25 / 255)
    np.testing.assert_array_equal(add_noise(clean, 25), expected.astype(np.float32))
    rng = np.random.default_rng(0)
    assert (expected < 0).any() and (expected > 1).any()  # not clipped
    pieces = [add_noise(part, 25, rng, "white") for part in (clean[:1], clean[1:])]
    np.testing.assert_array_equal(np.concatenate(pieces), expected.astype(np.float32))


def test_grey_noise_turns_the_picture_grey_and_is_alike_in_all_channels():
    clean = scene()
    target = clean_of(clean, "grey")
    assert target.dtype == np.uint8
    np.testing.assert_array_equal(target, clean.mean(axis=-1, keepdims=True).round().repeat(3, axis=-1))
    noisy = add_noise(clean, 25, kind="grey")
    np.testing.assert_array_equal(noisy, noisy[..., :1].repeat(3, axis=-1))
    assert (noisy[..., 0] - to_float(target)[..., 0]).std() * 255 == pytest.approx(25, rel=0.03)
    assert clean_of(clean, "white") is clean


def test_jpeg_noise_of_the_protocol_is_what_pillow_makes_of_white_noise():
    clean = scene()
    rounded = np.round(np.clip(add_noise(clean, 25), 0, 1) * 255).astype(np.uint8)
    for noisy, image in zip(add_noise(clean, 25, kind="jpeg"), rounded, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=90)  # 4:2:0 is Pillow's default
        np.testing.assert_array_equal(to_uint8(noisy), np.asarray(Image.open(file)))


def test_training_draws_jpeg_quality_and_sampling():
    qualities, subsamplings = load_data.draw_jpeg(2000, np.random.default_rng(0))
    assert set(qualities) == set(range(60, 101))
    assert set(subsamplings) == {0, 2}
    assert (subsamplings == 0).mean() == pytest.approx(0.5, abs=0.05)
    image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    image = image.repeat(3, axis=0)
    better, worse, colourless = (
        load_data.through_jpeg(image, [100, 60, 100], [0, 0, 2]).astype(int) - image[0]
    )
    assert better.std() < worse.std() and better.std() < colourless.std()


def test_correlated_noise_differs_in_grain_and_colour_but_not_in_strength():
    noise = residual(flat(count=40), "correlated")
    grain = [neighbours(image[None]) for image in noise]
    colour = [channels(image).mean() for image in noise]
    # the correlation after a Gaussian filter of radius r is exp(-1 / (4 r^2)): 0.2 at 0.4, 0.94 at 2 pixels
    assert 0.15 < min(grain) < 0.5 and 0.85 < max(grain) < 0.97
    assert min(colour) < 0.3 and max(colour) > 0.7
    assert noise.std(axis=(1, 2, 3)) == pytest.approx(25, rel=0.15)


@pytest.mark.parametrize("radius", [1.0, 2.0])
def test_low_pass_is_a_gaussian_filter(radius):
    noise = np.random.default_rng(0).standard_normal((1, 64, 48, 2), np.float32)
    expected = gaussian_filter(noise, (0, radius, radius, 0), mode="wrap")
    np.testing.assert_allclose(load_data.low_pass(noise, radius), expected, atol=1e-2)
    kept = load_data.low_pass(noise, np.full((1, 1, 1, 1), radius), keep_variance=True)
    assert neighbours(kept) == pytest.approx(np.exp(-1 / (4 * radius**2)), abs=0.08)


@pytest.mark.parametrize("kind, power", [("poisson", 0.5), ("speckle", 1.0), ("white", 0.0)])
def test_deviation_rises_with_brightness_by_its_law(kind, power):
    dark, bright = (residual(flat(value), kind).std() for value in (50, 200))
    assert bright / dark == pytest.approx(4**power, rel=0.03)


def test_poisson_noise_counts():
    sigma = 25
    counts = add_noise(flat(90), sigma, kind="poisson") * (0.5 / (sigma / 255) ** 2)
    np.testing.assert_allclose(counts, counts.round(), atol=1e-3)
    assert counts.var() == pytest.approx(counts.mean(), rel=0.03)


def test_varying_noise_is_stronger_in_some_places_and_sigma_on_average():
    noise = residual(flat(count=8, side=128), "varying")
    assert np.sqrt(np.square(noise).mean(axis=(1, 2, 3))) == pytest.approx(25, rel=0.03)
    rng = np.random.default_rng(0)
    level = zoom(rng.uniform(0.1, 1, (8, 4, 4)), (1, 32, 32), order=1, mode="nearest")[..., None]
    level *= 25 / np.sqrt(np.square(level).mean(axis=(1, 2), keepdims=True))
    np.testing.assert_allclose(noise, level * rng.standard_normal(noise.shape, np.float32), atol=1e-3)


def test_impulses_are_black_or_white_and_bring_an_error_of_sigma():
    clean = scene(8)
    noisy = add_noise(clean, 25, kind="impulse")
    hit = noisy != to_float(clean)
    assert set(np.unique(noisy[hit])) == {0, 1}
    assert noisy[hit].mean() == pytest.approx(0.5, abs=0.05)
    assert 0.01 < hit.mean() < 0.05
    assert np.sqrt(np.square(residual(clean, "impulse")).mean()) == pytest.approx(25, rel=0.05)
    noisy = add_noise(clean, 200, kind="impulse")  # which hits every value
    assert noisy.mean() == pytest.approx(0.5, abs=0.01)
    assert set(np.unique(noisy)) == {0, 1}


def test_uniform_noise_has_the_kurtosis_of_its_distribution():
    noise = residual(flat(), "uniform")
    assert kurtosis(noise.ravel()) == pytest.approx(-1.2, abs=0.02)
    assert np.abs(noise).max() <= 25 * np.sqrt(3) + 1e-3
    assert kurtosis(residual(flat(), "white").ravel()) == pytest.approx(0, abs=0.05)


def test_camera_without_noise_gives_the_picture():
    clean = np.concatenate([scene(8), np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)])
    assert psnr(clean, to_uint8(add_noise(clean, 0, kind="camera"))).min() > 60
    for curved in (np.bool_(False), np.bool_(True)):
        values = np.linspace(0, 1, 256, dtype=np.float32)
        linear = load_data.to_linear(values, curved)
        assert linear[0] == pytest.approx(0, abs=1e-6) and linear[-1] == pytest.approx(1)
        np.testing.assert_allclose(load_data.to_srgb(linear, curved), values, atol=1e-4)
    assert load_data.to_linear(np.array([0.5]), np.bool_(False))[0] == pytest.approx(load_data.MID_GREY, 1e-3)


def test_camera_noise_is_as_strong_grainy_and_coloured_as_measured_on_real_pairs():
    noise = residual(flat(count=60), "camera", 12)
    deviation = noise.std(axis=(1, 2, 3))
    assert 0.5 * 12 < np.median(deviation) < 12
    assert deviation.min() > 0.3 * 12 and deviation.max() < 1.6 * 12
    assert 0.55 < np.median([neighbours(image[None]) for image in noise]) < 0.8
    assert 0.5 < np.median([channels(image).mean() for image in noise]) < 0.85
    assert abs(noise.mean()) < 0.3


@pytest.mark.parametrize("sigma, low, high", [(CAMERA_SIGMA[0], 2, 5), (CAMERA_SIGMA[1], 11, 22)])
def test_camera_noise_of_training_leaves_3_to_15_grey_levels(sigma, low, high):
    assert low < np.median(residual(flat(count=24), "camera", sigma).std(axis=(1, 2, 3))) < high


def test_camera_noise_is_less_in_white_and_black():
    black, grey, white = (residual(flat(value, 16), "camera", 12).std() for value in (3, 128, 252))
    assert black < 0.8 * grey and white < 0.6 * grey


@pytest.fixture
def sensor(monkeypatch):
    """Gives the variance in linear light of each of 1,000 pictures of one value by sensors of one colour."""
    monkeypatch.setattr(load_data, "to_srgb", lambda linear, curved: linear)
    monkeypatch.setattr(load_data, "COLOUR_MATRIX", (0, 0))

    def variance(value, sigma, colour):
        monkeypatch.setattr(load_data, "bayer_colours", lambda shape, rng: np.full(shape, colour))
        images, sigma = np.full((1000, 32, 32, 3), value, np.float32), np.full((1000, 1, 1, 1), sigma)
        noise = load_data.sensor_noise(images, sigma, np.random.default_rng(0))
        return noise[..., colour].var(axis=(1, 2))

    return variance


@pytest.mark.parametrize("curved", [0, 1])
def test_sensor_noise_is_shot_and_read_noise_in_the_proportion_of_real_cameras(monkeypatch, sensor, curved):
    monkeypatch.setattr(load_data, "TONE_CURVE_SHARE", curved)
    black, grey = sensor(0, 25.0, 1), sensor(0.5, 25.0, 1).mean()
    # a tone curve makes mid-grey steeper, so that the sensor's noise is weaker there
    expected = 25 / 255 / load_data.MID_GREY_SLOPE / (1.5 if curved else 1)
    assert np.sqrt(grey) == pytest.approx(expected, rel=0.01)
    found = np.log(black / (grey - black) * load_data.MID_GREY)
    # Brooks et al.: log b = 2.18 log a + 1.2, with a deviation of 0.26
    assert found.mean() == pytest.approx(1.18 * np.log(grey / load_data.MID_GREY) + 1.2, abs=0.05)
    assert found.std() == pytest.approx(0.26, abs=0.04)


@pytest.mark.parametrize("colour, low, high", [(0, 1.9, 2.4), (2, 1.5, 1.9)])
def test_white_balance_and_share_of_tone_curves_are_those_of_real_cameras(sensor, colour, low, high):
    # shot noise alone: of gain^2 * value / gain
    gains = sensor(0.5, 1.0, colour) / (1 / 255 / load_data.MID_GREY_SLOPE) ** 2
    curved = gains < np.sqrt(low * high) / 1.5
    assert curved.mean() == pytest.approx(0.7, abs=0.04)
    gains[curved] *= 1.5**2
    assert gains.min() == pytest.approx(low, rel=0.15) and gains.max() == pytest.approx(high, rel=0.15)
    assert gains.mean() == pytest.approx((low + high) / 2, rel=0.02)


def test_cameras_sharpen_and_compress_in_their_shares_and_keep_edges(monkeypatch):
    monkeypatch.setattr(load_data, "SMOOTHED_COLOUR", (0, 0))
    noise = np.random.default_rng(0).normal(0, 20 / 255, (400, 16, 16, 1))
    noise = noise.repeat(3, axis=3).astype(np.float32)
    column = (100 + load_data.EDGE * np.arange(16, dtype=np.float32)) / 255
    ramp = np.broadcast_to(column[:, None, None], noise.shape)

    def developed(jpeg=0, sharpened=0, radius=0):
        monkeypatch.setattr(load_data, "JPEG_SHARE", jpeg)
        monkeypatch.setattr(load_data, "SHARPENED_SHARE", sharpened)
        monkeypatch.setattr(load_data, "SMOOTHED_LUMA", (radius, radius))
        return load_data.developed(ramp, noise.copy(), np.random.default_rng(0)) - ramp

    plain = developed()
    np.testing.assert_allclose(plain, noise, atol=0.51 / 255)
    for options, share in (({"jpeg": 0.7}, 0.7), ({"sharpened": 0.3}, 0.3)):
        changed = np.abs(developed(**options) - plain).mean(axis=(1, 2, 3)) > 0.2 / 255
        assert changed.mean() == pytest.approx(share, abs=0.07)
    sharper = developed(sharpened=1)
    assert (sharper.std(axis=(1, 2, 3)) > noise.std(axis=(1, 2, 3))).mean() > 0.9
    # at an edge of EDGE grey levels half of what is drawn from 0 to 1 is not smoothed
    smooth = load_data.low_pass(noise, np.ones((400, 1, 1, 1)))
    kept = ((developed(radius=1) - smooth) * (noise - smooth)).mean() / np.square(noise - smooth).mean()
    assert kept == pytest.approx(0.25, abs=0.03)


def test_colour_matrix_raises_what_differs_from_the_mean_of_the_channels(monkeypatch):
    def mean_and_rest(excess):
        monkeypatch.setattr(load_data, "COLOUR_MATRIX", (excess, excess))
        images, sigma = to_float(flat(count=16)), np.full((16, 1, 1, 1), 5.0)
        noise = load_data.sensor_noise(images, sigma, np.random.default_rng(0))
        mean = noise.mean(axis=-1, keepdims=True)
        return np.array([mean.std(), (noise - mean).std()])

    np.testing.assert_allclose(mean_and_rest(0.8) / mean_and_rest(0), [1, 1.8], rtol=0.02)


def test_demosaicing_keeps_flat_colours_and_measured_values():
    rng = np.random.default_rng(0)
    bayer = load_data.bayer_colours((20, 12, 14), rng)
    assert len({image[:2, :2].tobytes() for image in bayer}) == 4  # all phases
    for image in bayer:
        assert [(image == colour).mean() for colour in range(3)] == [0.25, 0.5, 0.25]
        assert (image[:-1] != image[1:]).all() and (image[:, :-1] != image[:, 1:]).all()
    colour = np.array([0.2, 0.5, 0.7], np.float32)
    demosaiced = load_data.demosaic(colour[bayer], bayer)
    np.testing.assert_allclose(demosaiced, np.broadcast_to(colour, demosaiced.shape), rtol=1e-5)
    mosaic = rng.standard_normal(bayer.shape, np.float32)
    demosaiced = load_data.demosaic(mosaic, bayer)
    np.testing.assert_array_equal(np.take_along_axis(demosaiced, bayer[..., None], -1)[..., 0], mosaic)
    # a grey ramp, which a linear filter of these widths must continue exactly
    ramp = np.broadcast_to(np.linspace(0, 1, 14, dtype=np.float32), bayer.shape)
    inside = load_data.demosaic(ramp, bayer)[:, 2:-2, 2:-2]
    np.testing.assert_allclose(inside, ramp[:, 2:-2, 2:-2, None].repeat(3, -1), atol=1e-6)
    # and mirror at the borders
    np.testing.assert_allclose(load_data.demosaic(ramp, bayer), ramp[..., None].repeat(3, -1), atol=0.1)


def test_white_batches_leave_the_noise_to_the_graph():
    images = scene(60, 16)
    (noisy, sigma), clean = Batches(images, 60, seed=3, sigma=(10, 50))[0]
    assert noisy.dtype == sigma.dtype == clean.dtype == np.float32
    assert sigma.shape == (60, 1, 1, 1)
    np.testing.assert_array_equal(noisy, clean)
    assert (sigma >= 10 / 255).all() and (sigma <= 50 / 255).all() and len(np.unique(sigma)) == 60
    mirrored = [np.rot90(images[:, ::step], turns, (1, 2)) for step in (1, -1) for turns in range(4)]
    positions = [image.tobytes() for image in np.concatenate(mirrored)]
    assert len({positions.index(image.tobytes()) // 60 for image in to_uint8(clean)}) == 8


def test_batches_share_the_kinds_out():
    images = np.random.default_rng(0).integers(60, 196, (1000, 8, 8, 3), np.uint8)
    noise = {"white": 0.5, "grey": 0.3, "uniform": 0.2}
    (noisy, sigma), clean = Batches(images, 1000, noise=noise, sigma=(5, 30))[0]
    is_white = sigma.ravel() > 0
    is_grey = (clean == clean[..., :1]).all(axis=(1, 2, 3))
    assert is_white.mean() == pytest.approx(0.5, abs=0.05)
    assert is_grey.mean() == pytest.approx(0.3, abs=0.05)
    assert not (is_white & is_grey).any()
    np.testing.assert_array_equal(noisy[is_white], clean[is_white])
    assert (noisy[is_grey] == noisy[is_grey][..., :1]).all()
    rest = ~(is_white | is_grey)
    deviation = 255 * np.sqrt(np.square(noisy - clean)[rest].mean(axis=(1, 2, 3)))
    assert 4 < deviation.min() < 8 and 27 < deviation.max() < 33
    assert deviation.mean() == pytest.approx(17.5, rel=0.1)


def test_strength_of_camera_noise_is_logarithmic_and_within_its_range(monkeypatch):
    strengths = []
    monkeypatch.setitem(NOISE_KINDS, "camera", lambda images, sigma, rng: strengths.append(sigma) or images)
    Batches(np.zeros((2000, 2, 2, 3), np.uint8), 2000, noise={"camera": 1.0})[0]
    (low, high), drawn = CAMERA_SIGMA, strengths[0]
    assert (drawn == 0).mean() == pytest.approx(load_data.NOISELESS, abs=0.03)
    assert low <= drawn[drawn > 0].min() and drawn.max() <= high
    assert np.median(drawn[drawn > 0]) == pytest.approx(np.sqrt(low * high), rel=0.1)


def test_grainy_images_are_halved_and_mirrored():
    rng = np.random.default_rng(0)
    calm = scene(2, 16).astype(np.float32) / 255
    calm[:, :, :9] = 0.5
    grainy = (calm + rng.normal(0, 2 / 255, calm.shape)).astype(np.float32)
    np.testing.assert_array_equal(load_data.halve_grainy(calm), calm)
    halved = load_data.halve_grainy(grainy)
    np.testing.assert_allclose(halved[:, 3, 5], grainy[:, 6:8, 10:12].mean(axis=(1, 2)), atol=1e-6)
    np.testing.assert_array_equal(halved, halved[:, ::-1])
    np.testing.assert_array_equal(halved, halved[:, :, ::-1])
    stripes = np.full((1, 8, 8, 3), 0.5, np.float32)
    stripes[:, :, ::2] += 3.5 / 255  # as steep as grain of a deviation of 2.5
    assert (load_data.halve_grainy(stripes) != stripes).any()
    texture = rng.random((2, 16, 16, 3), np.float32)  # everywhere, and too strong for grain
    np.testing.assert_array_equal(load_data.halve_grainy(texture), texture)


def test_only_images_with_camera_noise_are_halved(monkeypatch):
    monkeypatch.setitem(NOISE_KINDS, "camera", lambda images, sigma, rng: images)
    images = to_uint8(0.5 + np.random.default_rng(0).normal(0, 2 / 255, (40, 8, 8, 3)))
    (noisy, sigma), clean = Batches(images, 40, noise={"camera": 0.5, "white": 0.5})[0]
    np.testing.assert_array_equal(noisy, clean)
    mirrored = (clean == clean[:, ::-1]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(mirrored, sigma.ravel() == 0)
    assert mirrored.any() and not mirrored.all()


def test_batches_depend_on_seed_epoch_and_position_alone():
    images, noise = scene(24, 16), dict.fromkeys(NOISE_KINDS, 0.1)

    def feed(epoch, index, seed=1):
        batches = Batches(images, 12, seed, noise)
        batches[0]
        batches.go_to(epoch)
        (noisy, sigma), clean = batches[index]
        return np.concatenate([noisy.ravel(), sigma.ravel(), clean.ravel()])

    np.testing.assert_array_equal(feed(2, 1), feed(2, 1))
    for other in (feed(3, 1), feed(2, 0), feed(2, 1, seed=2)):
        assert (feed(2, 1) != other).any()


def test_streams_of_training_and_draws_are_not_that_of_test_noise():
    training = Batches(random_images(1, 4, 4, 3), 1).random(0)
    draws = np.random.default_rng((DRAWS_SEED, 0, 0))
    test = np.random.default_rng(TEST_NOISE_SEED)
    assert len({generator.random() for generator in (training, draws, test)}) == 3


def test_kinds_share_equally_but_those_of_photographs():
    assert load_data.noise_shares(["white", "grey"]) == {"white": 0.5, "grey": 0.5}
    assert load_data.noise_shares(["photographs"]) is load_data.PHOTOGRAPHS_NOISE
    assert set(load_data.PHOTOGRAPHS_NOISE) == set(NOISE_KINDS)
    shares = list(load_data.PHOTOGRAPHS_NOISE.values())
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)


def test_validation_images_have_the_kinds_of_noise_of_the_training():
    images = random_images(40, 16, 16, 3)
    noise = {"white": 0.5, "grey": 0.25, "uniform": 0.25}
    noisy, clean = validation_pair(images, noise, (0, 75))
    is_grey = (np.ptp(clean, axis=-1) == 0).all(axis=(1, 2))
    assert is_grey.sum() == 10
    np.testing.assert_allclose(np.ptp((noisy - clean)[is_grey], axis=-1), 0, atol=1e-6)
    np.testing.assert_array_equal(to_uint8(clean[~is_grey]), images[~is_grey])
    np.testing.assert_array_equal(validation_pair(images, noise, (0, 75))[0], noisy)
    _, clean = validation_pair(images, {"white": 0.5, "grey": 0.5}, (0, 75))
    assert (np.ptp(clean[:20], axis=-1) == 0).any()  # each kind has weak and strong noise
    white, _ = validation_pair(images, {"white": 1.0}, (0, 75))
    expected = add_noise(images, np.linspace(0, 75, 40), np.random.default_rng(VALIDATION_NOISE_SEED))
    np.testing.assert_allclose(white, expected, atol=1e-6)
