import argparse
import contextlib
import io
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zlib

import classifier
import KNN
import load_data
import simple_autoencoder as simple
import util

import keras
import numpy as np
import pytest
import tifffile
from conftest import (
    NAME,
    ROOT,
    TINY,
    files_of,
    printed_by,
    random_images,
    stop_at,
    told_line,
    usage_error,
)
from keras import layers
from PIL import Image

COLOURS = random_images(24, 30, 3)
DEEP = COLOURS.astype(np.uint16) * 257
OME = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"/></OME>'


def png(path, bits, rows, name, content, sides=(30, 24)):
    """Write a coloured PNG with one more chunk."""

    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", *sides, bits, 2, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = chunk(b"IHDR", header) + chunk(name, content) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def grey_of_12_bits(path):
    """Write a TIFF of 12 bits a pixel."""
    values = [(256, 2), (257, 2), (258, 12), (259, 1), (262, 1), (273, 110), (277, 1), (279, 6)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values)
    path.write_bytes(b"II*\0\x08\0\0\0" + struct.pack("<H", len(values)) + entries + bytes(4) + bytes(6))


def denoise(trained, *sources, to):
    """Call the verb `denoise`; what went wrong, line by line."""
    command = ["denoise", *sources, "--to", to, "--out", trained.out, f"--name={NAME}"]
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            printed_by(simple, *command)
    except OSError as error:
        return [*err.getvalue().splitlines(), util.error_line(error)]
    return []


def test_rare_pictures_are_refused_by_name_and_start_nothing(trained, tmp_path, monkeypatch):
    source, target, started = tmp_path / "in", tmp_path / "out", tmp_path / "started"
    source.mkdir()
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (source / "eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    for kind in ("bmp", "gif", "ico", "tga", "ppm"):
        Image.fromarray(COLOURS).save(source / f"a.{kind}")
    grey_of_12_bits(source / "12 bits.tif")
    tifffile.imwrite(source / "white is zero.tif", DEEP[..., 0], photometric="miniswhite")
    tifffile.imwrite(source / "signed.tif", DEEP[..., 0].astype(np.int16), photometric="minisblack")
    tifffile.imwrite(source / "lab.tif", COLOURS, photometric="cielab")
    tifffile.imwrite(source / "volume.tif", np.stack([DEEP, DEEP]), photometric="rgb", volumetric=True)
    tifffile.imwrite(source / "microscope.tif", DEEP, photometric="rgb", description=OME, metadata=None)
    png(source / "transparent.png", 16, DEEP.astype(">u2"), b"tRNS", DEEP[0, 0].astype(">u2").tobytes())
    png(source / "linear.png", 8, COLOURS, b"gAMA", struct.pack(">I", 100_000))
    png(source / "bomb.png", 8, COLOURS, b"tIME", bytes(7), sides=(60_000, 60_000))
    rare = sorted(source.iterdir())
    Image.fromarray(COLOURS).save(source / "z.png")
    *told, _ = denoise(trained, *rare, source / "z.png", to=target)
    assert [line.split(": not a readable image (")[0] for line in told] == [str(path) for path in rare]
    assert all(line.endswith("; convert it to plain PNG") for line in told)
    assert [path.name for path in target.iterdir()] == ["z.png"]
    assert not started.exists()


def test_picture_that_fails_for_any_reason_does_not_stop_the_others(trained, tmp_path, monkeypatch):
    for name in ("a.jpg", "c.webp"):
        Image.fromarray(np.zeros((1, 66_000), np.uint8)).save(tmp_path / name, "PNG")
    Image.fromarray(COLOURS).save(tmp_path / "d.png")
    Image.fromarray(COLOURS).save(tmp_path / "e.png")
    os.mkfifo(tmp_path / "b.png")
    denoise_picture = util.denoise_picture

    def without_memory(model, pixels, *options, **named):
        if pixels.shape == COLOURS.shape and not list((tmp_path / "out").iterdir()):
            (tmp_path / "out/other").touch()
            np.empty(2**47)
        return denoise_picture(model, pixels, *options, **named)

    monkeypatch.setattr(util, "denoise_picture", without_memory)
    sources = [tmp_path / name for name in ("a.jpg", "b.png", "c.webp", "d.png", "e.png")]
    *told, _ = denoise(trained, *sources, to=tmp_path / "out")
    assert told[0].startswith(f"{tmp_path}/out/a.jpg: JPEG cannot hold it (")
    assert told[1].startswith(f"{tmp_path}/b.png: no such file, or none of the regular kind")
    assert told[2].startswith(f"{tmp_path}/out/c.webp: WEBP cannot hold it (")
    assert told[3].startswith(f"{tmp_path}/d.png: Unable to allocate")
    assert len(told) == 4 and (tmp_path / "out/e.png").exists()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", " of 16 bits.png", " of 16 bits.tif"])
def test_resolution_and_texts_stay(tmp_path, suffix):
    first, second = (tmp_path / f"{name}{suffix}" for name in "ab")
    if "bits.tif" in suffix:
        tags = [(315, "s", 0, "An artist", True)]
        options = {"resolution": (300, 300), "resolutionunit": "INCH", "extratags": tags, "metadata": None}
        tifffile.imwrite(first, DEEP, photometric="rgb", **options)
    elif "bits" in suffix:
        png(first, 16, DEEP.astype(">u2"), b"pHYs", struct.pack(">IIB", 11811, 11811, 1))
    else:
        tags = {"tiffinfo": {315: "An artist"}} if suffix == ".tif" else {}
        Image.fromarray(COLOURS).save(first, dpi=(300, 300), **tags)
    load_data.write_pixels(second, *load_data.read_pixels(first))
    with Image.open(second) as image:
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.01)
        assert not suffix.endswith(".tif") or image.getexif()[315] == "An artist"


def test_bigtiff_becomes_a_png(tmp_path):
    tags = [(315, "s", 0, "An artist", True)]
    tifffile.imwrite(tmp_path / "a.tif", COLOURS, bigtiff=True, photometric="rgb", extratags=tags)
    load_data.write_pixels(tmp_path / "a.png", *load_data.read_pixels(tmp_path / "a.tif"))
    with Image.open(tmp_path / "a.png") as image:
        assert (np.asarray(image) == COLOURS).all()
        assert image.getexif()[315] == "An artist"


def test_pictures_of_telephones_are_read_without_a_warning(tmp_path, recwarn):
    Image.new("1", (14_000, 13_800), 1).save(tmp_path / "a.png")
    assert load_data.read_pixels(tmp_path / "a.png")[0].shape == (13_800, 14_000, 1)
    assert not recwarn


def test_picture_that_another_process_has_written_meanwhile_stays(trained, tmp_path, monkeypatch):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    (tmp_path / "out").mkdir()
    denoise_picture = util.denoise_picture

    def outrun(*arguments, **named):
        (tmp_path / "out/a.png").write_text("mine")
        return denoise_picture(*arguments, **named)

    monkeypatch.setattr(util, "denoise_picture", outrun)
    (told,) = denoise(trained, tmp_path / "a.png", to=tmp_path / "out")
    assert told.endswith("a.png: is there already; choose another --to, or --force")
    assert (tmp_path / "out/a.png").read_text() == "mine"


def pictures_in(folder, count=10, side=64, seed=0):
    folder.mkdir(parents=True)
    for index in range(count):
        path = folder / f"{index}.png"
        Image.fromarray(random_images(side, side, 3, seed=seed + index)).save(path, compress_level=0)
        os.utime(path, (0, 0))
    return folder


def test_folders_of_one_name_size_and_time_do_not_share_a_cache(tmp_path):
    data = [load_data.load_data(pictures_in(tmp_path / f"{n}/mine", seed=n), tmp_path, 24) for n in (0, 50)]
    assert (data[0].images["test"] != data[1].images["test"]).any()


def test_picture_that_cannot_be_opened_now_is_not_left_out_for_ever(tmp_path, monkeypatch):
    folder, opened = pictures_in(tmp_path / "mine"), Image.open

    def refuse(path, **options):
        if path.name == "3.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", refuse)
        line = told_line(load_data.load_data, folder, tmp_path, 24)
    assert line == f"[Errno 13] Permission denied: '{folder}/3.png'"
    whole = load_data.load_data(shutil.copytree(folder, tmp_path / "copy"), tmp_path, 24)
    assert len(load_data.load_data(folder, tmp_path, 24).images["train"]) == len(whole.images["train"])


def test_patches_of_a_folder_are_not_all_in_memory(tmp_path):
    folder = pictures_in(tmp_path / "mine", side=500)
    tracemalloc.start()
    data = load_data.load_data(folder, tmp_path, 96)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < data.images["train"].nbytes / 2


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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dataset", ""], "--dataset"),
        (["--out", ""], "--out"),
        (["evaluate", "--out", "mistyped"], "--out"),
        (["denoise", "", "--to", "a"], "IN"),
        (["denoise", "a.png", "--to", ""], "--to"),
        (["--name", "n" * 101], "--name"),
        (["--name", "noisy"], "--name"),  # a column of the tables
        (["--name", "encoder_mine"], "--name"),  # whose files would be those of the run `mine`
        (["--epochs", str(10**21)], "--epochs"),
        (["--filters", str(10**21)], "--filters"),
    ],
)
def test_arguments_that_no_work_can_use(arguments, told):
    assert f"argument {told}: " in usage_error(simple.parse_args, arguments)


def test_run_is_resumed_by_its_own_script_and_arguments(tmp_path):
    stop_at("Epoch 2/2", simple, *TINY, "--epochs=2", "--out", tmp_path)
    before, resume = files_of(tmp_path), ["--resume", f"--name={NAME}", "--out", str(tmp_path)]
    line = told_line(classifier.parse_args, resume)
    assert line.startswith(f"--resume: {NAME} is a run of simple_autoencoder.py, or of an older one")
    for option in ("--size=32", "--seed=5", "--limit=32", "--batch-size=8", "--filters=16", "--kl-weight=1"):
        line = told_line(simple.parse_args, [*resume, option])
        assert line.startswith(f"{option.split('=')[0]}: the interrupted run has ")
        assert line.endswith("; --resume takes other epochs and another --learning-rate only")
    assert simple.parse_args([*TINY, *resume]).filters == 12  # what it has may be said again
    changed = simple.parse_args([*resume, "--epochs=3", "--detail-epochs=2", "--learning-rate=1e-4"])
    assert (changed.epochs, changed.detail_epochs, changed.learning_rate) == (3, 2, 1e-4)
    assert files_of(tmp_path) == before


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
    assert capsys.readouterr().out == f"{tmp_path}/mine/b: left out (Permission denied)\n"


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
    assert told_line(util.denoise_picture, model, COLOURS).startswith("the result is not finite; restore")


def test_denoise_ends_without_a_word_when_nobody_reads(trained, tmp_path):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    command = [
        "denoise",
        tmp_path / "a.png",
        "--to",
        tmp_path / "out",
        "--out",
        trained.out,
        f"--name={NAME}",
    ]
    with pytest.raises(BrokenPipeError):
        printed_by(simple, *command, output=Closed())


def test_backend_that_is_not_there():
    command = [sys.executable, ROOT / "KNN.py", "--help"]
    ended = subprocess.run(
        command, env=os.environ | {"KERAS_BACKEND": "none"}, capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert ended.stderr.endswith("; see requirements.txt and KERAS_BACKEND\n")
    assert "Traceback" not in ended.stderr


def test_scripts_without_docstrings(monkeypatch):
    monkeypatch.setattr(KNN, "__doc__", None)
    assert KNN.parse_args([]).name == "knn_cifar10"
    assert simple.parse_args([], description=None).name == "simple_cifar10"
