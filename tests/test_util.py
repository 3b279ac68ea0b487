import json
import os
import subprocess
import sys

import util
from util import ModelError

import h5py
import imageio.v3 as iio
import keras
import numpy as np
import pytest
from scipy.ndimage import correlate1d


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def small_model(seed=0):
    keras.utils.set_random_seed(seed)
    image = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(4, 2, strides=2, activation="relu")(image)
    return keras.Model(image, keras.layers.Conv2DTranspose(3, 2, strides=2)(x))


def test_psnr_against_hand_values():
    clean = np.full((3, 4, 4, 3), 100, np.uint8)
    denoised = clean.copy()
    denoised[0] += 1  # MSE 1: 20 log10(255)
    denoised[1, 0, 0, 0] += 48  # MSE 48: 48.13 - 16.81
    assert util.psnr(clean, denoised) == pytest.approx([48.1308, 31.3184, np.inf], abs=1e-4)


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


def test_to_uint8_clips_and_rounds():
    assert util.to_uint8(np.array([-1, 0.1 / 255, 0.6 / 255, 2])).tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (33, 57), (32, 32)])
def test_images_of_any_size_are_denoised(shape):
    model = small_model()
    noisy = random_images(2, *shape, 3).astype(np.float32) / 255
    denoised = util.denoise(model, noisy)
    assert denoised.shape == noisy.shape
    assert denoised.dtype == np.uint8
    inner = [size // 2 * 2 for size in shape]  # whole cells, which padding does not reach
    if min(inner):
        alone = util.denoise(model, noisy[:, : inner[0], : inner[1]])
        np.testing.assert_array_equal(denoised[:, : inner[0], : inner[1]], alone)


def test_stride_counts_nested_models():
    inner = small_model()
    image = keras.Input((None, None, 3))
    outer = keras.Model(image, inner(keras.layers.Conv2D(3, 2, strides=2)(image)))
    assert util.stride(inner) == 2
    assert util.stride(outer) == 4


def test_multiply_accumulates_against_a_hand_count():
    image = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, padding="same")(small_model()(image))
    model = keras.Model(image, keras.layers.Dense(10)(keras.layers.GlobalAveragePooling2D()(x)))
    inner = 8 * 16 * (2 * 2 * 3 * 4) + 8 * 16 * (2 * 2 * 4 * 3)  # 16x32 image: 8x16 cells, there and back
    assert util.multiply_accumulates(model, (16, 32, 3)) == inner + 8 * 16 * (3 * 3 * 3 * 8) + 8 * 10


def test_saved_json_fits_older_keras_and_names_no_policy(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = small_model()
    finally:
        keras.config.set_dtype_policy("float32")
    with util.staged(tmp_path, "run") as stage:
        util.save_model(stage, model, "autoencoder_run")
    text = (tmp_path / "models/autoencoder_run.json").read_text()
    assert "bfloat16" not in text
    for key in ("input_axes", "quantization_config", "optimizer", "lambda"):
        assert key not in text.lower()
    loaded = util.load_model(tmp_path, "run", "autoencoder")
    for ours, restored in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(restored, ours.astype(np.float16))


def test_weights_are_saved_as_float16_where_that_can_hold_them(tmp_path):
    model = small_model()
    kernel, bias, *others = model.get_weights()
    model.set_weights([kernel, bias + 1e5, *others])
    with util.staged(tmp_path, "run") as stage:
        util.save_model(stage, model, "autoencoder_run")
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


@pytest.fixture
def saved(tmp_path):
    """Output folder with one saved autoencoder of run `small`."""
    with util.staged(tmp_path, "small") as stage:
        util.save_model(stage, small_model(), "autoencoder_small")
        util.write_record(stage, "small", {"name": "small"})
    return tmp_path


def test_copy_computes_in_the_policy_until_its_last_layer():
    model = small_model()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        copied = util.copy_in_policy(model)
    finally:
        keras.config.set_dtype_policy("float32")
    assert [layer.compute_dtype for layer in copied.layers[1:]] == ["bfloat16", "float32"]
    images = random_images(2, 8, 8, 3) / np.float32(255)
    exact, rounded = (one.predict(images, verbose=0) for one in (model, copied))
    assert 0 < np.abs(exact - rounded).max() < 0.01 * np.abs(exact).max()


def test_missing_model_lists_those_that_are_there(saved):
    with pytest.raises(ModelError, match="autoencoder_large.json: not found; there is small$"):
        util.load_model(saved, "large", "autoencoder")
    (saved / "weights/autoencoder_small.weights.h5").unlink()
    with pytest.raises(ModelError, match="autoencoder_small.weights.h5: not found; restore it"):
        util.load_model(saved, "small", "autoencoder")


@pytest.mark.parametrize("file", ["models/autoencoder_small.json", "weights/autoencoder_small.weights.h5"])
def test_flipped_bit_is_noticed(saved, file):
    content = bytearray((saved / file).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / file).write_bytes(content)
    with pytest.raises(ModelError, match=f"{file}: not the file that small wrote"):
        util.load_model(saved, "small", "autoencoder")


LAMBDA = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x)]).to_json()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"class_name": "os.system"}', LAMBDA])
def test_json_that_is_no_model_is_told(saved, text):
    (saved / "logs/small.json").unlink()  # so that the checksum does not tell first
    (saved / "models/autoencoder_small.json").write_text(text)
    with pytest.raises(ModelError, match="autoencoder_small.json: not a Keras model"):
        util.load_model(saved, "small", "autoencoder")


def test_weights_of_another_architecture_are_told(saved):
    (saved / "logs/small.json").unlink()
    image = keras.Input((None, None, 3))
    other = keras.Model(image, keras.layers.Conv2D(3, 5)(image))
    other.save_weights(saved / "weights/autoencoder_small.weights.h5", overwrite=True)
    with pytest.raises(ModelError, match="autoencoder_small.weights.h5: not the weights of"):
        util.load_model(saved, "small", "autoencoder")


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_damaged_record_is_told(saved, text):
    (saved / "logs/small.json").write_text(text)
    with pytest.raises(ModelError, match="small.json: damaged run record; delete it"):
        util.read_record(saved, "small")
    assert util.read_record(saved, "none") == {}


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), util.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with util.atomic(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_have_the_permissions_that_others_have(tmp_path):
    before = os.umask(0o027)
    try:
        with util.atomic(tmp_path / "a.txt") as temporary:
            temporary.write_text("new")
        assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640
    finally:
        assert os.umask(before) == 0o027


def test_failed_stage_leaves_everything_as_it_was(saved):
    before = {path: path.read_bytes() for path in saved.rglob("*.*") if path.is_file()}
    with pytest.raises(RuntimeError), util.staged(saved, "small") as stage:
        util.save_model(stage, small_model(seed=1), "autoencoder_small")
        raise RuntimeError
    assert {path: path.read_bytes() for path in saved.rglob("*.*") if path.is_file()} == before


def test_loading_finishes_an_interrupted_move(saved):
    complete = saved / "logs/.small.complete"
    with util.staged(saved / "elsewhere", "small") as stage:
        util.save_model(stage, small_model(seed=1), "autoencoder_small")
        util.write_record(stage, "small", {"name": "small"})
    os.rename(saved / "elsewhere", complete)
    moved_before_the_kill = "models/autoencoder_small.json"
    os.rename(complete / moved_before_the_kill, saved / moved_before_the_kill)
    loaded = util.load_model(saved, "small", "autoencoder")
    expected = util.portable_copy(small_model(seed=1))
    np.testing.assert_array_equal(loaded.get_weights()[0], expected.get_weights()[0])
    assert not complete.exists()


def test_second_run_of_a_name_is_refused(tmp_path):
    script = "import sys, util\nwith util.locked(sys.argv[1], 'run'): print('held', flush=True); input()"
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=util.HERE, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(ModelError, match="another run named run is going on"),
            util.locked(tmp_path, "run"),
        ):
            pass
        other.kill()
    with util.locked(tmp_path, "run"):  # a killed run holds nothing
        pass


def test_muon_takes_a_kernel_as_keras_takes_its_matrix():
    rng = np.random.default_rng(0)
    start, gradient = (rng.normal(size=(3, 3, 4, 8)).astype(np.float32) for _ in range(2))
    after = []
    for optimizer, shape in ((util.ConvolutionMuon, (3, 3, 4, 8)), (keras.optimizers.Muon, (36, 8))):
        variable = keras.Variable(start.reshape(shape))
        optimizer(0.1).apply([keras.ops.reshape(gradient, shape)], [variable])
        after.append(keras.ops.convert_to_numpy(variable).reshape(start.shape))
    np.testing.assert_allclose(*after, atol=1e-5)
    assert np.abs(after[0] - start).max() > 0.01


def test_muon_leaves_all_but_3x3_kernels_to_adamw():
    optimizer = util.ConvolutionMuon(0.1)
    shapes = ((3, 3, 4, 8), (2, 2, 3, 8), (1, 1, 8, 8), (3, 3), (8, 2), (8,))
    left = [optimizer._should_use_adamw(keras.Variable(np.zeros(shape))) for shape in shapes]
    assert left == [False, True, True, True, True, True]


def test_best_epoch_is_that_of_the_smallest_loss_or_of_the_largest_other_metric():
    rows = [{"val_loss": loss, "val_psnr": psnr} for loss, psnr in ((3, 20), (1, 25), (2, 30))]
    assert util.best_row(rows, "val_loss") is rows[1]
    assert util.best_row(rows, "val_psnr") is rows[2]
    assert util.best_row([], "val_loss") is None


def test_checkpoint_keeps_best_and_last(tmp_path):
    model = small_model()
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    checkpoint = util.Checkpoint(tmp_path, "val_psnr")
    checkpoint.set_model(model)
    for epoch, psnr in enumerate((20.0, 30.0, 25.0)):
        model.set_weights([np.full_like(weight, psnr) for weight in model.get_weights()])
        checkpoint.on_epoch_begin(epoch)
        checkpoint.on_epoch_end(epoch, {"val_psnr": psnr})
    assert (tmp_path / "epochs.csv").read_text().startswith("epoch,val_psnr,seconds\n1,20.0,")
    resumed = util.Checkpoint(tmp_path, "val_psnr")
    resumed.set_model(model)
    assert resumed.restore() == 3
    assert [row["val_psnr"] for row in resumed.rows] == [20, 30, 25]
    assert model.get_weights()[0].max() == 25
    resumed.on_epoch_begin(3)
    resumed.on_epoch_end(3, {"val_psnr": 29.0})  # better than the last, not than the best
    model.load_weights(resumed.best_path)
    assert model.get_weights()[0].max() == 30


def test_checkpoint_of_a_long_training(tmp_path):
    model = small_model()
    model.compile("sgd", "mse")
    checkpoint = util.Checkpoint(tmp_path, "val_psnr")
    checkpoint.set_model(model)
    checkpoint.rows = [{"epoch": n, "val_psnr": 20.0, "seconds": 100.0} for n in range(2000)]
    checkpoint.on_epoch_begin(2000)
    checkpoint.on_epoch_end(2000, {"val_psnr": 21.0})
    checkpoint.rows = []
    assert checkpoint.restore() == 2001


def test_checkpoint_faults_are_told(tmp_path):
    checkpoint = util.Checkpoint(tmp_path, "val_psnr")
    checkpoint.set_model(small_model())
    assert checkpoint.restore() == 0
    for content in (b"", b"no HDF5"):
        checkpoint.path.write_bytes(content)
        with pytest.raises(ModelError, match="damaged checkpoint; train without --resume"):
            checkpoint.restore()
    with h5py.File(checkpoint.path, "w") as file:
        file["history"] = json.dumps([])
    with pytest.raises(ModelError, match="does not fit this model"):
        checkpoint.restore()


def test_validation_that_is_not_a_number_stops_before_it_is_kept(tmp_path):
    checkpoint = util.Checkpoint(tmp_path, "val_psnr")
    checkpoint.set_model(small_model())
    checkpoint.on_epoch_begin(0)
    with pytest.raises(FloatingPointError, match="val_psnr is nan after epoch 1"):
        checkpoint.on_epoch_end(0, {"val_psnr": float("nan")})
    assert list(tmp_path.iterdir()) == []


def averaging_encoder():
    """Encoder in stock layers whose z_mean is the average of 2x2 pixels."""
    image = keras.Input((None, None, 3))
    average = keras.layers.Conv2D(3, 2, strides=2)
    z_mean = average(image)
    encoder = keras.Model(image, [z_mean, keras.layers.Conv2D(3, 1)(z_mean)])
    average.set_weights([np.full((2, 2, 1, 1), 0.25) * np.eye(3), np.zeros(3)])
    return encoder


@pytest.fixture
def encoder_run(tmp_path):
    """Output folder with the averaging encoder as run `small`."""
    with util.staged(tmp_path, "small") as stage:
        util.save_model(stage, averaging_encoder(), "encoder_small")
        util.write_record(stage, "small", {})
    return tmp_path


def test_feature_maps_are_streamed_with_their_origin(encoder_run):
    images = random_images(5, 5, 6, 3)  # the odd row is cut off
    weights = encoder_run / "weights/encoder_small.weights.h5"
    origin = util.feature_map_origin("small", weights, images, pooling=0, sigma=25.0)
    path = encoder_run / "f.h5"
    util.write_feature_maps(path, averaging_encoder(), images, np.arange(5), origin, batch_size=2)
    with h5py.File(path) as file:
        averages = images[:, :4].reshape(5, 2, 2, 3, 2, 3).mean(axis=(2, 4)) / 255
        assert file["features"].dtype == np.float16
        np.testing.assert_allclose(file["features"], averages, atol=1e-3)
        assert file["labels"][:].tolist() == [0, 1, 2, 3, 4]
        assert dict(file.attrs) == origin
        assert origin["sigma"] == 25.0


def test_receptive_field_bounds_what_a_pixel_changes():
    image = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(4, 2, strides=2)(image)
    x = keras.layers.Conv2D(4, 3, padding="same")(x)
    x = keras.layers.Conv2D(4, 5, padding="same")(x)
    model = keras.Model(image, keras.layers.Conv2DTranspose(3, 2, strides=2)(x))
    images = np.zeros((2, 40, 40, 3), np.float32)
    images[1, 21, 20] = 1
    before, after = model.predict(images, verbose=0)
    changed = np.flatnonzero(np.abs(after - before).max(axis=(1, 2)) > 1e-7)
    reach = max(21 - changed.min(), changed.max() - 21)
    assert reach <= util.receptive_field(model) <= reach + 1


def test_windows_are_of_one_length_and_reach_beyond_their_tiles():
    for length in range(1, 300):
        spans = util.tile_spans(length, 32, 8, 4)
        assert len({window.stop - window.start for window, _ in spans}) == 1
        assert len(spans) == max(1, -(-(length - 16) // 32))
        pixels = []
        for window, tile in spans:
            assert window.start % 4 == window.stop % 4 == 0
            assert window.start == 0 or window.start + 8 <= tile.start
            assert length <= window.stop < length + 4 or tile.stop <= window.stop - 8
            pixels += range(tile.start, tile.stop)
        assert pixels == list(range(length))


@pytest.mark.parametrize("tile", [16, 32, 256])
def test_tiles_make_the_whole_picture(tile):
    keras.utils.set_random_seed(0)
    image = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(8, 2, strides=2)(image)
    for _ in range(3):
        x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(x)
    model = keras.Model(image, keras.layers.Conv2DTranspose(3, 2, strides=2)(x))
    picture = random_images(1, 67, 90, 3)[0]
    padded = np.pad(picture, ((0, 1), (0, 0), (0, 0)), mode="edge")[None] / np.float32(255)
    whole = model.predict(padded, verbose=0)[0, :67]
    covered = np.zeros((67, 90), int)
    for rows, columns, denoised, _ in util.denoise_tiles(model, picture, tile):
        np.testing.assert_allclose(denoised, whole[rows, columns], atol=1e-5)
        covered[rows, columns] += 1
    assert (covered == 1).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_of_draws_give_their_mean_and_deviation(channels):
    picture = random_images(1, 37, 50, channels)[0]

    def draws(window, top, left):
        place = (top, left, (*window.shape[1:3], 3))
        return [window + 0.01 * util.endless_normal((draw,), *place)[None] for draw in range(5)]

    whole = np.stack([v[0] for v in draws(np.repeat(picture, 3 // channels, axis=2)[None] / 255, 0, 0)])
    if channels == 1:
        whole = whole.mean(axis=-1, keepdims=True)
    for rows, columns, mean, deviation in util.denoise_tiles(small_model(), picture, 16, draws):
        np.testing.assert_allclose(mean, whole.mean(axis=0)[rows, columns], atol=1e-5)
        np.testing.assert_allclose(deviation, whole.std(axis=0)[rows, columns], atol=1e-5)


def test_normal_values_are_the_same_wherever_they_are_cut_out():
    whole = util.endless_normal((0, 1), 0, 0, (70, 90, 4))
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(util.endless_normal((0, 1), 31, 33, (20, 57, 4)), whole[31:51, 33:90])
    assert np.abs(util.endless_normal((0, 2), 0, 0, (70, 90, 4)) - whole).min() > 0
    assert abs(whole.mean()) < 4 / np.sqrt(whole.size)
    assert abs(whole.std() - 1) < 4 / np.sqrt(2 * whole.size)
    assert abs(np.corrcoef(whole[:32, :32].ravel(), whole[32:64, 32:64].ravel())[0, 1]) < 0.08


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    advance = util.progress(3000, "images")
    for _ in range(3):
        advance(1000)
    assert capsys.readouterr().out == "images: 3,000 of 3,000\n"


def test_pooling_against_plain_means():
    maps = np.random.default_rng(0).random((2, 5, 9, 3))
    pooled = util.pool(maps, 4)
    assert pooled.shape == (2, 4, 4, 3)
    np.testing.assert_allclose(pooled[:, 0, 0], maps[:, 0:1, 0:2].mean(axis=(1, 2)))
    np.testing.assert_allclose(pooled[:, 1, 3], maps[:, 1:2, 7:9].mean(axis=(1, 2)))
    np.testing.assert_allclose(util.pool(maps, 1)[:, 0, 0], maps.mean(axis=(1, 2)))
    np.testing.assert_allclose(util.pool(maps, 16), maps)  # there are no more cells than that


def test_feature_maps_are_kept_and_used_again(encoder_run, monkeypatch):
    images = random_images(6, 8, 8, 3)
    first = util.feature_maps(encoder_run, "small", "test", images, np.arange(6), pooling=2)
    assert first.shape == (6, 2, 2, 3)
    np.testing.assert_allclose(first, images.reshape(6, 2, 4, 2, 4, 3).mean(axis=(2, 4)) / 255, atol=1e-3)
    monkeypatch.setattr(util, "write_feature_maps", lambda *_: pytest.fail("made again"))
    again = util.feature_maps(encoder_run, "small", "test", images, np.arange(6), pooling=2)
    np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("other", ["images", "weights", "bytes", "empty"])
def test_feature_maps_of_something_else_are_noticed(encoder_run, other, capsys):
    images, path = random_images(6, 8, 8, 3), encoder_run / "feature_maps/small_test.h5"
    expected = util.feature_maps(encoder_run, "small", "test", images, np.arange(6))
    if other == "images":  # same name, same shape
        util.feature_maps(encoder_run, "small", "test", random_images(6, 8, 8, 3, seed=1), np.arange(6))
    elif other == "weights":
        with h5py.File(path, "a") as file:
            file.attrs["weights"] = "0" * 64
            file["features"][:] = 0
    elif other == "bytes":
        raw = bytearray(path.read_bytes())
        place = raw.find(expected[0, 0].tobytes())
        raw[place] ^= 1
        path.write_bytes(raw)
    else:
        path.write_bytes(b"")
    capsys.readouterr()
    found = util.feature_maps(encoder_run, "small", "test", images, np.arange(6))
    np.testing.assert_array_equal(found, expected)
    assert f"{path}: made again (" in capsys.readouterr().out


def test_gif_has_a_frame_for_each_figure(tmp_path):
    images = random_images(2, 8, 8, 3)
    figures = [util.rows_figure([("row", images, ["a", "b"])], f"epoch {epoch}") for epoch in range(3)]
    util.save_gif(figures, tmp_path / "a.gif")
    frames = iio.imread(tmp_path / "a.gif")
    assert frames.shape[0] == 3
    assert iio.immeta(tmp_path / "a.gif", index=0)["duration"] == util.GIF_FRAME_MS
    assert iio.immeta(tmp_path / "a.gif", index=2)["duration"] == 6 * util.GIF_FRAME_MS


def test_figures_are_written(tmp_path):
    rows = [("images", random_images(2, 8, 8, 3), None), ("maps", np.random.rand(3, 8, 8), list("abc"))]
    history = [{"epoch": n, "loss": 1 / n, "val_loss": 2 / n} for n in (1, 2, 3)]
    figures = (util.rows_figure(rows, "title"), util.history_figure(history, ["loss"], "title"))
    for number, figure in enumerate(figures):
        util.save_figure(figure, tmp_path / f"{number}.png")
        assert iio.imread(tmp_path / f"{number}.png").std() > 5


def test_curves_have_ticks_at_their_values_and_a_legend_beside_them():
    few, many = (15, 25, 50), tuple(range(100))
    panels = [
        ("sigma", "PSNR", {"noisy": (few, few), "a model": (few, few)}),
        ("x", "y", {"b": (many, many)}),
    ]
    figure = util.curves_figure(panels)
    figure.draw_without_rendering()
    first, second = figure.axes
    assert first.get_xticks().tolist() == list(few)
    assert 3 < len(second.get_xticks()) < 12
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["noisy", "a model", "b"]
    assert len({line.get_color() for axis in figure.axes for line in axis.lines}) == 3
    for axis in figure.axes:
        assert not axis.get_tightbbox().overlaps(legend.get_window_extent())
    marked = util.curves_figure(panels, ticks=(10, 30)).axes
    assert [axis.get_xticks().tolist() for axis in marked] == [[10, 30], [10, 30]]


def test_curves_that_coincide_both_show(tmp_path):
    values = (15, 25, 50)
    curves = dict.fromkeys(("simple", "stacked"), (values, values))
    util.save_figure(util.curves_figure([("sigma", "PSNR", curves)]), tmp_path / "curves.png")
    pixels = iio.imread(tmp_path / "curves.png")[..., :3].astype(int)
    plot = pixels[: len(pixels) * 3 // 4]  # above the legend
    for colour in ((31, 119, 180), (255, 127, 14)):  # of the first and the second curve
        assert (np.abs(plot - colour).max(axis=-1) < 30).sum() > 100


def test_table_is_markdown():
    rows = [{"sigma": 15, "PSNR": 31.456, "SSIM": 0.91234}, {"sigma": 5, "PSNR": 8.0, "SSIM": 0.5}]
    assert util.format_table(rows).splitlines() == [
        "| sigma |  PSNR |   SSIM |",
        "|------:|------:|-------:|",
        "|    15 | 31.46 | 0.9123 |",
        "|     5 |  8.00 | 0.5000 |",
    ]


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a.b", "a b"])
def test_run_names_stay_inside_their_folders(name):
    with pytest.raises(ValueError):
        util.run_name(name)
