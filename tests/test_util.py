import argparse
import builtins
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import util
from util import ModelError

import h5py
import imageio.v3 as iio
import keras
import numpy as np
import pytest
from check_keras_versions import NAMES as SHIPPED
from conftest import (
    FULL,
    ROOT,
    assert_same_weights,
    curves_of,
    files_of,
    fixed_draws,
    labels_of,
    largest_file,
    legend_of,
    on_numpy,
    pixels_of,
    random_images,
    save_run,
    told_line,
    without_greeting,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.ndimage import correlate1d

# what Keras 3.5 stops at when it reads an architecture
REFUSED = re.compile(r'"(?:renorm\w*|input_axes|output_axes|quantization_config)":')

sides = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)
images = arrays(np.uint8, array_shapes(min_dims=3, max_dims=3, max_side=12).map(lambda shape: (2, *shape)))


def small_model(seed=0, convolutions=1):
    """Autoencoder of cells of 4x4 pixels, each of which depends on its neighbours alone."""
    rng = np.random.default_rng(seed)
    image = x = keras.Input((None, None, 3))
    for _ in range(2):
        x = keras.layers.Conv2D(4, 2, strides=2, activation="relu")(x)
    for _ in range(convolutions):
        x = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    for _ in range(2):
        x = keras.layers.Conv2DTranspose(3, 2, strides=2)(x)
    model = keras.Model(image, x)
    model.set_weights([rng.normal(0.05, 0.3, weight.shape) for weight in model.get_weights()])
    return model


MODEL = small_model()


@pytest.fixture
def small_tiles(monkeypatch):
    """Make tiles small, with surroundings as wide as `small_model` and `models_with_codes` need."""
    for name in ("REACH", "DRAWS_REACH"):
        monkeypatch.setattr(util, name, 4)
    for name in ("TILE", "DRAWS_TILE"):
        monkeypatch.setattr(util, name, 8)


def models_with_codes(levels):
    """Autoencoder, encoder and decoder of one code or two, on grids of 2x2 and 4x4 pixels."""
    keras.utils.set_random_seed(0)
    image = x = keras.Input((None, None, 3))
    outputs, codes, decoded = [], [], []
    for level in range(levels):
        x = keras.layers.Conv2D(6, 2, strides=2)(x)
        outputs += [keras.layers.Conv2D(5 - level, 1)(x) for _ in ("mean", "log-variance")]
        codes.append(keras.Input((None, None, 5 - level)))
        decoded.append(keras.layers.Conv2DTranspose(3, 2 ** (level + 1), strides=2 ** (level + 1))(codes[-1]))
    encoder = keras.Model(image, outputs)
    decoder = keras.Model(codes, keras.ops.mean(keras.ops.stack(decoded), axis=0))
    return keras.Model(image, decoder(encoder(image)[::2])), encoder, decoder


@given(images, seeds)
def test_psnr_against_its_definition(clean, seed):
    other = random_images(*clean.shape, seed=seed)
    expected = []
    for a, b in zip(clean.tolist(), other.tolist(), strict=True):
        squares = (np.array(a, float) - np.array(b, float)) ** 2
        expected.append(10 * np.log10(255**2 / squares.mean()) if squares.any() else np.inf)
    np.testing.assert_allclose(util.psnr(clean, other), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(util.psnr(clean, other), util.psnr(other, clean))
    assert np.isinf(util.psnr(clean, clean)).all()


def test_ssim_against_its_definition():
    clean = random_images(2, 20, 24, 3)
    denoised = (clean * 0.8 + random_images(2, 20, 24, 3, seed=1) * 0.2).astype(np.uint8)
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(x):
        return correlate1d(correlate1d(x, window, axis=1), window, axis=2)[:, 5:-5, 5:-5]

    a, b = clean.astype(np.float64), denoised.astype(np.float64)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    expected /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    np.testing.assert_allclose(util.ssim(clean, denoised), expected.mean(axis=(1, 2, 3)), atol=1e-4)


@given(arrays(np.float32, (3, 4), elements=st.floats(-1e6, 1e6, width=32)))
def test_rounding_stays_in_range_and_is_stable(values):
    rounded = util.to_uint8(values)
    np.testing.assert_allclose(rounded, np.clip(values * 255.0, 0, 255), atol=0.51)
    np.testing.assert_array_equal(util.to_uint8(rounded / 255), rounded)


def padded_by_hand(pictures):
    """Pictures (N, H, W, C), mirrored at the last row and column up to multiples of 4."""
    rows, columns = (
        ([*range(side), *reversed(range(side))] * 4)[: -(-side // 4) * 4] for side in pictures.shape[1:3]
    )
    return pictures[:, rows][:, :, columns]


@given(sides, sides, seeds)
def test_images_of_any_shape_are_padded_as_by_hand(height, width, seed):
    noisy = random_images(2, height, width, 3, seed=seed).astype(np.float32) / 255
    whole = MODEL.predict(padded_by_hand(noisy), verbose=0)[:, :height, :width]
    denoised = util.denoise(MODEL, noisy)
    assert (denoised.shape, denoised.dtype) == (noisy.shape, np.uint8)
    np.testing.assert_allclose(denoised, util.to_uint8(whole), atol=1)


def test_large_images_are_computed_in_the_memory_of_small_ones():
    sides = (32, 96, 192, 2000)
    found = [util.batch_size_for(np.empty((1, side, side, 3), np.uint8)) for side in sides]
    assert found == [250, 250, 62, 1]


def test_windows_are_of_one_size_and_reach_beyond_their_tiles():
    for length in range(1, 300):
        cut = list(util.tiles(length, 32, 8))
        assert len({window.stop - window.start for window, _, _ in cut}) == 1
        assert len(cut) == max(1, -(-(length - 16) // 32))
        pixels = []
        for window, inside, target in cut:
            assert window.start % 4 == window.stop % 4 == 0
            assert window.start == 0 or window.start + 8 <= target.start
            assert length <= window.stop < length + 4 or target.stop <= window.stop - 8
            assert range(window.start, window.stop)[inside] == range(target.start, target.stop)
            pixels += range(target.start, target.stop)
        assert pixels == list(range(length))


def as_in(picture, images):
    """What images (1, h, w, 3) show of a picture: in its size, its channels and its range."""
    images = np.asarray(images)[0, : picture.shape[0], : picture.shape[1]]
    return np.clip(images if picture.shape[2] == 3 else images.mean(axis=2, keepdims=True), 0, 1)


@pytest.mark.parametrize("shape", [(1, 3), (40, 37), (9, 30)])
@pytest.mark.parametrize(
    ("dtype", "channels", "strength"),
    [("uint8", 3, 1), ("uint16", 1, 0.3), ("float32", 3, 1), ("uint8", 1, 0)],
)
def test_picture_of_any_size_is_denoised_as_a_whole(shape, dtype, channels, strength, small_tiles):
    peak = np.float32({"uint8": 255, "uint16": 65535, "float32": 1}[dtype])
    picture = (random_images(*shape, channels, dtype=np.uint16) / np.float32(65535) * peak).astype(dtype)
    before = picture / peak
    window = padded_by_hand(before[None]).repeat(3 // channels, axis=3)
    expected = before + strength * (as_in(picture, MODEL.predict_on_batch(window)) - before)
    result, error = util.denoise_picture(MODEL, picture, strength)
    assert (result.dtype, result.shape, error) == (dtype, picture.shape, None)
    np.testing.assert_allclose(result / peak, expected, atol=0.51 / 255 if dtype == "uint8" else 1e-4)
    if strength == 0:
        np.testing.assert_array_equal(result, picture)


@pytest.mark.parametrize(
    ("picture", "found"),
    [
        (np.zeros((8, 8), np.uint8), r"\(8, 8\), uint8"),
        (np.zeros((8, 8, 4), np.uint8), r"\("),
        (np.zeros((1, 8, 8, 3), np.float32), r"\("),
        (np.zeros((0, 8, 3), np.float32), r"\("),
        (np.zeros((8, 8, 3), int), r"\("),
        (np.full((8, 8, 3), np.nan), "nan to nan"),
        (np.full((8, 8, 3), np.inf), "inf to inf"),
        (np.linspace(0, 255, 192).reshape(8, 8, 3), "0 to 255"),
    ],
)
def test_what_is_no_picture_is_refused(picture, found):
    with pytest.raises(ValueError, match=f"picture: expected .*, not {found}"):
        util.denoise_picture(MODEL, picture)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_self_ensemble_is_the_mean_over_positions_of_the_picture(count, small_tiles):
    picture = random_images(20, 28, 3)
    outputs = []
    # as it is, mirrored at the axis from top to bottom, both turned by 180 degrees, then by 90 and 270
    for quarters, mirrored in itertools.product((0, 2, 1, 3), (1, -1)):
        turned = np.rot90(picture, quarters)[:, ::mirrored] / np.float32(255)
        output = np.asarray(MODEL(turned[None]))[0]
        outputs.append(np.rot90(output[:, ::mirrored], -quarters))
    assert np.abs(outputs[0] - outputs[1]).max() > 0.1  # to this model the position makes a difference
    result, _ = util.denoise_picture(MODEL, picture, ensemble=count)
    np.testing.assert_allclose(result, 255 * np.clip(np.mean(outputs[:count], axis=0), 0, 1), atol=0.51)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_expected_error_is_what_draws_of_all_codes_differ_from_the_result(levels, channels, monkeypatch):
    autoencoder, encoder, decoder = models_with_codes(levels)
    picture = random_images(33, 57, channels)
    window = padded_by_hand(picture[None] / np.float32(255)).repeat(3 // channels, axis=3)
    result = picture / 255 + 0.5 * (as_in(picture, autoencoder(window)) - picture / 255)
    outputs, rng = encoder.predict(window, verbose=0), np.random.default_rng((2, 0, 0))
    squares = []
    for _ in range(3):
        codes = [
            mean + np.exp(log_var / 2) * rng.standard_normal(mean.shape, np.float32)
            for mean, log_var in zip(outputs[::2], outputs[1::2], strict=True)
        ]
        decoded = decoder(codes)
        squares.append(np.square(as_in(picture, decoded) - result).mean(axis=2))

    def denoised():
        found, error = util.denoise_picture(autoencoder, picture, 0.5, (encoder, decoder), 3)
        np.testing.assert_allclose(found, 255 * result, atol=0.51)
        assert (error.dtype, error.shape) == (np.float16, (33, 57))
        return error

    np.testing.assert_allclose(denoised(), 255 * np.sqrt(np.mean(squares, axis=0)), rtol=2e-3)
    monkeypatch.setattr(util, "draws", fixed_draws)
    whole = denoised()
    monkeypatch.setattr(util, "DRAWS_REACH", 4)
    monkeypatch.setattr(util, "DRAWS_TILE", 16)
    tiles, cuts = util.tiles, []
    monkeypatch.setattr(util, "tiles", lambda *cut: cuts.append(cut) or tiles(*cut))
    np.testing.assert_allclose(denoised(), whole, rtol=2e-3)
    assert cuts == [(33, 16, 4), (57, 16, 4)]


def test_saved_json_fits_older_keras_and_names_no_policy(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        image = keras.Input((None, None, 3))
        x = keras.layers.Conv2D(4, 3, use_bias=False, padding="same")(image)
        model = keras.Model(image, keras.layers.Dense(3)(keras.layers.BatchNormalization()(x)))
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile("adam", "mse")
    with util.publishing(tmp_path, "run") as draft:
        util.save_model(draft, model, "autoencoder_run")
    text = (tmp_path / "models/autoencoder_run.json").read_text()
    assert not REFUSED.findall(text)
    for word in ("bfloat16", "optimizer", "compile_config"):
        assert word not in text
    loaded = util.load_model(tmp_path, "run", "autoencoder")
    for ours, restored in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(restored, ours.astype(np.float16))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_model_loads_with_keras_alone_even_an_older_one(name):
    run = name.split("_", 1)[1] if name.startswith(util.PARTS) else name
    recorded = json.loads((ROOT / f"logs/{run}.json").read_text())["files"]
    paths = [ROOT / f"models/{name}.json", ROOT / f"weights/{name}.weights.h5"]
    for path in paths:
        assert util.sha256_of(path) == recorded[path.relative_to(ROOT).as_posix()]
    text = paths[0].read_text()
    assert REFUSED.findall(text) == []
    assert set(re.findall(r'"registered_name": (?!null)(.*?)[,\n]', text)) <= {
        '"Functional"'
    }  # no class of ours
    assert set(re.findall(r'"module": "(\w+)', text)) == {"keras"}
    model = keras.models.model_from_json(text)
    model.load_weights(paths[1])
    assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}
    assert len(model.trainable_weights) == sum(weight.trainable for weight in model.weights)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


def test_denoisers_by_default_are_those_of_the_data_set_that_are_saved(tmp_path):
    assert util.denoiser_runs(tmp_path, "photos", "encoder") == []
    (tmp_path / "models").mkdir()
    for name in ("stacked_photos", "simple_photos", "simple_cifar10", "stacked_photographs"):
        (tmp_path / f"models/encoder_{name}.json").write_text("{}")
    assert util.denoiser_runs(tmp_path, "photos", "encoder") == ["simple_photos", "stacked_photos"]


def test_weights_are_saved_as_float16_where_that_can_hold_them(tmp_path):
    model = small_model()
    kernel, bias, *others = model.get_weights()
    model.set_weights([kernel, bias + 1e5, *others])
    with util.publishing(tmp_path, "run") as draft:
        util.save_model(draft, model, "autoencoder_run")
    dtypes = set()
    with h5py.File(tmp_path / "weights/autoencoder_run.weights.h5") as file:
        file.visititems(lambda _, item: dtypes.add(getattr(item, "dtype", np.dtype(np.float16)).name))
    assert dtypes == {"float16", "float32"}
    loaded = util.load_model(tmp_path, "run", "autoencoder")
    assert {weight.dtype for weight in loaded.weights} == {"float32"}
    copied = util.portable_copy(model)
    for ours, restored in zip(copied.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, restored)
    np.testing.assert_array_equal(loaded.get_weights()[1], bias + 1e5)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("small")
    save_run(out)
    return out


@pytest.fixture
def saved(small_run, tmp_path):
    """Output folder with run `small`."""
    return shutil.copytree(small_run, tmp_path, dirs_exist_ok=True)


def test_model_computes_in_the_asked_precision_until_its_outputs(saved):
    exact, rounded = (util.load_model(saved, "small", "encoder", p) for p in ("float32", "mixed_bfloat16"))
    inner = rounded.get_layer("z_encoder")
    assert {layer.compute_dtype for layer in inner.layers[1:]} == {"bfloat16", "float32"}
    assert {inner.get_layer(name).compute_dtype for name in ("z_mean", "z_log_var")} == {"float32"}
    noisy = random_images(1, 8, 8, 3) / np.float32(255)
    for ours, theirs in zip(*(model.predict(noisy, verbose=0) for model in (exact, rounded)), strict=True):
        assert (ours.dtype, theirs.dtype) == (np.float32, np.float32)
        np.testing.assert_allclose(ours, theirs, atol=0.02 * max(1, np.abs(ours).max()))


def test_missing_model_lists_those_that_are_there(saved):
    with pytest.raises(ModelError, match="autoencoder_large.json: not found; there is small$"):
        util.load_model(saved, "large", "autoencoder")
    (saved / "weights/autoencoder_small.weights.h5").unlink()
    with pytest.raises(ModelError, match="autoencoder_small.weights.h5: not found; restore it"):
        util.load_model(saved, "small", "autoencoder")


@pytest.mark.parametrize("damage", ["empty", "cut", "bit"])
@pytest.mark.parametrize("file", ["models/encoder_small.json", "weights/decoder_small.weights.h5"])
def test_damaged_file_of_a_model_is_noticed(saved, file, damage):
    raw = (saved / file).read_bytes()
    flipped = raw[:-50] + bytes([raw[-50] ^ 1]) + raw[-49:]
    (saved / file).write_bytes({"empty": b"", "cut": raw[: len(raw) // 2], "bit": flipped}[damage])
    arguments = saved, "small", Path(file).name.split("_")[0]
    assert told_line(util.load_model, *arguments) == (
        f"{saved / file}: not the file that small wrote (SHA-256 differs); restore it or train again"
    )
    if damage != "bit":  # without the record there is no checksum
        (saved / "logs/small.json").unlink()
        line = told_line(util.load_model, *arguments)
        assert line.startswith(f"{saved / file}: not ")
        assert "restore it" in line


LAMBDA = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x)]).to_json()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"class_name": "os.system"}', LAMBDA])
def test_json_that_is_no_model_is_told(saved, text):
    (saved / "logs/small.json").unlink()  # so that the checksum does not tell first
    (saved / "models/autoencoder_small.json").write_text(text)
    with pytest.raises(ModelError, match="autoencoder_small.json: not a Keras model"):
        util.load_model(saved, "small", "autoencoder")


@pytest.mark.parametrize(
    ("part", "other"),
    [("decoder", "encoder"), ("encoder", "decoder"), ("autoencoder", "encoder"), ("autoencoder", "decoder")],
)
def test_model_in_the_place_of_another_is_told(saved, part, other):
    (saved / "logs/small.json").unlink()
    for folder, ending in (("models", "json"), ("weights", "weights.h5")):
        path = saved / folder
        shutil.copy(path / f"{other}_small.{ending}", path / f"{part}_small.{ending}")
    line = told_line(util.load_model, saved, "small", part)
    assert f"{part}_small.json: no {part} of pictures of any size; restore it or train again" in line


def test_lack_of_memory_is_not_taken_for_damage(saved, monkeypatch):
    def load(*_):
        raise MemoryError

    monkeypatch.setattr(keras.Model, "load_weights", load)
    with pytest.raises(MemoryError):
        util.load_model(saved, "small", "autoencoder")


def test_weights_of_another_architecture_are_told(saved):
    (saved / "logs/small.json").unlink()
    small_model().save_weights(saved / "weights/autoencoder_small.weights.h5", overwrite=True)
    with pytest.raises(ModelError, match="autoencoder_small.weights.h5: not the weights of"):
        util.load_model(saved, "small", "autoencoder")


def test_run_starts_from_the_weights_of_one_of_its_architecture(saved):
    model = util.load_model(saved, "small", "encoder")
    expected = model.get_weights()
    model.set_weights([0 * weight for weight in expected])
    util.start_from(model, saved, "small", "encoder")
    for ours, theirs in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ModelError, match="small: of another architecture than is to be trained"):
        util.start_from(model, saved, "small", "decoder")


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_damaged_record_is_told(saved, text):
    (saved / "logs/small.json").write_text(text)
    with pytest.raises(ModelError, match="small.json: damaged; delete it, or train small again"):
        util.read_record(saved, "small")
    assert util.read_record(saved, "none") == {}


def test_record_of_a_folder_whose_name_is_no_unicode(tmp_path):
    dataset = os.fsdecode(b"/pictures/\xe4")
    with util.publishing(tmp_path, "run") as draft:
        util.write_record(draft, "run", {"arguments": {"dataset": dataset}})
    assert util.read_record(tmp_path, "run")["arguments"]["dataset"] == dataset


def test_record_keeps_the_arguments_but_no_place_of_this_machine():
    kept = {"epochs": 3, "size": None, "dataset": "/home/me/holiday"}
    args = Namespace(verb="train", out=ROOT, resume=True, data_dir="/data", **kept)
    assert util.recorded_arguments(args) == kept | {"dataset": "holiday"}


def test_record_tells_what_the_run_started_from(tmp_path):
    record, start = {}, None
    for epochs in (2, 3, 4):
        args = Namespace(out=tmp_path, name="run", start=start, epochs=epochs)
        record = util.describe_run(args, [{"seconds": 60.4, "val_psnr": 20}] * epochs)
        with util.publishing(tmp_path, "run") as draft:
            util.write_record(draft, "run", record)
        start = "run"
    assert record["training_seconds"] == 242
    before = record["started_from"]
    assert (before["arguments"]["epochs"], before["training_seconds"]) == (3, 181)
    assert before["started_from"]["arguments"]["epochs"] == 2
    assert before["started_from"]["started_from"] is None


def test_kills_lose_nothing():
    kills = 100 if FULL else 15
    ended = on_numpy("tests/kill_savings.py", 0, kills)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split(f" of {kills} kills amid a save")[0]) > kills // 5


def test_full_disk_leaves_the_earlier_run(saved):
    before = files_of(saved)
    largest = max(len(content) for content in before.values())
    for size in (0, 100, 2000, largest // 2, largest - 1):
        with largest_file(size):
            line = told_line(save_run, saved, "small", 1)
        assert line == "[Errno 27] File too large; free some space and run again"
        assert files_of(saved) == before
    assert not list((saved / "logs").glob(".small.*"))
    with largest_file(largest + 1000):
        save_run(saved, seed=1)
    assert util.read_record(saved, "small")["seed"] == 1


FIGURE = util.rows_figure([("", random_images(2, 8, 8, 3), None)])
WRITERS = {
    "npy": lambda path: np.save(path, np.zeros(10_000)),
    "png": lambda path: FIGURE.savefig(path),
    "gif": lambda path: util.save_gif([FIGURE], path),
    "csv": lambda path: path.write_text("text" * 1000),
}


@pytest.mark.parametrize("ending", WRITERS)
def test_full_disk_leaves_the_earlier_file_of_any_kind(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    path.write_text("earlier")

    def replace():
        with util.atomic(path) as temporary:
            WRITERS[ending](temporary)

    for size in (0, 500):
        with largest_file(size):
            line = told_line(replace)
        assert line.endswith("; free some space and run again")
        assert files_of(tmp_path) == {path: b"earlier"}
        assert list(tmp_path.iterdir()) == [path]


DISK = """
import sys, util
try:
    for number in range(100):
        with util.atomic(f"{sys.argv[1]}/{number}.txt") as path:
            path.write_text("x" * 2000)
except OSError as error:
    print(util.error_line(error))
"""


@pytest.mark.parametrize("option, fault", [("size=64k", "No space left on device"), ("ro", "Read-only file")])
def test_disk_that_is_really_full_or_read_only(tmp_path, option, fault):
    mount = f"mount -t tmpfs -o {option} none {tmp_path} && {sys.executable} -c '{DISK}' {tmp_path}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    options = {"env": os.environ | {"KERAS_BACKEND": "numpy"}, "capture_output": True, "text": True}
    (line,) = subprocess.run([*command, mount], cwd=ROOT, **options).stdout.splitlines()
    assert fault in line


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), util.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with pytest.raises(FileNotFoundError, match="missing.txt"), util.atomic(path):
        (tmp_path / "missing.txt").read_text()  # is not told as a fault of writing
    with util.atomic(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_run_whose_publishing_was_killed_is_refused_until_it_is_published_again(saved, monkeypatch):
    move, moved = shutil.move, []

    def killed(source, target):
        if len(moved) == 4:
            raise KeyboardInterrupt
        moved.append(move(source, target))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "move", killed)
        save_run(saved, seed=1)
    assert util.read_record(saved, "small")["seed"] == 0
    lines = [told_line(util.load_model, saved, "small", path.name.split("_")[0]) for path in moved]
    assert all("not the file that small wrote (SHA-256 differs)" in line for line in lines)
    save_run(saved, seed=1)
    save_run(saved / "other", seed=1)
    assert_same_weights(saved, saved / "other", "small")
    assert util.read_record(saved, "small")["seed"] == 1


def test_second_run_of_a_name_is_refused_and_one_that_fails_at_its_start_leaves_nothing(tmp_path):
    args = Namespace(out=tmp_path, name="run", resume=False, seed=0, precision="float32")
    with pytest.raises(KeyboardInterrupt, match="Go on with: "), util.training("a.py", args, {}):
        line = told_line(util.training("a.py", args, {}).__enter__)
        raise KeyboardInterrupt
    remedy = "go on with --resume, delete it, or choose another --name"
    assert line == f"{tmp_path}/logs/run.training: of a run that was interrupted, or is going on; {remedy}"
    args.name = "failing"
    with pytest.raises(MemoryError), util.training("a.py", args, {}):
        raise MemoryError
    assert [path.name for path in tmp_path.glob("logs/*")] == ["run.training"]


FAULT = """
import util

def main():
    raise util.ModelError("a fault")

util.run_script(main)
"""


def test_fault_ends_a_script_in_one_line_and_is_an_exception_in_a_notebook(monkeypatch):
    ended = on_numpy("-c", FAULT)
    assert (ended.returncode, without_greeting(ended.stderr)) == (1, "a fault")
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    with pytest.raises(ModelError, match="a fault"):
        exec(FAULT)


@pytest.mark.parametrize(
    ("capabilities", "cpu", "expected"),
    [
        ([8], "", "mixed_bfloat16"),
        ([10, 7], "avx512_bf16", "float32"),  # one is a T4
        ([], "flags: avx512_bf16", "mixed_bfloat16"),
        ([], "flags: avx2", "float32"),
    ],
)
def test_fast_precision_is_that_of_the_devices_that_are_computed_on(monkeypatch, capabilities, cpu, expected):
    monkeypatch.setattr(util, "gpus", lambda: [("a GPU", capability) for capability in capabilities])
    monkeypatch.setattr(util, "_cpu_details", lambda: cpu)
    assert util.fast_precision() == expected


def test_gpus_are_those_that_the_backend_sees(monkeypatch):
    of_jax = [
        Namespace(platform="gpu", device_kind="a GPU", compute_capability="9.0"),
        Namespace(platform="cpu"),
    ]
    of_tensorflow = {"device_name": "a GPU", "compute_capability": (9, 0)}
    config = Namespace(
        list_physical_devices=lambda kind: [of_tensorflow], experimental=Namespace(get_device_details=dict)
    )
    cuda = Namespace(
        device_count=lambda: 1, get_device_name=lambda n: "a GPU", get_device_capability=lambda n: (9, 0)
    )
    monkeypatch.setitem(sys.modules, "jax", Namespace(local_devices=lambda: of_jax))
    monkeypatch.setitem(sys.modules, "tensorflow", Namespace(config=config))
    monkeypatch.setitem(sys.modules, "torch", Namespace(cuda=cuda))
    for backend in ("jax", "tensorflow", "torch"):
        monkeypatch.setattr(keras.backend, "backend", lambda name=backend: name)
        assert util.gpus() == [("a GPU", 9)]


def test_muon_takes_a_kernel_as_keras_takes_its_matrix():
    rng = np.random.default_rng(0)
    before, gradient = (rng.normal(size=(3, 3, 4, 8)).astype(np.float32) for _ in range(2))
    after = []
    for optimizer, shape in ((util.ConvolutionMuon, (3, 3, 4, 8)), (keras.optimizers.Muon, (36, 8))):
        variable = keras.Variable(before.reshape(shape))
        optimizer(0.1).apply([keras.ops.reshape(gradient, shape)], [variable])
        after.append(keras.ops.convert_to_numpy(variable).reshape(before.shape))
    np.testing.assert_allclose(*after, atol=1e-5)
    assert np.abs(after[0] - before).max() > 0.01


def test_best_epoch_is_that_of_the_smallest_loss_or_crps_or_of_the_largest_other_metric():
    rows = [{"val_loss": loss, "val_psnr": psnr} for loss, psnr in ((3, 20), (1, 25), (2, 30))]
    assert util.best_row(rows, "val_loss") is rows[1]
    assert util.best_row(rows, "val_psnr") is rows[2]
    assert util.best_row([{"val_crps": crps} for crps in (3, 2)], "val_crps") == {"val_crps": 2}
    assert util.best_row([], "val_loss") is None


def checkpoint_of(folder):
    model = small_model()
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    checkpoint = util.Checkpoint(folder, "val_psnr")
    checkpoint.set_model(model)
    return checkpoint


def test_checkpoint_keeps_best_and_last(tmp_path):
    checkpoint = checkpoint_of(tmp_path)
    for epoch, psnr in enumerate((20.0, 30.0, 25.0)):
        checkpoint.model.set_weights(
            [np.full_like(weight, psnr) for weight in checkpoint.model.get_weights()]
        )
        checkpoint.on_epoch_begin(epoch)
        checkpoint.on_epoch_end(epoch, {"val_psnr": psnr})
    assert (tmp_path / "epochs.csv").read_text().startswith("epoch,val_psnr,seconds,hardware\n1,20.0,")
    resumed = checkpoint_of(tmp_path)
    assert resumed.restore() == 3
    assert [row["val_psnr"] for row in resumed.rows] == [20, 30, 25]
    assert resumed.model.get_weights()[0].max() == 25
    resumed.on_epoch_begin(3)
    resumed.on_epoch_end(3, {"val_psnr": 29.0})  # better than the last, not than the best
    resumed.model.load_weights(resumed.best_path)
    assert resumed.model.get_weights()[0].max() == 30


def test_checkpoint_of_a_long_training(tmp_path):
    checkpoint = checkpoint_of(tmp_path)
    checkpoint.rows = [{"epoch": n, "val_psnr": 20.0, "seconds": 100.0} for n in range(2000)]
    checkpoint.on_epoch_begin(2000)
    checkpoint.on_epoch_end(2000, {"val_psnr": 21.0})
    checkpoint.rows = []
    assert checkpoint.restore() == 2001


def test_checkpoint_faults_are_told(tmp_path, recwarn):
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint.restore() == 0
    for content in (b"", b"no HDF5"):
        checkpoint.path.write_bytes(content)
        with pytest.raises(ModelError, match="damaged checkpoint; delete .* to train this stage anew"):
            checkpoint.restore()
    checkpoint.best_path.write_bytes(b"no HDF5")
    with pytest.raises(ModelError, match="best.weights.h5: does not fit this model .*; delete .* to train"):
        checkpoint.load(checkpoint.best_path)
    with h5py.File(checkpoint.path, "w") as file:
        file["history"] = json.dumps([])
    with pytest.raises(ModelError, match="does not fit this model"):
        checkpoint.restore()
    checkpoint.save(checkpoint.path)
    checkpoint.set_model(small_model(convolutions=3))
    checkpoint.model.compile("adam", "mse")
    checkpoint.model.optimizer.build(checkpoint.model.trainable_variables)
    with pytest.raises(ModelError, match="does not fit this model"):
        checkpoint.restore()
    assert not any("Skipping variable loading" in str(warning.message) for warning in recwarn)


def test_validation_that_is_not_a_number_stops_before_it_is_kept(tmp_path):
    checkpoint = checkpoint_of(tmp_path)
    with pytest.raises(FloatingPointError, match="val_psnr is nan after epoch 1"):
        checkpoint.on_test_end({"psnr": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_stage_gets_no_more_epochs_when_a_later_one_has_begun(tmp_path, monkeypatch, capsys):
    images = random_images(4, 8, 8, 3) / np.float32(255)

    class OneBatch(keras.utils.PyDataset):
        batch_size = 4

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return images, images

    def train(stage, epochs):
        model = checkpoint_of(tmp_path).model
        return util.fit(model, OneBatch(), (images, images), epochs, tmp_path, "val_loss", stage=stage)

    monkeypatch.setattr(util, "PROGRESS_SECONDS", 0)
    assert [len(train("first", 1)), len(train("first", 2)), len(train("second", 1))] == [1, 2, 1]
    printed = capsys.readouterr().out
    assert (
        printed.index("Stage first:") < printed.index("step 1 of 1, loss 0.") < printed.index("Stage second:")
    )
    os.utime(tmp_path / "first/checkpoint.weights.h5", (0, 0))
    assert len(train("first", 2)) == 2
    with pytest.raises(ModelError, match="second/checkpoint.weights.h5: second has begun; resume with"):
        train("first", 3)


def test_progress_is_shown_in_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(util, "PROGRESS_SECONDS", 0)
    advance = util.progress(3000, "images")
    for _ in range(2):
        advance(1000)
    assert capsys.readouterr().out == "images: 1,000 of 3,000\nimages: 2,000 of 3,000\n"


def test_rows_of_images_have_labels_captions_and_one_scale():
    pictures, maps = random_images(2, 8, 8, 3), np.random.default_rng(0).random((3, 8, 8))
    rows = [("images", pictures, None), ("maps", maps, list("abc"))]
    figure = util.rows_figure(rows, "a title", unit="grey levels")
    assert figure.get_suptitle() == "a title"
    assert labels_of(figure) == [("images", ""), ("", ""), ("maps", "a"), ("", "b"), ("", "c")]
    for shown, expected in zip(pixels_of(figure), [*pictures, *maps], strict=True):
        np.testing.assert_array_equal(shown, expected)
    *_, first, second, third, bar = figure.axes
    assert bar.get_ylabel() == "grey levels"
    scales = [axis.images[0].get_clim() for axis in (first, second, third)]
    assert scales == 3 * [(0, pytest.approx(np.quantile(maps, 0.995)))]
    assert not figure.axes[2].axison  # there is no third image


COLOURS = [(200, 10, 30), (20, 180, 40), (0, 60, 220)]
SOLID = [np.full((1, 8, 8, 3), colour, np.uint8) for colour in COLOURS]


def share_of(colour, pixels):
    return (np.abs(pixels[..., :3].astype(int) - colour).max(axis=-1) < 5).mean()


def test_saved_figure_shows_its_images(tmp_path):
    util.save_figure(util.rows_figure([("row", np.concatenate(SOLID), None)], "title"), tmp_path / "a.png")
    pixels = iio.imread(tmp_path / "a.png")
    assert pixels.shape[1] / pixels.shape[0] == pytest.approx((3 * 1.35 + 0.3) / (1.35 + 0.3), rel=0.02)
    for index, colour in enumerate(COLOURS):  # from left to right
        assert share_of(colour, np.array_split(pixels, 3, axis=1)[index]) > 0.4


def test_gif_has_a_frame_for_each_figure_that_stays_as_long_as_its_equals(tmp_path):
    figures = [util.rows_figure([("row", SOLID[index], ["a"])]) for index in (0, 1, 1, 1, 2)]
    util.save_gif(figures, tmp_path / "a.gif")
    frames = iio.imread(tmp_path / "a.gif")
    assert len(frames) == 3
    for frame, colour in zip(frames, COLOURS, strict=True):
        assert share_of(colour, frame) > 0.3
    durations = [iio.immeta(tmp_path / "a.gif", index=index)["duration"] for index in range(3)]
    assert durations == [util.GIF_FRAME_MS, 3 * util.GIF_FRAME_MS, 6 * util.GIF_FRAME_MS]


def test_history_shows_each_metric_and_its_validation():
    rows = [{"epoch": n, "loss": 1 / n, "val_loss": 2 / n, "kl": n, "val_kl": -n} for n in (1, 2, 3)]
    rows[0] |= {"lr": 1, "val_lr": 1}  # of one epoch, which is no curve
    rows[2]["stage"] = "later"
    border = [2.5, 2.5], [0, 1]
    labels = {"loss": "loss", "kl": "KL in nats", "lr": "rate"}
    figure = util.history_figure(rows, labels, "a title")
    epochs = [1, 2, 3]
    assert curves_of(figure) == [
        ("epoch", "loss", [(epochs, [1, 1 / 2, 1 / 3]), (epochs, [2, 1, 2 / 3]), border]),
        ("epoch", "KL in nats", [(epochs, [1, 2, 3]), (epochs, [-1, -2, -3]), border]),
    ]
    assert util.history_figure(rows[:1], labels) is None
    assert legend_of(figure) == ["training", "validation"]
    assert figure.get_suptitle() == "a title"


def test_curves_have_asked_ticks_and_a_legend_beside_them():
    few, many = (15, 25, 50), tuple(range(100))
    panels = [
        ("sigma", "PSNR", {"noisy": (few, few), "a model": (few, few)}),
        ("x", "y", {"b": (many, many)}),
    ]
    figure = util.curves_figure(panels)
    figure.draw_without_rendering()
    assert legend_of(figure) == ["noisy", "a model", "b"]
    assert len({line.get_color() for axis in figure.axes for line in axis.lines}) == 3
    for axis in figure.axes:
        assert not axis.get_tightbbox().overlaps(figure.legends[0].get_window_extent())
    marked = util.curves_figure(panels, ticks=(10, 30)).axes
    assert [axis.get_xticks().tolist() for axis in marked] == [[10, 30], [10, 30]]


def test_table_is_markdown():
    rows = [{"sigma": 15, "PSNR": 31.456, "SSIM": 0.91234}, {"sigma": 5, "PSNR": 8.0, "SSIM": 0.5}]
    assert util.format_table(rows).splitlines() == [
        "| sigma |  PSNR |   SSIM |",
        "|------:|------:|-------:|",
        "|    15 | 31.46 | 0.9123 |",
        "|     5 |  8.00 | 0.5000 |",
    ]


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a.b", "a b", "noisy", "encoder_a"])
def test_run_names_stay_inside_their_folders(name):
    with pytest.raises(argparse.ArgumentTypeError, match="use letters, digits|has a meaning of its own"):
        util.run_name(name)


def test_help_says_each_default():
    parser = argparse.ArgumentParser(formatter_class=util.HelpFormatter)
    parser.add_argument("--a", default=0, help="with zero")
    parser.add_argument("--b", help="with none")
    parser.add_argument("--c", action="store_true", help="a switch")
    assert [re.split("  +", line)[-1] for line in parser.format_help().splitlines()[-3:]] == [
        "with zero (default: 0)",
        "with none",
        "a switch",
    ]
