import json
import os
import shutil
import signal
import subprocess
import sys

import classifier
import util
from load_data import DataError, load_data

import imageio.v3 as iio
import keras
import numpy as np
import pytest
from conftest import run, start, table_rows

# enough training images for both classes
ARGUMENTS = ["--dataset=photos", "--limit=800", "--batch-size=100", "--precision=float32"]
ARGUMENTS += ["--epochs=2", "--rounds=2", "--widths", "16", "32", "32"]


def test_whitening_decorrelates_patches():
    rng = np.random.default_rng(0)
    smooth = rng.normal(128, 40, (40, 4, 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
    images = np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)
    model = classifier.build_classifier((16, 16, 3), 2)
    layer = model.get_layer("whitening")
    layer.set_weights(classifier.whitening(images))
    layer.activation = None
    responses = keras.ops.convert_to_numpy(layer(util.to_float(images)))[:, ::2, ::2, :12]
    responses = responses.reshape(-1, 12)
    np.testing.assert_allclose(responses.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(responses, rowvar=False), np.eye(12), atol=0.1)


def test_kernels_turn_as_muon_says_and_keep_their_norm():
    rng = np.random.default_rng(0)
    start, gradient = (rng.normal(size=(3, 3, 4, 8)).astype(np.float32) for _ in range(2))
    after = []
    for optimizer in (classifier.TurningMuon, util.ConvolutionMuon):
        variable = keras.Variable(start)
        optimizer(1.0, rms_rate=None).apply([keras.ops.convert_to_tensor(gradient)], [variable])
        after.append(keras.ops.convert_to_numpy(variable))
    np.testing.assert_allclose(after[0], after[1] * 8**0.5 / np.linalg.norm(after[1]), atol=1e-5)
    assert np.abs(after[1] - start).max() > 0.1


def test_averaged_weights_get_statistics_of_their_own():
    rng = np.random.default_rng(0)
    model = classifier.build_classifier((16, 16, 3), 2, (8, 8, 8))
    weights = [[rng.normal(size=part.shape) for part in model.get_weights()] for _ in range(3)]
    images = rng.random((50, 16, 16, 3), np.float32)
    classifier.average_weights(model, weights, 100 * [(images, None)])
    for variable, *parts in zip(model.weights, *weights, strict=True):
        if "moving" not in variable.name:
            np.testing.assert_allclose(variable, sum(parts) / 3, atol=1e-6)
    norm = model.get_layer("convolution_1a_norm")
    seen = keras.Model(model.inputs, norm.input).predict(images, verbose=0)
    np.testing.assert_allclose(norm.moving_mean, seen.mean(axis=(0, 1, 2)), atol=0.05 * seen.std())
    np.testing.assert_allclose(norm.moving_variance, seen.var(axis=(0, 1, 2)), rtol=0.05)


def test_accuracy_interval_is_that_of_wilson():
    # Brown, Cai, DasGupta, "Interval Estimation for a Binomial Proportion", 2001, equation 4, by hand
    labels = np.zeros(10, int)
    predicted = np.array([0] * 8 + [1] * 2)
    assert classifier.accuracy(labels, predicted) == pytest.approx((80, 49.02, 94.33), abs=0.01)


def test_most_confused_pairs_by_hand():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 0, 0, 2, 1, 0, 2, 2])
    pairs = classifier.confused_pairs(labels, predicted, ("cat", "dog", "frog"))
    assert pairs == [(50, "dog", "cat"), (25, "cat", "frog")]


@pytest.fixture(scope="module")
def classified(trained, tmp_path_factory):
    """Output folder with simple_photos and a classifier of the photographs, and what its training printed."""
    out = shutil.copytree(trained[0], tmp_path_factory.mktemp("classified") / "out")
    code, printed, err = run("classifier.py", *ARGUMENTS, "--out", out)
    assert code == 0, err
    return out, printed


def test_run_prints_and_writes_its_results(classified):
    out, printed = classified
    lines = table_rows(printed)
    assert "| sigma |" in printed
    assert len(lines) == 5
    assert printed.count("most confused") == 3
    record = util.read_record(out, "classifier_photos")
    rows = record["evaluation"]["photos, 32 images"]
    shown = {(row["sigma"], row["images"]): row["accuracy"] for row in rows}
    assert len(shown) == 11
    assert f"clean: {shown[0, 'clean']:.2f} (" in printed
    assert f" {shown[50, 'simple_photos']:.2f} (" in lines[3]
    assert shown[0, "clean"] > 60
    log = (out / "logs/classifier_photos.csv").read_text().split()
    assert [row[:4] for row in log[1:]] == ["1,1,", "1,2,", "2,3,", "2,4,"]
    assert [row["round"] for row in record["best"]] == [1, 2]
    assert [row["val_loss"] for row in record["best"]] == [
        min(float(row.split(",")[5]) for row in part) for part in (log[1:3], log[3:5])
    ]
    for kind in ("clean_confusion", "noisy_confusion", "denoised_confusion", "sigma", "history"):
        assert iio.imread(out / f"figures/classifier_photos_{kind}.png").std() > 5


def test_saved_classifier_needs_keras_alone(classified, tmp_path):
    out = classified[0]
    data = load_data("photos")
    images = util.to_float(data.images["test"])
    np.save(tmp_path / "images.npy", images)
    code = (
        "import sys, numpy, keras\n"
        f"model = keras.models.model_from_json(open({str(out / 'models/classifier_photos.json')!r}).read())\n"
        f"model.load_weights({str(out / 'weights/classifier_photos.weights.h5')!r})\n"
        "assert not model.compiled and model.dtype_policy.name == 'float32'\n"
        "probabilities = model.predict(numpy.load('images.npy'), verbose=0)\n"
        "numpy.save('probabilities.npy', probabilities)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    probabilities = np.load(tmp_path / "probabilities.npy")
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    right = np.mean(probabilities.argmax(axis=1) == data.labels["test"])
    rows = util.read_record(out, "classifier_photos")["evaluation"]["photos, 32 images"]
    assert 100 * right == pytest.approx(rows[0]["accuracy"])


def test_evaluate_gives_the_same_again(classified, tmp_path, capsys):
    out, printed = shutil.copytree(classified[0], tmp_path / "out"), classified[1]
    before = util.read_record(out, "classifier_photos")
    classifier.main(["evaluate", "--dataset=photos", f"--out={out}"])
    assert table_rows(capsys.readouterr().out) == table_rows(printed)
    assert util.read_record(out, "classifier_photos")["evaluation"] == before["evaluation"]
    for name in ("models/autoencoder_{}.json", "weights/autoencoder_{}.weights.h5"):
        shutil.copy(out / name.format("simple_photos"), out / name.format("simple_other"))
    classifier.main(["evaluate", "--dataset=photos", f"--out={out}", "--denoisers=simple_other"])
    rows = util.read_record(out, "classifier_photos")["evaluation"]["photos, 32 images"]
    kept = [row for row in rows if row["images"] != "simple_other"]
    assert kept == before["evaluation"]["photos, 32 images"]
    assert len(rows) == len(kept) + 5


def test_evaluate_takes_images_of_the_size_that_was_trained_on(classified, tmp_path):
    out = shutil.copytree(classified[0], tmp_path / "out")
    arguments = ["--dataset=photos", f"--out={out}", "--name=classifier_small"]
    few = ["--size=24", "--limit=3400", "--epochs=1", "--rounds=1", "--widths", "16", "16", "16"]
    classifier.main([*arguments, *few])
    classifier.main(["evaluate", *arguments])
    with pytest.raises(util.ModelError, match=r"classifies \(24, 24, 3\), not images \(48, 48, 3\); choose"):
        classifier.main(["evaluate", *arguments, "--size=48"])


def test_feature_maps_are_classified_instead_of_images(classified, capsys):
    out = classified[0]
    arguments = ["--dataset=photos", "--features=simple_photos", f"--out={out}"]
    classifier.main([*arguments, "--limit=800", "--batch-size=100", "--epochs=1", "--rounds=1"])
    printed = capsys.readouterr().out
    name = "classifier_photos_simple_photos"
    assert (out / "feature_maps/simple_photos_train_pool8.h5").exists()
    assert util.load_model(out, name).input_shape == (None, 8, 8, 48)
    classifier.main(["evaluate", *arguments])
    assert table_rows(capsys.readouterr().out) == table_rows(printed)
    with pytest.raises(util.ModelError, match="a classifier of simple_photos; give --features simple_photos"):
        classifier.main(["evaluate", "--dataset=photos", f"--name={name}", f"--out={out}"])
    with pytest.raises(util.ModelError, match="a classifier of images; leave out --features"):
        classifier.main(["evaluate", *arguments, "--name=classifier_photos"])


def test_interrupted_training_resumes_to_the_same_weights(classified, tmp_path):
    arguments = [*ARGUMENTS, "--out", tmp_path]
    process = start("classifier.py", *arguments, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    for _ in ("first round", "second round"):
        while "Epoch 2/2" not in process.stdout.readline():
            assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "--resume" in err
    assert not (tmp_path / "models/classifier_photos.json").exists()
    code, _, err = run("classifier.py", "--resume", "--name=classifier_photos", "--out", tmp_path)
    assert code == 0, err
    for ours, theirs in zip(
        util.load_model(tmp_path, "classifier_photos").get_weights(),
        util.load_model(classified[0], "classifier_photos").get_weights(),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_training_goes_on_from_a_saved_classifier(classified, tmp_path):
    out = shutil.copytree(classified[0], tmp_path / "out")
    arguments = [*ARGUMENTS, f"--out={out}", "--start=classifier_photos", "--rounds=1"]
    classifier.main([*arguments, "--name=classifier_again", "--learning-rate=1e-9"])
    saved = [util.load_model(out, name) for name in ("classifier_photos", "classifier_again")]
    for before, after in zip(*(model.trainable_variables for model in saved), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-3)
    assert util.read_record(out, "classifier_again")["arguments"]["start"] == "classifier_photos"
    np.testing.assert_array_equal(*(model.get_layer("whitening").kernel for model in saved))
    with pytest.raises(util.ModelError, match="classifier_photos.json: of another architecture"):
        classifier.main([*arguments, "--name=classifier_wider", "--widths", "16", "32", "48"])


def test_what_does_not_fit_is_told(classified, tmp_path):
    out = shutil.copytree(classified[0], tmp_path / "out")
    evaluate = ["evaluate", "--dataset=photos", f"--out={out}"]
    with pytest.raises(util.ModelError, match="autoencoder_blur.json: not found; there is simple_photos"):
        classifier.main([*evaluate, "--denoisers", "blur"])
    with pytest.raises(util.ModelError, match="classifier_cifar10.json: not found; there is classifier_p"):
        classifier.main([*evaluate, "--name=classifier_cifar10"])
    weights = out / "weights/classifier_photos.weights.h5"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(util.ModelError, match="classifier_photos.weights.h5: not the file that"):
        classifier.main(evaluate)
    weights.write_bytes(whole)
    path = out / "logs/classifier_photos.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_names": ["ship", "truck"]}))
    with pytest.raises(util.ModelError, match="not a classifier of the classes of photos; choose"):
        classifier.main(evaluate)


def test_one_class_is_refused(tmp_path):
    with pytest.raises(DataError, match="its training images are all of one class; raise --limit"):
        classifier.main(["--dataset=photos", "--limit=10", f"--out={tmp_path}"])
    assert not list(tmp_path.rglob("*classifier_photos*"))
