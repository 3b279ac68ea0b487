import hashlib
import http.client
import signal
import sys

import stl10_input
from stl10_input import DataError, download, download_and_extract, extract

import imageio.v3 as iio
import numpy as np
import pytest
from conftest import CONTENT, archive_of, cifar_pickle, largest_file, random_images, start, stl10_files, until

MD5 = hashlib.md5(CONTENT).hexdigest()


def test_images_are_read_as_a_loop_over_the_pixels_reads_them(tmp_path):
    raw = random_images(2 * stl10_input.IMAGE_BYTES)
    raw.tofile(tmp_path / "train_X.bin")
    images = stl10_input.read_all_images(tmp_path / "train_X.bin")
    expected = np.empty((2, 96, 96, 3), np.uint8)
    for position, (image, colour, column, row) in enumerate(np.ndindex(2, 3, 96, 96)):
        expected[image, row, column, colour] = raw[position]
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(stl10_input.read_single_image(tmp_path / "train_X.bin", 1), expected[1])
    assert isinstance(images, np.memmap)  # the unlabelled split has 2.76 GB


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (stl10_input.read_all_images, None, "not found; run python stl10_input.py"),
        (stl10_input.read_all_images, b"", "0 bytes is not a whole number of images"),
        (stl10_input.read_all_images, bytes(27_647), "27,647 bytes is not a whole number of images"),
        (stl10_input.read_labels, b"\x00\x01", "labels are 1 to 10"),
        (stl10_input.read_labels, b"\x01\x0b", "labels are 1 to 10"),
    ],
)
def test_file_that_is_not_of_stl10_is_refused(tmp_path, read, content, message):
    if content is not None:
        (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(DataError, match=f"train.bin: .*{message}"):
        read(tmp_path / "train.bin")


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


def fetch(server, path):
    return download(server.url, path, MD5, timeout=5, pause=0.01)


@pytest.mark.parametrize(("terminal", "end", "count"), [(False, "\n", 10), (True, "\r", 640)])
def test_progress_overwrites_itself_on_a_terminal_only(monkeypatch, capsys, terminal, end, count):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    for before in range(0, 640_000_000, 1_000_000):
        stl10_input._show_progress(before, before + 1_000_000, 640_000_000)
    *lines, last, nothing = capsys.readouterr().out.replace("\n", end).split(end)
    assert (len(lines) + 1, last, nothing) == (count, "  100.0% of 640 MB", "")


@pytest.mark.parametrize(
    ("name", "size"), [("f.part", 0), ("f.part", 1_000_000), ("f.part", len(CONTENT)), ("f", 2_000_000)]
)
def test_only_what_is_missing_is_transferred(server, tmp_path, name, size):
    (tmp_path / name).write_bytes(CONTENT[:size])
    for _ in range(2):
        assert fetch(server, tmp_path / "f").read_bytes() == CONTENT
        assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert server.asked == [size]


@pytest.mark.parametrize("faults", [["drop"] * 6, ["drop", "no range"], ["drop", "html", 503]])
def test_failed_attempt_is_followed_by_another(server, tmp_path, faults):
    server.faults = faults
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT
    assert server.asked[:2] == [0, len(CONTENT) // 2]


def test_network_that_goes_away_is_tried_again(server, tmp_path, monkeypatch, capsys):
    def fail_once(response, size):
        monkeypatch.undo()
        raise OSError("No route to host")

    monkeypatch.setattr(http.client.HTTPResponse, "read", fail_once)
    assert fetch(server, tmp_path / "f").read_bytes() == CONTENT
    assert "No route to host; trying again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["html"] * 5, "a web page came instead of the file; run again to go on"),
        ([404] * 5, "HTTP Error 404: Not Found; run again to go on"),
        ([], "what came has a wrong MD5; run again to start over"),
    ],
)
def test_failed_download_says_what_to_do(server, tmp_path, faults, message):
    (tmp_path / "f.part").write_bytes(b"not the beginning")
    server.faults = faults
    with pytest.raises(DataError) as failure:
        fetch(server, tmp_path / "f")
    assert str(failure.value) == f"{server.url}: {message}, or put f, as it is or unpacked, into {tmp_path}"
    assert not (tmp_path / "f").exists()


def test_unreachable_server_is_told(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(DataError, match="f: .*Connection refused; run again to go on, or put f"):
        download("http://127.0.0.1:9/f", tmp_path / "f", MD5)
    assert waits == [1, 2, 4, 8]


GOOD = [("set/a.bin", b"aaa"), ("set/b.bin", CONTENT[:500_000] + bytes(500_000))]  # packed: half
FILES = {name: hashlib.md5(content).hexdigest() for name, content in GOOD}


@pytest.mark.parametrize(
    ("members", "length", "message"),
    [
        ([GOOD[0], ("set/b.bin", b"bbx")], None, "no intact set/b.bin in it"),
        ([GOOD[0]], None, "no intact set/b.bin in it"),
        (GOOD, 250_000, "not a readable archive"),
    ],
)
def test_damaged_archive_leaves_nothing(tmp_path, members, length, message):
    whole = archive_of(tmp_path / "a.tar.gz", members)
    (tmp_path / "a.tar.gz").write_bytes(whole[:length])
    with pytest.raises(DataError, match=f"a.tar.gz: {message}.*; delete .*, run again"):
        extract(tmp_path / "a.tar.gz", FILES, tmp_path / "data")
    assert not list(tmp_path.glob("data/*"))


@pytest.fixture
def small_set(server, tmp_path):
    """Function that makes sure that a small data set, which the local server has, lies in a folder."""
    server.content = archive_of(tmp_path / "file.tar.gz", [("../evil", b""), ("set/other", b""), *GOOD])
    md5 = hashlib.md5(server.content).hexdigest()
    return lambda folder: download_and_extract(folder, server.url, md5, FILES)


def test_only_expected_files_are_extracted_and_only_once(small_set, server, tmp_path):
    paths = small_set(tmp_path)
    assert [path.read_bytes() for path in paths] == [content for _, content in GOOD]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.bin", "b.bin", "file.tar.gz", "set"]
    paths[0].unlink()
    assert small_set(tmp_path) == paths  # from the archive, again
    (tmp_path / "file.tar.gz").unlink()
    assert small_set(tmp_path) == paths
    assert server.asked == []


def test_full_disk_amid_the_download_and_amid_the_extraction(small_set, server, tmp_path):
    size = len(server.content)
    for limit in (size // 2, size + 1):
        with largest_file(limit), pytest.raises(DataError, match="/data: File too large; free some space"):
            small_set(tmp_path / "data")
        assert not list(tmp_path.glob("data/*set")) and not (tmp_path / "data/.extracting").exists()
    small_set(tmp_path / "data")
    assert server.sent < 1.6 * size  # it went on where it stopped


def test_data_folder_that_is_a_file(small_set, tmp_path):
    with pytest.raises(DataError, match="/file.tar.gz: .*; free some space or choose another --data-dir"):
        small_set(tmp_path / "file.tar.gz")


def start_with(server, folder):
    """Start stl10_input.py with the local server in the place of the official one."""
    return start("stl10_input.py", "--data-dir", folder, env={"http_proxy": server.url.rsplit("/", 1)[0]})


def test_stopped_script_keeps_what_it_has_and_goes_on_to_its_failure(server, tmp_path):
    server.faults = ["stall"]
    process = start_with(server, tmp_path)
    part = tmp_path / "stl10_binary.tar.gz.part"
    until(lambda: part.exists() and part.stat().st_size)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, "\nStopped; run again to go on where it stopped.\n")
    process = start_with(server, tmp_path)
    _, err = process.communicate()
    assert server.asked[1] > 0
    assert (process.returncode, err.count("\n")) == (1, 1)
    assert err.startswith(f"{stl10_input.DATA_URL}: what came has a wrong MD5; run again to start over, or")


def test_script_whose_output_nobody_reads(server, tmp_path):
    process = start_with(server, tmp_path)
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (1, "")


def test_main_verifies_and_saves(tmp_path, monkeypatch, capsys):
    stl10_files(tmp_path, train=11, test=1, unlabeled=1)
    checksums = {name: stl10_input.md5_of(tmp_path / name) for name in stl10_input.FILE_MD5}
    monkeypatch.setattr(stl10_input, "FILE_MD5", checksums)
    command = [f"--data-dir={tmp_path}", "--save-images=2"]
    stl10_input.main(command)
    printed = capsys.readouterr().out
    assert "train_X.bin: uint8 (11, 96, 96, 3), MD5 right" in printed
    assert "'airplane': 2, 'bird': 1," in printed
    image = stl10_input.read_single_image(tmp_path / "stl10_binary/train_X.bin", 1)
    np.testing.assert_array_equal(iio.imread(tmp_path / "stl10_png/bird/00001.png")[..., :3], image)
    (tmp_path / "stl10_binary/test_y.bin").write_bytes(b"\x02")
    with pytest.raises(DataError, match="test_y.bin: wrong MD5; delete it, run again"):
        stl10_input.main(command)
