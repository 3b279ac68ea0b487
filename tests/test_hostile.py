import argparse
import contextlib
import os
import subprocess
import sys
from pathlib import Path

import classifier
import KNN
import load_data
import util

import keras
import numpy as np
from conftest import (
    NAME,
    ROOT,
    files_of,
    printed_by,
    random_images,
    told_line,
)
from keras import layers
from PIL import Image


def pictures_in(folder, count=10, side=64, seed=0):
    folder.mkdir(parents=True)
    for index in range(count):
        path = folder / f"{index}.png"
        Image.fromarray(random_images(side, side, 3, seed=seed + index)).save(path, compress_level=0)
        os.utime(path, (0, 0))
    return folder


def test_picture_that_cannot_be_opened_is_not_left_out(tmp_path, monkeypatch):
    folder = pictures_in(tmp_path / "mine", count=1)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    line = told_line(load_data.load_data, folder, tmp_path, 24)
    assert line == f"[Errno 13] Permission denied: '{folder}/0.png'"


def test_names_with_dollars_or_of_no_unicode_are_drawn(tmp_path):
    odd = [b"a$^$b", b"\\frac{", b"\xff\xfe"]
    for name in odd:
        pictures_in(tmp_path / "mine" / os.fsdecode(name), count=1, side=200)
    data = load_data.load_data(tmp_path / "mine", tmp_path, 24)
    assert data.class_names == ("\\frac{", "a$^$b", "\\xff\\xfe")
    labels = np.arange(3)
    drawn = classifier.confusion_figure(labels, labels, data.class_names, "a$^$b")
    util.save_figure(drawn, tmp_path / "confusion.png")
    drawn = KNN.clusters_figure(data, {"a$^$b": np.zeros((100, 2), int)})
    assert len(drawn.axes) == 2 * KNN.SHOWN_CLUSTERS
    util.save_figure(drawn, tmp_path / "clusters.png")


def test_folders_with_long_names_give_runs_that_can_be_resumed():
    name = load_data.dataset_name("/some/" + "n" * 250)
    assert util.run_name(f"classifier_{name}").endswith("nnn")


def test_resumed_run_says_that_its_pictures_have_changed(tmp_path, capsys):
    args = argparse.Namespace(out=tmp_path, name="run", resume=False, seed=0, precision="float32")
    for data in ({"listing": "a"}, {"listing": "b"}, {"listing": "b"}):
        with contextlib.suppress(KeyboardInterrupt), util.training("script.py", args, data):
            raise KeyboardInterrupt
        args.resume = True
    assert capsys.readouterr().out.count("The pictures have changed") == 1


def test_record_of_a_training_is_not_replaced_by_neighbours(trained_copy):
    before = files_of(trained_copy)
    arguments = ["--dataset=photos", "--encoders", NAME, "--name", NAME, "--out", trained_copy]
    line = told_line(printed_by, KNN, *arguments)
    assert line == f"{NAME}: the name of a trained model; choose another --name"
    assert files_of(trained_copy) == before


def test_class_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    for name in "ab":
        pictures_in(tmp_path / "mine" / name, count=1)
    listed = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert load_data.image_files(tmp_path / "mine") == [tmp_path / "mine/a/0.png"]
    assert capsys.readouterr().out == f"[Errno 13] Permission denied: '{tmp_path}/mine/b'\n"


def of(shape, *layers_of_it):
    x = inputs = keras.Input(shape)
    for layer in layers_of_it:
        x = layer(x)
    return keras.Model(inputs, x)


def same(channels=3):
    return layers.Conv2D(channels, 3, padding="same")


def test_results_that_are_not_finite_are_refused():
    model = of((None, None, 3), same())
    model.set_weights([np.full_like(weight, np.inf) for weight in model.get_weights()])
    assert told_line(util.denoise_picture, model, random_images(24, 30, 3)).startswith(
        "the result is not finite; restore"
    )


def test_backend_that_is_not_there():
    command = [sys.executable, ROOT / "KNN.py", "--help"]
    ended = subprocess.run(
        command, env=os.environ | {"KERAS_BACKEND": "none"}, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert ended.stderr.endswith("; see requirements.txt and KERAS_BACKEND\n")
    assert "Traceback" not in ended.stderr
