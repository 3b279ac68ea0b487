import load_data
import util

import keras
import numpy as np
from conftest import on_numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

# without a deadline, since a new shape compiles the model anew; the same examples every time
settings.register_profile("project", deadline=None, derandomize=True, database=None)
settings.load_profile("project")

sides = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)
sigmas = st.floats(0, 255)
images = arrays(np.uint8, array_shapes(min_dims=3, max_dims=3, max_side=12).map(lambda shape: (2, *shape)))


def model_of(stride):
    keras.utils.set_random_seed(0)
    image = x = keras.Input((None, None, 3))
    for _ in range(stride // 2):
        x = keras.layers.Conv2D(6, 2, strides=2, activation="relu")(x)
    x = keras.layers.Conv2D(6, 3, padding="same")(x)
    for _ in range(stride // 2):
        x = keras.layers.Conv2DTranspose(6, 2, strides=2)(x)
    return keras.Model(image, keras.layers.Conv2D(3, 1)(x))


MODELS = {stride: model_of(stride) for stride in (2, 4)}


def drawn(seed, *shape, dtype=np.uint8):
    peak = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, peak, shape, dtype, endpoint=True)


def test_thousands_of_damaged_files_are_read_or_refused():
    ended = on_numpy("fuzz_readers.py", 0)
    assert ended.returncode == 0, ended.stderr[-3000:]
    counts = {
        line.split(":")[0]: [int(word) for word in line.split() if word.isdigit()]
        for line in ended.stdout.splitlines()
    }
    assert len(counts) == 9
    assert sum(map(sum, counts.values())) > 5000
    for kind, (read, _) in counts.items():
        assert read, f"not even the undamaged files were read: {kind}"


@given(images, sigmas, seeds)
def test_noise_is_that_of_its_seed_and_sigma(clean, sigma, seed):
    noisy = load_data.add_noise(clean, sigma, np.random.default_rng(seed))
    assert (noisy.dtype, noisy.shape) == (np.float32, clean.shape)
    expected = clean / 255 + np.random.default_rng(seed).standard_normal(clean.shape) * sigma / 255
    np.testing.assert_allclose(noisy, expected, atol=1e-5)


@given(images, st.lists(sigmas, min_size=2, max_size=2))
def test_noise_without_sigma_is_none_and_scales_with_it(clean, sigma):
    zero = load_data.add_noise(clean, 0)
    np.testing.assert_allclose(zero, clean / np.float32(255), atol=1e-6)
    np.testing.assert_array_equal(util.to_uint8(zero), clean)
    noise, unit = load_data.add_noise(clean, sigma) - zero, load_data.add_noise(clean, 1) - zero
    np.testing.assert_allclose(noise, unit * np.reshape(sigma, (2, 1, 1, 1)), atol=1e-3)


@given(arrays(np.float32, (3, 4), elements=st.floats(-1e6, 1e6, width=32)))
def test_rounding_stays_in_range_and_is_stable(values):
    rounded = util.to_uint8(values)
    np.testing.assert_allclose(rounded, np.clip(values * 255.0, 0, 255), atol=0.51)
    np.testing.assert_array_equal(util.to_uint8(rounded / 255), rounded)


@given(images, seeds)
def test_psnr_against_its_definition(clean, seed):
    other = drawn(seed, *clean.shape)
    expected = []
    for a, b in zip(clean.tolist(), other.tolist(), strict=True):
        squares = (np.array(a, float) - np.array(b, float)) ** 2
        expected.append(10 * np.log10(255**2 / squares.mean()) if squares.any() else np.inf)
    np.testing.assert_allclose(util.psnr(clean, other), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(util.psnr(clean, other), util.psnr(other, clean))
    assert np.isinf(util.psnr(clean, clean)).all()


@given(st.sampled_from([2, 4]), sides, sides, seeds)
@settings(max_examples=30)
def test_images_of_any_shape_are_padded_as_by_hand(stride, height, width, seed):
    noisy = drawn(seed, 2, height, width, 3).astype(np.float32) / 255
    rows, columns = (np.minimum(np.arange(-(-side // stride) * stride), side - 1) for side in (height, width))
    whole = MODELS[stride].predict(noisy[:, rows][:, :, columns], verbose=0)[:, :height, :width]
    denoised = util.denoise(MODELS[stride], noisy)
    assert denoised.shape == noisy.shape
    np.testing.assert_allclose(denoised, util.to_uint8(whole), atol=1)


@given(
    st.sampled_from([2, 4]),
    sides,
    sides,
    st.integers(1, 5),
    st.sampled_from([np.uint8, np.uint16]),
    st.sampled_from([1, 3]),
    seeds,
)
@settings(max_examples=25)
def test_tiles_of_any_size_make_the_whole_picture(stride, height, width, cells, dtype, channels, seed):
    picture = drawn(seed, height, width, channels, dtype=dtype)
    parts = [list(util.denoise_tiles(MODELS[stride], picture, tile)) for tile in (4 * cells, 64)]
    (whole,) = parts[1]
    covered = np.zeros((height, width), int)
    for rows, columns, tile, *_ in parts[0]:
        np.testing.assert_allclose(tile, whole[2][rows, columns], atol=1e-5)
        covered[rows, columns] += 1
    assert (covered == 1).all()


@given(arrays(np.float32, (2, 7, 9, 2), elements=st.floats(-10, 10, width=32)), st.integers(1, 12))
def test_pooled_maps_stay_within_their_cells(maps, side):
    pooled = util.pool(maps, side)
    assert pooled.shape == (2, min(side, 7), min(side, 9), 2)
    assert maps.min() - 1e-5 <= pooled.min() <= pooled.max() <= maps.max() + 1e-5
    if side == 1:
        np.testing.assert_allclose(pooled[:, 0, 0], maps.mean(axis=(1, 2)), atol=1e-4)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(12, 20), st.integers(1, 80), st.booleans(), seeds)
def test_patches_are_as_many_as_there_are_places_or_wanted(height, width, size, at_most, training, seed):
    picture = drawn(seed, height, width, 3)
    patches = load_data._cut(picture, size, training, at_most, np.random.default_rng(seed))
    step = size // 2 if training else size
    places = len(load_data.corners(picture, size, step))
    assert min(places, at_most) <= len(patches) <= at_most
    if 0 < len(patches) == places:
        windows = np.lib.stride_tricks.sliding_window_view(picture, (size, size), axis=(0, 1))
        expected = windows[::step, ::step].transpose(0, 1, 3, 4, 2)
        np.testing.assert_array_equal(patches, expected.reshape(patches.shape))


@given(st.integers(1, 50), st.integers(1, 60), seeds, st.integers(0, 1000))
def test_batches_show_every_image_at_most_once_in_an_epoch(count, batch_size, seed, epoch):
    clean = np.zeros((count, 2, 2, 3), np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None, None]
    batches = load_data.Batches(clean, batch_size, seed)
    batches.go_to(epoch)
    seen = [value for index in range(len(batches)) for value in np.round(batches[index][0][:, 0, 0, 0] * 255)]
    assert len(seen) == len(set(seen)) > count - min(batch_size, count)
