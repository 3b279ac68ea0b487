import hashlib
import itertools
import mmap
import os
import re
import sys

import load_data
import stl10_input
import util
from load_data import Batches, DataError, add_noise, read_picture
from stl10_input import IMAGE_BYTES

import imageio.v3 as iio
import keras
import numpy as np
import pytest
from conftest import (
    cifar_pickle,
    labels_of,
    pixels_of,
    random_images,
    start,
    stl10_files,
    told_line,
    usage_error,
    without_greeting,
)
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import ExifTags, Image, ImageCms, ImageOps, TiffImagePlugin

ON_NUMPY = {"KERAS_BACKEND": "numpy"}  # which starts fast

seeds = st.integers(0, 2**32 - 1)
sigmas = st.floats(0, 255)
sides = st.integers(1, 60)
pictures = arrays(np.uint8, array_shapes(min_dims=3, max_dims=3, max_side=12).map(lambda shape: (2, *shape)))


@given(pictures, sigmas, seeds)
def test_noise_is_that_of_its_seed_and_sigma(clean, sigma, seed):
    for rng, noise_seed in ((None, 0), (np.random.default_rng(seed), seed)):  # by default the protocol's
        noisy = add_noise(clean, sigma, rng)
        assert (noisy.dtype, noisy.shape) == (np.float32, clean.shape)
        expected = clean / 255 + np.random.default_rng(noise_seed).normal(0, sigma / 255, clean.shape)
        np.testing.assert_allclose(noisy, expected, atol=1e-5)


@given(pictures, st.lists(sigmas, min_size=2, max_size=2))
def test_noise_without_sigma_is_none_and_scales_with_it(clean, sigma):
    zero = add_noise(clean, 0)
    np.testing.assert_allclose(zero, clean / np.float32(255), atol=1e-6)
    noise, unit = add_noise(clean, sigma) - zero, add_noise(clean, 1) - zero
    np.testing.assert_allclose(noise, unit * np.reshape(sigma, (2, 1, 1, 1)), atol=1e-3)


def test_noise_is_not_clipped_and_sigma_not_negative():
    noisy = add_noise(np.zeros((20, 32, 32, 3), np.uint8), 50)
    assert 0.49 < (noisy < 0).mean() < 0.51
    with pytest.raises(ValueError, match="sigma must not be negative"):
        add_noise(np.zeros((1, 2, 2, 3), np.uint8), -1)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A small CIFAR-10 in `tmp_path`, of 6 x 20 images."""
    checksums = {}
    for index, name in enumerate(stl10_input.CIFAR10_FILE_MD5):
        content = cifar_pickle(random_images(20, 32, 32, 3, seed=index), [n % 10 for n in range(20)])
        checksums[name] = hashlib.md5(content).hexdigest()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(stl10_input, "CIFAR10_FILE_MD5", checksums)
    return tmp_path


def test_validation_split_is_fixed_and_disjoint(cifar10):
    data, again = (load_data.load_data("cifar10", cifar10) for _ in range(2))
    assert {split: len(images) for split, images in data.images.items()} == {
        "train": 90,
        "validation": 10,
        "test": 20,
    }
    np.testing.assert_array_equal(data.images["validation"], again.images["validation"])
    known = {image.tobytes() for image in data.images["train"]}
    assert not known & {image.tobytes() for image in data.images["validation"]}
    np.testing.assert_array_equal(data.images["test"], random_images(20, 32, 32, 3, seed=5))


def test_limit_takes_the_first_and_leaves_validation_alone(cifar10):
    data, limited = (load_data.load_data("cifar10", cifar10, limit=limit) for limit in (None, 7))
    np.testing.assert_array_equal(limited.images["train"], data.images["train"][:7])
    np.testing.assert_array_equal(limited.labels["train"], data.labels["train"][:7])
    np.testing.assert_array_equal(limited.images["validation"], data.images["validation"])
    with pytest.raises(DataError, match="--limit 91 is more than its 90 training images"):
        load_data.load_data("cifar10", cifar10, limit=91)


@pytest.fixture
def stl10(tmp_path):
    """A small STL-10 in `tmp_path`."""
    return stl10_files(tmp_path, train=30, test=12, unlabeled=25)


def test_stl10_labels_start_at_zero_and_unlabelled_has_none(stl10):
    data = load_data.load_data("stl10", stl10, size=96)
    assert {split: images.shape for split, images in data.images.items()} == {
        "train": (27, 96, 96, 3),
        "validation": (3, 96, 96, 3),
        "test": (12, 96, 96, 3),
        "unlabeled": (25, 96, 96, 3),
    }
    assert data.labels["test"].tolist() == [*range(10), 0, 1]
    assert set(data.labels["unlabeled"]) == {-1}
    assert data.denoiser_split == "unlabeled"


@pytest.mark.parametrize("size", [48, 50, 72])
def test_stl10_is_resized_once_into_a_cache_whose_name_tells_the_size(stl10, size, capsys):
    data = load_data.load_data("stl10", stl10, size=size)
    assert data.images["unlabeled"].shape == (25, size, size, 3)
    assert (stl10 / f"cache/stl10_unlabeled_{size}_v{load_data.RESIZED_VERSION}.npy").exists()
    assert "Resizing" in capsys.readouterr().out
    again = load_data.load_data("stl10", stl10, size=size)
    np.testing.assert_array_equal(again.images["test"], data.images["test"])
    assert "Resizing" not in capsys.readouterr().out


def test_stl10_refuses_other_sizes(stl10):
    with pytest.raises(DataError, match="--size 64 is not one of 48, 50, 72, 96"):
        load_data.load_data("stl10", stl10, size=64)


def test_stl10_labels_that_are_not_those_of_the_images(tmp_path):
    stl10_files(tmp_path, train=3, test=3, unlabeled=3, labels=2)
    line = told_line(load_data.main, ["--dataset=stl10", "--size=96", f"--data-dir={tmp_path}"])
    assert line == f"{tmp_path}/stl10_binary/train_y.bin: 2 labels of 3 images; delete it and run again"


def test_stl10_file_cut_amid_an_image(stl10):
    os.truncate(stl10 / "stl10_binary/test_X.bin", 2 * IMAGE_BYTES + 5)
    line = told_line(load_data.main, ["--dataset=stl10", "--size=96", f"--data-dir={stl10}"])
    assert line.startswith(f"{stl10}/stl10_binary/test_X.bin: 55,301 bytes is not a whole number of images")


def test_cache_of_another_version_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    iio.imwrite(tmp_path / "mine/a.png", random_images(40, 120, 3))
    arguments = str(tmp_path / "mine"), tmp_path / "data", 16
    expected = np.array(load_data.load_data(*arguments).images["train"])
    others = []
    for path in (tmp_path / "data/cache").iterdir():
        others.append(path.with_name(path.name.replace(f"_v{load_data.PATCHES_VERSION}", "_v999")))
        path.unlink()
        others[-1].write_bytes(b"of a later version")
    np.testing.assert_array_equal(load_data.load_data(*arguments).images["train"], expected)
    assert {path.read_bytes() for path in others} == {b"of a later version"}


def as_archive(path):
    with path.open("wb") as file:
        np.savez(file, random_images(3, 8, 8, 3))


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "no array": lambda path: path.write_bytes(b"no array"),
    "cut": lambda path: os.truncate(path, 300),
    "of another shape": lambda path: np.save(path, np.zeros((3, 9, 8, 3), np.uint8)),
    "of another type": lambda path: np.save(path, np.zeros((3, 8, 8, 3))),
    "an archive": as_archive,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_told(tmp_path, damage):
    cache, images = tmp_path / "cache.npy", random_images(3, 16, 16, 3)
    resized = load_data._cached_resize(images, 8, cache)
    np.testing.assert_array_equal(resized, load_data.resize(images, 8))
    del resized
    DAMAGES[damage](cache)
    line = told_line(load_data._cached_resize, images, 8, cache)
    assert line.startswith(f"{cache}: ")
    assert line.endswith("delete it and run again")


def test_resizing_is_antialiased():
    board = np.indices((96, 96)).sum(axis=0) % 2 * np.uint8(255)  # finer than 48x48 can show
    board = np.repeat(board[None, :, :, None], 3, axis=3).astype(np.uint8)
    resized = load_data.resize(board, 48)
    assert abs(resized[:, 4:-4, 4:-4].astype(int) - 127.5).max() < 2


@pytest.fixture
def folder_of_flat_pictures(tmp_path):
    """Sixty pictures of 96x96, each of one grey."""
    (tmp_path / "pictures").mkdir()
    for grey in range(60):
        iio.imwrite(tmp_path / "pictures" / f"{grey:02d}.png", np.full((96, 96, 3), grey, np.uint8))
    return tmp_path / "pictures"


def test_photos_need_no_download_and_share_no_pixel():
    data = load_data.load_data("photos", data_dir="/nonexistent")
    assert data.class_names == ("china", "flower")
    assert set(data.labels["test"]) == {0, 1}
    known = {patch.tobytes() for patch in data.images["train"]}
    assert not known & {patch.tobytes() for patch in data.images["test"]}


def test_the_first_held_out_patches_are_of_many_pictures(folder_of_flat_pictures, tmp_path):
    data = load_data.load_data(str(folder_of_flat_pictures), tmp_path / "data", size=16)
    for split in ("validation", "test"):
        assert len(np.unique(data.images[split][:12])) == 3  # of three pictures with 36 patches each


def test_what_is_shown_has_texture_and_is_of_many_pictures(folder_of_flat_pictures, tmp_path):
    for path in folder_of_flat_pictures.iterdir():
        picture = iio.imread(path)
        picture[:32, :32] = random_images(32, 32, 3) // 4 + picture[0, 0]
        iio.imwrite(path, picture)
    data = load_data.load_data(str(folder_of_flat_pictures), tmp_path / "data", size=16)
    shown = data.shown("test", 6)
    assert min(map(load_data.texture, shown)) > 10
    flat = data.images["test"][[load_data.texture(image) == 0 for image in data.images["test"]]]
    assert len(np.unique(flat)) == len(np.unique(shown[:3].min(axis=(1, 2, 3)))) == 3  # test pictures
    assert data.shown_picture.shape == (96, 96, 3)
    assert load_data.texture(data.shown_picture) > 0


def test_patches_of_different_splits_come_from_different_columns():
    columns = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (60, 200, 3))
    images, _ = load_data._patches_in_memory([columns], [0], 10)
    seen = {split: set(np.unique(patches)) for split, patches in images.items()}
    for one, other in itertools.combinations(seen.values(), 2):
        assert not one & other


def test_corners_are_those_of_all_whole_patches():
    picture = random_images(25, 33, 3)
    expected = [(top, left) for top in range(0, 18, 4) for left in range(0, 26, 4)]
    assert load_data.corners(picture, 8, 4) == expected
    assert load_data.corners(picture[:7], 8, 4) == []


def test_images_are_cut_to_whole_cells():
    images = random_images(2, 19, 22, 3)
    data = load_data.Data("odd", {"train": images, "test": images[:, :12]}, {}, (), {}).in_cells(4)
    np.testing.assert_array_equal(data.images["train"], images[:, :16, :20])
    np.testing.assert_array_equal(data.images["test"], images[:, :12, :20])


def test_patches_to_learn_from_are_cut_from_smaller_copies_too():
    blocks = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8).repeat(2, 0).repeat(2, 1)
    whole = {blocks[r : r + 16, c : c + 16].tobytes() for r in range(0, 81, 8) for c in range(0, 81, 8)}
    half = load_data.shrunk(blocks, 2)
    halves = {half[r : r + 16, c : c + 16].tobytes() for r in range(0, 33, 4) for c in range(0, 33, 4)}
    images, labels = load_data._patches_in_memory([blocks] * 10, range(10), 16)
    seen = {split: {patch.tobytes() for patch in patches} for split, patches in images.items()}
    assert whole < seen["train"] and halves < seen["train"]
    assert len(seen["train"]) == len(whole) + len(halves) + 5 * 5  # of a quarter: 24x24, 2 pixels apart
    apart = [(copy, step) for copy, step in ((blocks, 16), (half, 8), (load_data.shrunk(blocks, 4), 4))]
    assert len(seen["validation"]) == sum(len(load_data.corners(copy, 16, step)) for copy, step in apart)
    assert seen["validation"] < seen["train"]
    assert seen["test"] < whole
    assert np.bincount(labels["train"]).max() == len(seen["train"])


@given(sides, sides, st.integers(12, 20), st.integers(1, 80), st.sampled_from(load_data.PATCH_SPLITS), seeds)
def test_patches_are_as_many_as_there_are_places_or_wanted(height, width, size, at_most, split, seed):
    picture = random_images(height, width, 3, seed=seed)
    patches = np.array(load_data._patches_of(picture, size, split, at_most, np.random.default_rng(seed)))
    step = size // 2 if split == "train" else size
    places = len(load_data.corners(picture, size, step))
    assert min(places, at_most) <= len(patches) <= at_most
    if 0 < len(patches) == places:
        windows = np.lib.stride_tricks.sliding_window_view(picture, (size, size), axis=(0, 1))
        expected = windows[::step, ::step].transpose(0, 1, 3, 4, 2)
        np.testing.assert_array_equal(patches, expected.reshape(patches.shape))


@pytest.mark.parametrize(("count", "held_out"), [(10, 1), (20, 1), (21, 2), (100, 5)])
def test_a_twentieth_of_the_pictures_each_is_held_out(count, held_out):
    splits = load_data.split_pictures([0] * count).tolist()
    assert [splits.count(split) for split in ("validation", "test")] == [held_out, held_out]
    assert splits.count("train") == count - 2 * held_out


def test_a_class_is_split_alike_whatever_lies_beside_it():
    alone = load_data.split_pictures(["b"] * 40).tolist()
    assert load_data.split_pictures(["a"] * 10 + ["b"] * 40).tolist()[10:] == alone
    few = load_data.split_pictures(["a"] * 9 + ["b"] * 40).tolist()
    assert few == load_data.split_pictures([0] * 49).tolist()


def test_patches_of_a_picture_are_limited(monkeypatch):
    monkeypatch.setattr(load_data, "MAX_PATCHES", 300)
    images, _ = load_data._patches_in_memory(random_images(10, 96, 96, 3), [0] * 10, 16)
    assert len(images["train"]) == 8 * 30
    assert len({patch.tobytes() for patch in images["train"]}) == 8 * 30


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures in two subfolders."""
    for index in range(12):
        path = tmp_path / "pictures" / ("cats" if index % 2 else "dogs") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(path, random_images(64, 80, 3, seed=index))
    return tmp_path / "pictures"


def test_folder_is_split_by_picture_and_cached(folder, tmp_path, capsys):
    data = load_data.load_data(str(folder), tmp_path / "data", size=32)
    assert data.name == "pictures"
    assert data.class_names == ("cats", "dogs")
    assert {split: len(images) for split, images in data.images.items()} == {
        "train": 10 * (3 * 4 + 1 * 2),  # of the pictures, and of their halves
        "validation": 5,
        "test": 4,
    }
    corners = {iio.imread(path)[:32, :32].tobytes(): path.parent.name for path in folder.rglob("*.png")}
    held_out = zip(data.images["test"], data.labels["test"], strict=True)
    (known,) = [(patch.tobytes(), label) for patch, label in held_out if patch.tobytes() in corners]
    assert corners[known[0]] == data.class_names[known[1]]
    assert "Cutting" in capsys.readouterr().out
    load_data.load_data(str(folder), tmp_path / "data", size=32)
    assert "Cutting" not in capsys.readouterr().out
    other = tmp_path / "data/cache/other_size32_v4_train.npy"
    other.touch()
    cached = {path.name for path in other.parent.iterdir()}
    iio.imwrite(folder / "dogs" / "new.png", random_images(64, 80, 3, seed=99))
    load_data.load_data(str(folder), tmp_path / "data", size=32)
    assert "Cutting" in capsys.readouterr().out
    new = {path.name for path in other.parent.iterdir()}
    assert len(new) == len(cached)
    assert new & cached == {other.name}


def test_pictures_beside_subfolders_are_a_class_and_hidden_ones_none(folder, tmp_path):
    iio.imwrite(folder / "beside.png", random_images(64, 80, 3))
    (folder / ".thumbnails").mkdir()
    for name in ("._a.png", ".thumbnails/a.png", "cats/.b.png"):
        iio.imwrite(folder / name, random_images(64, 80, 3))
    data = load_data.load_data(str(folder), tmp_path / "data", size=32)
    assert data.class_names == ("cats", "dogs", "pictures")
    assert len(load_data.image_files(folder)) == 13


def test_unreadable_picture_in_a_folder_is_named_and_left_out(folder, tmp_path, capsys):
    (folder / "dogs" / "broken.png").write_text("no picture")
    load_data.load_data(str(folder), tmp_path / "data", size=32)
    assert f"Left out: {folder / 'dogs' / 'broken.png'}: not a readable image" in capsys.readouterr().out


def test_folder_without_use_is_told(tmp_path):
    with pytest.raises(DataError, match="no such folder; --dataset is cifar10, stl10, photos or"):
        load_data.load_data(str(tmp_path / "nothing"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no images in it"):
        load_data.load_data(str(tmp_path / "empty"), tmp_path)
    iio.imwrite(tmp_path / "empty" / "small.png", random_images(20, 20, 3))
    with pytest.raises(
        DataError, match="no picture drawn for train gives a patch of 48x48; lower --size, or"
    ):
        load_data.load_data(str(tmp_path / "empty"), tmp_path / "data")


def test_pictures_of_any_kind_are_read_as_rgb(tmp_path):
    rgb = random_images(6, 4, 3)
    grey = np.repeat(rgb[..., :1], 3, axis=2)
    alpha = np.dstack([rgb, rgb[..., 0]])
    cmyk = Image.fromarray(rgb).convert("CMYK")
    cases = {
        "cmyk.tif": (cmyk, np.asarray(cmyk.convert("RGB"))),
        "rgb.png": (Image.fromarray(rgb), rgb),
        "alpha.png": (Image.fromarray(alpha), rgb),
        "grey.png": (Image.fromarray(grey[..., 0]), grey),
        "grey16.png": (Image.fromarray(grey[..., 0].astype(np.uint16) * 257), grey),
        "bilevel.png": (Image.fromarray(grey[..., 0] > 127), (grey > 127) * np.uint8(255)),
        "palette.png": (Image.fromarray(grey).quantize(256), grey),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        np.testing.assert_array_equal(read_picture(tmp_path / name), expected, err_msg=name)


def test_picture_of_floating_point_is_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(OSError, match="floating point"):
        read_picture(tmp_path / "float.tif")


def test_folder_names_its_data_set_but_never_as_a_built_in_one():
    names = {"cifar10": "cifar10", "/a/my holiday.2020/": "my_holiday_2020", "/my/photos": "photos_folder"}
    for dataset, name in names.items():
        assert load_data.dataset_name(dataset) == name


def test_pca_keeps_the_asked_share_of_energy():
    rng = np.random.default_rng(0)
    flat = rng.normal(128, 1, (200, 12)) + rng.normal(0, 30, (200, 2)) @ rng.normal(0, 1, (2, 12))
    images = flat.clip(0, 255).astype(np.uint8).reshape(200, 2, 2, 3)
    pca = load_data.fit_pca(images, 0.9)
    pixels = images.reshape(200, -1) / 255
    restored = pca.inverse_transform(pca.transform(pixels))
    kept = 1 - ((pixels - restored) ** 2).sum() / ((pixels - pixels.mean(0)) ** 2).sum()
    assert pca.n_components_ <= 2
    assert kept >= 0.9


def test_batches_cover_an_epoch_once_and_mirror_some():
    images = np.zeros((10, 4, 4, 3), np.uint8) + np.arange(10, dtype=np.uint8)[:, None, None, None]
    images[:, :, 0] += 100  # a mark at the left edge
    batches = Batches(images, 3, seed=5)
    assert len(batches) == 3
    seen, mirrored = [], 0
    for index in range(3):
        (clean, sigma), target = batches[index]
        assert clean.dtype == sigma.dtype == np.float32
        np.testing.assert_array_equal(clean, target)
        pixels = np.round(clean * 255)
        seen += pixels[:, 0, 1, 0].tolist()
        mirrored += (pixels[:, 0, -1, 0] >= 100).sum()
    assert len(set(seen)) == 9
    assert 0 < mirrored < 9


def test_batches_prepared_ahead_for_a_gpu_are_the_same(monkeypatch):
    images, noise = random_images(40, 12, 12, 3), {"white": 0.5, "camera": 0.5}
    alone = Batches(images, 4, seed=1, noise=noise)
    monkeypatch.setattr(load_data, "gpus", lambda: ["some"])
    ahead = Batches(images, 4, seed=1, noise=noise)
    assert ahead._pool
    assert not alone._pool
    for epoch, indices in enumerate(([0, 0, 1, 2], [*range(10)], [3, 1])):  # stopped, whole, in any order
        alone.go_to(epoch)
        ahead.go_to(epoch)
        for index in indices:
            keras.tree.map_structure(np.testing.assert_array_equal, ahead[index], alone[index])


def test_batches_of_a_mapped_file_let_go_of_its_pages(tmp_path):
    random_images(40 * IMAGE_BYTES).tofile(tmp_path / "unlabeled_X.bin")
    images = load_data.stl10_input.read_all_images(tmp_path / "unlabeled_X.bin")
    batches = Batches(images, 20)
    assert isinstance(batches._mapped, mmap.mmap)
    chosen = np.sort(batches.order[:20])
    for image, index in zip(np.round(batches[0][1] * 255), chosen, strict=True):
        assert (image == images[index]).all() or (image == images[index][:, ::-1]).all()


@given(st.integers(1, 50), sides, seeds, st.integers(0, 1000))
def test_batches_show_every_image_at_most_once_in_an_epoch(count, batch_size, seed, epoch):
    clean = np.zeros((count, 2, 2, 3), np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None, None]
    batches = Batches(clean, batch_size, seed)
    batches.go_to(epoch)
    seen = [value for index in range(len(batches)) for value in np.round(batches[index][1][:, 0, 0, 0] * 255)]
    assert len(seen) == len(set(seen)) > count - min(batch_size, count)


def test_the_script_prints_its_splits_and_draws_them(tmp_path, capsys, monkeypatch):
    drawn, save_figure = {}, load_data.save_figure

    def keep_figure(figure, path):
        drawn[path.suffix] = figure
        save_figure(figure, path)

    monkeypatch.setattr(load_data, "save_figure", keep_figure)
    load_data.main(["--dataset", "photos", "--size=16", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "|      train |" in printed
    assert "keep 95%" in printed
    assert list((tmp_path / "figures").iterdir()) == [tmp_path / "figures/data_photos.png"]
    clean = load_data.load_data("photos", size=16).shown("test", 8)
    (shown, labels), columns = (part(drawn[".png"]) for part in (pixels_of, labels_of)), 8
    assert [label for label, _ in labels[::columns]] == ["clean", *(f"sigma {s}" for s in load_data.SIGMAS)]
    np.testing.assert_array_equal(shown[:columns], clean)
    noisy = load_data.to_uint8(add_noise(clean, 15))
    np.testing.assert_array_equal(shown[columns : 2 * columns], noisy)
    assert labels[columns][1] == f"{util.psnr(clean, noisy)[0]:.1f} dB"


PIXELS = np.random.default_rng(0).integers(0, 65536, (5, 7, 4), np.uint16)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("channels", "suffix"),
    [(1, ".png"), (2, ".png"), (3, ".png"), (4, ".png"), (1, ".tif"), (3, ".tif"), (4, ".tif"), (3, ".webp")],
)
def test_pixels_are_written_and_read_without_loss(tmp_path, channels, suffix, depth):
    path = tmp_path / f"a picture ä{suffix}"
    pixels = (PIXELS >> (8 if depth == np.uint8 else 0)).astype(depth)
    colours, alpha = pixels[..., : 3 if channels > 2 else 1], pixels[..., 3] if channels % 2 == 0 else None
    if suffix == ".webp":
        if depth == np.uint16:
            with pytest.raises(OSError, match=r".webp holds no 16 bits; choose .png"):
                load_data.write_pixels(path, colours)
        else:
            load_data.write_pixels(path, colours)
            np.testing.assert_array_equal(load_data.read_pixels(path)[0], colours)
        return
    load_data.write_pixels(path, colours, alpha)
    read_colours, read_alpha, _ = load_data.read_pixels(path)
    assert read_colours.dtype == depth
    np.testing.assert_array_equal(read_colours, colours)
    if alpha is None:
        assert read_alpha is None
    else:
        np.testing.assert_array_equal(read_alpha, alpha)


def turned_exif(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "a maker"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2020:01:02 03:04:05"
    return exif


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", " of 16 bits.png", " of 16 bits.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_picture_is_turned_upright_once(tmp_path, suffix, orientation):
    ramp = np.arange(0, 240, 10, np.uint8).reshape(4, 6)  # which JPEG changes little
    upright = np.asarray(ImageOps.exif_transpose(_with_exif(Image.fromarray(ramp), orientation)))
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    if suffix == " of 16 bits.png":
        colours = np.repeat(ramp[..., None].astype(np.uint16) * 257, 3, axis=2)
        load_data.write_pixels(first, colours, None, {"exif": turned_exif(orientation).tobytes()})
    else:
        deep = suffix == " of 16 bits.tif"
        Image.fromarray(ramp.astype(np.uint16) * 257 if deep else ramp).save(
            first, exif=turned_exif(orientation), quality=100
        )
    load_data.write_pixels(second, *load_data.read_pixels(first))
    for path in (first, second):
        pixels = load_data.read_pixels(path)[0]
        assert pixels.dtype == (np.uint16 if "16" in suffix else np.uint8)
        found = pixels[..., 0] / (257 if "16" in suffix else 1)
        np.testing.assert_allclose(found, upright, atol=0 if suffix.endswith(("png", "tif")) else 8)
    with Image.open(second) as image:
        assert ExifTags.Base.Orientation not in image.getexif()


def _with_exif(image, orientation):
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return image


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", " of 16 bits.png"])
def test_exif_and_colour_profile_are_kept(tmp_path, suffix):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    metadata = {"icc_profile": profile, "exif": turned_exif(6).tobytes()}
    pixels = random_images(8, 8, 3).astype(np.uint16 if "16" in suffix else np.uint8)
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    load_data.write_pixels(first, pixels, None, metadata)
    load_data.write_pixels(second, *load_data.read_pixels(first))
    with Image.open(second) as image:
        image.load()
        assert image.info["icc_profile"] == profile
        exif = image.getexif()
        assert exif[ExifTags.Base.Make] == "a maker"
        date = exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal]
        assert date == "2020:01:02 03:04:05"


def test_damaged_and_overlong_exif_are_left_out(tmp_path):
    image = Image.fromarray(random_images(8, 8, 3))
    for suffix in (".png", ".jpg", ".webp"):
        image.save(tmp_path / f"damaged{suffix}", exif=b"Exif\0\0no TIFF")
        assert "exif" not in load_data.read_pixels(tmp_path / f"damaged{suffix}")[2]
    long = turned_exif(1)
    long[ExifTags.Base.Make] = "a maker" * 10_000
    image.save(tmp_path / "long.png", exif=long)
    for suffix in (".jpg", ".jfif"):
        load_data.write_pixels(tmp_path / f"b{suffix}", *load_data.read_pixels(tmp_path / "long.png"))
        with Image.open(tmp_path / f"b{suffix}") as written:
            assert ExifTags.Base.Make not in written.getexif()


def test_jpeg_is_of_one_quality_whatever_its_ending_and_keeps_colours(tmp_path):
    pixels = random_images(40, 40, 3)  # whose colours change from pixel to pixel
    written = []
    for suffix in (".jpg", ".jpeg", ".jfif", ".jpe"):
        load_data.write_pixels(tmp_path / f"a{suffix}", pixels)
        written.append((tmp_path / f"a{suffix}").read_bytes())
    assert len(set(written)) == 1
    assert abs(iio.imread(written[0], extension=".jpg").astype(int) - pixels).mean() < 5


def test_png_of_16_bit_colours_asks_for_tensorflow_where_it_is_not(tmp_path, monkeypatch):
    path, pixels = tmp_path / "a.png", random_images(4, 6, 3, dtype=np.uint16)
    load_data.write_pixels(path, pixels)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    expected = f"{path}: PNG of 16-bit colours is handled by TensorFlow; install tensorflow"
    for work in (load_data.read_pixels, lambda path: load_data.write_pixels(path, pixels)):
        with pytest.raises(DataError, match=re.escape(expected)):
            work(path)


def test_pixels_that_a_format_cannot_hold_are_refused(tmp_path):
    with pytest.raises(OSError, match="JPEG holds no transparency; choose .png"):
        load_data.write_pixels(tmp_path / "a.jpg", np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8))
    with pytest.raises(OSError, match="a.pcx: no format to write has this ending; choose .png"):
        load_data.write_pixels(tmp_path / "a.pcx", np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8))
    for name in ("a.xyz", "a"):
        with pytest.raises(OSError, match=f"{name}: no format to write has this ending; choose .png"):
            load_data.write_pixels(tmp_path / name, np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(OSError, match="TIFF holds no transparency of grey of 16 bits; choose .png"):
        load_data.write_pixels(
            tmp_path / "a.tif", np.zeros((2, 2, 1), np.uint16), np.zeros((2, 2), np.uint16)
        )
    assert list(tmp_path.iterdir()) == []


def colours_of_16_bits_tiff(path, pixels, **more):
    """Write a TIFF of uint16 pixels (H, W, C) as they are, and more tags by their names."""
    height, width, channels = pixels.shape
    tags = {256: width, 257: height, 258: (16,) * channels, 259: 1, 262: 2, 277: channels, 278: height}
    tags |= {getattr(ExifTags.Base, name).value: value for name, value in more.items()}
    planes = np.split(pixels, channels, axis=2) if more.get("PlanarConfiguration") == 2 else [pixels]
    tags[273] = tuple(index * planes[0].nbytes for index in range(len(planes)))  # from the tags' end on
    tags[279] = (planes[0].nbytes,) * len(planes)
    head = b"II*\0\x08\0\0\0"
    directory = TiffImagePlugin.ImageFileDirectory_v2(head)
    directory.update(tags)
    content = b"".join(plane.astype("<u2").tobytes() for plane in planes)
    path.write_bytes(head + directory.tobytes(len(head)) + content)


@pytest.mark.parametrize("planar", [1, 2])
def test_colours_of_16_bits_are_read_of_any_plain_tiff(tmp_path, planar):
    path = tmp_path / "a.tif"
    for channels, extra in ((3, ()), (4, 0), (4, 2)):
        pixels = PIXELS[..., :channels]
        colours_of_16_bits_tiff(path, pixels, PlanarConfiguration=planar, ExtraSamples=extra)
        colours, alpha, _ = load_data.read_pixels(path)
        np.testing.assert_array_equal(colours, pixels[..., :3])
        assert (alpha is None) == (extra != 2)
    np.testing.assert_array_equal(alpha, PIXELS[..., 3])
    colours_of_16_bits_tiff(path, PIXELS, PlanarConfiguration=planar, ExtraSamples=1)
    with pytest.raises(OSError, match="colours of 16 bits that are not plain RGB"):
        load_data.read_pixels(path)


def test_colours_of_a_tiff_of_16_bits_are_turned_upright(tmp_path):
    colours_of_16_bits_tiff(tmp_path / "a.tif", PIXELS[..., :3], Orientation=6)
    np.testing.assert_array_equal(load_data.read_pixels(tmp_path / "a.tif")[0], np.rot90(PIXELS[..., :3], -1))


def test_pixels_that_would_be_cut_are_refused(tmp_path):
    Image.fromarray(np.full((4, 5), 70_000, np.int32)).save(tmp_path / "b.tif")
    with pytest.raises(OSError, match="pixels of 32 bits"):
        load_data.read_pixels(tmp_path / "b.tif")
    frames = [Image.fromarray(random_images(4, 4, 3, seed=seed)) for seed in range(2)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(OSError, match="several frames"):
        load_data.read_pixels(tmp_path / "a.webp")


WRONG_USAGE = "--energy=1 --energy=nan --size=0 --size=3 --dataset= --data-dir= unknown"


@pytest.mark.parametrize("argument", WRONG_USAGE.split())
def test_wrong_usage_is_told(argument):
    assert "error: " in usage_error(load_data.parse_args, [argument])


def test_paths_of_the_command_line_are_absolute_but_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = load_data.parse_args(["--dataset=mine", "--data-dir=data"])
    assert (args.dataset, args.data_dir) == (str(tmp_path / "mine"), str(tmp_path / "data"))
    assert load_data.parse_args(["--dataset=photos"]).dataset == "photos"


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    line = told_line(load_data.main, ["--dataset=photos", "--size=12", f"--out={tmp_path}/out"])
    assert line == f"[Errno 20] Not a directory: '{tmp_path}/out/figures'"


def test_output_that_nobody_reads_any_more():
    process = start("load_data.py", "--dataset=photos", "--size=12", "--out=/nonexistent", env=ON_NUMPY)
    process.stdout.close()
    err = without_greeting(process.stderr.read())
    assert (process.wait(), err) == (1, "")


def test_names_that_are_no_ascii_in_an_ascii_locale(tmp_path):
    holiday = tmp_path / "Urlaub ä"
    for index, name in enumerate((b"\xe4", "ö".encode(), b"\xff\xfe")):  # of other times and systems
        folder = os.path.join(os.fsencode(holiday), name)
        os.makedirs(folder)
        picture = iio.imwrite("<bytes>", random_images(60, 200, 3, seed=index), extension=".png")
        for kind, content in ((b"good", picture), (b"damaged", b"no picture")):
            with open(os.path.join(folder, kind + name + b".png"), "wb") as file:
                file.write(content)
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"} | ON_NUMPY
    arguments = ["--dataset", holiday, "--size=16", "--data-dir", tmp_path / "data", "--out", tmp_path]
    process = start("load_data.py", *arguments, env=environment, cwd="/", errors="replace")
    printed, err = process.communicate()
    assert (process.returncode, without_greeting(err)) == (0, "")
    assert printed.count("Left out: ") == 3
    assert len(list((tmp_path / "figures").iterdir())) == 1
