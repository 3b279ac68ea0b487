import json
import shutil

import KNN
import util
from load_data import Data, load_data

import numpy as np
import pytest
from conftest import run

# enough training images for both classes
ARGUMENTS = ["--dataset=photos", "--limit=800", "--clusters=3"]


def test_vote_takes_the_commonest_label_and_of_equals_the_lowest():
    neighbours = np.array([[2, 1, 1], [0, 2, 1], [2, 2, 0]])
    assert KNN.vote(neighbours, 3).tolist() == [1, 0, 2]


def test_k_is_the_one_that_classifies_best():
    # the nearest neighbour is wrong for all, the majority of three right
    neighbours = np.array([[0, 1, 1, 0, 0], [1, 0, 0, 1, 1]] * 4)
    labels = np.array([1, 0] * 4)
    assert KNN.choose_k(neighbours, labels) == 3
    assert KNN.choose_k(neighbours[:, :2], labels) == 1


def test_purity_by_hand():
    labels, clusters = np.array([0, 0, 1, 1, 2, 2]), np.array([5, 5, 5, 7, 7, 7])
    assert KNN.purity(labels, clusters) == pytest.approx(4 / 6)


def test_cluster_row_without_labels():
    row = KNN.cluster_row("PCA", np.full(4, -1), np.array([0, 1, 1, 1]))
    assert (row["smallest"], row["largest"], row["purity"]) == (1, 3, "no labels")


@pytest.fixture(scope="module")
def encoders(trained, tmp_path_factory):
    """Output folder with the run simple_photos, of this file's own."""
    return shutil.copytree(trained[0], tmp_path_factory.mktemp("compared") / "out")


@pytest.fixture(scope="module")
def compared(encoders):
    out = encoders
    code, printed, err = run("KNN.py", *ARGUMENTS, "--out", out, cwd=out)
    assert code == 0, err
    return out, printed


def test_neighbours_against_brute_force(compared):
    out, _ = compared
    data = load_data("photos", limit=800)
    rows = json.loads((out / "logs/knn_photos.json").read_text())["accuracy"]
    row = next(row for row in rows if row["space"] == "pixels" and "NN" in row["method"])
    k = int(row["method"].split("-")[0])
    flat = {split: images.reshape(len(images), -1) / 255 for split, images in data.images.items()}
    noise = np.random.default_rng(0).normal(0, 25 / 255, data.images["test"].shape)
    for kind, queries in (
        ("clean", flat["test"]),
        ("noisy 25", flat["test"] + noise.reshape(len(flat["test"]), -1)),
    ):
        right = 0
        for query, label in zip(queries, data.labels["test"], strict=True):
            nearest = np.argsort(((flat["train"] - query) ** 2).sum(axis=1), kind="stable")[:k]
            right += np.bincount(data.labels["train"][nearest]).argmax() == label
        assert row[kind] == pytest.approx(100 * right / len(flat["test"]))


def test_what_is_printed_and_written(compared):
    out, printed = compared
    assert "| clean | noisy 25 | denoised 25 | noisy 50 | denoised 50 |" in printed
    for space in ("pixels", "PCA", "simple_photos"):
        assert sum(f" {space} |" in line for line in printed.splitlines()) >= 2
    for kind in ("accuracy", "neighbours", "clusters"):
        assert (out / f"figures/knn_photos_{kind}.png").stat().st_size > 10_000
    centroids = np.load(out / "models/kmeans_knn_photos_simple_photos_centroids.npy")
    labels = np.load(out / "models/kmeans_knn_photos_simple_photos_labels.npy")
    assert centroids.shape == (3, 4 * 4 * 48)
    assert labels.shape == (800,)
    images = load_data("photos", limit=800).images["train"]
    features = util.feature_maps(out, "simple_photos", "train", images, labels, pooling=4)
    points = features.reshape(800, -1).astype(np.float32)
    distances = ((points[:, None] - centroids) ** 2).sum(axis=-1)
    np.testing.assert_array_equal(distances.argmin(axis=1), labels)


def test_second_run_uses_the_feature_maps_and_gives_the_same(compared):
    out, printed = compared
    files = {path: path.stat().st_mtime_ns for path in out.glob("feature_maps/*_pool4.h5")}
    assert len(files) == 7  # train, validation, and five kinds of query
    code, again, err = run("KNN.py", *ARGUMENTS, "--out", out, cwd=out)
    assert code == 0, err
    assert [line for line in again.splitlines() if line.startswith("|")] == [
        line for line in printed.splitlines() if line.startswith("|")
    ]
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_missing_encoder_and_too_many_clusters_are_told(compared):
    out, _ = compared
    code, _, err = run("KNN.py", "--dataset=photos", "--encoders", "simple_stl10", "--out", out)
    assert code == 1
    assert err == f"{out}/models/autoencoder_simple_stl10.json: not found; there is simple_photos"
    code, _, err = run("KNN.py", "--dataset=photos", "--limit=5", "--clusters=6", "--out", out)
    assert code == 1
    assert err == "photos: fewer training images than --clusters 6; lower it"
    code, _, err = run("KNN.py", "--dataset=photos", "--limit=20", "--out", out)
    assert code == 1
    assert err.startswith("photos: its training images are all of one class; raise --limit")


def test_unlabelled_images_are_clustered_from_their_file(encoders, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    counts = {"train": 60, "validation": 10, "test": 12, "unlabeled": 40}
    images = {split: rng.integers(0, 256, (count, 24, 24, 3), np.uint8) for split, count in counts.items()}
    labels = {split: np.arange(count) % 10 for split, count in counts.items()}
    labels["unlabeled"] = np.full(40, -1)
    np.save(tmp_path / "unlabeled.npy", images["unlabeled"])
    images["unlabeled"] = np.load(tmp_path / "unlabeled.npy", mmap_mode="r")
    data = Data("stl10", images, labels, tuple("abcdefghij"), {})
    monkeypatch.setattr(KNN, "load_data", lambda *_: data)
    KNN.main(
        [
            "--dataset=stl10",
            "--encoders",
            "simple_photos",
            "--clusters=4",
            "--name=k",
            "--out",
            str(encoders),
        ]
    )
    printed = capsys.readouterr().out
    assert sum("no labels" in line for line in printed.splitlines()) == 2
    assert np.load(encoders / "models/kmeans_k_simple_photos_labels.npy").shape == (40,)


def test_svm_separates_what_a_line_separates():
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 2
    points = (rng.normal(0, 1, (300, 5)) + 50 * labels[:, None] + [1000, 0, 0, 0, 0]).astype(np.float32)
    svm = KNN.fit_svm(points.copy(), labels, seed=0)
    assert (svm.predict(points.copy()) == labels).all()
