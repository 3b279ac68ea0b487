import hashlib
import itertools
import mmap
import pickle

import load_data
from load_data import (
    Batches,
    DataError,
    LabelledBatches,
    add_noise,
    read_cifar10_batch,
    read_picture,
    shift_zoom_or_cut_out,
)
from stl10_input import IMAGE_BYTES

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps, TiffImagePlugin


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_noise_has_the_asked_deviation_and_no_bias():
    images = np.full((50, 32, 32, 3), 128, np.uint8)
    for sigma in (1, 25, 75):
        noise = (add_noise(images, sigma) - np.float32(128 / 255)) * 255
        # 153,600 values: the mean's standard error is sigma / 392, the deviation's sigma / 554
        assert abs(noise.mean()) < 4 * sigma / 392
        assert abs(noise.std() - sigma) < 4 * sigma / 554


def test_noise_is_white_and_not_clipped():
    noisy = add_noise(np.zeros((20, 32, 32, 3), np.uint8), 50)
    assert noisy.dtype == np.float32
    assert 0.49 < (noisy < 0).mean() < 0.51
    for axis in (0, 1, 2, 3):  # neighbours along no axis are correlated
        shifted = np.roll(noisy, 1, axis)
        assert abs(np.corrcoef(noisy.ravel(), shifted.ravel())[0, 1]) < 4 / np.sqrt(noisy.size)


def test_noise_is_that_of_the_protocol():
    images = random_images(5, 8, 8, 3)
    expected = images / 255 + np.random.default_rng(0).normal(0, 25 / 255, images.shape)
    np.testing.assert_allclose(add_noise(images, 25), expected, atol=1e-6)


def test_noise_piece_by_piece_is_the_noise_of_the_whole():
    images = random_images(10, 8, 8, 3)
    rng = np.random.default_rng(0)
    pieces = [add_noise(part, 25, rng) for part in (images[:3], images[3:4], images[4:])]
    np.testing.assert_array_equal(np.concatenate(pieces), add_noise(images, 25))


def test_noise_of_one_sigma_for_each_image():
    noise = add_noise(np.zeros((3, 64, 64, 3), np.uint8), [0, 10, 50]).std(axis=(1, 2, 3)) * 255
    np.testing.assert_allclose(noise, [0, 10, 50], rtol=0.03)
    with pytest.raises(ValueError, match="sigma must not be negative"):
        add_noise(np.zeros((1, 2, 2, 3), np.uint8), -1)


def cifar_pickle(images, labels, recipe=b"cnumpy.core.multiarray\n_reconstruct\n"):
    """A batch in the form of the official ones: protocol 2, numpy names of 2009, byte strings."""
    raw = images.transpose(0, 3, 1, 2).tobytes()
    shape = b"J" + len(images).to_bytes(4, "little") + b"M\x00\x0c\x86"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = recipe + b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01" + shape + dtype + b"\x89T"
    array += len(raw).to_bytes(4, "little") + raw + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + listed + b"u."


def test_cifar10_batch_is_read_in_its_order(tmp_path):
    images = random_images(4, 32, 32, 3)
    content = cifar_pickle(images, [3, 8, 8, 0])
    (tmp_path / "test_batch").write_bytes(content)
    read, labels = read_cifar10_batch(tmp_path / "test_batch", hashlib.md5(content).hexdigest())
    np.testing.assert_array_equal(read, images)
    assert labels.tolist() == [3, 8, 8, 0]


def test_cifar10_checksum_comes_before_unpickling(tmp_path):
    (tmp_path / "test_batch").write_bytes(cifar_pickle(random_images(1, 32, 32, 3), [0]))
    with pytest.raises(DataError, match="test_batch: wrong MD5; delete it"):
        read_cifar10_batch(tmp_path / "test_batch", "0" * 32)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_foreign_code_in_a_pickle_does_not_run(tmp_path):
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": Evil(tmp_path / "ran"), "labels": []}, 2))
    with pytest.raises(DataError, match="it asks for"):
        read_cifar10_batch(tmp_path / "test_batch")
    assert not (tmp_path / "ran").exists()


def test_numpy_functions_beyond_the_admitted_are_refused(tmp_path):
    content = cifar_pickle(random_images(1, 32, 32, 3), [0], b"cnumpy\nsave\n")
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match="it asks for numpy.save"):
        read_cifar10_batch(tmp_path / "test_batch")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps([]),
        cifar_pickle(random_images(2, 32, 32, 3), [0]),
        cifar_pickle(random_images(1, 32, 32, 3), [10]),
        cifar_pickle(random_images(1, 32, 32, 3), [0])[:1000],
    ],
)
def test_damaged_cifar10_batch_is_told(tmp_path, content):
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match="test_batch: .*; delete it and run again"):
        read_cifar10_batch(tmp_path / "test_batch")


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A small CIFAR-10 in `tmp_path`, of 6 x 20 images."""
    checksums = {}
    for index, name in enumerate(load_data.CIFAR10_FILE_MD5):
        images = random_images(20, 32, 32, 3, seed=index)
        content = cifar_pickle(images, [n % 10 for n in range(20)])
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        checksums[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(load_data, "CIFAR10_FILE_MD5", checksums)
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
    test_batch = read_cifar10_batch(cifar10 / "cifar-10-batches-py/test_batch")[0]
    np.testing.assert_array_equal(data.images["test"], test_batch)


def test_limit_takes_the_first_and_leaves_validation_alone(cifar10):
    data, limited = (load_data.load_data("cifar10", cifar10, limit=limit) for limit in (None, 7))
    np.testing.assert_array_equal(limited.images["train"], data.images["train"][:7])
    np.testing.assert_array_equal(limited.labels["train"], data.labels["train"][:7])
    np.testing.assert_array_equal(limited.images["validation"], data.images["validation"])
    with pytest.raises(DataError, match="--limit 91 is more than its 90 training images"):
        load_data.load_data("cifar10", cifar10, limit=91)


@pytest.fixture
def stl10(tmp_path, monkeypatch):
    """A small STL-10 in `tmp_path`."""
    (tmp_path / "stl10_binary").mkdir()
    for split, count in (("train", 30), ("test", 12), ("unlabeled", 25)):
        random_images(count * IMAGE_BYTES).tofile(tmp_path / f"stl10_binary/{split}_X.bin")
        labels = np.arange(count, dtype=np.uint8) % 10 + 1
        labels.tofile(tmp_path / f"stl10_binary/{split}_y.bin")
    return tmp_path


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


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_damaged_cache_is_told(stl10, content):
    load_data.load_data("stl10", stl10, size=48)
    cache = stl10 / f"cache/stl10_test_48_v{load_data.RESIZED_VERSION}.npy"
    cache.write_bytes(cache.read_bytes()[:5000] if content is None else content)
    with pytest.raises(DataError, match=f"{cache}: .*delete it and run again"):
        load_data.load_data("stl10", stl10, size=48)


def test_resizing_is_antialiased():
    board = np.indices((96, 96)).sum(axis=0) % 2 * np.uint8(255)  # finer than 48x48 can show
    board = np.repeat(board[None, :, :, None], 3, axis=3).astype(np.uint8)
    resized = load_data.resize(board, 48)
    assert abs(resized[:, 4:-4, 4:-4].astype(int) - 127.5).max() < 2


def test_photos_need_no_download_and_share_no_pixel():
    data = load_data.load_data("photos", data_dir="/nonexistent")
    assert data.class_names == ("china", "flower")
    assert set(data.labels["test"]) == {0, 1}
    known = {patch.tobytes() for patch in data.images["train"]}
    assert not known & {patch.tobytes() for patch in data.images["test"]}


def test_patches_of_different_splits_come_from_different_columns():
    columns = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (60, 200, 3))
    images, _ = load_data._cut_and_split([(columns, 0)], 1, 10)
    seen = {split: set(np.unique(patches)) for split, patches in images.items()}
    for one, other in itertools.combinations(seen.values(), 2):
        assert not one & other


def test_corners_are_those_of_all_whole_patches():
    picture = random_images(25, 33, 3)
    expected = [(top, left) for top in range(0, 18, 4) for left in range(0, 26, 4)]
    assert load_data.corners(picture, 8, 4) == expected
    assert load_data.corners(picture[:7], 8, 4) == []


def test_training_patches_are_cut_from_smaller_copies_too():
    blocks = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8).repeat(2, 0).repeat(2, 1)
    whole = {blocks[r : r + 16, c : c + 16].tobytes() for r in range(0, 81, 8) for c in range(0, 81, 8)}
    half = load_data.shrunk(blocks, 2)
    halves = {half[r : r + 16, c : c + 16].tobytes() for r in range(0, 33, 4) for c in range(0, 33, 4)}
    pictures = [(blocks, index) for index in range(10)]
    images, labels = load_data._cut_and_split(pictures, 10, 16)
    seen = {split: {patch.tobytes() for patch in patches} for split, patches in images.items()}
    assert whole < seen["train"] and halves < seen["train"]
    assert len(seen["train"]) == len(whole) + len(halves) + 5 * 5  # of a quarter: 24x24, 2 pixels apart
    assert seen["test"] < whole
    assert np.bincount(labels["train"]).max() == len(seen["train"])


def test_patches_of_a_picture_are_limited(monkeypatch):
    monkeypatch.setattr(load_data, "MAX_PATCHES", 300)
    pictures = [(picture, 0) for picture in random_images(10, 96, 96, 3)]
    images, _ = load_data._cut_and_split(pictures, 10, 16)
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
        "validation": 4,
        "test": 4,
    }
    test_picture = next(
        path for path in folder.rglob("*.png") if (data.images["test"][0] == iio.imread(path)[:32, :32]).all()
    )
    assert data.class_names[data.labels["test"][0]] == test_picture.parent.name
    assert "Cutting" in capsys.readouterr().out
    load_data.load_data(str(folder), tmp_path / "data", size=32)
    assert "Cutting" not in capsys.readouterr().out
    iio.imwrite(folder / "dogs" / "new.png", random_images(64, 80, 3, seed=99))
    load_data.load_data(str(folder), tmp_path / "data", size=32)
    assert "Cutting" in capsys.readouterr().out


def test_pictures_beside_subfolders_are_a_class_and_hidden_ones_none(folder, tmp_path):
    iio.imwrite(folder / "beside.png", random_images(64, 80, 3))
    (folder / ".thumbnails").mkdir()
    for name in ("._a.png", ".thumbnails/a.png", "cats/.b.png"):
        iio.imwrite(folder / name, random_images(64, 80, 3))
    data = load_data.load_data(str(folder), tmp_path / "data", size=32)
    assert data.class_names == ("cats", "dogs", "pictures")
    assert len(load_data._image_files(folder)) == 13


def test_unreadable_picture_in_a_folder_is_named_and_left_out(folder, tmp_path, capsys):
    (folder / "dogs" / "broken.png").write_text("no picture")
    load_data.load_data(str(folder), tmp_path / "data", size=32)
    assert f"{folder / 'dogs' / 'broken.png'}: left out" in capsys.readouterr().out


def test_folder_without_use_is_told(tmp_path):
    with pytest.raises(DataError, match="no such folder; --dataset is cifar10, stl10, photos or"):
        load_data.load_data(str(tmp_path / "nothing"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no images in it"):
        load_data.load_data(str(tmp_path / "empty"), tmp_path)
    iio.imwrite(tmp_path / "empty" / "small.png", random_images(20, 20, 3))
    with pytest.raises(DataError, match="no image is large enough for .* 48x48; lower --size"):
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


def test_exif_orientation_is_respected(tmp_path):
    rgb = random_images(6, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "turned.png"), np.rot90(rgb, -1))


def test_dataset_names():
    assert load_data.dataset_name("cifar10") == "cifar10"
    assert load_data.dataset_name("/some/where/my holiday.2020/") == "my_holiday_2020"


def test_folder_named_like_a_built_in_set_does_not_take_its_name():
    assert load_data.dataset_name("/home/me/photos") == "photos_folder"


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
        clean, target = batches[index]
        assert clean.dtype == np.float32
        np.testing.assert_array_equal(clean, target)
        pixels = np.round(clean * 255)
        seen += pixels[:, 0, 1, 0].tolist()
        mirrored += (pixels[:, 0, -1, 0] >= 100).sum()
    assert len(set(seen)) == 9
    assert 0 < mirrored < 9


def test_batches_depend_on_seed_and_epoch_alone():
    images = random_images(12, 4, 4, 3)
    one, other = Batches(images, 4, seed=1), Batches(images, 4, seed=1)
    one.go_to(2)
    other.go_to(2)
    np.testing.assert_array_equal(one[1][0], other[1][0])
    other.go_to(3)
    assert not np.array_equal(one[1][0], other[1][0])
    assert len(Batches(images, 100)) == 1


def test_batches_take_the_colour_from_a_share_of_the_images():
    images = random_images(200, 4, 4, 3)
    batches = Batches(images, 100, grey=0.3)
    fed = np.concatenate([batches[index][0] for index in range(2)])
    grey = (fed == fed[..., :1]).all(axis=(1, 2, 3))
    assert 0.2 < grey.mean() < 0.4
    means = sorted(np.round(images.mean(axis=-1)).sum(axis=(1, 2)).tolist())
    assert set(np.round(fed[grey, ..., 0] * 255).sum(axis=(1, 2)).tolist()) <= set(means)


def test_batches_of_a_mapped_file_let_go_of_its_pages(tmp_path):
    random_images(40 * IMAGE_BYTES).tofile(tmp_path / "unlabeled_X.bin")
    images = load_data.stl10_input.read_all_images(tmp_path / "unlabeled_X.bin")
    batches = Batches(images, 20)
    assert isinstance(batches._mapped, mmap.mmap)
    chosen = np.sort(batches.order[:20])
    for image, index in zip(np.round(batches[0][0] * 255), chosen, strict=True):
        assert (image == images[index]).all() or (image == images[index][:, ::-1]).all()


def test_the_script_prints_its_splits_and_draws_them(tmp_path, capsys):
    load_data.main(["--dataset", "photos", "--size", "32", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "|      train |" in printed
    assert "keep 95%" in printed
    assert iio.imread(tmp_path / "figures/data_photos.png").shape[0] > 300


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


def test_pixels_are_upright_and_of_a_palette_coloured(tmp_path):
    rgb = random_images(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(load_data.read_pixels(tmp_path / "turned.png")[0], np.rot90(rgb, -1))
    Image.fromarray(rgb).quantize(256).save(tmp_path / "palette.png")
    pixels, alpha, _ = load_data.read_pixels(tmp_path / "palette.png")
    assert pixels.shape == (4, 6, 3)
    assert alpha is None


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
        assert load_data.read_pixels(tmp_path / f"damaged{suffix}")[2] == {}
    long = turned_exif(1)
    long[ExifTags.Base.Make] = "a maker" * 10_000
    image.save(tmp_path / "long.png", exif=long)
    for suffix in (".jpg", ".jfif"):
        load_data.write_pixels(tmp_path / f"b{suffix}", *load_data.read_pixels(tmp_path / "long.png"))
        with Image.open(tmp_path / f"b{suffix}") as written:
            assert not written.getexif()


def test_jpeg_is_of_one_quality_whatever_its_ending(tmp_path):
    pixels = random_images(40, 40, 1).repeat(3, axis=2)
    written = []
    for suffix in (".jpg", ".jpeg", ".jfif", ".jpe"):
        load_data.write_pixels(tmp_path / f"a{suffix}", pixels)
        written.append((tmp_path / f"a{suffix}").read_bytes())
    assert len(set(written)) == 1
    assert abs(iio.imread(written[0], extension=".jpg").astype(int) - pixels).mean() < 5


def test_pixels_that_a_format_cannot_hold_are_refused(tmp_path):
    with pytest.raises(OSError, match="JPEG holds no transparency; choose .png"):
        load_data.write_pixels(tmp_path / "a.jpg", np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8))
    with pytest.raises(OSError, match=r"a.pcx: .pcx cannot hold it \(.*\); choose .png"):
        load_data.write_pixels(tmp_path / "a.pcx", np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8))
    for name in ("a.xyz", "a"):
        with pytest.raises(OSError, match=f"{name}: no format to write has this ending; choose .png"):
            load_data.write_pixels(tmp_path / name, np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(OSError, match="grey of 16 bits with transparency is written as .png only"):
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
    with pytest.raises(OSError, match="colours of 16 bits that are not plain RGB; convert it"):
        load_data.read_pixels(path)


def test_colours_of_a_tiff_of_16_bits_are_turned_upright(tmp_path):
    colours_of_16_bits_tiff(tmp_path / "a.tif", PIXELS[..., :3], Orientation=6)
    np.testing.assert_array_equal(load_data.read_pixels(tmp_path / "a.tif")[0], np.rot90(PIXELS[..., :3], -1))


def test_pixels_that_would_be_cut_are_refused(tmp_path):
    Image.fromarray(np.full((4, 5), 70_000, np.int32)).save(tmp_path / "b.tif")
    with pytest.raises(OSError, match="pixels of 32 bits"):
        load_data.read_pixels(tmp_path / "b.tif")
    frames = [Image.fromarray(random_images(4, 4, 3, seed=seed)) for seed in range(2)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(OSError, match="several frames"):
        load_data.read_pixels(tmp_path / "a.gif")


def test_labelled_batches_mirror_each_image_in_every_other_epoch(monkeypatch):
    monkeypatch.setattr("load_data.shift_zoom_or_cut_out", lambda images, rng, share: images)
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    labels = np.arange(20) % 4
    batches = LabelledBatches(images, labels, 4, 5, seed=1)
    as_float = images / np.float32(255)
    mirrored = {}
    for epoch in (0, 1, 2):
        batches.go_to(epoch)
        for index in range(len(batches)):
            fed, one_hot = batches[index]
            for image, target in zip(fed, one_hot, strict=True):
                same = np.flatnonzero((as_float == image).all(axis=(1, 2, 3)))
                other = np.flatnonzero((as_float[:, :, ::-1] == image).all(axis=(1, 2, 3)))
                (origin,) = np.union1d(same, other)
                mirrored.setdefault(origin, []).append(not len(same))
                assert target.tolist() == np.eye(4)[labels[origin]].tolist()
    assert len(mirrored) == 20
    assert all(a != b and a == c for a, b, c in mirrored.values())
    assert 0 < sum(flips[0] for flips in mirrored.values()) < 20


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_images_are_shifted_by_whole_pixels_and_cut_out_of_or_enlarged(share):
    # every pixel tells where it is
    rows, columns = np.mgrid[0:32, 0:32] * 4
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    images = shift_zoom_or_cut_out(image[None].repeat(200, axis=0), np.random.default_rng(0), share)
    assert images.shape == (200, 32, 32, 3)
    grey = (images == 128).all(axis=-1)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    shifts = [(padded[y : y + 32, x : x + 32], (y, x)) for y in range(5) for x in range(5)]
    found = []
    for shifted, hole in zip(images, grey, strict=True):
        found.append([shift for whole, shift in shifts if (whole[~hole] == shifted[~hole]).all()])
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


def test_feature_maps_are_fed_as_they_are():
    maps = np.random.default_rng(0).normal(size=(6, 4, 4, 5)).astype(np.float16)
    batches = LabelledBatches(maps, np.zeros(6, int), 2, 6)
    fed, _ = batches[0]
    assert fed.dtype == np.float32
    np.testing.assert_array_equal(fed, maps.astype(np.float32))
