import errno
import hashlib
import http.client
import os
import signal
import subprocess
import sys

import stl10_input
from stl10_input import DataError, download, download_and_extract, extract

import imageio.v3 as iio
import matplotlib.image
import numpy as np
import pytest
from conftest import CONTENT, MD5, ROOT, archive_of, cifar_pickle, random_images, start, until, usage_error


def test_images_are_read_as_a_loop_over_the_pixels_reads_them(tmp_path):
    raw = random_images(2 * stl10_input.IMAGE_BYTES)
    path = tmp_path / "train_X.bin"
    raw.tofile(path)
    images = stl10_input.read_all_images(path)
    expected = np.empty((2, 96, 96, 3), np.uint8)
    position = 0
    for image in range(2):
        for colour in range(3):
            for column in range(96):
                for row in range(96):
                    expected[image, row, column, colour] = raw[position]
                    position += 1
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(stl10_input.read_single_image(path, 1), expected[1])


def test_images_are_mapped_not_loaded(tmp_path):
    path = tmp_path / "unlabeled_X.bin"
    with path.open("wb") as file:
        file.truncate(100_000 * stl10_input.IMAGE_BYTES)  # sparse
    images = stl10_input.read_all_images(path)
    assert images.shape == (100_000, 96, 96, 3)
    assert isinstance(images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 1


@pytest.mark.parametrize("length", [0, 1, stl10_input.IMAGE_BYTES - 1, stl10_input.IMAGE_BYTES + 1])
def test_image_file_of_a_wrong_length_is_refused(tmp_path, length):
    path = tmp_path / "train_X.bin"
    path.write_bytes(bytes(length))
    with pytest.raises(DataError, match=f"{path}: {length:,} bytes is not"):
        stl10_input.read_all_images(path)


def test_labels_stay_as_on_disk(tmp_path):
    path = tmp_path / "train_y.bin"
    path.write_bytes(bytes([1, 10, 5]))
    assert stl10_input.read_labels(path).tolist() == [1, 10, 5]


@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"\x01\x0b"])
def test_labels_out_of_range_are_refused(tmp_path, content):
    path = tmp_path / "train_y.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match="labels are 1 to 10"):
        stl10_input.read_labels(path)


def test_missing_file_tells_what_to_run(tmp_path):
    with pytest.raises(DataError, match="run python stl10_input.py"):
        stl10_input.read_all_images(tmp_path / "train_X.bin")


def test_saved_images_are_the_images(tmp_path):
    images = random_images(3, 96, 96, 3)
    stl10_input.save_images(images, [1, 10, 1], tmp_path)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert names == ["airplane/00000.png", "airplane/00002.png", "truck/00001.png"]
    np.testing.assert_array_equal(iio.imread(tmp_path / "truck/00001.png")[..., :3], images[1])


def test_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def on_full_disk(path, image, format):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(matplotlib.image, "imsave", on_full_disk)
    with pytest.raises(OSError, match="truck/00000.png: not written .No space left on device.; make room"):
        stl10_input.save_images(random_images(1, 96, 96, 3), [10], tmp_path)
    assert not list(tmp_path.rglob("*.*"))


def test_cifar10_is_read_in_its_order(tmp_path, monkeypatch):
    images, labels = random_images(12, 32, 32, 3), np.array([3, 8, 8, 0] * 3)
    checksums = {}
    for index, name in enumerate(stl10_input.CIFAR10_FILE_MD5):
        content = cifar_pickle(images[2 * index :][:2], labels[2 * index :][:2].tolist())
        checksums[name] = hashlib.md5(content).hexdigest()
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(stl10_input, "CIFAR10_FILE_MD5", checksums)
    (train, train_labels), (test, test_labels) = stl10_input.load_cifar10(tmp_path)
    np.testing.assert_array_equal([*train, *test], images)
    np.testing.assert_array_equal([*train_labels, *test_labels], labels)
    assert (len(train), len(test)) == (10, 2)


def test_cifar10_checksum_comes_before_unpickling(tmp_path):
    (tmp_path / "test_batch").write_text(f"cbuiltins\nopen\n(V{tmp_path}/ran\nVw\ntR.")
    with pytest.raises(DataError, match="test_batch: wrong MD5; delete it and run again to download it"):
        stl10_input.read_cifar10_batch(tmp_path / "test_batch", MD5)
    assert not (tmp_path / "ran").exists()


def fetch(server, path, **options):
    return download(server.url, path, MD5, **({"pause": 0.01, "timeout": 5} | options))


def test_download(server, tmp_path, capsys):
    path = tmp_path / "new" / "file.tar.gz"
    assert fetch(server, path).read_bytes() == CONTENT
    assert not path.with_name("file.tar.gz.part").exists()
    assert "100% of 3 MB" in capsys.readouterr().out
    fetch(server, path)
    assert server.sent == len(CONTENT)  # the second call verified what was there


@pytest.mark.parametrize(("total", "lines"), [(640_000_000, 10), (0, 6)])
def test_progress_without_a_terminal_is_a_line_every_tenth_or_100_mb(total, lines, capsys):
    for before in range(0, 640_000_000, 1_000_000):
        stl10_input._progress(before, before + 1_000_000, total, 12.3)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines
    assert all(line.endswith(" MB, 12.3 MB/s") for line in printed)


def test_dropped_connection_is_resumed(server, tmp_path):
    server.faults = ["drop", "drop"]
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.asked == [0, 1_500_000, 2_250_000]
    assert server.sent == len(CONTENT)


def test_later_call_transfers_only_the_rest(server, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT[:1_000_000])
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.sent == 2_000_000


def test_complete_part_is_taken_over(server, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT)
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.sent == 0


def test_truncated_file_under_the_final_name_is_completed(server, tmp_path):
    (tmp_path / "f").write_bytes(CONTENT[:2_000_000])
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.sent == 1_000_000


def test_larger_part_stays_whatever_lies_under_the_final_name(server, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT[:2_000_000])
    (tmp_path / "f").write_bytes(b"<html>")
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.sent == 1_000_000


def test_network_that_goes_away_is_tried_again(server, tmp_path, monkeypatch, capsys):
    read, faults = http.client.HTTPResponse.read1, [OSError(errno.EHOSTUNREACH, "No route to host")]

    def fail_once(response, *size):
        if faults:
            raise faults.pop()
        return read(response, *size)

    monkeypatch.setattr(http.client.HTTPResponse, "read1", fail_once)
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT
    assert "No route to host; trying again" in capsys.readouterr().out


def test_server_without_range_starts_over(server, tmp_path):
    server.faults = ["drop", "no range"]
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT


def test_bad_beginning_is_discarded(server, tmp_path):
    (tmp_path / "f.part").write_bytes(b"not the beginning")
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.asked == [17, 0]


def test_wrong_checksum_leaves_no_file(server, tmp_path):
    server.faults = ["wrong"]
    with pytest.raises(DataError, match="MD5 is .* expected"):
        fetch(server, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_html_page_is_not_taken_for_the_file(server, tmp_path):
    server.faults = ["html"]
    with pytest.raises(DataError, match="web page"):
        fetch(server, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_server_error_is_tried_again(server, tmp_path):
    server.faults = [503, 503]
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT


def test_missing_file_on_the_server_is_final(server, tmp_path):
    server.faults = [404] * 9
    with pytest.raises(DataError, match="404"):
        fetch(server, tmp_path / "f")
    assert server.asked == [0]


def test_offline_tells_where_to_put_which_file(tmp_path):
    url, path = "http://127.0.0.1:9/file.tar.gz", tmp_path / "f"
    with pytest.raises(
        DataError, match=f"{url}: .*; run again to go on, or download it by other means and put it at {path}$"
    ):
        download(url, path, MD5, attempts=2, pause=0.01)


FILES = {"set/a.bin": hashlib.md5(b"aaa").hexdigest(), "set/b.bin": hashlib.md5(b"bbb").hexdigest()}
GOOD = [("set/a.bin", b"aaa"), ("set/b.bin", b"bbb")]


def test_only_expected_members_are_extracted(tmp_path):
    members = [("../evil", b"x"), ("/tmp/evil_absolute", b"x"), ("set/link", "/etc/passwd"), *GOOD]
    archive_of(tmp_path / "a.tar.gz", members)
    extract(tmp_path / "a.tar.gz", FILES, tmp_path / "data")
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["a.tar.gz", "data/set/a.bin", "data/set/b.bin"]


@pytest.mark.parametrize(
    "members, message",
    [
        ([GOOD[0], ("set/b.bin", b"bbx")], "set/b.bin has a wrong MD5"),
        ([GOOD[0]], "set/b.bin not in it"),
        ([GOOD[0], ("set/b.bin", "/etc/passwd")], "set/b.bin not in it"),
        ([GOOD[0], ("set/../set/b.bin", b"bbb")], "set/b.bin not in it"),
    ],
)
def test_bad_archive_leaves_nothing(tmp_path, members, message):
    archive_of(tmp_path / "a.tar.gz", members)
    with pytest.raises(DataError, match=message):
        extract(tmp_path / "a.tar.gz", FILES, tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_truncated_archive_is_told(tmp_path):
    noise = np.random.default_rng(0).bytes(100_000)
    whole = archive_of(tmp_path / "a.tar.gz", [("set/a.bin", noise)])
    for length in (0, 10, len(whole) // 2):
        (tmp_path / "a.tar.gz").write_bytes(whole[:length])
        with pytest.raises(DataError, match="a.tar.gz: "):
            extract(tmp_path / "a.tar.gz", {"set/a.bin": hashlib.md5(noise).hexdigest()}, tmp_path / "data")
        assert list((tmp_path / "data").iterdir()) == []


def test_archive_put_by_hand_needs_no_network(tmp_path):
    md5 = hashlib.md5(archive_of(tmp_path / "set.tar.gz", GOOD)).hexdigest()
    paths = download_and_extract(tmp_path, "http://127.0.0.1:9/set.tar.gz", md5, FILES)
    assert [path.read_bytes() for path in paths] == [b"aaa", b"bbb"]
    (tmp_path / "set.tar.gz").unlink()
    assert download_and_extract(tmp_path, "http://127.0.0.1:9/set.tar.gz", md5, FILES) == paths


FETCH = """
import sys, stl10_input
url, md5, name, checksum, folder = sys.argv[1:]
stl10_input.download_and_extract(folder, url, md5, {name: checksum})
"""


def test_killed_download_transfers_only_the_rest(server, tmp_path):
    server.content = archive_of(tmp_path / "a.tar.gz", [("set/a.bin", CONTENT)])
    checksum = hashlib.md5(server.content).hexdigest()
    command = [sys.executable, "-c", FETCH, server.url, checksum, "set/a.bin", MD5, str(tmp_path / "data")]
    server.faults = ["stall"]
    half = len(server.content) // 2
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        part = tmp_path / "data/file.tar.gz.part"
        until(lambda: part.exists() and part.stat().st_size >= half // 2**20 * 2**20)
        process.kill()
    kept = part.stat().st_size
    assert 0 < kept <= half
    assert not (tmp_path / "data/set").exists()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert server.asked == [0, kept]
    assert server.sent == half + len(server.content) - kept
    assert (tmp_path / "data/set/a.bin").read_bytes() == CONTENT


def start_with(server, folder):
    """Start stl10_input.py with the local server in the place of the official one."""
    environment = {"http_proxy": server.url.rsplit("/", 1)[0]}
    return start("stl10_input.py", "--data-dir", folder, env=environment)


@pytest.mark.parametrize(
    ("fault", "told"),
    [("html", "a web page instead of the file"), (404, "HTTP Error 404"), (None, "its MD5 is ")],
)
def test_script_tells_a_failed_download_in_one_line(server, tmp_path, fault, told):
    server.faults = [fault]
    process = start_with(server, tmp_path)
    printed, err = process.communicate()
    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    assert err.startswith(f"{stl10_input.DATA_URL}: ")
    assert told in err
    assert f"put it at {tmp_path}/stl10_binary.tar.gz" in err
    assert "\r" not in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["Ctrl-C", "closed output"])
def test_script_keeps_what_it_has(server, tmp_path, ending):
    server.faults = ["stall"]
    process = start_with(server, tmp_path)
    part = tmp_path / "stl10_binary.tar.gz.part"
    if ending == "Ctrl-C":
        until(lambda: part.exists() and part.stat().st_size)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
        assert (process.returncode, err.strip()) == (130, "Stopped; run again to go on where it stopped.")
        assert part.stat().st_size
    else:
        process.stdout.close()
        assert (process.wait(), process.stderr.read()) == (1, "")


@pytest.mark.parametrize("argument", ["--save-images=-1", "--save-images=x", "--unknown"])
def test_wrong_usage_is_told(argument):
    assert "error: " in usage_error(stl10_input.parse_args, [argument])
