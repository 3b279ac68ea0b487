import hashlib
import itertools
import os

import load_data
import stl10_input
import util
from load_data import Batches, DataError, add_noise

import imageio.v3 as iio
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
from PIL import Image

ON_NUMPY = {"KERAS_BACKEND": "numpy"}  # which starts fast

seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 60)


def cut_up(pictures, labels, size):
    return load_data._cut_photographs("photos", pictures, labels, (), {}, size, 0, load_data.SHRINKING)


def places(picture, size, step):
    """How many squares have room in a picture, `step` pixels apart."""
    rows, columns = (max(0, (side - size) // step + 1) for side in picture.shape[:2])
    return rows * columns


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
    counts = {split: len(images) for split, images in data.images.items()}
    assert counts == {"train": 90, "validation": 10, "test": 20}
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
    counts = {split: len(images) for split, images in data.images.items()}
    assert counts == {"train": 27, "validation": 3, "test": 12, "unlabeled": 25}
    assert data.labels["test"].tolist() == [*range(10), 0, 1]
    assert set(data.labels["unlabeled"]) == {-1}
    assert data.denoiser_split == "unlabeled"


def test_stl10_is_resized_to_its_sizes_alone(stl10):
    data, whole = (load_data.load_data("stl10", stl10, size=size) for size in (48, 96))
    assert data.images["unlabeled"].shape == (25, 48, 48, 3)
    expected = Image.fromarray(whole.images["test"][3]).resize((48, 48), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(data.images["test"][3], expected)
    line = told_line(load_data.load_data, "stl10", stl10, 64)
    assert line == "stl10: --size 64 is not one of 48, 50, 72, 96"


def test_stl10_labels_that_are_not_those_of_the_images(stl10):
    path = stl10 / "stl10_binary/train_y.bin"
    os.truncate(path, 2)
    line = told_line(load_data.load_data, "stl10", stl10, 96)
    assert line == f"{path}: not a label for each image; delete it and run again"


@pytest.fixture
def folder_of_flat_pictures(tmp_path):
    """Sixty pictures of 96x96, each of one grey."""
    (tmp_path / "pictures").mkdir()
    for grey in range(60):
        iio.imwrite(tmp_path / "pictures" / f"{grey:02d}.png", np.full((96, 96, 3), grey, np.uint8))
    return tmp_path / "pictures"


def test_photos_need_no_download():
    data = load_data.load_data("photos", data_dir="/nonexistent")
    assert data.class_names == ("china", "flower")
    assert set(data.labels["test"]) == {0, 1}


def test_the_first_held_out_patches_are_of_many_pictures(folder_of_flat_pictures):
    data = load_data.load_data(str(folder_of_flat_pictures), size=16)
    for split in ("validation", "test"):
        assert len(np.unique(data.images[split][:12])) == 3  # of three pictures with 36 patches each


def test_what_is_shown_has_texture_and_is_of_many_pictures(folder_of_flat_pictures):
    for path in folder_of_flat_pictures.iterdir():
        picture = iio.imread(path)
        picture[:32, :32] = random_images(32, 32, 3) // 4 + picture[0, 0]
        iio.imwrite(path, picture)
    data = load_data.load_data(str(folder_of_flat_pictures), size=16)
    shown = data.shown("test", 6)
    assert min(map(load_data.texture, shown)) > 10
    assert len(np.unique(shown.min(axis=(1, 2, 3)))) > 1  # pictures
    assert data.shown_picture.shape == (96, 96, 3)
    assert load_data.texture(data.shown_picture) > 0


def test_patches_of_different_splits_come_from_different_columns():
    columns = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (60, 200, 3))
    seen = {split: set(np.unique(patches)) for split, patches in cut_up([columns], [0], 10).images.items()}
    for one, other in itertools.combinations(seen.values(), 2):
        assert not one & other


def test_images_are_cut_to_whole_cells():
    images = random_images(2, 19, 22, 3)
    data = load_data.Data("odd", {"train": images, "test": images[:, :12]}, {}, (), {}).in_cells(4)
    np.testing.assert_array_equal(data.images["train"], images[:, :16, :20])
    np.testing.assert_array_equal(data.images["test"], images[:, :12, :20])


def test_patches_to_learn_from_are_cut_from_smaller_copies_too():
    blocks = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8).repeat(2, 0).repeat(2, 1)
    whole = {blocks[r : r + 16, c : c + 16].tobytes() for r in range(0, 81, 8) for c in range(0, 81, 8)}
    half, quarter = (load_data._resized(blocks, side, side) for side in (48, 24))
    halves = {half[r : r + 16, c : c + 16].tobytes() for r in range(0, 33, 4) for c in range(0, 33, 4)}
    data = cut_up([blocks] * 10, range(10), 16)
    seen = {split: {patch.tobytes() for patch in patches} for split, patches in data.images.items()}
    assert whole < seen["train"] and halves < seen["train"]
    assert len(seen["train"]) == len(whole) + len(halves) + 5 * 5  # of a quarter: 24x24, 2 pixels apart
    copies = ((blocks, 16), (half, 8), (quarter, 4))
    assert len(seen["validation"]) == sum(places(copy, 16, step) for copy, step in copies)
    assert seen["validation"] < seen["train"]
    assert seen["test"] < whole
    assert np.bincount(data.labels["train"]).max() == len(seen["train"])


@given(sides, sides, st.integers(12, 20), st.integers(1, 80), st.sampled_from(load_data.PATCH_SPLITS), seeds)
def test_patches_are_as_many_as_there_are_places_or_wanted(height, width, size, at_most, split, seed):
    picture = random_images(height, width, 3, seed=seed)
    rng = np.random.default_rng(seed)
    patches = np.array(load_data._patches_of(picture, size, 0, (), split, rng, at_most))
    step = size // 2 if split == "train" else size
    there = places(picture, size, step)
    assert len(patches) == min(there, at_most)
    if 0 < there <= at_most:
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
    images = cut_up(random_images(10, 96, 96, 3), [0] * 10, 16).images["train"]
    assert len(images) == len({patch.tobytes() for patch in images}) == 8 * 30


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures in two subfolders."""
    for index in range(12):
        path = tmp_path / "pictures" / ("cats" if index % 2 else "dogs") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(path, random_images(64, 80, 3, seed=index))
    return tmp_path / "pictures"


def test_folder_is_split_by_picture(folder):
    data = load_data.load_data(str(folder), size=32)
    assert data.name == "pictures"
    assert data.class_names == ("cats", "dogs")
    counts = {split: len(images) for split, images in data.images.items()}
    of_train = 10 * (3 * 4 + 1 * 2)  # of the pictures, and of their halves
    assert counts == {"train": of_train, "validation": 5, "test": 4}
    corners = {iio.imread(path)[:32, :32].tobytes(): path.parent.name for path in folder.rglob("*.png")}
    held_out = zip(data.images["test"], data.labels["test"], strict=True)
    (known,) = [(patch.tobytes(), label) for patch, label in held_out if patch.tobytes() in corners]
    assert corners[known[0]] == data.class_names[known[1]]


def test_pictures_beside_subfolders_are_a_class_and_hidden_ones_none(folder):
    iio.imwrite(folder / "beside.png", random_images(64, 80, 3))
    (folder / ".thumbnails").mkdir()
    for name in ("._a.png", ".thumbnails/a.png", "cats/.b.png"):
        iio.imwrite(folder / name, random_images(64, 80, 3))
    data = load_data.load_data(str(folder), size=32)
    assert data.class_names == ("cats", "dogs", "pictures")
    assert len(load_data.image_files(folder)) == 13


def test_links_are_followed_once(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    iio.imwrite(tmp_path / "elsewhere/a.png", random_images(64, 80, 3))
    (folder / "birds").symlink_to(tmp_path / "elsewhere")
    (folder / "dogs/round").symlink_to(folder)
    (folder / "beside.png").symlink_to(tmp_path / "elsewhere/a.png")
    files = load_data.image_files(folder)
    assert files == sorted(files) and len(files) == 14
    classes = load_data.classes_of(files, folder)
    assert classes[folder / "birds/a.png"] == "birds"
    assert set(classes.values()) == {"birds", "cats", "dogs", "pictures"}


def test_unreadable_picture_in_a_folder_is_named_and_left_out(folder, capsys):
    (folder / "dogs" / "broken.png").write_text("no picture")
    load_data.load_data(str(folder), size=32)
    assert f"Left out: {folder / 'dogs' / 'broken.png'}: not a readable image" in capsys.readouterr().out


def test_folder_without_use_is_told(tmp_path):
    def told():
        return told_line(load_data.load_data, str(tmp_path / "mine"))

    assert told().startswith(f"{tmp_path}/mine: no such folder; --dataset is cifar10, stl10, photos or")
    (tmp_path / "mine").mkdir()
    assert "there are no images in it" in told()
    iio.imwrite(tmp_path / "mine" / "small.png", random_images(20, 20, 3))
    assert "no picture drawn for train gives a patch of 48x48; lower --size, or" in told()


def test_folder_names_its_data_set_but_never_as_a_built_in_one():
    names = {"cifar10": "cifar10", "/a/my holiday.2020/": "my_holiday_2020", "/my/photos": "photos_folder"}
    for dataset, name in names.items():
        assert load_data.dataset_name(dataset) == name


def test_pca_keeps_the_asked_share_of_energy():
    rng = np.random.default_rng(0)
    flat = rng.normal(128, 1, (200, 12)) + rng.normal(0, 30, (200, 2)) @ rng.normal(0, 1, (2, 12))
    images = flat.clip(0, 255).astype(np.uint8).reshape(200, 2, 2, 3)
    pca = load_data.fit_pca(images, 0.9)
    assert pca.n_components_ <= 2 and pca.explained_variance_ratio_.sum() >= 0.9
    np.testing.assert_allclose(pca.mean_, images.mean(axis=0).ravel() / 255, rtol=1e-5)
    assert "gives no PCA" in told_line(load_data.fit_pca, images[:1])


@given(st.integers(1, 50), sides, seeds, st.integers(0, 1000))
def test_batches_show_every_image_at_most_once_in_an_epoch(count, batch_size, seed, epoch):
    clean = np.zeros((count, 2, 2, 3), np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None, None]
    batches = Batches(clean, batch_size, seed)
    batches.go_to(epoch)
    seen = [value for index in range(len(batches)) for value in np.round(batches[index][1][:, 0, 0, 0] * 255)]
    assert len(seen) == len(set(seen)) > count - min(batch_size, count)


def test_the_script_prints_its_splits_and_draws_them(tmp_path, capsys, monkeypatch):
    drawn, save_figure = {}, util.save_figure

    def keep_figure(figure, path):
        drawn[path.suffix] = figure
        save_figure(figure, path)

    monkeypatch.setattr(util, "save_figure", keep_figure)
    load_data.main(["--dataset", "photos", "--size=16", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "|      train |" in printed
    assert "keep 95%" in printed
    assert list((tmp_path / "figures").iterdir()) == [tmp_path / "figures/data_photos.png"]
    clean = load_data.load_data("photos", size=16).shown("test", 8)
    (shown, labels), columns = (part(drawn[".png"]) for part in (pixels_of, labels_of)), 8
    assert [label for label, _ in labels[::columns]] == ["clean", *(f"sigma {s}" for s in load_data.SIGMAS)]
    np.testing.assert_array_equal(shown[:columns], clean)
    noisy = util.to_uint8(add_noise(clean, 15))
    np.testing.assert_array_equal(shown[columns : 2 * columns], noisy)
    assert labels[columns][1] == f"{util.psnr(clean, noisy)[0]:.1f} dB"


WRONG_USAGE = "--energy=1 --energy=nan --size=0 --size=3 unknown"


@pytest.mark.parametrize("argument", WRONG_USAGE.split())
def test_wrong_usage_is_told(argument):
    assert "error: " in usage_error(load_data.parse_args, [argument])


def test_paths_of_the_command_line_are_absolute_but_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = load_data.parse_args(["--dataset=mine", "--data-dir=data"])
    assert (args.dataset, args.data_dir) == (str(tmp_path / "mine"), str(tmp_path / "data"))
    assert load_data.parse_args(["--dataset=photos"]).dataset == "photos"


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
    assert printed.count("Left out: ") == 5  # three are damaged, and two names are no Unicode
    assert len(list((tmp_path / "figures").iterdir())) == 1
