import json
import os
import shutil
import signal

import simple_autoencoder as simple
import stack_autoencoder as stack
import util

import h5py
import imageio.v3 as iio
import keras
import numpy as np
import pytest
from conftest import TINY, run, start, table_rows

STACK = ["--filters=20", "--latent-dim=14"]


def level_one(seed=0):
    keras.utils.set_random_seed(seed)
    models = simple.build_encoder(16, 1, 14), simple.build_decoder(16, 1, 14)
    simple.start_as_identity(*models)
    return models


def shaken(model, seed=0):
    rng = np.random.default_rng(seed)
    model.set_weights([weight + rng.normal(0, 0.05, weight.shape) for weight in model.get_weights()])
    return model


def test_stack_starts_as_level_one():
    models = [shaken(model) for model in level_one()]
    stacked = [stack.stack_encoder(models[0], 20, 2, 18), stack.stack_decoder(models[1], 20, 1, 18)]
    images = np.random.default_rng(0).random((2, 8, 12, 3)).astype(np.float32)
    alone, together = (simple.build_autoencoder(*pair)(images) for pair in (models, stacked))
    np.testing.assert_array_equal(alone, together)


def test_codes_of_both_levels_reach_the_decoder_in_their_order():
    models = [shaken(model) for model in level_one()]
    encoder = shaken(stack.stack_encoder(models[0], 20, 2, 18))
    decoder = shaken(stack.stack_decoder(models[1], 20, 1, 18))
    images = np.random.default_rng(0).random((2, 8, 12, 3)).astype(np.float32)
    codes = encoder.predict(images, verbose=0)
    assert [code.shape for code in codes] == [(2, 4, 6, 14)] * 2 + [(2, 2, 3, 18)] * 2
    whole = simple.build_autoencoder(encoder, decoder).predict(images, verbose=0)
    np.testing.assert_allclose(decoder.predict(codes[::2], verbose=0), whole, atol=1e-5)
    for level in (0, 2):
        codes[level] = codes[level] + 1
        assert np.abs(decoder.predict(codes[::2], verbose=0) - whole).max() > 1e-3
        codes[level] = codes[level] - 1
    assert util.stride(simple.build_autoencoder(encoder, decoder)) == 4


def test_pictures_are_sampled_with_the_codes_of_both_levels(monkeypatch):
    models = [shaken(model) for model in level_one()]
    encoder = shaken(stack.stack_encoder(models[0], 20, 1, 18))
    decoder = shaken(stack.stack_decoder(models[1], 20, 1, 18))
    autoencoder = simple.build_autoencoder(encoder, decoder)
    pixels = np.random.default_rng(0).integers(0, 256, (33, 57, 3), np.uint8)
    padded = np.pad(pixels, ((0, 3), (0, 3), (0, 0)), mode="edge")[None] / np.float32(255)
    codes = encoder.predict(padded, verbose=0)
    draws = []
    for draw in range(3):
        shapes = enumerate([(18, 30, 14), (9, 15, 18)])
        noise = [util.endless_normal((0, draw, level), 0, 0, shape) for level, shape in shapes]
        draws.append(decoder.predict(simple.drawn(codes, noise), verbose=0)[0, :33, :57])
    sampler = simple.window_sampler(encoder, decoder, 3)
    for tile in (16, 512):
        monkeypatch.setattr(simple, "SAMPLING_TILE", tile)
        denoised, _, deviation = simple.denoise_pixels(autoencoder, pixels, draws=sampler)
        np.testing.assert_allclose(denoised, util.to_uint8(np.mean(draws, axis=0)), atol=1)
        expected = 255 * np.std(draws, axis=0).mean(axis=2, keepdims=True)
        np.testing.assert_allclose(deviation, expected, rtol=0.01)


def test_arithmetic_stays_within_the_bounds():
    one = simple.build_encoder(), simple.build_decoder()
    simple_count = util.multiply_accumulates(simple.build_autoencoder(*one), (32, 32, 3))
    f, z, cells = simple.FILTERS, simple.LATENT_DIM, 16 * 16
    blocks = simple.ENCODER_BLOCKS + simple.DECODER_BLOCKS
    assert simple_count == cells * (2 * 12 * f + blocks * 2 * 9 * f * f + 3 * f * z)
    assert simple_count <= 110e6
    both = stack.stack_encoder(one[0]), stack.stack_decoder(one[1])
    f2, z2, blocks2 = stack.FILTERS, stack.LATENT_DIM, stack.ENCODER_BLOCKS + stack.DECODER_BLOCKS
    level_two = 8 * 8 * (4 * z * f2 + 4 * f2 * z + blocks2 * 2 * 9 * f2 * f2 + 3 * f2 * z2)
    total = util.multiply_accumulates(simple.build_autoencoder(*both), (32, 32, 3))
    assert total == simple_count + level_two
    assert total <= 220e6


def test_level_one_is_loaded_as_it_was_saved(trained):
    out = trained[0]
    for part, model in zip(("encoder", "decoder"), stack.load_level_one(out, "simple_photos"), strict=True):
        saved = util.load_model(out, "simple_photos", part)
        for ours, theirs in zip(model.get_weights(), saved.get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(util.ModelError, match="not found; there is simple_photos"):
        stack.load_level_one(out, "simple_cifar10")


@pytest.fixture(scope="module")
def stacked(trained, tmp_path_factory):
    """Output folder in which a stack was trained on the short training of the photographs."""
    out = tmp_path_factory.mktemp("stacked")
    shutil.copytree(trained[0], out, dirs_exist_ok=True)
    code, printed, err = run(
        "stack_autoencoder.py", *TINY, *STACK, "--epochs=2", "--greedy-epochs=1", "--out", out
    )
    assert code == 0, err
    return out, printed


def test_run_tells_what_each_stage_brought(stacked):
    out, printed = stacked
    record = util.read_record(out, "stacked_photos")
    stages = record["validation_psnr"]
    assert list(stages) == ["simple", "greedy", "joint"]
    assert stages["joint"] > stages["simple"]
    for stage in stages.values():
        assert f"{stage:.2f} dB" in printed
    lines = (out / "logs/stacked_photos.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [["greedy", "1"], ["joint", "2"], ["joint", "3"]]
    header = "| sigma | noisy PSNR | simple PSNR | stacked PSNR | noisy SSIM | simple SSIM | stacked SSIM |"
    assert header in printed
    assert record["base"] == "simple_photos"


def test_stacked_files_are_those_of_simple(stacked):
    out, name = stacked[0], "stacked_photos"
    simple_files = {path.name for path in out.rglob("*simple_photos*") if path.is_file()}
    stacked_files = {path.name for path in out.rglob("*stacked_photos*") if path.is_file()}
    assert stacked_files == {file.replace("simple", "stacked") for file in simple_files}
    for kind in ("reconstructions", "sweep", "posterior", "history"):
        assert iio.imread(out / f"figures/{name}_{kind}.png").std() > 5
    with h5py.File(out / f"feature_maps/{name}_test.h5") as file:
        assert file["features"].shape == (32, 12, 12, 14)
        assert file.attrs["run"] == name


def test_level_one_is_frozen_in_the_greedy_stage(stacked, tmp_path, monkeypatch):
    seen = {}
    fit = simple.fit

    def watch(vae, data, args, epochs, stage, epochs_before):
        parts = [vae.encoder.get_layer("encoder"), vae.decoder.get_layer("decoder")]
        before = [weight for part in parts for weight in part.get_weights()]
        rows = fit(vae, data, args, epochs, stage, epochs_before)
        after = [weight for part in parts for weight in part.get_weights()]
        seen[stage] = max(np.abs(a - b).max() for a, b in zip(before, after, strict=True))
        return rows

    monkeypatch.setattr(simple, "fit", watch)
    arguments = [*TINY, *STACK, "--epochs=1", "--greedy-epochs=1", f"--out={stacked[0]}", "--name=again"]
    stack.main(arguments)
    assert seen["greedy"] == 0
    assert seen["joint"] > 1e-4


def test_stack_goes_on_from_a_saved_one_without_a_greedy_stage(stacked):
    arguments = [*TINY, *STACK, "--epochs=1", "--start=stacked_photos", "--name=tuned"]
    stack.main([*arguments, f"--out={stacked[0]}"])
    stages = util.read_record(stacked[0], "tuned")["validation_psnr"]
    assert list(stages) == ["simple", "start", "joint"]
    before = util.read_record(stacked[0], "stacked_photos")["validation_psnr"]
    assert stages["start"] == pytest.approx(max(before["greedy"], before["joint"]), abs=0.01)


def test_evaluate_shows_simple_beside_stacked(stacked):
    out, printed = stacked
    code, again, err = run("stack_autoencoder.py", "evaluate", "--dataset=photos", "--out", out)
    assert (code, err) == (0, "")
    assert len(table_rows(printed)) == 5
    assert table_rows(again) == table_rows(printed)


def test_picture_is_sampled_from_the_command_line(stacked, tmp_path):
    iio.imwrite(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (9, 14, 3), np.uint8))
    arguments = [str(tmp_path / "a.png"), "--to", str(tmp_path / "b.png"), "--out", str(stacked[0])]
    stack.main(["denoise", *arguments, "--samples=2", "--name=stacked_photos"])
    assert iio.imread(tmp_path / "b.png").shape == (9, 14, 3)
    assert iio.imread(tmp_path / "b_deviation.png").shape == (9, 14)
    with pytest.raises(OSError, match="stacked_cifar10.json: not found; there is .*simple_photos"):
        stack.main(["denoise", *arguments, "--force"])


def test_images_that_are_no_whole_cells(tmp_path):
    arguments = [*TINY, "--size=50", "--epochs=1", "--latent-dim=12", f"--out={tmp_path}"]
    simple.main(arguments)
    stack.main([*arguments, "--greedy-epochs=1"])
    model = util.load_model(tmp_path, "stacked_photos", "autoencoder")
    assert util.denoise(model, np.zeros((1, 50, 50, 3), np.float32)).shape == (1, 50, 50, 3)
    stack.main(["evaluate", "--dataset=photos", "--size=48", "--images=9", f"--out={tmp_path}"])
    record = util.read_record(tmp_path, "stacked_photos")
    for part in ("evaluation", "posterior"):  # the later one does not push out the earlier
        assert list(record[part]) == ["photos, 16 images of 50x50", "photos, 9 images of 48x48"]


def test_missing_base_lists_what_is_there(stacked):
    arguments = ["--dataset=photos", "--base=simple_stl10", "--out", stacked[0]]
    code, _, err = run("stack_autoencoder.py", *arguments)
    assert code == 1
    path = stacked[0] / "models/autoencoder_simple_stl10.json"
    assert err.startswith(f"{path}: not found; there is ")
    assert "simple_photos" in err


def test_stack_on_a_stack_is_refused(stacked, tmp_path):
    arguments = [*TINY, "--base=stacked_photos", "--name=double", "--out", stacked[0]]
    code, _, err = run("stack_autoencoder.py", *arguments)
    assert code == 1
    assert "encoder_stacked_photos.json: not the encoder of a simple model; choose another --base" in err


@pytest.mark.parametrize("reached", ["before stacking", "after the greedy stage", "Epoch 2/2"])
def test_interrupted_stack_resumes_to_the_same_weights(stacked, tmp_path, reached):
    out = stacked[0]
    for folder in ("models", "weights"):
        (tmp_path / folder).mkdir()
        for path in (out / folder).glob("*_simple_photos.*"):
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    arguments = [*TINY, *STACK, "--epochs=2", "--greedy-epochs=1", "--out", tmp_path]
    process = start("stack_autoencoder.py", *arguments, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    while reached not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 130
    resume = ["--resume", "--name=stacked_photos", "--out", tmp_path]
    code, _, err = run("stack_autoencoder.py", *resume)
    assert code == 0, err
    for ours, theirs in zip(
        util.load_model(tmp_path, "stacked_photos", "autoencoder").get_weights(),
        util.load_model(out, "stacked_photos", "autoencoder").get_weights(),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert json.loads((tmp_path / "logs/stacked_photos.json").read_text())["arguments"]["greedy_epochs"] == 1
