import argparse
import csv
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import simple_autoencoder as simple
import util
from load_data import Batches, Data, add_noise
from stl10_input import read_all_images

import h5py
import imageio.v3 as iio
import keras
import numpy as np
import pytest
from conftest import TINY, run, start, table_rows, without_greeting
from PIL import Image


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def small_models(seed=0):
    keras.utils.set_random_seed(seed)
    encoder, decoder = simple.build_encoder(16, 1, 14), simple.build_decoder(16, 1, 14)
    simple.start_as_identity(encoder, decoder)
    return encoder, decoder


def shaken(model, seed=0):
    """The same model with every weight moved a little, so that no zero hides a difference."""
    rng = np.random.default_rng(seed)
    model.set_weights([weight + rng.normal(0, 0.05, weight.shape) for weight in model.get_weights()])
    return model


def test_untrained_model_is_the_identity():
    encoder, decoder = small_models()
    images = np.random.default_rng(0).random((2, 10, 6, 3)).astype(np.float32)
    np.testing.assert_allclose(simple.build_autoencoder(encoder, decoder)(images), images, atol=1e-6)


def test_autoencoder_is_the_decoder_of_the_encoders_mean():
    encoder, decoder = map(shaken, small_models())
    images = np.random.default_rng(0).random((2, 8, 8, 3)).astype(np.float32)
    z_mean, _ = encoder.predict(images, verbose=0)
    autoencoder = simple.build_autoencoder(encoder, decoder)
    np.testing.assert_allclose(
        autoencoder.predict(images, verbose=0), decoder.predict(z_mean, verbose=0), atol=1e-5
    )


def test_order_of_the_encoders_outputs():
    # Keras keys weights by class and order: swapped, the two heads would load each other's kernels
    encoder, _ = small_models()
    z_mean, z_log_var = encoder(np.zeros((1, 4, 4, 3), np.float32))
    assert np.ptp(z_log_var) == 0
    assert z_log_var[0, 0, 0, 0] == simple.INITIAL_LOG_VAR
    assert float(z_mean[0, 0, 0, 0]) == pytest.approx(-0.5)


def test_kl_divergence_against_sampling():
    rng = np.random.default_rng(0)
    mean, log_var = rng.normal(0, 1, (1, 1, 1, 4)), rng.normal(0, 1, (1, 1, 1, 4))
    z = mean + np.exp(log_var / 2) * rng.normal(0, 1, (400_000, 1, 1, 4))
    log_ratio = 0.5 * (z**2 - (z - mean) ** 2 / np.exp(log_var) - log_var)  # log q(z) - log p(z)
    estimate = log_ratio.sum(axis=(1, 2, 3))
    error = estimate.std() / np.sqrt(len(z))
    assert float(simple.kl_divergence(mean, log_var)[0]) == pytest.approx(estimate.mean(), abs=4 * error)


def test_loss_against_its_formula():
    vae = simple.DenoisingVAE(*map(shaken, small_models()), kl_weight=0.25)
    clean = random_images(3, 8, 8, 3).astype(np.float32) / 255
    noisy = add_noise(random_images(3, 8, 8, 3), 25)
    loss = float(vae.compute_loss(noisy, clean, vae(noisy, training=False), training=False))
    mean, log_var = (np.asarray(code) for code in vae.encoder(noisy))
    mse = ((np.asarray(vae.decoder(mean)) - clean) ** 2).mean(axis=(1, 2, 3))
    kl = 0.5 * (mean**2 + np.exp(log_var) - 1 - log_var).sum(axis=(1, 2, 3)) / (8 * 8 * 3)
    assert loss == pytest.approx(np.mean(0.5 * np.log(mse + 255.0**-2) + 0.25 * kl), rel=1e-4)
    assert float(vae.kl.result()) == pytest.approx(kl.mean(), rel=1e-4)
    assert float(vae.psnr.result()) == pytest.approx(np.mean(-10 * np.log10(mse)), rel=1e-4)


def small_classifier(side=8):
    """Classifier of images by their mean colour."""
    image = keras.Input((side, side, 3))
    x = keras.layers.GlobalAveragePooling2D()(image)
    return shaken(keras.Model(image, keras.layers.Dense(4, activation="softmax")(x)))


def test_classifiers_add_how_far_their_verdicts_are_apart():
    models, classifiers = list(map(shaken, small_models())), [small_classifier(), small_classifier()]
    clean = random_images(3, 8, 8, 3).astype(np.float32) / 255
    noisy = add_noise(random_images(3, 8, 8, 3), 25)
    losses = []
    for judges in ([], classifiers):
        vae = simple.DenoisingVAE(*models, classifiers=judges)
        denoised, *codes = vae(noisy, training=False)
        losses.append(float(vae.compute_loss(noisy, clean, (denoised, *codes), training=False)))
    divergences = []
    for classifier in classifiers:
        p, q = (np.asarray(classifier(np.clip(images, 0, 1))) for images in (clean, denoised))
        divergences.append((p * np.log(p / q)).sum(axis=-1))
    assert np.min(divergences) > 1e-4
    assert np.abs(divergences[0] - divergences[1]).min() > 1e-5
    expected = simple.CLASSIFIER_WEIGHT * np.mean(divergences)
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-2)
    assert len(vae.trainable_variables) == sum(len(model.trainable_variables) for model in models)


def test_training_goes_on_from_a_saved_run_and_heeds_classifiers(trained, tmp_path):
    out = trained[0]
    for folder in ("models", "weights", "logs"):
        shutil.copytree(out / folder, tmp_path / folder, dirs_exist_ok=True)
    for name, side in (("classifier_a", 48), ("classifier_b", 48), ("classifier_small", 32)):
        with util.staged(tmp_path, name) as stage:
            util.save_model(stage, small_classifier(side), name)
    arguments = [*TINY, "--start=simple_photos", f"--out={tmp_path}", "--name=simple_tuned", "--epochs=1"]
    simple.main([*arguments, "--classifier", "classifier_a", "classifier_b", "--learning-rate=1e-9"])
    for ours, theirs in zip(
        util.load_model(tmp_path, "simple_tuned", "autoencoder").get_weights(),
        util.load_model(out, "simple_photos", "autoencoder").get_weights(),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    told = util.read_record(tmp_path, "simple_tuned")["arguments"]
    assert (told["start"], told["classifier"]) == ("simple_photos", ["classifier_a", "classifier_b"])
    with pytest.raises(util.ModelError, match=r"classifier_small.json: classifies \(32, 32, 3\), not images"):
        simple.main([*arguments, "--classifier", "classifier_a", "classifier_small"])
    with pytest.raises(util.ModelError, match="encoder_simple_photos.json: of another architecture"):
        simple.main([*arguments, "--filters=16"])


def test_training_noise_has_a_sigma_of_its_own_for_each_image():
    vae = simple.DenoisingVAE(*small_models(), sigma=(10, 50))
    clean = np.full((400, 16, 16, 3), 0.5, np.float32)
    sigma = (np.asarray(vae.noisy(clean)) - clean).std(axis=(1, 2, 3)) * 255
    assert 9 < sigma.min() < 12
    assert 47 < sigma.max() < 53
    assert abs(sigma.mean() - 30) < 4 * 40 / np.sqrt(12 * 400)  # uniform: deviation 40 / sqrt(12)


def test_noise_of_grey_images_is_grey_and_that_of_some_others_has_coarse_colour():
    vae = simple.DenoisingVAE(*small_models(), sigma=(50, 50), photographs=True)
    clean = random_images(300, 16, 16, 3).astype(np.float32) / 255
    clean[:100] = clean[:100, ..., :1]
    noise = 255 / 50 * (np.asarray(vae.noisy(clean)) - clean)
    np.testing.assert_allclose(noise[:100], noise[:100, ..., :1].repeat(3, axis=-1), atol=1e-5)
    assert noise[:100].std() == pytest.approx(1, abs=0.03)
    colour = noise - (noise @ np.array(simple.LUMA, np.float32))[..., None]
    colour = colour[100:].std(axis=(1, 2, 3)) / noise[100:].std(axis=(1, 2, 3))
    coarse = colour < 0.7  # it is 0.88 of white noise, 0.55 at most with a quarter of the colours' variance
    assert 0.2 < coarse.mean() < 0.4
    np.testing.assert_allclose(noise[100:][~coarse].std(axis=(1, 2, 3)), 1, atol=0.15)
    white = simple.DenoisingVAE(*small_models(), sigma=(50, 50)).noisy(clean)
    assert (np.asarray(white - clean).std(axis=-1) > 0.01).mean() > 0.9


def test_noise_in_jpeg_is_what_pillow_decodes():
    clean = np.full((1, 32, 48, 3), (0.5, 0.45, 0.55), np.float32)
    noise = np.random.default_rng(0).normal(0, 15 / 255, clean.shape).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(util.to_uint8(clean + noise)[0]).save(file, "JPEG", quality=100, subsampling="4:2:0")
    decoded = util.to_float(np.asarray(Image.open(file))) - clean[0]
    in_jpeg, share = np.ones((1, 1, 1, 1), bool), np.zeros((1, 1, 1, 1), np.float32)
    interpolated, repeated = (
        np.asarray(simple.noise_in_files(clean, noise, in_jpeg, share + blocky))[0] for blocky in (0, 1)
    )
    assert (interpolated - decoded).std() * 255 < 1  # rounding to whole grey levels, three times
    colour = repeated - (repeated @ np.array(simple.LUMA, np.float32))[..., None]
    assert np.ptp(colour.reshape(16, 2, 24, 2, 3), axis=(1, 3)).max() < 1e-5
    cells = [part.reshape(16, 2, 24, 2, 3).mean(axis=(1, 3)) for part in (repeated, noise)]
    np.testing.assert_allclose(*cells, atol=1e-6)


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
            noisy = np.asarray(vae(clean, training=True)[0])
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


def test_posterior_tables_against_closed_forms():
    encoder, decoder = small_models()  # the identity: z_mean is the image, z_log_var is -10
    clean = random_images(40, 8, 8, 3)
    levels, quality = simple.posterior_tables(encoder, decoder, clean, sigma=25, samples=10)
    noisy = add_noise(clean, 25)
    (z_mean, z_log_var) = encoder.predict(noisy, verbose=0)
    kl = 0.5 * (z_mean**2 + np.exp(z_log_var) - 1 - z_log_var)
    assert levels == [
        {
            "level": 1,
            "KL per latent": pytest.approx(kl.mean(), rel=1e-4),
            "active units": pytest.approx(np.mean(z_mean.reshape(-1, 14).var(axis=0) > 0.01)),
        }
    ]
    expected = util.psnr(clean, util.to_uint8(noisy)).mean()
    assert [row["decoded"] for row in quality] == ["posterior mean", "one sample", "mean of 10 samples"]
    assert quality[0]["PSNR"] == pytest.approx(expected, abs=0.01)
    assert quality[1]["PSNR"] < quality[2]["PSNR"] <= quality[0]["PSNR"] + 1e-3


def test_samples_have_the_posteriors_deviation():
    encoder, decoder = small_models()
    codes = [np.zeros((2, 4, 4, 14), np.float32), np.full((2, 4, 4, 14), np.log(0.04), np.float32)]
    draws = simple.decoded_samples(decoder, codes, 200)
    assert draws.shape == (200, 2, 8, 8, 3)
    assert draws.std() == pytest.approx(0.2, abs=0.003)
    assert draws.mean() == pytest.approx(0.5, abs=0.003)


def test_learning_rate_rises_and_falls():
    rate = simple.build_optimizer(1e-3, 1000)._learning_rate
    assert float(rate(0)) == 0
    assert float(rate(100)) == pytest.approx(1e-3, rel=1e-3)
    assert float(rate(1000)) == pytest.approx(1e-5, rel=1e-3)


def test_every_file_of_the_run_is_there(trained):
    out, printed = trained
    name = "simple_photos"
    for part in ("encoder", "decoder", "autoencoder"):
        assert (out / f"models/{part}_{name}.json").exists()
        assert (out / f"weights/{part}_{name}.weights.h5").exists()
    for kind in ("reconstructions", "history", "sweep", "posterior"):
        assert iio.imread(out / f"figures/{name}_{kind}.png").std() > 5
    assert iio.imread(out / f"feature_maps/{name}.png").std() > 5
    for kind in ("single", "group"):
        assert len(iio.imread(out / f"gifs/{name}_{kind}.gif")) == 3  # before the training, and each epoch
    for split, count in (("test", 32), ("train", 64)):
        with h5py.File(out / f"feature_maps/{name}_{split}.h5") as file:
            assert file["features"].shape == (count, 24, 24, simple.LATENT_DIM)
            described = {"run": name, "dataset": "photos", "split": split, "sigma": 0.0, "pooling": 0}
            assert described.items() <= dict(file.attrs).items()
            assert file.attrs["weights"] == util.sha256_of(out / f"weights/encoder_{name}.weights.h5")
    with (out / f"logs/{name}.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    left_over = [
        path for path in (out / "logs").iterdir() if path.name not in (f"{name}.csv", f"{name}.json")
    ]
    assert [path.name for path in left_over if path.is_file()] == [f".{name}.lock"]
    assert "| sigma | noisy PSNR | simple PSNR | noisy SSIM | simple SSIM |" in printed
    assert "val_psnr" in printed


def test_record_tells_how_the_run_came_about(trained):
    record = json.loads((trained[0] / "logs/simple_photos.json").read_text())
    assert record["arguments"]["epochs"] == 2
    assert record["training_images"] == 64
    table = record["evaluation"]["photos, 32 images of 48x48"]
    assert [row["sigma"] for row in table] == [15, 25, 35, 50, 75]
    for path, checksum in record["files"].items():
        assert util.sha256_of(trained[0] / path) == checksum
    assert len(record["files"]) == 6


def test_evaluate_prints_what_the_training_printed(trained):
    out, printed = trained
    code, again, err = run("simple_autoencoder.py", "evaluate", "--dataset", "photos", "--out", out, cwd=out)
    assert (code, err) == (0, "")
    assert len(table_rows(printed)) == 5
    assert table_rows(again) == table_rows(printed)


LOAD = """
import sys, numpy, keras
folder, noisy, result = sys.argv[1:]
model = keras.models.model_from_json(open(folder + "/models/autoencoder_simple_photos.json").read())
model.load_weights(folder + "/weights/autoencoder_simple_photos.weights.h5")
numpy.save(result, model.predict(numpy.load(noisy), verbose=0))
ours = {"util", "load_data", "stl10_input", "simple_autoencoder"} & set(sys.modules)
print(keras.backend.backend(), sorted(ours))
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_saved_model_needs_nothing_but_keras(trained, tmp_path, backend):
    if not importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is not installed")
    out = trained[0]
    noisy = add_noise(random_images(2, 16, 16, 3), 25)
    np.save(tmp_path / "noisy.npy", noisy)
    command = [sys.executable, "-c", LOAD, out, tmp_path / "noisy.npy", tmp_path / "result.npy"]
    environment = os.environ | {"KERAS_BACKEND": backend}
    printed = subprocess.run(
        map(str, command), cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert printed.stdout.split() == [backend, "[]"]
    expected = util.load_model(out, "simple_photos", "autoencoder").predict(noisy, verbose=0)
    np.testing.assert_allclose(np.load(tmp_path / "result.npy"), expected, atol=1e-5)


def test_scripts_train_under_jax(tmp_path):
    if not importlib.util.find_spec("jax"):
        pytest.skip("jax is not installed")
    environment = os.environ | {"KERAS_BACKEND": "jax"}
    arguments = [*TINY, "--epochs", "1", "--out", tmp_path]
    code, printed, err = run("simple_autoencoder.py", *arguments, env=environment)
    assert code == 0, err
    record = util.read_record(tmp_path, "simple_photos")
    assert record["environment"]["backend"].startswith("jax ")
    assert record["best"]["val_psnr"] > 15


def losses_of(out):
    with (out / "logs/simple_photos.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def weights_of(out):
    return util.load_model(out, "simple_photos", "autoencoder").get_weights()


def test_default_precision_trains_a_folder_of_pictures(tmp_path):
    for index in range(3):
        (tmp_path / "holiday").mkdir(exist_ok=True)
        iio.imwrite(tmp_path / f"holiday/{index}.png", random_images(80, 200, 3, seed=index))
    arguments = [
        "--dataset",
        tmp_path / "holiday",
        "--data-dir",
        tmp_path,
        "--size=24",
        "--precision=mixed_bfloat16",
    ]
    code, printed, err = run(
        "simple_autoencoder.py", *arguments, "--filters=12", "--epochs=1", "--out", tmp_path
    )
    assert code == 0, err
    model = util.load_model(tmp_path, "simple_holiday", "autoencoder")
    assert {weight.dtype for weight in model.weights} == {"float32"}
    assert "bfloat16" not in (tmp_path / "models/autoencoder_simple_holiday.json").read_text()
    assert util.read_record(tmp_path, "simple_holiday")["arguments"]["dataset"] == "holiday"
    assert str(tmp_path) not in (tmp_path / "logs/simple_holiday.json").read_text()


def test_training_on_a_mapped_file_larger_than_a_batch(tmp_path):
    random_images(20 * 96 * 96 * 3).tofile(tmp_path / "unlabeled_X.bin")
    images = read_all_images(tmp_path / "unlabeled_X.bin")
    small = {split: np.ascontiguousarray(images[:4]) for split in ("train", "validation", "test")}
    labels = {split: np.zeros(4, np.int64) for split in small} | {"unlabeled": np.full(20, -1)}
    data = Data("stl10", small | {"unlabeled": images}, labels, ("none",), {})
    args = argparse.Namespace(
        out=tmp_path, name="mapped", batch_size=8, seed=0, sigma=(0, 50), learning_rate=1e-3
    )
    (row,) = simple.fit(simple.DenoisingVAE(*small_models()), data, args, 1)
    assert np.isfinite(row["val_psnr"])


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_training_resumes_to_the_same_weights(trained, tmp_path, signal_number):
    arguments = [*TINY, "--epochs", "2", "--out", tmp_path]
    process = start("simple_autoencoder.py", *arguments, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    while "Epoch 2/2" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal_number)
    err = without_greeting(process.communicate()[1])
    if signal_number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 130
        assert err.strip().startswith(f"Stopped. Go on with: {sys.executable} ")
        assert err.endswith(f"simple_autoencoder.py --resume --name simple_photos --out {tmp_path}")
    assert not (tmp_path / "models").exists()
    code, printed, err = run(
        "simple_autoencoder.py", "--resume", "--name", "simple_photos", "--out", tmp_path
    )
    assert code == 0, err
    assert "Epoch 1/2" not in printed
    assert losses_of(tmp_path) == pytest.approx(losses_of(trained[0]), rel=1e-4)
    for resumed, whole in zip(weights_of(tmp_path), weights_of(trained[0]), strict=True):
        np.testing.assert_allclose(resumed, whole, atol=1e-6)
    assert len(iio.imread(tmp_path / "gifs/simple_photos_single.gif")) == 3


def test_divergence_stops_in_one_line_and_keeps_the_last_good_epoch(tmp_path):
    arguments = [*TINY, "--epochs", "3", "--learning-rate", "1e30", "--out", tmp_path]
    code, _, err = run("simple_autoencoder.py", *arguments)
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "the training diverged" in err
    assert "--resume and a lower --learning-rate" in err
    assert not (tmp_path / "models").exists()


def test_resume_with_nothing_to_resume(tmp_path):
    code, _, err = run("simple_autoencoder.py", "--resume", "--dataset", "photos", "--out", tmp_path)
    assert code == 1
    assert err == (
        f"{tmp_path}/logs/simple_photos.training/arguments.json: not found, nothing to resume; "
        "train without --resume"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--sigma", "-1", "5"],
        ["--sigma", "50", "5"],
        ["--sigma", "a", "b"],
        ["--sigma", "nan", "5"],
        ["--epochs", "0"],
        ["--epochs", "-1"],
        ["--limit", "0"],
        ["--name", "a/b"],
        ["--name", ""],
        ["--name", ".."],
        ["--filters", "11"],
        ["--seed", "-1"],
        ["--kl-weight", "-1"],
        ["--learning-rate", "nan"],
        ["--size", "3"],
        ["--precision", "float16"],
        ["--unknown"],
        ["evaluate", "--images", "0"],
        ["denoise", "a.png", "--to", "b", "--samples", "-1"],
    ],
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        simple.parse_args(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_train_is_meant_when_no_verb_is_given():
    assert simple.parse_args([]).verb == "train"
    assert simple.parse_args(["--epochs", "3"]).epochs == 3
    assert simple.parse_args(["evaluate"]).name == "simple_cifar10"
    assert simple.parse_args(["--dataset", "/some/holiday"]).name == "simple_holiday"


def identity_model():
    return simple.build_autoencoder(*small_models())


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 7, 3), (7, 1, 1), (33, 57, 3)])
def test_pictures_of_any_size_keep_shape_and_depth(shape):
    for depth in (np.uint8, np.uint16):
        pixels = np.random.default_rng(0).integers(0, np.iinfo(depth).max, shape, depth, endpoint=True)
        denoised, noise, _ = simple.denoise_pixels(identity_model(), pixels)
        assert denoised.dtype == depth
        np.testing.assert_allclose(denoised, pixels, atol=1)
        assert noise < 0.01


def test_strength_blends_and_noise_is_what_the_whole_of_it_would_remove():
    model = shaken(identity_model())
    pixels = random_images(20, 22, 3)
    full, noise, _ = simple.denoise_pixels(model, pixels)
    half, noise_of_half, _ = simple.denoise_pixels(model, pixels, strength=0.5)
    none, noise_of_none, _ = simple.denoise_pixels(model, pixels, strength=0)
    np.testing.assert_array_equal(none, pixels)
    assert noise == noise_of_half == noise_of_none
    np.testing.assert_allclose(half, (full.astype(float) + pixels) / 2, atol=1)
    assert noise == pytest.approx(np.std(full.astype(float) - pixels), abs=0.5)


def test_denoise_writes_what_it_can_and_names_the_rest(trained, tmp_path):
    source, target = tmp_path / "in folder", tmp_path / "out ä"
    source.mkdir()
    for name, shape in (("a ö.png", (9, 14, 3)), ("b.jpg", (30, 20, 3)), ("grey.png", (5, 6))):
        iio.imwrite(source / name, random_images(*shape))
    (source / "text.png").write_text("no image")
    raw = (source / "b.jpg").read_bytes()
    (source / "cut.jpg").write_bytes(raw[: len(raw) // 2])
    arguments = ["denoise", source, "--to", target, "--name=simple_photos", "--out", trained[0]]
    code, printed, err = run("simple_autoencoder.py", *arguments)
    assert code == 1
    assert f"{source / 'text.png'}: not a readable image" in err
    assert f"{source / 'cut.jpg'}: not a readable image" in err
    assert err.splitlines()[-1] == f"{target}: 2 of 5 pictures are missing, for the reasons above"
    assert len(err.splitlines()) == 3
    assert sorted(path.name for path in target.iterdir()) == ["a ö.png", "b.jpg", "grey.png"]
    assert iio.imread(target / "a ö.png").shape == (9, 14, 3)
    assert iio.imread(target / "grey.png").shape == (5, 6)
    assert f"{target / 'b.jpg'}: 20x30, noise about " in printed
    before = (target / "b.jpg").read_bytes()
    (target / "b.jpg").write_bytes(b"mine")
    picture = ["denoise", source / "b.jpg", "--to", target, *arguments[4:]]
    code, _, err = run("simple_autoencoder.py", *picture)
    assert code == 1
    assert f"{target / 'b.jpg'}: is there already; choose another --to, or --force" in err
    code, _, err = run("simple_autoencoder.py", *picture, "--force")
    assert code == 0, err
    assert (target / "b.jpg").read_bytes() == before


def test_denoise_never_overwrites_its_input(trained, tmp_path):
    path = tmp_path / "a.png"
    iio.imwrite(path, random_images(8, 8, 3))
    before = path.read_bytes()
    arguments = ["denoise", path, "--to", tmp_path, "--force", "--name=simple_photos", "--out", trained[0]]
    code, _, err = run("simple_autoencoder.py", *arguments)
    assert code == 1
    assert f"{path}: is there already; choose another --to\n" in err
    assert path.read_bytes() == before


def test_gifs_do_without_what_a_kill_has_left(tmp_path):
    clean = random_images(2, 8, 8, 3)
    for name in ("0000.npy", "0001.npy", ".ab_12x.npy"):
        np.save(tmp_path / name, clean)
    (tmp_path / "gifs").mkdir()
    simple.write_gifs(tmp_path, "run", tmp_path, clean, clean)
    assert len(iio.imread(tmp_path / "gifs/run_single.gif")) == 2


def test_resumed_folder_is_known_by_its_whole_path(tmp_path, monkeypatch):
    (tmp_path / "logs/simple_mine.training").mkdir(parents=True)
    (tmp_path / "logs/simple_mine.training/arguments.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    args = simple.parse_args(["--dataset=mine", "--resume", f"--out={tmp_path}"])
    assert args.dataset == str(tmp_path / "mine")


@pytest.mark.parametrize("shape", [(1, 1, 3), (33, 57, 3), (40, 21, 1)])
def test_samples_of_a_picture_have_the_posteriors_deviation(shape, monkeypatch):
    encoder, decoder = small_models()  # the identity, and a log-variance of -10 for each of 2x2x3 values
    model = simple.build_autoencoder(encoder, decoder)
    sampler = simple.window_sampler(encoder, decoder, 40)
    expected = 255 * np.exp(-5) / (np.sqrt(3) if shape[2] == 1 else 1)
    for depth in (np.uint8, np.uint16):
        pixels = np.full(shape, np.iinfo(depth).max // 2, depth)
        denoised, _, deviation = simple.denoise_pixels(model, pixels, draws=sampler)
        assert denoised.dtype == depth
        assert deviation.shape == (*shape[:2], 1)
        assert deviation.mean(dtype=float) == pytest.approx(expected, rel=0.4 if shape == (1, 1, 3) else 0.04)
        away = np.abs(denoised - pixels.astype(float)).max() / np.iinfo(depth).max * 255
        assert away < 5 * expected / np.sqrt(40) + 1
        monkeypatch.setattr(simple, "SAMPLING_TILE", 16)
        again, _, same = simple.denoise_pixels(model, pixels, draws=sampler)
        monkeypatch.undo()
        np.testing.assert_allclose(again, denoised, atol=1)
        np.testing.assert_allclose(same, deviation, rtol=0.01)


def test_deviation_is_written_beside_the_picture(trained, tmp_path, capsys):
    for name in ("a ä.jpg", "b.png"):
        iio.imwrite(tmp_path / name, random_images(9, 14, 3))
    arguments = ["denoise", str(tmp_path / "a ä.jpg"), "--name=simple_photos", "--out", str(trained[0])]
    for target in ("first", "second"):
        simple.main([*arguments, "--samples=3", "--to", str(tmp_path / target)])
    told = re.search(
        r"a ä.jpg: 14x9, noise about \d+\.\d, mean deviation (\d\.\d\d), ", capsys.readouterr().out
    )
    written = tmp_path / "first/a ä_deviation.png"
    assert sorted(path.name for path in written.parent.iterdir()) == ["a ä.jpg", "a ä_deviation.png"]
    brightness = iio.imread(written)
    assert brightness.shape == (9, 14)
    assert brightness.mean() / simple.DEVIATION_SCALE == pytest.approx(float(told[1]), abs=0.01)
    for name in ("a ä.jpg", "a ä_deviation.png"):  # the same command draws the same
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    (tmp_path / "first/a ä.jpg").unlink()
    written.write_bytes(b"mine")
    again = [*arguments, "--samples=3", "--to", str(tmp_path / "first")]
    with pytest.raises(OSError, match="1 of 1 pictures are missing"):
        simple.main(again)
    assert f"{written}: is there already; choose another --to, or --force" in capsys.readouterr().err
    assert list(written.parent.iterdir()) == [written]
    assert written.read_bytes() == b"mine"
    simple.main([*again, "--force"])
    assert iio.imread(written).shape == (9, 14)


def test_deviation_never_overwrites_a_picture_that_was_given(trained, tmp_path):
    given = tmp_path / "a_deviation.png"
    iio.imwrite(given, random_images(8, 8, 3))
    before = given.read_bytes()
    arguments = ["--samples=2", "--force", "--name=simple_photos", "--out", str(trained[0])]
    with pytest.raises(OSError, match="1 of 1 pictures are missing"):
        simple.main(["denoise", str(given), "--to", str(tmp_path / "a.png"), *arguments])
    assert given.read_bytes() == before
    pictures = [tmp_path / "in/a.png", given]
    simple.sources_and_targets(pictures, tmp_path)
    with pytest.raises(OSError, match="a_deviation.png: 2 results would have this name"):
        simple.sources_and_targets(pictures, tmp_path, samples=2)


def test_model_of_photographs_is_taken_where_it_is_saved(tmp_path):
    arguments = ["denoise", "a.png", "--to", "b", "--out", str(tmp_path)]
    assert simple.parse_args(arguments).name == "simple_cifar10"
    (tmp_path / "models").mkdir()
    (tmp_path / "models/autoencoder_simple_photos432.json").write_text("{}")
    assert simple.parse_args(arguments).name == "simple_photos432"
    assert simple.parse_args([*arguments, "--name=mine"]).name == "mine"
    assert simple.parse_args(arguments, "stacked").name == "stacked_cifar10"


def test_folder_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file: cannot be written to .*; choose another --to"):
        simple.main(["denoise", "a.png", "--to", str(tmp_path / "file"), "--out", str(tmp_path)])


def test_denoise_of_nothing_and_of_two_of_one_name(tmp_path):
    with pytest.raises(OSError, match="there are no files in it"):
        simple.sources_and_targets([tmp_path], tmp_path / "out")
    pictures = [tmp_path / folder / "a.png" for folder in ("first", "second")]
    with pytest.raises(OSError, match="2 results would have this name"):
        simple.sources_and_targets(pictures, tmp_path / "out")
    assert simple.sources_and_targets(pictures[:1], tmp_path / "b.jpg") == [(pictures[0], tmp_path / "b.jpg")]
    assert simple.sources_and_targets(pictures[:1], tmp_path) == [(pictures[0], tmp_path / "a.png")]
