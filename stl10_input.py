"""Download STL-10 and CIFAR-10 whole, and read their files.

    python stl10_input.py                      # STL-10: download (2.64 GB), verify, extract, read, report
    python stl10_input.py --show               # and open a window with one training image
    python stl10_input.py --save-images 100    # and write 100 training images as PNG files, by class

Writes `data/stl10_binary/` (3.1 GB) and keeps the archive beside it; a download that was stopped is resumed.
`load_cifar10` does the same for CIFAR-10 (170 MB). Usable alone: numpy, matplotlib and the standard
library are enough. A fault is a `DataError`, an `OSError` whose message is one line with file and remedy.

STL-10 (Coates, Lee, Ng, "An Analysis of Single Layer Networks in Unsupervised Feature Learning", 2011): 96x96
colour images, 5,000 for training, 8,000 for testing, 100,000 unlabelled. CIFAR-10 (Krizhevsky, "Learning
Multiple Layers of Features from Tiny Images", 2009): 32x32, 50,000 for training, 10,000 for testing.
"""

import argparse
import hashlib
import http.client
import os
import pickle
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np

DATA_DIR = str(Path(__file__).resolve().parent / "data")
DATA_URL = "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"
DATA_PATH = DATA_DIR + "/stl10_binary/train_X.bin"
LABEL_PATH = DATA_DIR + "/stl10_binary/train_y.bin"

ARCHIVE_MD5 = "91f7769df0f17e558f3565bffb0c7dfb"
FILE_MD5 = {
    "stl10_binary/train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
    "stl10_binary/train_y.bin": "5a34089d4802c674881badbb80307741",
    "stl10_binary/test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
    "stl10_binary/test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
    "stl10_binary/unlabeled_X.bin": "5242ba1fed5e4be9e1e742405eb56ca4",
}
CLASS_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")

HEIGHT, WIDTH, DEPTH = 96, 96, 3
IMAGE_BYTES = HEIGHT * WIDTH * DEPTH

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

NETWORK_FAULTS = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


class DataError(OSError):
    """A data file that is missing, damaged or cannot be fetched; the message names file and remedy."""


def md5_of(path):
    """MD5 of a file as a hexadecimal string, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def download(url, path, md5, timeout=30, attempts=5, pause=1.0):
    """Download an archive, going on where an earlier call has stopped, verify it and return its path.

    The bytes go to `path` + ".part"; only a file with the right checksum gets its final name. A file that
    already lies at `path` is verified instead of fetched; if it is incomplete, it is taken as the beginning.

    Args:
        url: Address of the archive.
        path: Where to put it.
        md5: Expected MD5, hexadecimal.
        timeout: Seconds without a byte before an attempt counts as failed.
        attempts: Attempts in a row, none of which brought a byte, before giving up.
        pause: Seconds before the second attempt, doubled for each later one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if path.exists():
        if md5_of(path) == md5:
            return path
        print(f"{path}: incomplete or damaged, trying to complete it")
        os.replace(path, part)
    by_hand = f"or put {path.name}, as it is or unpacked, into {path.parent}"
    print(f"Downloading {url} from byte {_size(part):,}", flush=True)
    failures = 0
    while True:
        before = _size(part)
        try:
            _receive(url, part, timeout)
            break
        except NETWORK_FAULTS as error:
            failures = 1 if _size(part) > before else failures + 1
            reason = error.reason if type(error) is urllib.error.URLError else error
            if failures == attempts:
                raise DataError(f"{url}: {reason}; run again to go on, {by_hand}") from None
            wait = pause * 2 ** (failures - 1)
            print(f"  {reason}; trying again in {wait:.0f} s", flush=True)
            time.sleep(wait)
    if md5_of(part) != md5:
        part.unlink()
        raise DataError(f"{url}: what came has a wrong MD5; run again to start over, {by_hand}")
    os.replace(part, path)
    return path


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _receive(url, part, timeout):
    """One attempt: append to `part` what it lacks, by HTTP Range."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing lies beyond what we have: complete, or not this file
            return
        raise
    with response:
        if "text/html" in response.headers.get("Content-Type", ""):
            raise ConnectionError("a web page came instead of the file")
        if response.status != 206:  # this server cannot resume
            have = 0
        total = have + int(response.headers.get("Content-Length", 0))
        with open(part, "ab" if have else "wb") as file:
            while chunk := _read(response):
                file.write(chunk)
                _show_progress(have, have + len(chunk), total)
                have += len(chunk)
        if have < total:
            raise ConnectionError(f"the connection broke after {have:,} of {total:,} bytes")


def _read(response):
    """Read a chunk; every fault here is one of the network, those of writing are of the disk."""
    try:
        return response.read(1 << 16)
    except OSError as error:
        raise ConnectionError(error) from None


def _show_progress(before, done, total):
    """Print how far a download is: a line that overwrites itself on a terminal, elsewhere one every tenth."""
    terminal = sys.stdout.isatty()
    steps = 1000 if terminal else 10
    if total and done * steps // total > before * steps // total:
        end = "\r" if terminal and done < total else "\n"
        print(f"  {done / total:6.1%} of {total / 1e6:,.0f} MB", end=end, flush=True)


def extract(archive, files, folder):
    """Extract the files of a tar archive that a dict of MD5 by name lists, once all are verified."""
    folder = Path(folder)
    temporary = folder / ".extracting"
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name in files:
                    print(f"  extracting {member.name}", flush=True)
                    tar.extract(member, temporary, filter="data")
        for name, md5 in files.items():
            path = temporary / name
            if not path.exists() or md5_of(path) != md5:
                raise DataError(f"{archive}: no intact {name} in it; delete the archive, run again")
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, folder / name)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{archive}: not a readable archive ({error}); delete it, run again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def download_and_extract(data_dir=DATA_DIR, url=DATA_URL, archive_md5=ARCHIVE_MD5, files=FILE_MD5):
    """Make sure that the files of a data set lie under `data_dir`; fetch their archive if they do not.

    An archive of that name in `data_dir` is used instead. `files` is a dict of MD5 by name; their paths are
    returned.
    """
    data_dir = Path(data_dir)
    paths = [data_dir / name for name in files]
    if not all(path.exists() for path in paths):
        try:
            extract(download(url, data_dir / Path(url).name, archive_md5), files, data_dir)
        except (DataError, BrokenPipeError):
            raise
        except OSError as error:
            remedy = "free some space or choose another --data-dir, and run again"
            raise DataError(f"{data_dir}: {error.strerror}; {remedy}") from None
    return paths


def read_labels(path=LABEL_PATH):
    """Read the labels of STL-10's training or test split (the unlabelled split has none).

    Returns:
        uint8 array of shape (N,), 1 to 10 as on disk; 1 is `CLASS_NAMES[0]`.
    """
    labels = np.frombuffer(_existing(path).read_bytes(), np.uint8)
    if labels.size == 0 or labels.min() < 1 or labels.max() > len(CLASS_NAMES):
        raise DataError(f"{path}: not a label file of STL-10 (labels are 1 to 10); delete it and run again")
    return labels


def read_all_images(path=DATA_PATH):
    """Map an image file of STL-10 into memory.

    On disk an image is three colour planes, each stored column by column. The result is a view of the
    file: the 2.76 GB of the unlabelled split cost no such memory, only what is indexed is read.

    Returns:
        Read-only uint8 array of shape (N, 96, 96, 3): image, row, column, colour.
    """
    size = _existing(path).stat().st_size
    if size == 0 or size % IMAGE_BYTES:
        raise DataError(f"{path}: {size:,} bytes is not a whole number of images; delete it and run again")
    planes = np.memmap(path, np.uint8, "r").reshape(-1, DEPTH, WIDTH, HEIGHT)
    return planes.transpose(0, 3, 2, 1)


def _existing(path):
    if not Path(path).is_file():
        raise DataError(f"{path}: not found; run python stl10_input.py to download STL-10")
    return Path(path)


def read_single_image(path=DATA_PATH, index=0):
    """Read one image of STL-10: uint8 array of shape (96, 96, 3)."""
    return np.array(read_all_images(path)[index])


def plot_image(image, title=""):
    """Show one image, shape (height, width, 3), in a window."""
    from matplotlib import pyplot as plt

    plt.imshow(image)
    plt.title(title)
    plt.axis("off")
    plt.show()


def save_images(images, labels, folder):
    """Write images (N, H, W, 3), uint8, with labels from 1 to 10, as `folder`/CLASS/00000.png and so on."""
    from matplotlib.image import imsave

    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = Path(folder) / CLASS_NAMES[label - 1] / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        imsave(path, image)


def read_cifar10_batch(path, md5):
    """Read one batch of CIFAR-10: uint8 images (N, 32, 32, 3) and int64 labels (N,) from 0 to 9.

    Its MD5 is checked first, since a pickle of another origin could run any code.
    """
    raw = Path(path).read_bytes()
    if hashlib.md5(raw).hexdigest() != md5:
        raise DataError(f"{path}: wrong MD5; delete it and run again to download it")
    batch = pickle.loads(raw, encoding="latin1")  # written by Python 2
    images = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.asarray(batch["labels"], np.int64)


def load_cifar10(data_dir=DATA_DIR):
    """Read CIFAR-10, downloading it if it is not there; the training images in the order of their batches.

    Returns:
        (images, labels) of the training split, and of the test split, as `read_cifar10_batch` gives them.
    """
    paths = download_and_extract(data_dir, CIFAR10_URL, CIFAR10_ARCHIVE_MD5, CIFAR10_FILE_MD5)
    *batches, test = map(read_cifar10_batch, paths, CIFAR10_FILE_MD5.values())
    images, labels = zip(*batches, strict=True)
    return (np.concatenate(images), np.concatenate(labels)), test


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Download STL-10, verify and read it.")
    add = parser.add_argument
    add("--data-dir", default=DATA_DIR, help="where the data lie (default: %(default)s)")
    add("--show", action="store_true", help="show one training image in a window")
    add("--save-images", type=int, default=0, metavar="N", help="write N training images to stl10_png/ there")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    paths = download_and_extract(args.data_dir)
    for path, md5 in zip(paths, FILE_MD5.values(), strict=True):
        content = read_labels(path) if path.stem.endswith("_y") else read_all_images(path)
        if md5_of(path) != md5:
            raise DataError(f"{path}: wrong MD5; delete it, run again")
        print(f"{path}: {content.dtype} {content.shape}, MD5 right")
    images, labels = read_all_images(paths[0]), read_labels(paths[1])
    counts = np.bincount(labels, minlength=11)[1:].tolist()
    print("Training images of a class:", dict(zip(CLASS_NAMES, counts, strict=True)))
    if args.save_images:
        folder = Path(args.data_dir) / "stl10_png"
        save_images(images[: args.save_images], labels[: args.save_images], folder)
        print(f"{min(args.save_images, len(images))} images written to {folder}")
    if args.show:
        plot_image(images[0], CLASS_NAMES[labels[0] - 1])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped; run again to go on where it stopped.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head -1`
        os._exit(1)
    except OSError as error:
        sys.exit(str(error))
