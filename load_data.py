"""Prepare a data set: images, splits, noise.

    python load_data.py --dataset photos       # patches of the two photographs inside scikit-learn
    python load_data.py                        # CIFAR-10 (170 MB download)
    python load_data.py --dataset stl10        # STL-10 (2.64 GB download), 48x48
    python load_data.py --dataset my_pictures/ # patches of your own images

Prints the splits, the classes and how many PCA components keep --energy of the variance, and writes
`figures/data_DATASET.png`: clean samples and the same with noise of several sigmas. The training scripts
call `load_data` and `Batches` from here.

From top to bottom: data sets; picture files; patches of pictures; kinds of noise; feeding a training; the
command line. A fault is a `DataError`, an `OSError` whose message is one line with the file and the remedy.
"""

import argparse
import hashlib
import io
import itertools
import math
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import stl10_input
import util
from stl10_input import DataError

import keras
import numpy as np
import OpenImageIO as oiio
from keras import ops
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from scipy.ndimage import convolve, uniform_filter
from sklearn.datasets import load_sample_images
from sklearn.decomposition import PCA
from sklearn.model_selection import train_test_split

Image.MAX_IMAGE_PIXELS = None  # telephones exceed Pillow's bound; OpenImageIO has ours
oiio.attribute("limits:imagesize_MB", 1500)  # decoded: 250 megapixels of 16-bit colours
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # so do texts of more than 1 MiB
warnings.filterwarnings("ignore", module="PIL")  # of slightly damaged files

PHOTOS_CLASSES = ("china", "flower")
BUILT_IN = ("cifar10", "stl10", "photos")
SIGMAS = (15, 25, 35, 50, 75)  # of the protocol, on the 0-255 scale
TEST_NOISE_SEED, VALIDATION_NOISE_SEED = 0, 1
SPLIT_SEED = 0
PCA_IMAGES = 1000  # that the printed PCA is fitted to, at most
PATCH_SPLITS = ("train", "validation", "test")
VALIDATION = 1000  # images or patches at most
STL10_SIZES = (48, 50, 72, 96)
DEFAULT_SIZE = 48  # of patches, and of STL-10
MIN_SIZE = 12  # of patches: SSIM looks at windows of 11 pixels
MAX_PATCHES = 100_000  # of a folder, about
MARGIN = 16  # pixels by which a training patch may exceed the place that is drawn in it, in every epoch anew
SHRINKING = (2, 4)  # training and validation patches are cut from 1/2 and 1/4 of the size, too
SHOWN_PICTURE = (512, 768)  # height and width of the part that is shown of a picture, at most
FEWEST_TO_HOLD_OUT = 10  # with fewer photographs none is held out whole: each is divided among the splits
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")  # of picture files
SUFFIXES = {suffix: kind for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
CHANNELS = (("Y",), ("Y", "A"), ("R", "G", "B"), ("R", "G", "B", "A"))
THUMBNAIL, XMP_TAG = 1, 700  # of TIFF: a value of NewSubfileType, and a tag
PNG_SIGNATURE_BYTES = 8
CODING_CHUNKS = (b"tRNS", b"bKGD", b"hIST", b"sBIT", b"sPLT")  # they fit pixels as they are stored
EXIF_TAGS = {270, 271, 272, 274, 282, 283, 296, 305, 306, 315, 316, 33432, 34665, 34853}  # of TIFF
AHEAD = min(16, os.cpu_count() or 1)  # batches at a time; 64 images of 96x96 take 14 MB

# kinds of noise
TEST_JPEG_QUALITY, TRAINING_JPEG_QUALITIES = 90, (60, 100)
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, as in JPEG
CORRELATED_RADII = (0.4, 2)  # of Gaussian filters, in pixels
CAMERA_SIGMA = (5, 25)  # of training: 3 to 15 grey levels are left
GRAIN = (0.5, 3)  # grey levels in an image's calmest 8x8 pixels: with less it is clean, with more texture
NOISELESS = 0.06  # share of camera noise that has strength zero, so that texture is not taken for noise

# simulated cameras: with these ranges their noise resembles that of pairs of real photographs
MID_GREY, MID_GREY_SLOPE = 0.214, 1.08  # linear light of sRGB's 1/2, and the slope of sRGB there
COLOUR_MATRIX = (0.2, 0.8)  # how much it raises the saturation
SMOOTHED_LUMA, SMOOTHED_COLOUR, SHARPENING_RADIUS = (0.4, 1.2), (1.5, 4), 1  # pixels
EDGE = 3  # grey levels from pixel to pixel
TONE_CURVE_SHARE, SHARPENED_SHARE, JPEG_SHARE = 0.7, 0.3, 0.7
DEMOSAICING = (  # sixteenths
    # cross: green at a red or blue pixel
    [[0, 0, -2, 0, 0], [0, 0, 4, 0, 0], [-2, 4, 8, 4, -2], [0, 0, 4, 0, 0], [0, 0, -2, 0, 0]],
    # along: red or blue at a green pixel whose row has that colour
    [[0, 0, 1, 0, 0], [0, -2, 0, -2, 0], [-2, 8, 10, 8, -2], [0, -2, 0, -2, 0], [0, 0, 1, 0, 0]],
    # across: red or blue at a green pixel whose column has that colour
    [[0, 0, -2, 0, 0], [0, -2, 8, -2, 0], [1, 0, 10, 0, 1], [0, -2, 8, -2, 0], [0, 0, -2, 0, 0]],
    # diagonal: red at a blue pixel, blue at a red one
    [[0, 0, -3, 0, 0], [0, 4, 0, 4, 0], [-3, 0, 12, 0, -3], [0, 4, 0, 4, 0], [0, 0, -3, 0, 0]],
)


@dataclass
class Data:
    """A prepared data set. Images are uint8 (N, H, W, 3), labels int64 (N,) from 0, splits are `train`,
    `validation`, `test` and, for STL-10, `unlabeled` (whose labels are all -1)."""

    name: str
    images: dict
    labels: dict
    class_names: tuple
    checksums: dict  # for the run record: MD5 of each file or its pixels, or one of all names and sizes
    shown_picture: np.ndarray | None = None  # of photographs: one held out for testing, or its middle

    @property
    def identity(self):
        """Name and checksums, as a run record tells them."""
        return {"name": self.name, "checksums": self.checksums}

    @property
    def denoiser_split(self):
        """The split that denoisers train on; they need no labels."""
        return "unlabeled" if "unlabeled" in self.images else "train"

    def in_cells(self, side):
        """The same data, images cut at the right and the bottom to multiples of `side` pixels."""
        cut = {}
        for split, images in self.images.items():
            height, width = (length // side * side for length in images.shape[1:3])
            cut[split] = images[:, :height, :width]
        return replace(self, images=cut)

    def first(self, split, count):
        """The first `count` images of a split."""
        return np.ascontiguousarray(self.images[split][:count])

    def shown(self, split, count):
        """Images to look at: the one with most texture in each of `count` stretches of a split."""
        images = self.images[split][:VALIDATION]
        stretches = np.array_split(np.arange(len(images)), min(count, len(images)))
        return np.stack([max(images[stretch], key=texture) for stretch in stretches])


def texture(image):
    """Mean difference between neighbouring pixels of an image (H, W, 3), uint8, in grey levels."""
    values = image.astype(np.int16)
    return sum(np.abs(np.diff(values, axis=axis)).mean() for axis in (0, 1))


def evenly(total, count):
    """At most `count` indices at even distances over range(total)."""
    return np.linspace(0, total, min(count, total), endpoint=False).astype(int)


def load_data(
    dataset="cifar10", data_dir=util.HERE / "data", size=None, limit=None, margin=0, shrinking=SHRINKING
):
    """Load a data set, downloading it if it is not there.

    The validation split is drawn from the training images with a fixed seed, before `limit`, so that it is
    the same for every run. Photographs are split before they are cut, so that no two splits share a pixel.

    Args:
        dataset: `cifar10`, `stl10`, `photos` or the path of a folder with images.
        data_dir: Where downloaded data lie.
        size: STL-10: side that images are resized to, one of 48, 50, 72, 96. Photographs: side of a patch.
            CIFAR-10 is 32.
        limit: Use the first so many training images only.
        margin: Photographs: by how many pixels training patches exceed `size`, for `Batches` to choose from.
        shrinking: Photographs: divisors of the sizes at which training and validation patches are cut, too.

    Returns:
        `Data`.
    """
    data_dir = Path(data_dir)
    if dataset == "cifar10":
        data = _load_cifar10(data_dir, size or 32)
    elif dataset == "stl10":
        data = _load_stl10(data_dir, size or DEFAULT_SIZE)
    elif dataset == "photos":
        data = _load_photos(size or DEFAULT_SIZE, margin, shrinking)
    else:
        data = _load_folder(Path(dataset), size or DEFAULT_SIZE, margin, shrinking)
    if limit is not None:
        split = data.denoiser_split
        if limit > (there := len(data.images[split])):
            raise DataError(f"{dataset}: --limit {limit} is more than its {there} training images; lower it")
        for limited in {"train", split}:
            data.images[limited] = data.images[limited][:limit]
            data.labels[limited] = data.labels[limited][:limit]
    return data


def check_labelled(data, dataset, limit=None):
    """Check that the labelled training images are as many as asked for, and of several classes."""
    if limit and limit > (available := len(data.images["train"])):
        raise DataError(f"{dataset}: --limit {limit} is more than its {available} labelled images; lower it")
    if len(np.unique(data.labels["train"])) < 2:
        remedy = "raise --limit, or sort the pictures into a subfolder for each class"
        raise DataError(f"{dataset}: its training images are all of one class; {remedy}")


def dataset_name(dataset):
    """Name of a data set in the names of runs; that of a folder is its last part."""
    if dataset in BUILT_IN:
        return dataset
    name = "".join(c if c.isalnum() or c in "_-" else "_" for c in Path(dataset).resolve().name) or "root"
    name = name.encode()[: util.NAME_BYTES - 20].decode(errors="ignore")  # a run's kind is before it
    return f"{name}_folder" if name in BUILT_IN else name


def _load_cifar10(data_dir, size):
    if size != 32:
        raise DataError(f"cifar10: its images are 32x32, --size {size} is not possible")
    train, test = stl10_input.load_cifar10(data_dir)
    classes, checksums = stl10_input.CIFAR10_CLASSES, stl10_input.CIFAR10_FILE_MD5
    return _with_validation("cifar10", *train, test, classes, checksums)


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
    folder = stl10_input.download_and_extract(data_dir)[0].parent

    def split(name):
        images = stl10_input.read_all_images(folder / f"{name}_X.bin")  # mapped, not in memory
        if size != images.shape[1]:
            resized = (_resized(image, size, size) for image in images)
            images = np.fromiter(resized, np.dtype((np.uint8, (size, size, 3))), len(images))
        if name == "unlabeled":
            return images, np.full(len(images), -1)
        labels = stl10_input.read_labels(folder / f"{name}_y.bin").astype(np.int64) - 1
        if len(labels) != len(images):
            raise DataError(f"{folder}/{name}_y.bin: not a label for each image; delete it and run again")
        return images, labels

    classes, checksums = stl10_input.CLASS_NAMES, stl10_input.FILE_MD5  # compared when they were extracted
    data = _with_validation("stl10", *split("train"), split("test"), classes, checksums)
    data.images["unlabeled"], data.labels["unlabeled"] = split("unlabeled")
    return data


def _resized(image, width, height):
    """An image (H, W, 3), uint8, resized with antialiasing (Pillow's bicubic)."""
    image = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Metadata:
    """What a picture file holds beside its pixels."""

    kind: str = ""  # its format, one of FORMATS
    spec: oiio.ImageSpec = field(default_factory=oiio.ImageSpec)  # with what OpenImageIO knows of it
    raw: bytes = b""  # the file


def read_picture(path, keep_grey=False):
    """Read an image file as RGB, uint8 (H, W, 3): upright by its EXIF orientation, no alpha.

    With `keep_grey` a grey picture stays grey, (H, W, 1).
    """
    pixels, _, metadata = read_pixels(path)
    pixels = upright(pixels, metadata)
    if pixels.dtype == np.uint16:
        pixels = np.round(pixels / 257).astype(np.uint8)
    return pixels if keep_grey else np.repeat(pixels, 3 // pixels.shape[2], axis=2)


def read_pixels(path):
    """Read an image file without loss, its pixels as they lie in it.

    Returns:
        uint8 or uint16 array, (H, W, 1) of a grey image or (H, W, 3) of a coloured one (palettes and CMYK
        become RGB); its alpha (H, W), or None; and its `Metadata`.
    """
    raw = Path(path).read_bytes()
    try:
        pixels, kind, spec = _decoded(path)
        if b"acTL" in raw[: raw.find(b"IDAT")] and kind == "PNG":
            raise ValueError("an animation")
    except ValueError as error:
        message = f"{path}: not a readable image ({util.first_line(error)}); convert it to plain PNG"
        raise DataError(message) from None
    colours = 3 if pixels.shape[2] > 2 else 1
    alpha = pixels[..., -1] if pixels.shape[2] > colours else None
    return pixels[..., :colours], alpha, Metadata(kind, spec, raw)


def _decoded(path):
    """Pixels of an image file, its format and its descriptive attributes; ValueError if it is not plain."""
    options = oiio.ImageSpec()
    options["oiio:UnassociatedAlpha"] = options["tiff:keep_unassociated_alpha"] = 1
    image = oiio.ImageInput.open(os.fsencode(path).decode(), options)
    kind = image.format_name().upper() if image else "damaged"
    if kind not in FORMATS:
        raise ValueError(f"not PNG, JPEG, TIFF or WebP, but {oiio.geterror() or kind}")
    spec = image.spec().copy()
    pixels = image.read_image(0, 0, 0, spec.nchannels, "unknown")  # of its own type
    if image.has_error or pixels is None:
        raise ValueError(image.geterror())
    photometry = spec.get_string_attribute("tiff:ColorSpace")
    multiplied = spec.alpha_channel >= 0 and not spec.get_int_attribute("oiio:UnassociatedAlpha")
    following = image.seek_subimage(1, 0)
    rare = {
        f"pixels of type {spec.format}": pixels.dtype not in (np.uint8, np.uint16),
        f"channels {', '.join(spec.channelnames)}": spec.channelnames not in CHANNELS,
        f"colours as {photometry}": photometry not in ("", "palette", "CMYK", "YCbCr"),
        "colours multiplied by alpha": multiplied,
        "a palette of 8 bits, or nothing but black": photometry == "palette" and not pixels.any(),
        "several pictures": following and image.spec().get_int_attribute("tiff:subfiletype") != THUMBNAIL,
    }
    if found := [reason for reason, there in rare.items() if there]:
        raise ValueError(", ".join(found))
    white_is_zero = spec.get_int_attribute("tiff:PhotometricInterpretation", 1) == 0
    if white_is_zero and pixels.dtype == np.uint16:  # OpenImageIO has turned 8 bits
        pixels = 65535 - pixels
    if "CMYK" in (photometry, spec.get_string_attribute("jpeg:ColorSpace")):
        spec.erase_attribute("ICCProfile")  # which does not fit RGB
    spec.erase_attribute("(ICCProfile:|oiio:|tiff:|compression).*")  # of the coding, or of no use in PNG
    return pixels, kind, spec


def upright(pixels, metadata):
    """Turn and mirror pixels (H, W, C) of a file as its EXIF orientation says."""
    orientation = metadata.spec.get_int_attribute("Orientation", 1)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    rows, columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


def format_for(path, pixels, alpha=None):
    """The format that the ending of `path` asks for; it must hold these channels and their depth."""
    kind = SUFFIXES.get(path.suffix.lower())
    if not kind:
        raise DataError(f"{path}: no format to write has this ending; choose .png, or a folder that is there")
    if pixels.dtype == np.uint16 and kind not in ("PNG", "TIFF"):
        raise DataError(f"{path}: {kind} holds no 16 bits; choose .png")
    if alpha is not None and kind == "JPEG":
        raise DataError(f"{path}: JPEG holds no transparency; choose .png")
    return kind


def write_pixels(path, pixels, alpha=None, metadata=Metadata()):
    """Write what `read_pixels` returns, in the format that the ending of `path` asks for.

    PNG keeps all that a PNG holds. JPEG and WebP keep EXIF, XMP, profile, resolution and comment as they are,
    JPEG also IPTC. TIFF, and PNG from other formats, get XMP, EXIF without notes of the maker, profile and
    resolution. What a PNG says of its colours without a profile, PNG alone keeps.
    """
    kind = format_for(path, pixels, alpha)
    channels = pixels if alpha is None else np.dstack([pixels, alpha])
    write = _write_png_or_tiff if kind in ("PNG", "TIFF") else _write_jpeg_or_webp
    with util.atomic(path) as temporary:
        try:
            write(temporary, kind, np.ascontiguousarray(channels), metadata)
        except (OSError, ValueError, struct.error) as error:
            remedy = "free space on the disk, or choose .png"
            raise OSError(f"{path}: {kind} was not written ({util.first_line(error)}); {remedy}") from None


def _write_png_or_tiff(path, kind, channels, metadata):
    height, width, count = channels.shape
    spec = oiio.ImageSpec(width, height, count, str(channels.dtype))
    spec.extra_attribs = metadata.spec.extra_attribs
    spec.channelnames, spec.alpha_channel = CHANNELS[count - 1], -1 if count % 2 else count - 1
    spec["oiio:UnassociatedAlpha"] = spec["tiff:write_iptc"] = 1
    spec["oiio:ColorSpace"] = "unknown"  # else PNG says sRGB, whatever the profile
    file = oiio.ImageOutput.create(kind.lower())
    written = file.open(os.fsencode(path).decode(), spec) and file.write_image(channels) and file.close()
    if not written or not np.array_equal(_decoded(path)[0], channels):  # a full disk is not always told
        raise ValueError(file.geterror())
    raw = path.read_bytes()
    if kind == metadata.kind == "PNG":  # the chunks beside the pixels stay as they were
        read, written = list(_png_chunks(metadata.raw)), list(_png_chunks(raw))
        kept = [chunk for chunk in read if chunk[4:5].islower() and chunk[4:8] not in CODING_CHUNKS]
        head, *pixels = (chunk for chunk in written if chunk[4:5].isupper())
        path.write_bytes(b"".join([raw[:PNG_SIGNATURE_BYTES], head, *kept, *pixels]))
    elif xmp := _described_by_pillow(metadata).get("xmp"):
        path.write_bytes(_png_with_xmp(raw, xmp) if kind == "PNG" else _tiff_with_xmp(raw, xmp))


def _png_chunks(raw):
    """Chunks of a PNG file: length, kind, content and checksum."""
    start, kind = PNG_SIGNATURE_BYTES, b""
    while start < len(raw) and kind != b"IEND":
        end, kind = start + 12 + int.from_bytes(raw[start : start + 4], "big"), raw[start + 4 : start + 8]
        yield raw[start:end]
        start = end


def _png_with_xmp(raw, xmp):
    chunk = b"iTXtXML:com.adobe.xmp" + bytes(5) + xmp
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    head, *others = _png_chunks(raw)
    return b"".join([raw[:PNG_SIGNATURE_BYTES], head, chunk, *others])


def _tiff_with_xmp(raw, xmp):
    """A TIFF file with this XMP in the place of its own, and a new directory behind it at the end."""
    order = "<" if raw[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(f"{order}I", raw, 4)
    (count,) = struct.unpack_from(f"{order}H", raw, directory)
    entries = {}
    for start in range(directory + 2, directory + 2 + 12 * count, 12):
        entries[struct.unpack_from(f"{order}H", raw, start)[0]] = raw[start : start + 12]
    place = len(raw) + len(raw) % 2  # values and directories lie at even places
    entries[XMP_TAG] = struct.pack(f"{order}HHII", XMP_TAG, 1, len(xmp), place)
    parts = [raw[:4], struct.pack(f"{order}I", place + len(xmp) + len(xmp) % 2)]
    parts += [raw[8:], bytes(len(raw) % 2), xmp, bytes(len(xmp) % 2)]
    parts += [struct.pack(f"{order}H", len(entries)), *(entries[tag] for tag in sorted(entries)), bytes(4)]
    return b"".join(parts)


def _write_jpeg_or_webp(path, kind, channels, metadata):
    # by Pillow: OpenImageIO's JPEG ends the process on a full disk, its WebP changes colours under alpha 0
    coding = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True, "exact": True}
    image = Image.fromarray(channels.squeeze(2) if channels.shape[2] == 1 else channels)
    file = io.BytesIO()  # since Pillow does not see that a disk fills up
    image.save(file, kind, **coding, **_described_by_pillow(metadata))
    path.write_bytes(file.getvalue())


def _described_by_pillow(metadata):
    """Options of `Image.save` that hold a file's metadata."""
    if not metadata.raw:
        return {}
    try:
        image = Image.open(io.BytesIO(metadata.raw), formats=[metadata.kind])
    except UnidentifiedImageError:  # a TIFF of 16-bit grey with alpha
        return {}
    with image:
        if metadata.kind == "PNG":
            image.load()  # what lies behind the pixels, too
        described = {key: image.info.get(key) for key in ("exif", "xmp", "icc_profile", "dpi", "comment")}
        described["icc_profile"] = metadata.spec.get("ICCProfile", np.empty(0)).tobytes()
        if metadata.kind in ("TIFF", "WEBP"):
            exif = image.getexif()
            exif.bigtiff = False  # the offsets that no other format has
            for tag in set(exif) - EXIF_TAGS:
                del exif[tag]
            described |= {"exif": exif.tobytes(), "dpi": None}  # which EXIF has
        iptc = [content for name, content in getattr(image, "applist", []) if name == "APP13"]
    described["extra"] = b"".join(b"\xff\xed" + struct.pack(">H", 2 + len(part)) + part for part in iptc)
    return {key: value for key, value in described.items() if value}


def pictures_by_name(folder):
    """Paths of the images in a folder by name, with subfolders and without endings."""
    named = {}
    for path in image_files(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in named:
            raise DataError(f"{path}: of the same name as {named[name]}; remove one")
        named[name] = path
    return named


def picture_pairs(folder, noisy_folder):
    """Paths of each picture and its noisy version, a dict by the names of their files."""
    clean, noisy = pictures_by_name(folder), pictures_by_name(noisy_folder)
    if unmatched := sorted(clean.keys() ^ noisy.keys()):
        place = noisy_folder if unmatched[0] in clean else folder
        message = f"has no picture named {unmatched[0]}, as the other folder does; add or remove it"
        raise DataError(f"{place}: {message}")
    return {name: (clean[name], noisy[name]) for name in clean}


def read_pair(clean_path, noisy_path):
    """Read a clean and a noisy picture, uint8 arrays of one shape (H, W, 3) or, if grey, (H, W, 1)."""
    clean, noisy = (read_picture(path, keep_grey=True) for path in (clean_path, noisy_path))
    if clean.shape != noisy.shape:
        sizes = " and ".join("x".join(map(str, picture.shape)) for picture in (clean, noisy))
        raise DataError(f"{noisy_path}: of another size than its partner ({sizes}); remove one")
    if min(clean.shape[:2]) < MIN_SIZE:
        raise DataError(f"{clean_path}: smaller than {MIN_SIZE}x{MIN_SIZE} pixels; remove it")
    return clean, noisy


def pictures_with_noise(pairs, kind, sigma=None):
    """Name, clean and noisy picture of what `picture_pairs` returns; with sigma, noise is added instead.

    White noise is that of the protocol's seed in each picture, one channel of it in a grey one. Other kinds
    are drawn by one generator for all pictures, since what they choose, as a camera, is to differ. Clean
    pictures are uint8, and noisy ones uint8 or, with noise added, float32.
    """
    rng = None if kind == "white" else np.random.default_rng(TEST_NOISE_SEED)
    for name, paths in pairs.items():
        clean, noisy = read_pair(*paths)
        if sigma is not None:
            if kind != "white":  # the others need three channels
                clean = np.repeat(clean, 3 // clean.shape[2], axis=2)
            noisy = add_noise(clean[None], sigma, rng, kind)[0]
            clean = clean_of(clean[None], kind)[0]
        yield name, clean, noisy


def _patches_of(picture, size, margin, shrinking, split, rng, at_most):
    """Cut a picture (H, W, 3) into a list of patches, views of it; `at_most` are drawn.

    Training patches are `margin` pixels larger and overlap by half. For training and validation, copies
    shrunk by the divisors in `shrinking` are cut as well, in proportionally smaller steps.
    """
    step = size
    if split == "train":
        step, size = size // 2, size + margin
        lacking = [(0, max(0, size - side)) for side in picture.shape[:2]]
        if min(picture.shape[:2]) >= size - margin:
            picture = np.pad(picture, (*lacking, (0, 0)), mode="symmetric")
    copies = [(picture, step)]
    for divisor in shrinking if split != "test" else ():
        if min(picture.shape[:2]) // divisor >= size:
            copy = _resized(picture, picture.shape[1] // divisor, picture.shape[0] // divisor)
            copies.append((copy, step // divisor))
    places = []
    for copy, step in copies:
        corners = (range(0, side - size + 1, step) for side in copy.shape[:2])
        places += [(copy, *corner) for corner in itertools.product(*corners)]
    if len(places) > at_most:
        places = [places[index] for index in np.sort(rng.choice(len(places), at_most, replace=False))]
    return [copy[top : top + size, left : left + size] for copy, top, left in places]


def split_pictures(labels):
    """Split of each photograph, given their labels.

    Of every class a twentieth, rounded up, is held out for validation, and as many for testing.
    A class is split alike whatever lies beside it, if all have FEWEST_TO_HOLD_OUT photographs or more; else
    all photographs are split as one class.
    """
    labels = np.asarray(labels)
    if np.unique(labels, return_counts=True)[1].min() < FEWEST_TO_HOLD_OUT:
        labels = np.zeros_like(labels)
    splits = np.full(len(labels), "train", object)
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        share = math.ceil(len(members) / 20)
        drawn = np.random.default_rng(SPLIT_SEED).permutation(members)
        splits[drawn[:share]], splits[drawn[share : 2 * share]] = "validation", "test"
    return splits


def _cut_photographs(source, pictures, labels_of, class_names, checksums, size, margin, shrinking):
    """`Data` of pictures, uint8 (H, W, 3): split, then cut; few are each cut into three bands first."""
    count, splits = len(labels_of), split_pictures(labels_of)
    patches, labels = ({split: [] for split in PATCH_SPLITS} for _ in range(2))
    shown, most = None, -1
    for index, picture in enumerate(pictures):
        regions = {splits[index]: picture}
        if count < FEWEST_TO_HOLD_OUT:
            first, second = int(0.7 * picture.shape[1]), int(0.85 * picture.shape[1])
            regions = dict(zip(PATCH_SPLITS, np.split(picture, [first, second], axis=1), strict=True))
        for split, region in regions.items():
            rng = np.random.default_rng((SPLIT_SEED, index))
            cut = _patches_of(region, size, margin, shrinking, split, rng, max(1, MAX_PATCHES // count))
            patches[split] += [np.array(cut)] if cut else []
            labels[split] += [labels_of[index]] * len(cut)
            if split == "test" and cut:
                middle = _middle(region, min(SHOWN_PICTURE[0], 2 * region.shape[1]), SHOWN_PICTURE[1])
                if texture(middle) > most:
                    shown, most = middle.copy(), texture(middle)
    for split in PATCH_SPLITS:
        if not patches[split]:
            none = f"no picture drawn for {split} gives a patch of {size}x{size}"
            raise DataError(f"{source}: {none}; lower --size, or remove small and damaged pictures")
        patches[split], labels[split] = np.concatenate(patches[split]), np.array(labels[split])
    for split, kept in (("validation", VALIDATION), ("test", None)):  # the first ones are of many pictures
        order = np.random.default_rng(SPLIT_SEED).permutation(len(labels[split]))[:kept]
        patches[split], labels[split] = patches[split][order], labels[split][order]
    return Data(dataset_name(source), patches, labels, class_names, checksums, shown)


def _middle(picture, height, width):
    top, left = (max(0, side - kept) // 2 for side, kept in zip(picture.shape, (height, width), strict=False))
    return picture[top : top + height, left : left + width]


def _load_photos(*cut):
    photographs = load_sample_images()
    pictures, names = photographs.images, [Path(name).name for name in photographs.filenames]
    checksums = {name: hashlib.md5(image).hexdigest() for name, image in zip(names, pictures, strict=True)}
    return _cut_photographs("photos", pictures, range(len(pictures)), PHOTOS_CLASSES, checksums, *cut)


def image_files(folder, remedy="choose another"):
    """Paths of the images in a folder, its subfolders and what they link to, sorted; hidden ones left out."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {remedy}")
    files, walked = [], set()
    for place, folders, names in os.walk(folder, onerror=print, followlinks=True):
        real = os.path.realpath(place)
        if real in walked:  # a link leads back to it
            folders.clear()
            continue
        walked.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        files += [Path(place, name) for name in names if name[0] != "."]
    files = sorted(path for path in files if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"{folder}: there are no images in it; {remedy}")
    return files


def classes_of(files, folder):
    """Class of each image file in a folder, by path: its subfolder; beside subfolders the data set's name."""
    name = dataset_name(folder)
    return {path: name if path.parent == folder else path.relative_to(folder).parts[0] for path in files}


def _load_folder(folder, size, *cut):
    """Patches of a user's own images; subfolders are classes, and what lies beside them is one more."""
    files = image_files(folder, f"--dataset is {', '.join(BUILT_IN)} or a folder of images")
    class_of = classes_of(files, folder)
    classes = sorted(set(class_of.values()))
    print(f"Cutting {len(files):,} images of {folder} into {size}x{size} patches", flush=True)
    labels = [classes.index(class_of[path]) for path in files]
    # a name that is no Unicode is shown with escapes
    classes = tuple(os.fsencode(name).decode(errors="backslashreplace") for name in classes)
    listing = repr([(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files])
    checksums = {"names and sizes": hashlib.md5(listing.encode()).hexdigest()}
    pictures = map(_readable_picture, files)
    return _cut_photographs(folder, pictures, labels, classes, checksums, size, *cut)


def _readable_picture(path):
    """An unreadable file is named and gives an empty picture."""
    try:
        return read_picture(path)
    except DataError as error:
        print(f"Left out: {error}", flush=True)
        return np.empty((0, 0, 3), np.uint8)


def add_noise(images, sigma, rng=None, kind="white"):
    """Add noise of some kind; all but `jpeg` and `camera`, which end as 8 bits, are not clipped.

    Args:
        images: uint8 array (N, H, W, 3).
        sigma: Strength on the 0-255 scale, one number or one for each image; of white noise, its standard
            deviation. What it is of other kinds, their functions tell.
        rng: `numpy.random.Generator`; by default a new one with the test noise's seed, which makes the
            noisy test images of the protocol. Piece by piece, one generator draws the same white noise.
        kind: One of NOISE_KINDS. Grey noise turns the images to grey: compare with `clean_of(images, kind)`.
            JPEG has the protocol's quality.

    Returns:
        float32 array (N, H, W, 3), nominally in [0, 1].
    """
    sigma = np.reshape(np.asarray(sigma, np.float64), (-1, 1, 1, 1))
    rng = rng or np.random.default_rng(TEST_NOISE_SEED)
    sigma = np.broadcast_to(sigma, (len(images), 1, 1, 1))
    fixed = {"quality": TEST_JPEG_QUALITY} if kind == "jpeg" else {}
    return NOISE_KINDS[kind](clean_of(images, kind) / 255, sigma, rng, **fixed).astype(np.float32)


def clean_of(images, kind):
    """Ground truth for a kind of noise: images uint8 (N, H, W, 3), or for `grey` their grey versions."""
    if kind != "grey":
        return images
    return np.broadcast_to(images.mean(axis=-1, keepdims=True).round().astype(np.uint8), images.shape)


# Kinds of noise: functions of clean images x, floats (N, H, W, 3) in [0, 1], of their sigma (N, 1, 1, 1) on
# the 0-255 scale and of a Generator, to noisy images y. In formulas s is sigma / 255, n standard normal.


def white(images, sigma, rng):
    """y = x + s n: additive white Gaussian noise."""
    return images + rng.standard_normal(images.shape) * (sigma / 255)


def grey(images, sigma, rng):
    """y = x + s n, one n for all channels, as in a grey picture; `clean_of` makes x grey."""
    return images + rng.standard_normal((*images.shape[:3], 1)) * (sigma / 255)


def jpeg(images, sigma, rng, quality=None):
    """White noise in a JPEG file: clipped, rounded and coded; sigma is that of the white noise.

    Files are of one quality and 4:2:0, or quality, 4:4:4 or 4:2:0 are drawn for each.
    """
    noisy = util.to_uint8(white(images, sigma, rng))
    if quality:
        return util.to_float(through_jpeg(noisy, [quality] * len(noisy), [2] * len(noisy)))
    return util.to_float(through_jpeg(noisy, *draw_jpeg(len(noisy), rng)))


def draw_jpeg(count, rng):
    """Quality and Pillow's subsampling (0: 4:4:4, 2: 4:2:0) of JPEG files."""
    return rng.integers(*TRAINING_JPEG_QUALITIES, count, endpoint=True), 2 * rng.integers(2, size=count)


def through_jpeg(images, qualities, subsamplings):
    """Images uint8 (N, H, W, 3) as they come out of JPEG files."""
    decoded = np.empty_like(images)
    for index, (quality, subsampling) in enumerate(zip(qualities, subsamplings, strict=True)):
        file = io.BytesIO()
        Image.fromarray(images[index]).save(file, "JPEG", quality=int(quality), subsampling=int(subsampling))
        decoded[index] = Image.open(file)
    return decoded


def correlated(images, sigma, rng):
    """y = x + s (sqrt(c) a + sqrt(1 - c) b): a alike in all channels, b of each channel's own.

    a and b are white Gaussian noise after Gaussian filters of two radii, scaled to variance 1. c, from 0 to
    1, and the radii, in CORRELATED_RADII, are drawn for each image. y - x has deviation s everywhere.
    """
    shape = (len(images), 1, 1, 1)
    common, own = (
        low_pass(rng.standard_normal((*images.shape[:3], channels), np.float32), radius, keep_variance=True)
        for channels, radius in zip((1, 3), rng.uniform(*CORRELATED_RADII, (2, *shape)), strict=True)
    )
    share = rng.random(shape)
    return images + (np.sqrt(share) * common + np.sqrt(1 - share) * own) * (sigma / 255)


def poisson(images, sigma, rng):
    """y = Poisson(k x) / k, shot noise of k counts at white: variance x / k; k makes it s^2 at x = 1/2."""
    counts = 0.5 / np.square(np.maximum(sigma / 255, 1e-6))
    return rng.poisson(images * counts) / counts


def speckle(images, sigma, rng):
    """y = x + 2 s x n: multiplicative noise, whose deviation is s at x = 1/2."""
    return images + images * rng.standard_normal(images.shape, np.float32) * (2 * sigma / 255)


def varying(images, sigma, rng):
    """y = x + s m n: m, of mean square 1, varies over the picture, as in FFDNet's spatially variant noise.

    m is drawn at 4x4 points from 0.1 to 1 and interpolated linearly (Zhang, Zuo, Zhang, "FFDNet: Toward a
    Fast and Flexible Solution for CNN-Based Image Denoising", 2018).
    """
    rows, columns = (np.linspace(0, 3, side)[:, None] - np.arange(4) for side in images.shape[1:3])
    tents = (np.maximum(0, 1 - np.abs(distance)) for distance in (rows, columns))
    level = np.einsum("hi,wj,nij->nhw", *tents, rng.uniform(0.1, 1, (len(images), 4, 4)))[..., None]
    level /= np.sqrt(np.square(level).mean(axis=(1, 2), keepdims=True))
    return images + level * rng.standard_normal(images.shape, np.float32) * (sigma / 255)


def impulse(images, sigma, rng):
    """Salt and pepper: y is 0 or 1, evenly, for a share p of the values, else x.

    p is what brings a root mean square error of s in each image: s^2 over the mean of (x^2 + (1 - x)^2) / 2,
    and at most 1, which sigma reaches at 127.5 in mid-grey and at 180 in black and white.
    """
    cost = (np.square(images) + np.square(1 - images)).mean(axis=(1, 2, 3), keepdims=True) / 2
    share = np.minimum(np.square(sigma / 255) / cost, 1)
    drawn = rng.random(images.shape, np.float32)
    return np.where(drawn < share / 2, 0, np.where(drawn < share, 1, images))


def uniform(images, sigma, rng):
    """y = x + s u: u uniform from -sqrt(3) to sqrt(3), of variance 1, as rounding to few levels adds."""
    return images + rng.uniform(-math.sqrt(3), math.sqrt(3), images.shape) * (sigma / 255)


def camera(images, sigma, rng):
    """Noise of photographs as cameras write them, by a simulated camera.

    To linear light and the sensor's values v, Bayer mosaic, shot and read noise of variance a v + b,
    demosaicing, white balance, colour matrix, gamma, tone curve; smoothing, sharpening and JPEG, each in some
    cameras; 8 bits. Brooks et al., "Unprocessing Images for Learned Raw Denoising", CVPR 2019; Guo et al.,
    "Toward Convolutional Blind Denoising of Real Photographs" (CBDNet), CVPR 2019; Zhang et al., "Practical
    Blind Image Denoising via Swin-Conv-UNet and Data Synthesis" (SCUNet), 2023.

    The mean of many noisy images y is to be the picture x, and without noise y is x: a denoiser is not to
    undo what cameras do to pictures. So linear steps are applied to the noise n alone, and a step f that is
    not linear, such as curves and JPEG, turns it into (f(x + n) - f(x - n)) / 2.

    sigma is the deviation that green has on the sensor at mid-grey, in grey levels of sRGB. Of y - x it
    is about half to once that, less in blacks and whites.
    """
    return developed(images, sensor_noise(images, sigma, rng), rng)


def sensor_noise(images, sigma, rng):
    """Noise of a simulated camera in its demosaiced pictures, (N, H, W, 3) in sRGB."""
    images, sigma = images.astype(np.float32), sigma.astype(np.float32)

    def draw(low, high, channels=1):
        return rng.uniform(low, high, (len(images), 1, 1, channels)).astype(np.float32)

    curved = draw(0, 1) < TONE_CURVE_SHARE
    linear, slope = to_linear(images, curved), MID_GREY_SLOPE * np.where(curved, np.float32(1.5), 1)
    # shot and read noise a and b in the proportion of real cameras, and together as strong as sigma says
    variance = np.square(sigma / 255 / slope)
    shot = np.maximum(variance, 1e-12) / MID_GREY
    # Brooks et al.
    read = np.exp(2.18 * np.log(shot) + 1.2 + 0.26 * rng.standard_normal(shot.shape, np.float32))
    shot, read = (part * variance / (shot * MID_GREY + read) for part in (shot, read))
    gains = draw((1.9, 1, 1.5), (2.4, 1, 1.9), 3)  # of the white balance (Brooks et al.)
    excess = draw(*COLOUR_MATRIX)
    values = (linear + excess * linear.mean(axis=-1, keepdims=True)) / (1 + excess) / gains

    bayer = bayer_colours(images.shape[:3], rng)
    value, gain = (
        np.take_along_axis(of_colours, bayer[..., None], axis=-1)
        for of_colours in (values, np.broadcast_to(gains, values.shape))
    )
    noise = gain * np.sqrt(shot * value + read) * rng.standard_normal(value.shape, np.float32)
    noise = demosaic(noise[..., 0], bayer)
    noise = (1 + excess) * noise - excess * noise.mean(axis=-1, keepdims=True)
    return (to_srgb(linear + noise, curved) - to_srgb(linear - noise, curved)) / 2


def developed(images, noise, rng):
    """Images with what the smoothing, sharpening and JPEG of a camera leave of their noise, in 8 bits."""

    def draw(low, high, share=1.0):
        drawn = rng.uniform(low, high, (len(images), 1, 1, 1)).astype(np.float32)
        return drawn * (rng.random(drawn.shape) < share)

    to_luma = np.array(LUMA, np.float32)[:, None]
    rough = noise @ to_luma
    colour = low_pass(noise - rough, draw(*SMOOTHED_COLOUR))
    luma = low_pass(rough, draw(*SMOOTHED_LUMA))
    steps = sum(map(np.square, np.gradient(255 * (images @ to_luma), axis=(1, 2))))
    luma += draw(0, 1) * steps / (steps + EDGE**2) * (rough - luma)  # cameras smooth edges less
    luma += draw(0, 1, SHARPENED_SHARE) * (luma - low_pass(luma, SHARPENING_RADIUS))
    noise = luma + colour
    files = rng.random(len(images)) < JPEG_SHARE
    options = draw_jpeg(files.sum(), rng)
    with_noise, against = (
        util.to_float(through_jpeg(util.to_uint8(images[files] + part), *options))
        for part in (noise[files], -noise[files])
    )
    noise[files] = (with_noise - against) / 2
    return util.to_float(util.to_uint8(images + noise))


def to_linear(images, curved):
    """sRGB in [0, 1] to linear light (IEC 61966-2-1), where `curved` from before a smoothstep tone curve."""
    images = np.where(curved, 0.5 - np.sin(np.arcsin(1 - 2 * images) / 3), images)
    return np.where(images <= 0.04045, images / 12.92, ((images + 0.055) / 1.055) ** 2.4)


def to_srgb(linear, curved):
    """Inverse of `to_linear`; clips to [0, 1]."""
    linear = np.clip(linear, 0, 1)
    images = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.where(curved, images**2 * (3 - 2 * images), images)


def bayer_colours(shape, rng):
    """Colour (0 red, 1 green, 2 blue) of each pixel of Bayer mosaics (N, H, W), each of random phase."""
    top, left = rng.integers(2, size=(2, shape[0], 1, 1))
    return (top + np.arange(shape[1])[:, None]) % 2 + (left + np.arange(shape[2])) % 2


def demosaic(mosaic, bayer):
    """Colours (N, H, W, 3) of Bayer mosaics (N, H, W) by linear filters.

    Malvar, He, Cutler, "High-Quality Linear Interpolation for Demosaicing of Bayer-Patterned Color Images",
    ICASSP 2004.
    """
    kernels = np.array(DEMOSAICING)[:, None] / 16
    cross, along, across, diagonal = (convolve(mosaic, kernel, mode="mirror") for kernel in kernels)
    red_row = (bayer[..., :2] == 0).any(axis=-1, keepdims=True)
    red = np.where(bayer == 0, mosaic, np.where(bayer == 2, diagonal, np.where(red_row, along, across)))
    blue = np.where(bayer == 2, mosaic, np.where(bayer == 0, diagonal, np.where(red_row, across, along)))
    return np.stack([red, np.where(bayer == 1, mosaic, cross), blue], axis=-1)


def low_pass(images, radius, keep_variance=False):
    """Filter images (N, H, W, C) with Gaussians of deviation `radius` (N, 1, 1, 1) in pixels, cyclically.

    With `keep_variance`, white noise has the same variance afterwards.
    """
    spectrum = np.fft.rfft2(images, axes=(1, 2))
    for axis in (1, 2):
        frequency = np.fft.fftfreq(images.shape[axis]).reshape([-1 if n == axis else 1 for n in range(4)])
        gain = np.exp(-2 * np.square(np.pi * radius * frequency))
        if keep_variance:
            gain /= np.sqrt(np.square(gain).mean(axis=axis, keepdims=True))
        spectrum *= gain[:, :, : spectrum.shape[2]]
    return np.fft.irfft2(spectrum, s=images.shape[1:3], axes=(1, 2))


NOISE_KINDS = {
    kind.__name__: kind
    for kind in (white, grey, jpeg, camera, correlated, poisson, speckle, varying, impulse, uniform)
}
PHOTOGRAPHS_NOISE = {"white": 0.42, "camera": 0.28, "grey": 0.14, "jpeg": 0.06, "correlated": 0.03}
PHOTOGRAPHS_NOISE |= {"poisson": 0.015, "speckle": 0.015, "varying": 0.015, "impulse": 0.015, "uniform": 0.01}
OWN = "own"  # in the place of a kind of noise: the pictures are noisy already
NEIGHBOURS = ((0, 1), (1, 0), (0, 2), (2, 0), (1, 3), (3, 1), (2, 3), (3, 2))  # in a cell of 2x2, by row


def draw_neighbours(images, distance, seed):
    """Two images of noisy ones, each of a pixel of every cell; where they differ, it is mostly by noise.

    Of a cell, 2 * distance pixels wide, two pixels are drawn that are `distance` apart in a row or column.
    Huang et al., "Neighbor2Neighbor: Self-Supervised Denoising from Single Noisy Images", CVPR 2021, where
    the distance is 1.

    Args:
        images: List of tensors (N, H, W, 3), H and W multiples of 2 * distance; all give the same pixels.
        distance: In pixels, beyond which noise is taken to be independent.
        seed: `keras.random.SeedGenerator`.

    Returns:
        Pairs of tensors (N, H / 2 / distance, W / 2 / distance, 3), one for each of `images`.
    """
    side = 2 * distance
    count, height, width, channels = ops.shape(images[0])
    shape = count, height // side, width // side
    pair = keras.random.randint(shape, 0, len(NEIGHBOURS), seed=seed)
    top, left = (keras.random.randint(shape, 0, distance, seed=seed) for _ in range(2))
    chosen = []
    for corners in np.array(NEIGHBOURS, np.int32).T:
        corner = ops.take(corners, pair)
        row, column = top + corner // 2 * distance, left + corner % 2 * distance
        chosen.append(ops.one_hot(row * side + column, side * side)[..., None])

    def pixels(image, place):
        cells = ops.reshape(image, (count, shape[1], side, shape[2], side, channels))
        cells = ops.reshape(ops.transpose(cells, (0, 1, 3, 2, 4, 5)), (*shape, side * side, channels))
        return ops.sum(cells * place, axis=3)

    return [tuple(pixels(image, place) for place in chosen) for image in images]


def noise_shares(names):
    """Shares by kind of noise: those of PHOTOGRAPHS_NOISE for the name `photographs`, else equal ones."""
    if names == ["photographs"]:
        return PHOTOGRAPHS_NOISE
    return dict.fromkeys(names, 1 / len(set(names)))


def halve_grainy(images):
    """Images (N, H, W, 3) in [0, 1], H and W even; a grainy one at half its size, mirrored to fill the frame.

    Many photographs that are taken as clean have as much grain as is to be removed; means of 2x2 pixels have
    less. An image's grain is what its calmest 8x8 pixels have, unless that is so much that they are texture.
    """
    steps = np.diff(255 * (images @ np.array(LUMA, np.float32)), axis=2)
    power = uniform_filter(np.square(steps), (0, 8, 8)).min(axis=(1, 2)) / 2
    small = images.reshape(len(images), images.shape[1] // 2, 2, images.shape[2] // 2, 2, 3).mean(axis=(2, 4))
    mirrored = np.pad(small, [(0, 0), (0, small.shape[1]), (0, small.shape[2]), (0, 0)], mode="symmetric")
    low, high = np.square(GRAIN)
    return np.where(((low < power) & (power < high))[:, None, None, None], mirrored, images)


def training_pair(images, kind, position, sigma, rng):
    """Noisy and clean images of one kind of noise, as denoisers are trained on them.

    Args:
        images: uint8 array (N, H, W, 3).
        kind: One of NOISE_KINDS, or OWN, whose pairs are the images as they are.
        position: Where each image lies in the range of strengths, (N, 1, 1, 1) from 0 to 1.
        sigma: Lowest and highest strength on the 0-255 scale. That of camera noise is kept within
            CAMERA_SIGMA, on a logarithmic scale, and zero for a share of NOISELESS.
        rng: `numpy.random.Generator`.

    Returns:
        Two float arrays like `images`, nominally in [0, 1].
    """
    clean, (low, high) = util.to_float(clean_of(images, kind)), sigma
    if kind == OWN:
        return clean, clean
    strength = low + position * (high - low)
    if kind == "camera":
        clean, (low, high) = halve_grainy(clean), np.clip(sigma, *CAMERA_SIGMA)
        strength = np.where(rng.random(position.shape) < NOISELESS, 0, low * (high / low) ** position)
    return NOISE_KINDS[kind](clean, strength, rng), clean


def validation_pair(images, noise, sigma):
    """Noisy and clean validation images, float32, always the same.

    Args:
        images: uint8 array (N, H, W, 3).
        noise: Kinds of noise and their shares, as in the training.
        sigma: Lowest and highest strength on the 0-255 scale; the images' are spread evenly between.
    """
    rng = np.random.default_rng(VALIDATION_NOISE_SEED)
    position = np.linspace(0, 1, len(images)).reshape(-1, 1, 1, 1)
    order = rng.permutation(len(images)) if len(noise) > 1 else np.arange(len(images))
    bounds = np.round(np.cumsum(list(noise.values()))[:-1] * len(images)).astype(int)
    noisy, clean = np.empty((2, *images.shape), np.float32)
    for kind, chosen in zip(noise, np.split(order, bounds), strict=True):
        noisy[chosen], clean[chosen] = training_pair(images[chosen], kind, position[chosen], sigma, rng)
    return noisy, clean


def cut_at_random(images, shape, rng):
    """Images (N, H, W, C) cut to a height and width, each at a place of its own."""
    height, width = shape
    tops, lefts = (
        rng.integers(0, side - kept, len(images), endpoint=True)
        for side, kept in zip(images.shape[1:3], shape, strict=True)
    )
    places = zip(images, tops, lefts, strict=True)
    return np.stack([image[top : top + height, left : left + width] for image, top, left in places])


class Batches(keras.utils.PyDataset):
    """Feed `fit` with square images, mirrored and turned at random, and noise, in a new order every epoch.

    A batch is ((images, sigma), clean), float32. White noise is left to the training graph: its images are
    clean, and sigma (N, 1, 1, 1) is its standard deviation on the scale of the images, [0, 1]. Other noise is
    in the images, and sigma is 0.

    What is drawn depends on seed, epoch and position alone, so that a resumed training sees what an
    uninterrupted one would have seen. Images may be memory-mapped and larger than memory. While one batch
    trains, AHEAD others are prepared.

    Args:
        images: uint8 array (N, H, W, 3).
        batch_size: Images in a batch; what is left over at the end of an epoch is dropped.
        noise: Dict of kinds of noise and their shares of the images; by default white noise alone.
        sigma: Lowest and highest strength of noise on the 0-255 scale, as `training_pair` takes it.
        shape: Height and width to cut images to, at random; by default they stay as they are.
    """

    def __init__(self, images, batch_size, seed=0, noise=None, sigma=(0, 75), shape=None):
        super().__init__()
        self.images, self.batch_size, self.seed = images, min(batch_size, len(images)), seed
        self.noise, self.sigma, self.shape = noise or {"white": 1.0}, sigma, shape or images.shape[1:3]
        self._pool = ThreadPoolExecutor(AHEAD)
        self.go_to(0)

    def go_to(self, epoch):
        """Shuffle as for `epoch`, counted from 0."""
        self.epoch, self._coming = epoch, {}
        self.order = np.random.default_rng((self.seed, epoch)).permutation(len(self.images))

    def __len__(self):
        return len(self.images) // self.batch_size

    def __getitem__(self, index):
        for ahead in range(index, min(index + AHEAD, len(self))):
            if ahead not in self._coming:
                self._coming[ahead] = self._pool.submit(self.prepare, ahead)
        return self._coming.pop(index).result()

    def prepare(self, index):
        """Compute a batch."""
        rng = self.random(index)
        batch = cut_at_random(self.take(index)[1], self.shape, rng)
        for turned in (batch[:, ::-1], batch[:, :, ::-1], batch.swapaxes(1, 2)):
            chosen = rng.random(len(batch)) < 0.5
            batch[chosen] = turned[chosen]
        shares = np.array(list(self.noise.values()))
        kinds = rng.choice(list(self.noise), len(batch), p=shares / shares.sum())
        position = rng.random((len(batch), 1, 1, 1))
        clean = util.to_float(batch)
        noisy, sigma = clean.copy(), np.zeros(position.shape, np.float32)
        for kind in self.noise:
            chosen = kinds == kind
            if kind == "white":
                sigma[chosen] = (self.sigma[0] + position[chosen] * (self.sigma[1] - self.sigma[0])) / 255
            elif chosen.any():
                noisy[chosen], clean[chosen] = training_pair(
                    batch[chosen], kind, position[chosen], self.sigma, rng
                )
        return (noisy, sigma), clean

    def random(self, index):
        """Generator of what is drawn for a batch."""
        # index from 1, since for NumPy (0, 0, 0) is the same as 0, the seed of test noise
        return np.random.default_rng((self.seed, self.epoch, 1 + index))

    def take(self, index):
        """Indices of the images of a batch, and a copy of these images."""
        chosen = np.sort(self.order[index * self.batch_size :][: self.batch_size])
        return chosen, self.images[chosen]


def absolute_path(text):
    """Absolute path of what a command line names, so that --resume finds it from any folder."""
    return str(Path(text).resolve())


def dataset_or_folder(text):
    """Value of --dataset: the name of a built-in data set, or the absolute path of a folder."""
    return text if text in BUILT_IN else absolute_path(text)


def add_data_options(parser, default="cifar10"):
    """Add the options that say which data a script works on; default None means those of a saved run."""
    add = parser.add_argument
    dataset = "cifar10, stl10, photos (two photographs inside scikit-learn) or a folder of images"
    dataset += "" if default else " (default: that of the run)"
    size = f"side of STL-10's images (48, 50, 72, 96) or of photographs' patches (default: {DEFAULT_SIZE})"
    where = "where data are kept and downloaded to"
    add("--dataset", type=dataset_or_folder, default=default, help=dataset)
    add("--data-dir", type=absolute_path, default=str(util.HERE / "data"), help=where)
    add("--size", type=util.number(int, MIN_SIZE), help=size)


def parse_args(argv=None):
    description = "Prepare a data set and show it."
    parser = argparse.ArgumentParser(description=description, formatter_class=util.HelpFormatter)
    add_data_options(parser)
    add = parser.add_argument
    add("--out", type=Path, default=util.HERE, help="where figures/ is")
    energy = "share of the variance that PCA keeps"
    add("--energy", type=util.number(float, 0.01, 0.99), default=0.95, help=energy)
    return parser.parse_args(argv)


def fit_pca(images, energy=0.95):
    """Fit the PCA of images, uint8 (N, H, W, 3), that keeps a share of their energy (variance).

    Its methods take pixels in [0, 1], flattened.
    """
    pixels = images.reshape(len(images), -1).astype(np.float32)
    if not np.ptp(pixels, axis=0).any():
        raise DataError("there is one picture alone, or all are equal, which gives no PCA; add pictures")
    pixels /= 255  # in place: there may be much of it
    solver = "covariance_eigh" if len(pixels) >= pixels.shape[1] else "full"
    return PCA(n_components=energy, svd_solver=solver).fit(pixels)


def show_samples(data, path):
    """Write a figure of test images, clean and with noise of the protocol's sigmas."""
    clean = data.shown("test", 8)
    rows = [("clean", clean, None)]
    for sigma in SIGMAS:
        noisy = util.to_uint8(add_noise(clean, sigma))
        rows.append((f"sigma {sigma}", noisy, util.psnr_captions(clean, noisy)))
    util.save_figure(util.rows_figure(rows, f"{data.name}: test images and the noise added to them"), path)


def main(argv=None):
    args = parse_args(argv)
    data = load_data(args.dataset, args.data_dir, args.size)
    table = []
    for split, images in data.images.items():
        labels = data.labels[split]
        counts = np.bincount(labels[labels >= 0], minlength=len(data.class_names))
        of_a_class = f"{counts.min()}-{counts.max()}" if counts.any() else "no labels"
        shape = "x".join(map(str, images.shape[1:]))
        table.append({"split": split, "images": len(images), "shape": shape, "of a class": of_a_class})
    print(util.format_table(table))
    print("classes:", ", ".join(data.class_names))
    images = data.images["train"]
    sample = images[evenly(len(images), PCA_IMAGES)]
    pca = fit_pca(sample, args.energy)
    kept = f"{pca.n_components_} of {pca.n_features_in_} components keep {args.energy:.0%}"
    print(f"PCA of {len(sample):,} training images: {kept}")
    path = args.out / "figures" / f"data_{data.name}.png"
    show_samples(data, path)
    print(f"{path}: clean and noisy samples")


if __name__ == "__main__":
    util.run_script(main)
