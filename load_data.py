"""Prepare a data set: images, splits, noise, caches.

    python load_data.py --dataset photos       # patches of the two photographs inside scikit-learn
    python load_data.py                        # CIFAR-10 (170 MB download)
    python load_data.py --dataset stl10        # STL-10 (2.64 GB download), 48x48
    python load_data.py --dataset my_pictures/ # patches of your own images

Prints a table of the splits and writes `figures/data_DATASET.png`: clean samples and the same with noise
of several sigmas. The training scripts call `load_data` and `Batches` from here.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import math
import mmap
import os
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path

import stl10_input
from stl10_input import DataError
from util import (
    HERE,
    NAME_BYTES,
    atomic,
    first_line,
    format_table,
    given_path,
    number,
    progress,
    psnr,
    rows_figure,
    run_script,
    save_figure,
    to_float,
    to_uint8,
)

import keras
import numpy as np
import tifffile
from PIL import ExifTags, Image, TiffImagePlugin
from sklearn.datasets import load_sample_images
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split

Image.MAX_IMAGE_PIXELS = None  # telephones exceed Pillow's bound; MAX_PIXELS is ours
warnings.filterwarnings("ignore", module="PIL")  # of slightly damaged files

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
CIFAR10_FILE_MD5 = {
    "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
    "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
    "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PHOTOS_CLASSES = ("china", "flower")

BUILT_IN = ("cifar10", "stl10", "photos")

SIGMAS = (15, 25, 35, 50, 75)  # of the protocol, on the 0-255 scale
TEST_NOISE_SEED = 0
SPLIT_SEED = 0
PCA_VALUES = 20_000_000  # of the images whose PCA is told
PATCH_SPLITS = ("train", "validation", "test")
VALIDATION = 1000  # images at most, and at most a tenth of the training set
STL10_SIZES = (48, 50, 72, 96)
DEFAULT_SIZE = 48  # of patches, and of STL-10
MIN_SIZE = 12  # of patches: SSIM looks at windows of 11 pixels
MAX_PATCHES = 100_000  # of a folder
SHRINKING = (2, 4)  # training patches of photographs are cut from half and a quarter of the size, too
FEWEST_HELD_OUT = 10  # with fewer photographs none is held out whole: each is divided among the splits
MAX_JPEG_EXIF = 65_533  # bytes
SAVE_OPTIONS = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")  # of picture files; others are refused, some start programs
SUFFIXES = {suffix: kind for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B")  # of Pillow
MAX_PIXELS = 250_000_000  # of a picture
SRGB_GAMMA = 0.45455
DESCRIPTIVE_TAGS = {270, 271, 272, 305, 306, 315, 316, 33432, 34665, 34853}  # of TIFF, from title to GPS
RESIZED_VERSION, PATCHES_VERSION = 1, 2  # of the caches


@dataclass
class Data:
    """A prepared data set. Images are uint8 (N, H, W, 3), labels int64 (N,) from 0, splits are `train`,
    `validation`, `test` and, for STL-10, `unlabeled` (whose labels are all -1)."""

    name: str
    images: dict
    labels: dict
    class_names: tuple
    checksums: dict  # MD5 of the files it came from, for the run record

    @property
    def described(self):
        """What a run record tells of the data."""
        return {"data": {"name": self.name, "checksums": self.checksums}}

    @property
    def denoiser_split(self):
        """The split that denoisers train on; they need no labels."""
        return "unlabeled" if "unlabeled" in self.images else "train"

    def sample(self, split, count):
        """The first `count` images of a split, in memory."""
        return np.ascontiguousarray(self.images[split][:count])

    def spread(self, split, count):
        """At most `count` images at even distances over a split; neighbours may look alike."""
        return self.images[split][evenly(len(self.images[split]), count)]


def evenly(total, count):
    """At most `count` indices at even distances over range(total)."""
    return np.linspace(0, total, min(count, total), endpoint=False).astype(int)


def load_data(dataset="cifar10", data_dir=HERE / "data", size=None, limit=None):
    """Load a data set, downloading it if it is not there.

    The validation split is drawn from the training images with a fixed seed, before `limit`, so that it is
    the same for every run. Photographs are split before they are cut, so that no two splits share a pixel.

    Args:
        dataset: `cifar10`, `stl10`, `photos` or the path of a folder with images.
        data_dir: Where data and caches lie.
        size: STL-10: side that images are resized to, one of 48, 50, 72, 96. Photographs: side of a patch.
            CIFAR-10 is 32.
        limit: Use the first so many training images only.

    Returns:
        `Data`.

    Raises:
        DataError: the data cannot be had, are damaged, or there are fewer training images than `limit`.
    """
    data_dir = Path(data_dir)
    if dataset == "cifar10":
        data = _load_cifar10(data_dir, size or 32)
    elif dataset == "stl10":
        data = _load_stl10(data_dir, size or DEFAULT_SIZE)
    elif dataset == "photos":
        data = _load_photos(size or DEFAULT_SIZE)
    else:
        data = _load_folder(Path(dataset), data_dir, size or DEFAULT_SIZE)
    if limit is not None:
        split = data.denoiser_split
        available = len(data.images[split])
        if limit > available:
            raise DataError(
                f"{dataset}: --limit {limit} is more than its {available} training images; lower it"
            )
        for limited in {"train", split}:
            data.images[limited] = data.images[limited][:limit]
            data.labels[limited] = data.labels[limited][:limit]
    return data


def check_classes(data, dataset):
    """Check that there is something to tell apart.

    Raises:
        DataError: the training images are all of one class.
    """
    if len(np.unique(data.labels["train"])) < 2:
        remedy = "raise --limit, or sort the pictures into a subfolder for each class"
        raise DataError(f"{dataset}: its training images are all of one class; {remedy}")


def absolute_path(text):
    """Absolute path of what a command line names, so that --resume finds it from any folder."""
    return str(given_path(text).resolve())


def dataset_or_folder(text):
    """Value of --dataset: the name of a built-in data set, or the absolute path of a folder."""
    return text if text in BUILT_IN else absolute_path(text)


def dataset_name(dataset):
    """Name of a data set in the names of runs; that of a folder is its last part."""
    if dataset in BUILT_IN:
        return dataset
    name = "".join(c if c.isalnum() or c in "_-" else "_" for c in Path(dataset).resolve().name) or "root"
    name = name.encode()[:NAME_BYTES].decode(errors="ignore")
    return f"{name}_folder" if name in BUILT_IN else name


def read_cifar10_batch(path, md5):
    """Read one batch of the python version of CIFAR-10.

    Args:
        path: `data_batch_1` to `data_batch_5` or `test_batch`.
        md5: Its MD5. It is checked first, since a pickle of another origin could run any code.

    Returns:
        uint8 images (N, 32, 32, 3) and int64 labels (N,) from 0 to 9.

    Raises:
        DataError: missing file or wrong checksum.
    """
    path = Path(path)
    remedy = "delete it and run again to download it"
    if not path.is_file():
        raise DataError(f"{path}: not found; {remedy}")
    raw = path.read_bytes()
    if hashlib.md5(raw).hexdigest() != md5:
        raise DataError(f"{path}: wrong MD5; {remedy}")
    batch = pickle.loads(raw, encoding="latin1")  # written by Python 2
    images = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.asarray(batch["labels"], np.int64)


def _load_cifar10(data_dir, size):
    if size != 32:
        raise DataError(f"cifar10: its images are 32x32, --size {size} is not possible")
    paths = stl10_input.download_and_extract(data_dir, CIFAR10_URL, CIFAR10_ARCHIVE_MD5, CIFAR10_FILE_MD5)
    batches = [read_cifar10_batch(*pair) for pair in zip(paths, CIFAR10_FILE_MD5.values(), strict=True)]
    images = np.concatenate([batch[0] for batch in batches[:-1]])
    labels = np.concatenate([batch[1] for batch in batches[:-1]])
    return _with_validation("cifar10", images, labels, batches[-1], CIFAR10_CLASSES, CIFAR10_FILE_MD5)


def _with_validation(name, images, labels, test, class_names, checksums):
    """Split the validation images off the training images; both keep their order."""
    count = min(VALIDATION, len(images) // 10)
    kept, held_out = train_test_split(np.arange(len(images)), test_size=count, random_state=SPLIT_SEED)
    order = {"train": np.sort(kept), "validation": np.sort(held_out)}
    return Data(
        name,
        {split: images[index] for split, index in order.items()} | {"test": test[0]},
        {split: labels[index] for split, index in order.items()} | {"test": test[1]},
        class_names,
        dict(checksums),
    )


def _load_stl10(data_dir, size):
    if size not in STL10_SIZES:
        raise DataError(f"stl10: --size {size} is not one of {', '.join(map(str, STL10_SIZES))}")
    paths = stl10_input.download_and_extract(data_dir)
    files = {Path(name).stem: path for name, path in zip(stl10_input.FILE_MD5, paths, strict=True)}

    def split(name):
        images = stl10_input.read_all_images(files[f"{name}_X"])
        if size != images.shape[1]:
            images = _cached_resize(
                images, size, data_dir / "cache" / f"stl10_{name}_{size}_v{RESIZED_VERSION}.npy"
            )
        if name == "unlabeled":
            return images, np.full(len(images), -1)
        labels = stl10_input.read_labels(files[f"{name}_y"]).astype(np.int64) - 1
        if len(labels) != len(images):
            path = files[f"{name}_y"]
            raise DataError(f"{path}: {len(labels)} labels of {len(images)} images; delete it and run again")
        return images, labels

    # the 2.76 GB of the unlabelled split were verified when they were extracted
    hashed = [name for name in stl10_input.FILE_MD5 if "unlabeled" not in name]
    checksums = {name: stl10_input.md5_of(data_dir / name) for name in hashed}
    data = _with_validation("stl10", *split("train"), split("test"), stl10_input.CLASS_NAMES, checksums)
    data.images["unlabeled"], data.labels["unlabeled"] = split("unlabeled")
    return data


def resize(images, size):
    """Resize images (N, H, W, 3), uint8, to size×size with antialiasing (Pillow's bicubic)."""
    return np.stack([_resized(image, size, size) for image in images])


def _resized(image, width, height):
    return np.asarray(
        Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BICUBIC)
    )


def _cached_resize(images, size, cache):
    """Resize a split that may be larger than memory, once, into a `.npy` file; returns it memory-mapped."""
    if not cache.exists():
        print(f"Resizing {len(images):,} images to {size}x{size} into {cache}", flush=True)
        advance = progress(len(images), "resized")
        # not through a memory map, where a full disk would kill the process
        with atomic(cache) as path, open(path, "wb") as file:
            _write_header(file, (len(images), size, size, 3))
            for start in range(0, len(images), 1000):
                file.write(resize(images[start : start + 1000], size))
                advance(len(images[start : start + 1000]))
    return _open_cache(cache, (len(images), size, size, 3))


def _write_header(file, shape):
    """Write the header of a `.npy` file of bytes; its length does not depend on the number of images."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def _open_cache(cache, shape, dtype=np.uint8):
    """Map a cache file; `shape` may leave the number of images open with None."""
    try:
        array = np.lib.format.open_memmap(cache, mode="r")
    except Exception as error:  # a damaged header raises whatever its parsing stumbles over
        raise DataError(f"{cache}: damaged cache ({error}); delete it and run again") from None
    if array.dtype != dtype or array.shape != (shape[0] or len(array), *shape[1:]):
        found = f"{array.dtype} {array.shape}"
        raise DataError(f"{cache}: holds {found}, not what its name says; delete it and run again")
    return array


def read_picture(path):
    """Read an image file as RGB, uint8 (H, W, 3): upright by its EXIF orientation, no alpha.

    Raises:
        OSError: not an image that `read_pixels` reads.
    """
    pixels, _, _ = read_pixels(path)
    if pixels.dtype == np.uint16:
        pixels = (pixels // 257).astype(np.uint8)
    return np.repeat(pixels, 3 // pixels.shape[2], axis=2)


def read_pixels(path):
    """Read an image file without loss: upright by its EXIF orientation, in its own channels and depth.

    Returns:
        uint8 or uint16 array, (H, W, 1) of a grey image or (H, W, 3) of a coloured one (palettes and CMYK
        become RGB); its alpha (H, W), or None; and a dict with what else is worth keeping, where it has it:
        `icc_profile` and `exif`, bytes, the latter without the orientation; and `dpi`, its resolution.

    Raises:
        OSError: not a PNG, JPEG, TIFF or WebP file, or of a kind that is rare among them.
    """
    if not Path(path).is_file():  # a pipe could wait for ever
        raise OSError("no such file, or none of the regular kind")
    with Image.open(path, formats=FORMATS) as image:
        image.filename = ""  # Pillow 13 maps a file that has a name, and garbles TIFFs that lie on their side
        grey_depth = image.mode.startswith("I")  # 16 bits
        deep = _bits(image) == 16 and not grey_depth  # colours, which Pillow would cut to 8 bits
        if image.format == "TIFF":
            image.getexif()  # while the file is open
        if not deep or image.format == "PNG":
            image.load()  # which turns a TIFF upright and forgets its orientation
        orientation, metadata = _orientation_and_metadata(image)
        if grey_depth:
            pixels = np.asarray(image).astype(np.uint16)
        elif not deep:
            transparent = "A" in image.mode or "transparency" in image.info
            grey = image.mode in ("1", "L", "LA")
            pixels = np.asarray(image.convert(("L" if grey else "RGB") + ("A" if transparent else "")))
        elif image.format == "PNG":
            pixels = _tensorflow_io().decode_png(Path(path).read_bytes(), dtype="uint16").numpy()
        else:
            with tifffile.TiffFile(path) as file:
                pixels = file.pages[0].asarray()  # of planar configuration 2, channels come first
            planar = image.tag_v2.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2
            pixels = pixels.transpose((1, 2, 0) if planar else (0, 1, 2))[..., : len(image.mode)]
    pixels = _upright(pixels.reshape(*pixels.shape[:2], -1), orientation)
    colours = (pixels.shape[2] - 1) // 2 * 2 + 1  # of 1 to 4 channels, the second or fourth is alpha
    return pixels[..., :colours], pixels[..., -1] if pixels.shape[2] > colours else None, metadata


def _bits(image):
    """Bits of a channel in the file, at most 8 or 16; raises OSError of an image that is rare."""
    tags, info = getattr(image, "tag_v2", {}), image.info
    deep_png = image.format == "PNG" and "16" in str(image.tile[0][3])
    bits = 16 if deep_png else max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    premultiplied = tags.get(TiffImagePlugin.EXTRASAMPLES) == (1,)
    plain = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 2) in (1, 2) and not premultiplied
    gamma = SRGB_GAMMA if {"srgb", "icc_profile"} & set(info) else info.get("gamma", SRGB_GAMMA)
    rare = {
        f"more than {MAX_PIXELS:,} pixels": image.width * image.height > MAX_PIXELS,
        "an image of several frames": getattr(image, "n_frames", 1) > 1 and image.format != "MPO",
        "microscopy": "<OME" in str(tags.get(TiffImagePlugin.IMAGEDESCRIPTION)),
        "floating point or signed pixels": set(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))) != {1},
        f"pixels of {bits} bits": bits not in (1, 2, 4, 8, 16),
        f"pixels of kind {image.mode}": image.mode not in MODES,
        "colours of 16 bits that are not plain RGB": bits == 16 and (not plain or "transparency" in info),
        f"gamma {gamma}": abs(gamma - SRGB_GAMMA) > 0.01,
    }
    if found := [kind for kind, there in rare.items() if there]:
        raise OSError(", ".join(found))
    return bits


def _orientation_and_metadata(image):
    """EXIF orientation of an image, 1 where there is none, and the metadata of `read_pixels`."""
    orientation, kept = 1, {"icc_profile": image.mode != "CMYK" and image.info.get("icc_profile")}
    with contextlib.suppress(Exception):  # damaged, which is no reason to do without the picture
        exif = image.getexif()
        orientation = exif.pop(ExifTags.Base.Orientation, 1)
        for tag in set(exif) - DESCRIPTIVE_TAGS if image.format == "TIFF" else ():
            del exif[tag]
        kept["exif"] = exif and exif.tobytes()
        dpi = [float(value) for value in image.info.get("dpi", ())]
        kept["dpi"] = all(0 < value < 1e5 for value in dpi) and dpi
    return orientation, {key: value for key, value in kept.items() if value}


def _upright(pixels, orientation):
    """Turn and mirror pixels (H, W, C) by their EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


def write_pixels(path, pixels, alpha=None, metadata=None):
    """Write what `read_pixels` returns, in the format that the ending of `path` asks for.

    Raises:
        OSError: the format cannot hold these channels or this depth; or the disk is full, and so on.
    """
    suffix = path.suffix.lower()
    kind, deep = SUFFIXES.get(suffix), pixels.dtype == np.uint16
    if not kind:
        raise OSError(f"{path}: no format to write has this ending; choose .png")
    if deep and kind not in ("PNG", "TIFF"):
        raise OSError(f"{path}: {suffix} holds no 16 bits; choose .png")
    if alpha is not None and (kind == "JPEG" or deep and kind == "TIFF" and pixels.shape[2] == 1):
        raise OSError(f"{path}: {kind} holds no transparency{' of grey of 16 bits' * deep}; choose .png")
    channels = pixels if alpha is None else np.concatenate([pixels, alpha[..., None]], axis=2)
    try:
        encoded = _encoded(kind, channels, **(metadata or {}))
    except (OSError, ValueError) as error:
        raise OSError(f"{path}: {suffix} cannot hold it ({first_line(error)}); choose .png") from None
    with atomic(path) as temporary:
        temporary.write_bytes(encoded)


def _encoded(kind, channels, **metadata):
    """A file of pixels (H, W, 1 to 4), in memory: some encoders hang or crash on a full disk."""
    file, count, deep = io.BytesIO(), channels.shape[2], channels.dtype == np.uint16
    if deep and count > 1 and kind == "PNG":
        return _with_metadata(_tensorflow_io().encode_png(channels).numpy(), metadata)
    if deep and count > 1:
        (tags := Image.Exif()).load(metadata.get("exif", b""))
        texts = [(tag, "s", 0, text.encode(), True) for tag, text in tags.items() if isinstance(text, str)]
        options = {"resolution": metadata.get("dpi"), "iccprofile": metadata.get("icc_profile")}
        options |= {"extrasamples": [2] * (count - 3), "extratags": texts}  # 2: not multiplied into colours
        tifffile.imwrite(file, channels, compression="zlib", metadata=None, software=False, **options)
    else:
        if kind == "JPEG" and len(metadata.get("exif", b"")) > MAX_JPEG_EXIF:
            del metadata["exif"]
        image = Image.fromarray(channels.squeeze(2) if count == 1 else channels)
        image.save(file, kind, **SAVE_OPTIONS.get(kind, {}), **metadata)
    return file.getvalue()


def _with_metadata(png, metadata):
    """A PNG file, as bytes, with the chunks in which Pillow writes the metadata of `read_pixels`."""
    file, header = io.BytesIO(), 8 + 25  # signature and IHDR, after which they stand
    Image.new("L", (1, 1)).save(file, "PNG", **metadata)
    return png[:header] + file.getvalue()[header : file.getvalue().rindex(b"IDAT") - 4] + png[header:]


def _tensorflow_io():
    try:
        from tensorflow import io
    except ImportError:
        raise OSError("colours of 16 bits are read and written by TensorFlow, which is not there") from None
    return io


def corners(picture, size, step):
    """Top and left of patches of a picture (H, W, 3), `step` pixels apart, row by row."""
    return list(itertools.product(*(range(0, side - size + 1, step) for side in picture.shape[:2])))


def shrunk(picture, divisor):
    """A picture (H, W, 3), uint8, at a part of its size, with antialiasing (Pillow's bicubic)."""
    height, width = (side // divisor for side in picture.shape[:2])
    return _resized(picture, width, height)


def _cut(picture, size, training, at_most, rng):
    """Cut a picture (H, W, 3) into a list of patches (size, size, 3), views of it; `at_most` are drawn.

    Training patches overlap by half, and smaller copies of the picture are cut as well, at the same distances
    in the picture itself. The others do not overlap.
    """
    copies = [(picture, size // 2 if training else size)]
    for divisor in SHRINKING if training else ():
        if min(picture.shape[:2]) // divisor >= size:
            copies.append((shrunk(picture, divisor), size // 2 // divisor))
    places = [(copy, *corner) for copy, step in copies for corner in corners(copy, size, step)]
    if len(places) > at_most:
        places = [places[index] for index in np.sort(rng.choice(len(places), at_most, replace=False))]
    return [copy[top : top + size, left : left + size] for copy, top, left in places]


def split_pictures(count, rng):
    """Splits of `count` photographs by index: a twentieth each for validation and test."""
    share = -(-count // 20)
    splits = ["train"] * count
    for rank, index in enumerate(rng.permutation(count)[: 2 * share]):
        splits[index] = "validation" if rank < share else "test"
    return splits


def _cuts(pictures, count, size):
    """Split `count` pictures among train, validation and test, then cut them.

    Of FEWEST_HELD_OUT and more, a twentieth each is kept for validation and test; of fewer, every picture
    is split into vertical bands instead.

    Args:
        pictures: Iterable of (uint8 picture (H, W, 3), label).
        count: How many there are.
        size: Side of a patch.

    Yields:
        Split, label, and a list of patches uint8 (size, size, 3).
    """
    rng = np.random.default_rng(SPLIT_SEED)
    split_of = split_pictures(count, rng)
    for index, (picture, label) in enumerate(pictures):
        if count >= FEWEST_HELD_OUT:
            regions = {split_of[index]: picture}
        else:
            first, second = int(0.7 * picture.shape[1]), int(0.85 * picture.shape[1])
            bands = np.split(picture, [first, second], axis=1)
            regions = dict(zip(PATCH_SPLITS, bands, strict=True))
        for split, region in regions.items():
            yield split, label, _cut(region, size, split == "train", max(1, MAX_PATCHES // count), rng)


def _cut_and_split(pictures, count, size):
    """What `_cuts` yields, in memory: two dicts by split, patches uint8 (N, size, size, 3), labels (N,)."""
    patches, labels = ({split: [] for split in PATCH_SPLITS} for _ in range(2))
    for split, label, cuts in _cuts(pictures, count, size):
        patches[split] += cuts
        labels[split] += [label] * len(cuts)
    patches = {split: np.array(cuts, np.uint8).reshape(-1, size, size, 3) for split, cuts in patches.items()}
    return patches, {split: np.array(listed, np.int64) for split, listed in labels.items()}


def _load_photos(size):
    photographs = load_sample_images()
    pictures = list(zip(photographs.images, range(len(photographs.images)), strict=True))
    images, labels = _cut_and_split(pictures, len(pictures), size)
    checksums = {
        Path(n).name: hashlib.md5(p).hexdigest()
        for n, (p, _) in zip(photographs.filenames, pictures, strict=True)
    }
    return _usable(Data("photos", images, labels, PHOTOS_CLASSES, checksums), "photos", size)


def _usable(data, source, size):
    """Data of patches, at most VALIDATION of them for validation; raises DataError where a split has none."""
    kept = evenly(len(data.labels["validation"]), VALIDATION)
    for parts in (data.images, data.labels):
        parts["validation"] = parts["validation"][kept]
    for split, images in data.images.items():
        if not len(images):
            raise DataError(
                f"{source}: no image is large enough for {split} patches of {size}x{size}; lower --size"
            )
    return data


def image_files(folder):
    """Paths of the images in a folder and its subfolders, sorted; hidden ones are left out.

    Raises:
        DataError: no such folder, or no images in it.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; --dataset is cifar10, stl10, photos or a folder of images"
        )
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise DataError(
            f"{folder}: there are no images in it (links are not followed); choose another --dataset"
        )
    return files


def _load_folder(folder, data_dir, size):
    """Patches of a user's own images, cached in `data_dir`.

    Subfolders, if any, are the classes; what lies beside them is one more, of the data set's name.
    """
    files = image_files(folder)
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
    listing = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
    digest = hashlib.md5(repr((os.path.realpath(folder), listing)).encode()).hexdigest()
    name = dataset_name(folder)
    stem = f"{name}_{digest[:12]}_size{size}_v{PATCHES_VERSION}"
    class_of = {path: name if path.parent == folder else path.relative_to(folder).parts[0] for path in files}
    classes = sorted(set(class_of.values()))
    cache = {split: data_dir / "cache" / f"{stem}_{split}.npy" for split in PATCH_SPLITS}
    cached_labels = {split: path.with_name(f"{path.stem}_labels.npy") for split, path in cache.items()}
    if not all(path.exists() for path in (*cache.values(), *cached_labels.values())):
        print(
            f"Cutting {len(files):,} images of {folder} into {size}x{size} patches in {data_dir / 'cache'}",
            flush=True,
        )
        pictures = _readable_pictures(files, [classes.index(class_of[path]) for path in files])
        _write_cuts(_cuts(pictures, len(files), size), size, cache, cached_labels)
    images = {split: _open_cache(path, (None, size, size, 3)) for split, path in cache.items()}
    labels = {
        split: np.array(_open_cache(path, (len(images[split]),), np.int64))
        for split, path in cached_labels.items()
    }
    # a name that is no Unicode is shown with escapes
    classes = tuple(os.fsencode(name).decode(errors="backslashreplace") for name in classes)
    return _usable(Data(name, images, labels, classes, {"listing": digest}), folder, size)


def _write_cuts(cuts, size, cache, cached_labels):
    """Write what `_cuts` yields to `.npy` files by split, as it comes."""
    labels = {split: [] for split in cache}
    with contextlib.ExitStack() as stack:
        files = {}
        for split, path in cache.items():
            files[split] = stack.enter_context(open(stack.enter_context(atomic(path)), "wb"))
            _write_header(files[split], (0, size, size, 3))
        for split, label, patches in cuts:
            for patch in patches:
                files[split].write(np.ascontiguousarray(patch))
            labels[split] += [label] * len(patches)
        for split, file in files.items():
            with atomic(cached_labels[split]) as path, open(path, "wb") as labels_file:
                np.save(labels_file, np.array(labels[split], np.int64))
            file.seek(0)
            _write_header(file, (len(labels[split]), size, size, 3))


def _readable_pictures(files, labels):
    """Yield (picture, label); an unreadable file is named and yields an empty picture."""
    for path, label in zip(files, labels, strict=True):
        try:
            yield read_picture(path), label
        except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
            if getattr(error, "errno", None) or isinstance(error, MemoryError):
                raise  # mended later, it would stay left out of the cache
            print(f"{path}: left out, not a readable image ({first_line(error)})", flush=True)
            yield np.empty((0, 0, 3), np.uint8), label


def add_noise(images, sigma, rng=None):
    """Add white Gaussian noise (AWGN), not clipped.

    Args:
        images: uint8 array (N, H, W, 3).
        sigma: Standard deviation on the 0-255 scale, one number or one for each image.
        rng: `numpy.random.Generator`; by default a new one with the test noise's seed, which makes the
            noisy test images of the protocol. Several calls with one generator, piece by piece, draw the same
            noise as one call for the whole.

    Returns:
        float32 array (N, H, W, 3), nominally in [0, 1].

    Raises:
        ValueError: a negative sigma.
    """
    sigma = np.reshape(np.asarray(sigma, np.float64), (-1, 1, 1, 1))
    if sigma.min(initial=0) < 0:
        raise ValueError(f"sigma must not be negative, but is {sigma.min()}")
    rng = rng or np.random.default_rng(TEST_NOISE_SEED)
    return (images / 255 + rng.standard_normal(images.shape) * (sigma / 255)).astype(np.float32)


def fit_pca(images, energy=0.95):
    """Fit the compression of flattened pixels that keeps a share of their energy (variance).

    Args:
        images: uint8 array (N, H, W, 3).
        energy: Share to keep, above 0 and below 1.

    Returns:
        Fitted `sklearn.decomposition.PCA` (the singular value decomposition of the centred pixels) with as
        many components as needed; `transform` and `inverse_transform` take pixels in [0, 1], flattened.
    """
    pixels = images.reshape(len(images), -1).astype(np.float32)
    pixels /= 255  # in place: there may be much of it
    solver = "covariance_eigh" if len(pixels) >= pixels.shape[1] else "full"
    return PCA(n_components=energy, svd_solver=solver).fit(pixels)


class Batches(keras.utils.PyDataset):
    """Feed `fit` with clean images, in a new order every epoch (`go_to`), half of them mirrored.

    What is drawn depends on seed, epoch and position alone, so that a resumed training sees what an
    uninterrupted one would have seen. Images may be memory-mapped and larger than memory.

    Args:
        images: uint8 array (N, H, W, 3).
        batch_size: Images in a batch; what is left over at the end of an epoch is dropped.
        seed: Of order, mirroring and greying.
        grey: Share of the images that are fed without colour.
    """

    def __init__(self, images, batch_size, seed=0, grey=0.0):
        super().__init__()
        self.images, self.batch_size, self.seed = images, min(batch_size, len(images)), seed
        self.grey = grey
        self._mapped = _memory_map(images)
        self.go_to(0)

    def go_to(self, epoch):
        """Shuffle as for `epoch`, counted from 0."""
        self.epoch = epoch
        self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self.images))

    def __len__(self):
        return len(self.images) // self.batch_size

    def __getitem__(self, index):
        batch = self.take(index)[1]
        rng = np.random.default_rng((self.seed, self.epoch, index))
        mirrored = rng.random(len(batch)) < 0.5
        batch[mirrored] = batch[mirrored, :, ::-1]
        greyed = rng.random(len(batch)) < self.grey
        batch[greyed] = batch[greyed].mean(axis=-1, keepdims=True).round()
        clean = to_float(batch)
        return clean, clean

    def take(self, index):
        """Indices of the images of a batch, and a copy of these images."""
        chosen = np.sort(self.order[index * self.batch_size :][: self.batch_size])
        batch = self.images[chosen]
        if self._mapped is not None:
            _forget_pages(self._mapped)
        return chosen, batch


def _memory_map(array):
    """The `mmap.mmap` that an array is a view of, or None."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, mmap.mmap) else None


def _forget_pages(mapped):
    """Let go of the pages of a file that were read, which would else count as this process's memory."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def add_data_options(parser):
    """Add the options that say which data a script works on."""
    parser.add_argument(
        "--dataset",
        type=dataset_or_folder,
        default="cifar10",
        help="cifar10, stl10, photos (two photographs inside scikit-learn) or a folder of images",
    )
    parser.add_argument(
        "--data-dir",
        type=absolute_path,
        default=str(HERE / "data"),
        help="where data are kept and downloaded to",
    )
    parser.add_argument(
        "--size",
        type=number(int, MIN_SIZE),
        default=None,
        help=f"side of STL-10's images (48, 50, 72, 96) or of photographs' patches (default: {DEFAULT_SIZE})",
    )


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Prepare a data set and show it.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_data_options(parser)
    parser.add_argument("--out", type=given_path, default=HERE, help="where figures/ is")
    parser.add_argument("--energy", type=float, default=0.95, help="share of energy that PCA keeps")
    args = parser.parse_args(argv)
    if not 0 < args.energy < 1:
        parser.error(f"argument --energy: {args.energy} is not between 0 and 1")
    return args


def show_samples(data, path, count=8):
    """Write a figure of test images, clean and with noise of the protocol's sigmas."""
    clean = data.sample("test", count)
    rows = [("clean", clean, None)]
    for sigma in SIGMAS:
        noisy = to_uint8(add_noise(clean, sigma))
        rows.append((f"sigma {sigma}", noisy, [f"{value:.1f} dB" for value in psnr(clean, noisy)]))
    with atomic(path) as temporary:
        save_figure(rows_figure(rows, f"{data.name}: test images and the noise added to them"), temporary)


def main(argv=None):
    args = parse_args(argv)
    data = load_data(args.dataset, args.data_dir, args.size)
    table = []
    for split, images in data.images.items():
        counts = np.bincount(data.labels[split][data.labels[split] >= 0], minlength=len(data.class_names))
        table.append(
            {
                "split": split,
                "images": len(images),
                "shape": "x".join(map(str, images.shape[1:])),
                "MB": round(images.nbytes / 1e6),
                "of a class": f"{counts.min()}-{counts.max()}" if counts.any() else "no labels",
            }
        )
    print(format_table(table))
    print("classes:", ", ".join(data.class_names))
    pixels = math.prod(data.images["train"].shape[1:])
    sample = data.sample("train", min(1000, PCA_VALUES // pixels))  # more would take minutes
    pca = fit_pca(sample, args.energy)
    kept = f"{pca.n_components_} of {pca.n_features_in_} components keep {args.energy:.0%}"
    print(f"PCA of {len(sample):,} training images: {kept}")
    path = args.out / "figures" / f"data_{data.name}.png"
    show_samples(data, path)
    print(f"{path}: clean and noisy samples")


if __name__ == "__main__":
    run_script(main)
