import shutil

import classifier
import simple_autoencoder
import util
from load_data import Data, DataError, check_labelled

import keras
import numpy as np
import pytest
from conftest import (
    NAME,
    assert_same_weights,
    curves_of,
    legend_of,
    printed_by,
    random_images,
    rows_of,
    run_of,
    stop_at,
    table_rows,
    told_line,
    usage_error,
)

CLASSIFIER = "classifier_photos"
SHORT = ["--dataset=photos", "--size=24", "--batch-size=100", "--precision=float32"]
SHORT += ["--widths", "16", "16", "32"]
TRAIN = [*SHORT, "--epochs=4", "--rounds=2"]


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
    kernel, _ = classifier.whitening(np.full((2, 4, 4, 3), 90, np.uint8))
    np.testing.assert_allclose(
        np.square(kernel).sum(axis=(0, 1, 2)), 1 / classifier.WHITENING_EPSILON, rtol=1e-3
    )


def test_kernels_turn_as_muon_says_and_keep_their_norm():
    rng = np.random.default_rng(0)
    before, gradient = (rng.normal(size=(3, 3, 4, 8)).astype(np.float32) for _ in range(2))
    after = []
    for optimizer in (classifier.FixedNormMuon, util.ConvolutionMuon):
        variable = keras.Variable(before)
        optimizer(1.0, rms_rate=None).apply([keras.ops.convert_to_tensor(gradient)], [variable])
        after.append(keras.ops.convert_to_numpy(variable))
    np.testing.assert_allclose(after[0], after[1] * 8**0.5 / np.linalg.norm(after[1]), atol=1e-5)
    assert np.abs(after[1] - before).max() > 0.1


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
    measured = classifier.accuracy(np.zeros(10), np.array([0] * 8 + [1] * 2))
    assert measured == pytest.approx((80, 49.02, 94.33), abs=0.01)


def test_confusion_by_hand():
    names = ["cat", "dog", "frog"]
    labels, predicted = np.array([0, 0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 2, 1, 0, 2, 2])
    pairs = classifier.confused_pairs(labels, predicted, names)
    assert pairs == [(50, "dog", "cat"), (25, "cat", "frog")]
    axis = classifier.confusion_figure(labels, predicted, names, "clean").axes[0]
    np.testing.assert_allclose(axis.images[0].get_array(), [[75, 0, 25], [50, 50, 0], [0, 0, 100]])
    assert axis.images[0].get_clim() == (0, 100)
    for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [label.get_text() for label in ticks] == names


def test_labelled_batches_mirror_each_image_in_every_other_epoch(monkeypatch):
    monkeypatch.setattr("classifier.shift_zoom_or_cut_out", lambda images, rng, share: images)
    images = random_images(20, 16, 16, 3)
    batches = classifier.LabelledBatches(images, np.arange(20), 20, 5, seed=1)
    mirrored = np.full((4, 20), -1)
    for epoch in range(4):
        batches.go_to(epoch)
        for index in range(len(batches)):
            for image, one_hot in zip(*batches[index], strict=True):
                (label,) = np.flatnonzero(one_hot)
                original = images[label] / np.float32(255)
                mirrored[epoch, label] = not np.array_equal(image, original)
                shown = original[:, ::-1] if mirrored[epoch, label] else original
                np.testing.assert_array_equal(image, shown)
    np.testing.assert_array_equal(mirrored[1], 1 - mirrored[0])
    np.testing.assert_array_equal(mirrored[2:], mirrored[:2])
    assert 0 < mirrored[0].sum() < 20


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_images_are_shifted_by_whole_pixels_and_cut_out_of_or_enlarged(share):
    # every pixel says where it is
    rows, columns = np.mgrid[0:32, 0:32] * 4
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    images = image[None].repeat(200, axis=0)
    images = classifier.shift_zoom_or_cut_out(images, np.random.default_rng(0), share)
    assert images.shape == (200, 32, 32, 3)
    grey = (images == 128).all(axis=-1)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    shifts = [(padded[y : y + 32, x : x + 32], (y, x)) for y in range(5) for x in range(5)]
    found = [
        [shift for whole, shift in shifts if (whole[~hole] == shifted[~hole]).all()]
        for shifted, hole in zip(images, grey, strict=True)
    ]
    cut_out = np.array([bool(matches) for matches in found])
    assert abs((~cut_out).mean() - share) < 0.1
    assert len({matches[0] for matches in found if matches}) > 15
    for hole in grey[cut_out]:  # a square of 8 pixels
        assert hole.sum() == 64
        assert hole.any(axis=0).sum() == hole.any(axis=1).sum() == 8
    assert not grey[~cut_out].any()
    inside = images[~cut_out, 8:24, 8:24, :2].astype(float)
    slopes = np.gradient(inside[..., 0], axis=1).mean(axis=(1, 2)) / 4
    assert 0.74 < min(slopes) < 0.8
    assert 0.95 < max(slopes) < 1.01


@pytest.fixture(scope="module")
def classified(trained, tmp_path_factory):
    """A classifier of the photographs, beside the short training of a denoiser."""
    out = shutil.copytree(trained.out, tmp_path_factory.mktemp("classified") / "out")
    return run_of(classifier, out, *TRAIN)


@pytest.fixture
def copied(classified, tmp_path):
    return shutil.copytree(classified.out, tmp_path / "out")


def evaluation_of(out, name=CLASSIFIER):
    return util.read_record(out, name)["evaluation"]["photos, 16 images"]


def test_run_prints_and_writes_its_results(classified):
    lines = table_rows(classified.printed)
    assert classified.printed.count("most confused") == 3
    record = util.read_record(classified.out, CLASSIFIER)
    shown = {(row["sigma"], row["images"]): row["accuracy"] for row in evaluation_of(classified.out)}
    assert len(shown) == 11
    assert f"clean: {shown[0, 'clean']:.2f} (" in classified.printed
    assert f" {shown[50, NAME]:.2f} (" in lines[3]
    assert shown[0, "clean"] > 60
    rows = rows_of(classified.out / f"logs/{CLASSIFIER}.csv")
    assert [(row["round"], row["epoch"]) for row in rows] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    assert [row["round"] for row in record["best"]] == [1, 2]
    best = [min(row["val_loss"] for row in part) for part in (rows[:2], rows[2:])]
    assert [row["val_loss"] for row in record["best"]] == best


def test_figures_show_what_was_measured(classified):
    shown = {(row["sigma"], row["images"]): row["accuracy"] for row in evaluation_of(classified.out)}
    kinds = ("clean_confusion", "noisy_confusion", "denoised_confusion", "sigma", "history")
    assert set(classified.figures) == {f"{CLASSIFIER}_{kind}.png" for kind in kinds}
    ((_, _, curves),) = curves_of(classified.figures[f"{CLASSIFIER}_sigma.png"])
    assert curves[0] == ([15, 75], 2 * [shown[0, "clean"]])
    for kind, curve in zip(("noisy", NAME), curves[1:], strict=True):
        assert curve == ([15, 25, 35, 50, 75], [shown[sigma, kind] for sigma in (15, 25, 35, 50, 75)])
    assert legend_of(classified.figures[f"{CLASSIFIER}_sigma.png"]) == ["clean", "noisy", NAME]
    rows = rows_of(classified.out / f"logs/{CLASSIFIER}.csv")
    for _, name, (_, validation) in curves_of(classified.figures[f"{CLASSIFIER}_history.png"]):
        assert validation == ([1, 2, 3, 4], [row[f"val_{name}"] for row in rows])


def test_saved_classifier_needs_keras_alone(classified, photographs, predicted_by_keras_alone):
    images = util.to_float(photographs.images["test"])
    probabilities = predicted_by_keras_alone(classified.out, CLASSIFIER, images)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    right = np.mean(probabilities.argmax(axis=1) == photographs.labels["test"])
    assert 100 * right == pytest.approx(evaluation_of(classified.out)[0]["accuracy"])


def test_evaluate_gives_the_same_again(classified, copied):
    evaluate = ["evaluate", "--dataset=photos", "--out", copied]
    before = evaluation_of(copied)
    assert table_rows(printed_by(classifier, *evaluate)) == table_rows(classified.printed)
    assert evaluation_of(copied) == before


def test_training_that_is_interrupted_everywhere_resumes_to_the_same_weights(classified, tmp_path):
    command = TRAIN
    for reached in ("Epoch 2/2", "Epoch 1/2", "Accuracy in %"):  # of round one, of round two, of the end
        told = stop_at(reached, classifier, *command, "--out", tmp_path)
        assert told.endswith(f"classifier.py --resume --name {CLASSIFIER} --out {tmp_path}")
        assert not (tmp_path / f"models/{CLASSIFIER}.json").exists()
        command = ["--resume", f"--name={CLASSIFIER}"]
    printed_by(classifier, *command, "--out", tmp_path)
    assert_same_weights(tmp_path, classified.out, CLASSIFIER, part=None)


def test_training_goes_on_from_a_saved_classifier(copied):
    arguments = [*SHORT, "--epochs=1", "--rounds=1", f"--start={CLASSIFIER}", "--out", copied]
    printed_by(classifier, *arguments, "--name=classifier_again", "--learning-rate=1e-9")
    saved = [util.load_model(copied, name) for name in (CLASSIFIER, "classifier_again")]
    for before, after in zip(*(model.trainable_variables for model in saved), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-3)
    np.testing.assert_array_equal(*(model.get_layer("whitening").kernel for model in saved))


def test_what_does_not_fit_is_told(copied):
    evaluate = ["evaluate", "--dataset=photos", "--out", copied]
    record = copied / f"logs/{CLASSIFIER}.json"
    told = {
        "--denoisers=blur": f"autoencoder_blur.json: not found; there is {NAME}",
        "--name=classifier_cifar10": f"classifier_cifar10.json: not found; there is {CLASSIFIER}",
        "--size=32": f"{record}: classifies (24, 24, 3), not (32, 32, 3); choose another --size",
    }
    for argument, expected in told.items():
        assert told_line(printed_by, classifier, *evaluate, argument).endswith(expected)
    record.unlink()
    line = told_line(printed_by, classifier, *evaluate)
    assert line == f"{record}: missing, or of other classes than photos; choose another --name"


def test_names_of_runs_of_another_kind_are_refused(copied):
    for script, name in ((classifier, NAME), (simple_autoencoder, CLASSIFIER)):
        line = told_line(printed_by, script, *TRAIN[:1], f"--name={name}", "--out", copied)
        assert line == f"{copied}/logs/{name}.json: of a run of another kind; choose another --name"


def test_one_class_is_refused(tmp_path):
    line = told_line(printed_by, classifier, *TRAIN, "--limit=10", "--out", tmp_path)
    assert line.startswith("photos: its training images are all of one class; raise --limit")
    assert not list(tmp_path.rglob(f"*{CLASSIFIER}*"))


@pytest.mark.parametrize("argument", ["--epochs=2", "--rounds=0", "--widths=5", "--denoisers=a/b", "denoise"])
def test_wrong_usage_is_told(argument):
    assert "error: " in usage_error(classifier.parse_args, [argument])


def test_limit_above_the_labelled_images_is_told():
    images = {split: random_images(4, 8, 8, 3) for split in ("train", "unlabeled")}
    data = Data("stl10", images, {"train": np.arange(4), "unlabeled": np.full(4, -1)}, tuple("abcd"), {})
    check_labelled(data, "stl10", 4)
    with pytest.raises(DataError, match="stl10: --limit 9 is more than its 4 labelled images; lower it"):
        check_labelled(data, "stl10", 9)
