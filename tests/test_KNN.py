import re
import shutil
from argparse import Namespace

import KNN
import util
from load_data import Data

import h5py
import keras
import numpy as np
import pytest
from conftest import (
    NAME,
    files_of,
    labels_of,
    largest_file,
    legend_of,
    pixels_of,
    printed_by,
    random_images,
    run_of,
    told_line,
)

ARGUMENTS = ["--dataset=photos", "--size=24", "--clusters=3"]


def test_vote_takes_the_commonest_label_and_of_equals_the_lowest():
    neighbours = np.array([[2, 1, 1], [0, 2, 1], [2, 2, 0]])
    assert KNN.vote(neighbours).tolist() == [1, 0, 2]


def test_k_is_the_one_that_classifies_best():
    # the nearest neighbour is wrong for all, the majority of three right
    neighbours = np.array([[0, 1, 1, 0, 0], [1, 0, 0, 1, 1]] * 4)
    labels = np.array([1, 0] * 4)
    assert KNN.choose_k(neighbours, labels) == 3
    assert KNN.choose_k(neighbours[:, :2], labels) == 1


def test_purity_by_hand_and_without_labels():
    labels, clusters = np.array([0, 0, 1, 1, 1, 2]), np.array([5, 5, 5, 7, 7, 7])
    assert KNN.purity(labels, clusters) == pytest.approx(4 / 6)
    row = KNN.cluster_row("PCA", np.full(4, -1), np.array([0, 1, 1, 1]))
    assert (row["smallest"], row["largest"], row["purity"]) == (1, 3, "no labels")


def test_clusters_are_no_more_than_there_are_different_points(capsys):
    images = random_images(2, 4, 4, 3)[[0, 1, 1, 0, 1]]
    data = Data("photos", {"train": images}, {"train": np.zeros(5)}, (), {})
    args = Namespace(clusters=3, seed=0)
    kmeans, _ = KNN.cluster(args, data, "pixels", lambda images, *_: KNN.flat(images))
    a, b = kmeans.labels_[:2]
    assert kmeans.labels_.tolist() == [a, b, b, a, b]
    assert sorted([a, b]) == [0, 1]
    assert capsys.readouterr().out.startswith("pixels: 2 clusters, since")


def test_pooling_against_plain_means():
    maps = np.random.default_rng(0).random((2, 5, 9, 3))
    pooled = KNN.pool(maps, 4)
    assert pooled.shape == (2, 4, 4, 3)
    np.testing.assert_allclose(pooled[:, 0, 0], maps[:, 0:1, 0:2].mean(axis=(1, 2)))
    np.testing.assert_allclose(pooled[:, 1, 3], maps[:, 1:2, 7:9].mean(axis=(1, 2)))
    np.testing.assert_allclose(KNN.pool(maps, 16), maps)  # there are no more cells than that


@pytest.fixture
def averaging(tmp_path):
    """Output folder with a run `small`, whose encoder's z_mean is the average of 2x2 pixels."""
    image = keras.Input((None, None, 3))
    average = keras.layers.Conv2D(3, 2, strides=2)
    z_mean = average(image)
    encoder = keras.Model(image, [z_mean, keras.layers.Conv2D(3, 1)(z_mean)])
    average.set_weights([np.full((2, 2, 1, 1), 0.25) * np.eye(3), np.zeros(3)])
    with util.publishing(tmp_path, "small") as draft:
        util.save_model(draft, encoder, "encoder_small")
        util.write_record(draft, "small", {})
    return tmp_path


def test_feature_maps_are_written_in_parts_and_used_again(averaging, monkeypatch):
    monkeypatch.setattr(util, "batch_size_for", lambda images: 2)
    images = random_images(5, 9, 8, 3)
    arguments = averaging, "small", "test", images, np.arange(5), 2
    maps = KNN.feature_maps(*arguments, sigma=25.0)
    averages = images[:, :8].reshape(5, 2, 4, 2, 4, 3).mean(axis=(2, 4)) / 255  # the odd row is cut off
    np.testing.assert_allclose(maps, averages, atol=1e-3)
    with h5py.File(averaging / "feature_maps/small_test_5_pool2.h5") as file:
        assert (file["features"].dtype, file["features"].chunks) == (np.float16, (5, 2, 2, 3))
        assert file["labels"][:].tolist() == [0, 1, 2, 3, 4]
        assert [file.attrs[key] for key in ("run", "pooling", "sigma")] == ["small", 2, 25.0]
    monkeypatch.setattr(util, "write_feature_maps", lambda *_: pytest.fail("made again"))
    np.testing.assert_array_equal(KNN.feature_maps(*arguments, sigma=25.0), maps)


@pytest.mark.parametrize("other", ["images", "weights", "bytes", "empty"])
def test_feature_maps_of_something_else_are_not_taken(averaging, other):
    arguments = averaging, "small", "test", random_images(6, 8, 8, 3), np.arange(6)
    path = averaging / "feature_maps/small_test_6_pool0.h5"
    expected = KNN.feature_maps(*arguments)
    whole = path.read_bytes()
    if other == "images":  # same name, same shape
        KNN.feature_maps(*arguments[:3], random_images(6, 8, 8, 3, seed=1), np.arange(6))
    elif other == "weights":
        with h5py.File(path, "a") as file:
            file.attrs["weights"] = "0" * 64
            file["features"][:] = 0
    elif other == "bytes":
        place = whole.find(expected[0, 0].tobytes())
        path.write_bytes(whole[:place] + b"x" + whole[place + 1 :])
    else:
        path.write_bytes(b"")
    np.testing.assert_array_equal(KNN.feature_maps(*arguments), expected)


def test_full_disk_leaves_the_feature_maps_of_before(averaging):
    images = random_images(100, 32, 32, 3)
    KNN.feature_maps(averaging, "small", "test", images, np.arange(100))
    before = files_of(averaging)
    path = averaging / "feature_maps/small_test_100_pool0.h5"
    with largest_file(path.stat().st_size - 1):
        arguments = averaging, "small", "test", 255 - images, np.arange(100)
        assert "File too large; free some space" in told_line(KNN.feature_maps, *arguments)
    assert files_of(averaging) == before


@pytest.fixture(scope="module")
def compared(trained, tmp_path_factory):
    """A comparison on the photographs, with the encoder of the short training."""
    out = shutil.copytree(trained.out, tmp_path_factory.mktemp("compared") / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KNN, "SHOWN_QUERIES", 3)
        patch.setattr(KNN, "SHOWN_OF_A_CLUSTER", 4)
        return run_of(KNN, out, *ARGUMENTS)


def rows_of(compared):
    return util.read_record(compared.out, "knn_photos")["accuracy"]


def test_neighbours_against_brute_force(compared, photographs):
    (row,) = (row for row in rows_of(compared) if row["space"] == "pixels" and "NN" in row["method"])
    k = int(row["method"].split("-")[0])
    flat = {split: images.reshape(len(images), -1) / 255 for split, images in photographs.images.items()}
    noise = np.random.default_rng(0).normal(0, 25 / 255, photographs.images["test"].shape)
    queries = {"clean": flat["test"], "noisy 25": flat["test"] + noise.reshape(len(flat["test"]), -1)}
    for kind, points in queries.items():
        right = 0
        for query, label in zip(points, photographs.labels["test"], strict=True):
            nearest = np.argsort(((flat["train"] - query) ** 2).sum(axis=1), kind="stable")[:k]
            right += np.bincount(photographs.labels["train"][nearest]).argmax() == label
        assert row[kind] == pytest.approx(100 * right / len(flat["test"]))


def test_clusters_are_those_of_the_feature_maps(compared, photographs):
    train = photographs.images["train"]
    kept = [compared.out / f"models/kmeans_knn_photos_{NAME}_{kind}.npy" for kind in ("centroids", "labels")]
    centroids, labels = map(np.load, kept)
    with h5py.File(compared.out / f"feature_maps/{NAME}_train_{len(train)}_pool4.h5") as file:
        points = file["features"][:].reshape(len(train), -1).astype(np.float32)
    distances = ((points[:, None] - centroids) ** 2).sum(axis=-1)
    np.testing.assert_array_equal(distances.argmin(axis=1), labels)
    assert centroids.shape == (3, 4 * 4 * 12)
    figure = compared.figures["knn_photos_clusters.png"]
    assert [label for label, _ in labels_of(figure)[::4]] == [f"{NAME}\ncluster {n}" for n in range(3)]
    nearest = distances.argsort(axis=0, kind="stable")[:4].T.ravel()
    np.testing.assert_array_equal(pixels_of(figure), train[nearest])


def test_accuracies_are_shown_as_bars_for_every_space_and_kind(compared):
    figure, rows = compared.figures["knn_photos_accuracy.png"], rows_of(compared)
    kinds = ["clean", "noisy 25", "denoised 25", "noisy 50", "denoised 50"]
    assert legend_of(figure) == kinds
    for axis, panel in zip(figure.axes, (rows[::2], rows[1::2]), strict=True):
        heights = [[bar.get_height() for bar in bars] for bars in axis.containers]
        assert heights == [[row[kind] for row in panel] for kind in kinds]


def test_nearest_images_are_shown_below_their_queries(compared, photographs):
    figure = compared.figures["knn_photos_neighbours.png"]
    labels, shown = labels_of(figure), pixels_of(figure)
    noisy = np.random.default_rng(0).normal(photographs.images["test"] / 255, 50 / 255)
    queries = KNN.evenly(len(noisy), 3)
    distances = ((photographs.images["train"] / 255 - noisy[queries, None]) ** 2).sum(axis=(2, 3, 4))
    for column, nearest in enumerate(distances.argmin(axis=1)):
        np.testing.assert_array_equal(shown[column], photographs.images["test"][queries[column]])
        np.testing.assert_array_equal(shown[9 + column], photographs.images["train"][nearest])
        assert labels[9 + column][1] == photographs.class_names[photographs.labels["train"][nearest]]


def test_second_run_uses_the_feature_maps_and_gives_the_same(compared, tmp_path):
    out = shutil.copytree(compared.out, tmp_path / "out")
    files = {path: path.stat().st_mtime_ns for path in out.glob("feature_maps/*_pool4.h5")}
    assert len(files) == 7  # train, validation, and five kinds of query
    again = printed_by(KNN, *ARGUMENTS, "--out", out)
    tables = [re.findall(r"^\|.*", printed, re.MULTILINE) for printed in (again, compared.printed)]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 12
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_encoder_that_is_not_saved_is_told(compared):
    arguments = [*ARGUMENTS, "--encoders", "simple_stl10", NAME, "--out", compared.out]
    expected = f"encoder_simple_stl10.json: not found; there is {NAME}"
    assert told_line(printed_by, KNN, *arguments).endswith(expected)


def test_unlabelled_images_are_clustered_from_their_file(trained_copy, tmp_path, monkeypatch):
    counts = {"train": 60, "validation": 10, "test": 12, "unlabeled": 40}
    images = {split: random_images(count, 24, 24, 3) for split, count in counts.items()}
    labels = {split: np.arange(count) % 10 for split, count in counts.items()}
    labels["unlabeled"] = np.full(40, -1)
    np.save(tmp_path / "unlabeled.npy", images["unlabeled"])
    images["unlabeled"] = np.load(tmp_path / "unlabeled.npy", mmap_mode="r")
    monkeypatch.setattr(KNN, "load_data", lambda *_: Data("stl10", images, labels, tuple("abcdefghij"), {}))
    monkeypatch.setattr(KNN, "SHOWN_OF_A_CLUSTER", 2)
    arguments = ["--dataset=stl10", f"--encoders={NAME}", "--clusters=4", "--name=k", "--out", trained_copy]
    printed = printed_by(KNN, *arguments)
    assert sum("no labels" in line for line in printed.splitlines()) == 2
    assert np.load(trained_copy / f"models/kmeans_k_{NAME}_labels.npy").shape == (40,)


def test_svm_separates_what_a_line_separates():
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 2
    points = (rng.normal(0, 1, (300, 5)) + 50 * labels[:, None] + [1000, 0, 0, 0, 0]).astype(np.float32)
    svm = KNN.fit_svm(points.copy(), labels, seed=0)
    assert (svm.predict(points.copy()) == labels).all()
