"""Download STL-10 and CIFAR-10, and read their files.

    python stl10_input.py                      # download (2.64 GB), verify, extract, read, report
    python stl10_input.py --show               # and open a window with one training image
    python stl10_input.py --save-images 100    # and write 100 training images as PNG files, by class

Writes `data/stl10_binary/` (3.1 GB) and keeps the archive beside it. An interrupted download goes on
where it stopped. Needs numpy, matplotlib and the standard library only, so that the file can be taken
along into other projects.

STL-10: Coates, Lee, Ng, "An Analysis of Single Layer Networks in Unsupervised Feature Learning", AISTATS
2011. 96x96 colour images: 5,000 for training, 8,000 for testing, 100,000 unlabelled.
"""

import argparse
import contextlib
import errno
import hashlib
import http.client
import os
import pickle
import queue
import shutil
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: two downloads at once are not noticed there
    fcntl = None

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

CHUNK = 1 << 20  # bytes read at a time
TIMEOUT = 30  # seconds without a byte, or with fewer than SLOWEST each, before an attempt counts as failed
SLOWEST = 1000  # bytes a second
LARGEST = 3_000_000_000  # bytes of an archive; STL-10 has 2.64 GB
ATTEMPTS = 5  # failures in a row, with nothing gained, before giving up
NETWORK_FAULTS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ValueError,  # of an address or a number that is none
)
DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class DataError(OSError):
    """A data file that is missing, damaged or cannot be fetched; the message names file and remedy."""


def _progress(before, done, total, rate):
    """Tell how far a download is: a line that overwrites itself on a terminal, elsewhere one every tenth.

    Args:
        before, done: Bytes before and after the last piece.
        total: Bytes of the file; 0 if the server does not say, and then a line comes every 100 MB.
        rate: MB/s.
    """
    share = f"{done / total:4.0%} of {total / 1e6:,.0f} MB" if total else f"{done / 1e6:,.0f} MB"
    if sys.stdout.isatty():
        bar = "=" * int(30 * done / total) if total else ""
        end = "\n" if done == total else ""
        print(f"\r  [{bar:<30}] {share}, {rate:.1f} MB/s ", end=end, flush=True)
    else:
        lines_before, lines = (
            10 * have // total if total else have // 100_000_000 for have in (before, done)
        )
        if lines > lines_before:
            print(f"  {share}, {rate:.1f} MB/s", flush=True)


def md5_of(path):
    """MD5 of a file as a hexadecimal string, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _answer(request, timeout):
    """`urlopen` that gives up after `timeout` seconds, however slowly the headers come."""
    answers = queue.SimpleQueue()

    def ask():
        try:
            answers.put(urllib.request.urlopen(request, timeout=timeout))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError(f"no answer within {timeout} seconds") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _read(response, timeout):
    """The next CHUNK bytes, or those that come within `timeout` seconds; none at the end."""
    read, ends = b"", time.monotonic() + timeout
    while len(read) < CHUNK:
        try:
            piece = response.read1(CHUNK - len(read))
        except OSError as error:
            raise ConnectionError(error.strerror or error) from None
        if not piece:
            break
        read += piece
        if time.monotonic() > ends:
            if len(read) < SLOWEST * timeout:
                raise TimeoutError(f"fewer than {SLOWEST:,} bytes a second")
            break
    return read


def _receive(url, part, timeout):
    """One attempt: append what `part` still lacks. Raises one of `NETWORK_FAULTS` if the transfer broke."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = _answer(request, timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing lies beyond what we have: complete, or not this file
            return
        raise
    with response:
        if "text/html" in response.headers.get("Content-Type", ""):
            raise DataError(f"{url}: the server sent a web page instead of the file")
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            raise ConnectionError("the server resumed at another place than asked")
        have = have if resumed else 0
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else 0
        first, started = have, time.monotonic()
        with open(part, "ab" if resumed else "wb") as file:
            while chunk := _read(response, timeout):
                file.write(chunk)
                have += len(chunk)
                rate = (have - first) / max(time.monotonic() - started, 1e-6) / 1e6
                _progress(have - len(chunk), have, total, rate)
                if have > LARGEST:
                    part.unlink()
                    raise DataError(f"{url}: the server sends more than {LARGEST:,} bytes")
        if have < total:
            raise ConnectionError(f"the connection broke after {have:,} of {total:,} bytes")


def download(url, path, md5, timeout=TIMEOUT, attempts=ATTEMPTS, pause=1.0):
    """Download `url` to `path`, resuming and verifying.

    The bytes go to `path` + ".part", where a later call goes on (HTTP Range); only a file with the right
    checksum gets its final name. A file that already lies at `path` is verified instead of fetched; if it
    is incomplete, it is taken as the beginning.

    Args:
        url: Address of the file.
        path: Where to put it.
        md5: Expected MD5, hexadecimal.
        timeout: Seconds without a byte, or with fewer than SLOWEST each, before an attempt counts as failed.
        attempts: Attempts in a row, none of which brought a byte, before giving up.
        pause: Seconds before the second attempt, doubled for each later one.

    Returns:
        `path` as a `pathlib.Path`.

    Raises:
        DataError: no connection, an HTTP error, a web page in the file's place or a wrong checksum.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path.parent):
        return _download(url, path, md5, timeout, attempts, pause)


@contextlib.contextmanager
def _alone_in(folder):
    """Wait until no other process downloads to a folder."""
    if not fcntl:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{folder}: waiting for another process that downloads to it", flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # a file system that locks no folders
        pass
    try:
        yield
    finally:
        os.close(handle)


def _download(url, path, md5, timeout, attempts, pause):
    part = path.with_name(path.name + ".part")
    if path.exists():
        if md5_of(path) == md5:
            return path
        print(f"{path}: incomplete or damaged, trying to complete it")
        if part.exists() and part.stat().st_size > path.stat().st_size:
            path.unlink()
        else:
            os.replace(path, part)
    by_hand = f"download it by other means and put it at {path}"
    resumed = part.exists()
    print(f"Downloading {url}" + (f", resuming at {part.stat().st_size / 1e6:,.0f} MB" if resumed else ""))
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _receive(url, part, timeout)
            break
        except DataError as error:
            raise DataError(f"{error}; {by_hand}") from None
        except NETWORK_FAULTS as error:
            gained = part.exists() and part.stat().st_size > before
            failures = 1 if gained else failures + 1
            message = error.reason if type(error) is urllib.error.URLError else error
            message = repr(str(message))[1:-1][:200]  # what a server has sent may be anything
            permanent = isinstance(error, urllib.error.HTTPError) and error.code in (401, 403, 404, 410)
            if failures >= attempts or permanent:
                raise DataError(f"{url}: {message}; run again to go on, or {by_hand}") from None
            print(f"  {message}; trying again in {pause * 2 ** (failures - 1):.0f} s", flush=True)
            time.sleep(pause * 2 ** (failures - 1))
    found = md5_of(part)
    if found != md5:
        part.unlink()
        if resumed:  # perhaps only the old beginning was bad
            print(f"{path}: checksum of the resumed download is wrong, starting over")
            return _download(url, path, md5, timeout, attempts, pause)
        raise DataError(f"{url}: its MD5 is {found}, expected {md5}; run again, or {by_hand}")
    os.replace(part, path)
    return path


def extract(archive, files, folder):
    """Extract the expected files of a tar archive, and nothing else, into `folder`.

    Args:
        archive: Path of a tar file, compressed or not.
        files: Mapping of member name to MD5. Other members are ignored; a link or device under an
            expected name counts as missing.
        folder: Where to put them, under their member names. Nothing appears there before all are verified.

    Raises:
        DataError: unreadable archive, missing member or wrong checksum.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".extracting-*"):  # by a killed process
        if time.time() - left.stat().st_mtime > 24 * 3600:
            shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=".extracting-", dir=folder))
    try:
        with tarfile.open(archive) as tar:
            missing = dict(files)
            for member in tar:
                if member.isreg() and member.name in missing:
                    print(f"  extracting {member.name}", flush=True)
                    path = temporary / member.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with tar.extractfile(member) as packed, open(path, "wb") as file:
                        shutil.copyfileobj(packed, file)
                    if md5_of(path) != missing.pop(member.name):
                        raise DataError(
                            f"{archive}: {member.name} has a wrong MD5; delete the archive, run again"
                        )
                if not missing:
                    break
        if missing:
            raise DataError(f"{archive}: {', '.join(missing)} not in it; delete the archive, run again")
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, folder / name)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{archive}: not a readable archive ({error}); delete it, run again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def download_and_extract(data_dir=DATA_DIR, url=DATA_URL, archive_md5=ARCHIVE_MD5, files=FILE_MD5):
    """Make sure that the files of a data set lie under `data_dir`; fetch them if they do not.

    Written for STL-10, serves any data set that comes as one tar archive.

    Args:
        data_dir: Folder of all data.
        url: Address of the archive. An archive of that name in `data_dir` is used instead.
        archive_md5: MD5 of the archive.
        files: Mapping of member name to MD5.

    Returns:
        List of the files' paths, in the order of `files`.

    Raises:
        DataError: the data could not be fetched, or are not what they should be.
    """
    data_dir = Path(data_dir)
    paths = [data_dir / name for name in files]
    if not all(path.exists() for path in paths):
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot be the data folder ({error.strerror})"
            raise DataError(f"{data_dir}: {message}; choose another --data-dir") from None
        try:
            extract(download(url, data_dir / Path(url).name, archive_md5), files, data_dir)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise DataError(f"{data_dir}: {error.strerror}; free some space and run again") from None
    return paths


def read_labels(path=LABEL_PATH):
    """Read the labels of the training or test split (the unlabelled split has none).

    Returns:
        uint8 array of shape (N,), 1 to 10 as on disk; 1 is `CLASS_NAMES[0]`.

    Raises:
        DataError: missing or empty file, or a label out of range.
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

    Raises:
        DataError: missing file, or a length that is not a whole number of images.
    """
    size = _existing(path).stat().st_size
    if size == 0 or size % IMAGE_BYTES:
        raise DataError(f"{path}: {size:,} bytes is not a whole number of images; delete it and run again")
    planes = np.memmap(path, np.uint8, "r").reshape(-1, DEPTH, WIDTH, HEIGHT)
    return planes.transpose(0, 3, 2, 1)


def read_single_image(path=DATA_PATH, index=0):
    """Read one image: uint8 array of shape (96, 96, 3).

    Raises:
        DataError: as `read_all_images`.
        IndexError: there is no image of that index.
    """
    return np.array(read_all_images(path)[index])


def plot_image(image, title=""):
    """Show one image, shape (height, width, 3), in a window."""
    from matplotlib import pyplot as plt

    plt.imshow(image)
    plt.title(title)
    plt.axis("off")
    plt.show()


def save_images(images, labels, folder):
    """Write images as PNG files, `folder`/CLASS/00000.png and so on, numbered as in `images`.

    Args:
        images: uint8 array (N, height, width, 3).
        labels: N labels from 1 to 10, as `read_labels` gives them.
        folder: Where to write; made if missing.
    """
    from matplotlib import image as mpl_image

    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = Path(folder) / CLASS_NAMES[label - 1] / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        try:
            mpl_image.imsave(temporary, np.ascontiguousarray(image), format="png")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            remedy = "make room" if error.errno in DISK_FULL else "choose another --data-dir"
            raise OSError(f"{path}: not written ({error.strerror}); {remedy}, run again") from None


def read_cifar10_batch(path, md5):
    """Read one batch of the python version of CIFAR-10.

    Args:
        path: `data_batch_1` to `data_batch_5` or `test_batch`.
        md5: Its MD5. It is checked first, since a pickle of another origin could run any code.

    Returns:
        uint8 images (N, 32, 32, 3) and int64 labels (N,) from 0 to 9.
    """
    raw = Path(path).read_bytes()
    if hashlib.md5(raw).hexdigest() != md5:
        raise DataError(f"{path}: wrong MD5; delete it and run again to download it")
    batch = pickle.loads(raw, encoding="latin1")  # written by Python 2
    images = batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.asarray(batch["labels"], np.int64)


def load_cifar10(data_dir=DATA_DIR):
    """Read CIFAR-10, downloading it if it is not there.

    Returns:
        (images, labels) of the 50,000 training images, in the order of their batches, and (images, labels)
        of the 10,000 test images, as `read_cifar10_batch` gives them.
    """
    paths = download_and_extract(data_dir, CIFAR10_URL, CIFAR10_ARCHIVE_MD5, CIFAR10_FILE_MD5)
    *batches, test = map(read_cifar10_batch, paths, CIFAR10_FILE_MD5.values())
    images, labels = zip(*batches, strict=True)
    return (np.concatenate(images), np.concatenate(labels)), test


def _existing(path):
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: not found; run python stl10_input.py to download STL-10")
    return path


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Download STL-10, verify and read it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--data-dir", default=DATA_DIR, help="where the data lie")
    parser.add_argument("--show", action="store_true", help="show one training image in a window")
    parser.add_argument(
        "--save-images",
        type=int,
        default=0,
        metavar="N",
        help="write the first N training images to DATA_DIR/stl10_png/",
    )
    args = parser.parse_args(argv)
    if not args.data_dir:
        parser.error("argument --data-dir: is empty")
    if args.save_images < 0:
        parser.error(f"argument --save-images: {args.save_images} is negative")
    return args


def main(argv=None):
    args = parse_args(argv)
    paths = download_and_extract(args.data_dir)
    for path, md5 in zip(paths, FILE_MD5.values(), strict=True):
        content = read_labels(path) if path.stem.endswith("_y") else read_all_images(path)
        if md5_of(path) != md5:
            raise DataError(f"{path}: wrong MD5; delete it, run again")
        print(f"{path}: {content.dtype} {content.shape}, MD5 right")
    images, labels = read_all_images(paths[0]), read_labels(paths[1])
    print(
        "Training images of a class:", dict(zip(CLASS_NAMES, np.bincount(labels)[1:].tolist(), strict=False))
    )
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
