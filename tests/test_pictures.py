"""Picture files as other programs write them: read right or refused by name, and nothing in them is lost."""

import io
import os
import struct
import tempfile
import zlib

import load_data
from load_data import read_picture, read_pixels, write_pixels

import imageio.v3 as iio
import numpy as np
import OpenImageIO as oiio
import pytest
from conftest import largest_file, random_images, told_line
from PIL import ExifTags, Image, ImageCms, ImageOps, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

RGB = random_images(24, 32, 3)
GREY = RGB[..., :1]
DEEP = random_images(24, 32, 4, dtype=np.uint16)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><!-- of a program that nobody knows --></x:xmpmeta>'
TEXT = b"Comment\0\0" + zlib.compress(bytes(2_000_000))
LARGE_PROFILE = b"icc\0\0" + zlib.compress(PROFILE + np.random.default_rng(0).bytes(2_000_000))
WIDE = struct.pack(">8I", 31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600)
EXPOSURE = 33434  # tag of EXIF
NEGATIVE, LAB = {262: 0}, {262: 8}  # photometric interpretations of TIFF


def png(pixels, *chunks, bits=8, colours=2, sides=None):
    """A PNG file of rows of bytes or of uint16, and chunks after its header."""
    height, width = sides or pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for kind, content in [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]:
        file += struct.pack(">I", len(content)) + kind + content
        file += struct.pack(">I", zlib.crc32(kind + content))
    return file


def tiff(pixels, tags=()):
    """An uncompressed TIFF file of pixels (H, W, C), and more tags by their numbers."""
    height, width, channels = pixels.shape
    kind, bits = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind], 8 * pixels.itemsize
    plain = {256: width, 257: height, 258: (bits,) * channels, 259: 1, 262: 2 if channels > 2 else 1}
    plain |= {273: 0, 277: channels, 278: height, 279: pixels.nbytes, 339: (kind,) * channels}
    directory = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\x08\0\0\0")
    directory.update(plain | dict(tags))
    return b"II*\0\x08\0\0\0" + directory.tobytes(8) + pixels.tobytes()


def by_pillow(kind, second=None, **options):
    """A file of RGB and perhaps a second picture, in a format that Pillow writes."""
    file = io.BytesIO()
    if second:
        options |= {"save_all": True, "append_images": [second]}
    Image.fromarray(RGB).save(file, kind, **options)
    return file.getvalue()


def tiff_of_two(subfile_type):
    """A TIFF file of two pictures, the second one at half the size and of a NewSubfileType."""
    second = Image.fromarray(RGB[::2, ::2])
    second.encoderinfo = {"tiffinfo": {254: subfile_type}}
    return by_pillow("TIFF", second)


def lzw(predictor):
    spec = oiio.ImageSpec(32, 24, 3, "uint16")
    spec["compression"], spec["tiff:predictor"] = "lzw", predictor
    output = oiio.ImageOutput.create("tiff")
    with tempfile.NamedTemporaryFile(suffix=".tif") as file:
        assert output.open(file.name, spec) and output.write_image(DEEP[..., :3]) and output.close()
        return file.read()


def palette(scale):
    """A palette TIFF file: red rises, green falls, blue is 50."""
    ramp = np.arange(256)
    colours = scale * np.concatenate([ramp, ramp[::-1], 50 + 0 * ramp])
    return tiff(GREY, {262: 3, 320: tuple(colours.astype(int))})


def with_alpha(path):
    """Pixels of a file, its alpha as the last channel."""
    pixels, alpha, _ = read_pixels(path)
    return pixels if alpha is None else np.dstack([pixels, alpha])


STRIPES = np.full((24, 8), 0b00011011, np.uint8)  # 2 bits: 0, 1, 2, 3
BILEVEL = np.packbits(GREY[..., 0] > 127, axis=1)
DEEP_GREY, KEY = DEEP[..., :1], DEEP[0, 0, :1].astype(">u2")
READ = {  # a file, and its pixels with alpha
    "lzw.tif": (lzw(1), DEEP[..., :3]),
    "lzw by differences.tif": (lzw(2), DEEP[..., :3]),
    "palette.tif": (palette(257), np.dstack([GREY, 255 - GREY, np.full_like(GREY, 50)])),
    "alpha.tif": (tiff(DEEP, {338: 2}), DEEP),
    "white is zero.tif": (tiff(GREY, NEGATIVE), 255 - GREY),
    "white is zero 16.tif": (tiff(DEEP_GREY, NEGATIVE), 65535 - DEEP_GREY),
    "thumbnail.tif": (tiff_of_two(1), RGB),
    "key of 2 bits.png": (
        png(STRIPES, (b"tRNS", b"\0\2"), bits=2, colours=0, sides=(24, 32)),
        np.tile(np.array([[0, 255], [85, 255], [170, 0], [255, 255]]), (24, 8, 1)),
    ),
    "key of 16 bits.png": (
        png(DEEP_GREY[..., 0], (b"tRNS", KEY.tobytes()), bits=16, colours=0),
        np.dstack([DEEP_GREY, np.where(DEEP_GREY == KEY, 0, 65535)]),
    ),
    "bilevel.png": (png(BILEVEL, bits=1, colours=0, sides=(24, 32)), (GREY > 127) * 255),
    "profile.png": (png(RGB, (b"iCCP", LARGE_PROFILE)), RGB),
    "text.png": (png(RGB, (b"zTXt", TEXT), (b"tEXt", b"Author\0I")), RGB),
    "gamma 0.png": (png(RGB, (b"gAMA", bytes(4))), RGB),
    "gamma.png": (png(RGB, (b"gAMA", struct.pack(">I", 45455)), (b"cHRM", WIDE)), RGB),
    "colours.png": (png(RGB, (b"cICP", bytes([12, 13, 0, 1]))), RGB),
    "colours 16.png": (png(DEEP[..., :3], (b"cICP", bytes([9, 16, 0, 1])), bits=16), DEEP[..., :3]),
}


@pytest.mark.parametrize("name", READ)
def test_odd_pictures_are_read_and_written_as_they_are(tmp_path, name):
    first, second = tmp_path / name, tmp_path / f"again {name}"
    content, expected = READ[name]
    first.write_bytes(content)
    write_pixels(second, *read_pixels(first))
    for path in (first, second):
        pixels = with_alpha(path)
        np.testing.assert_array_equal(pixels, expected)
        assert pixels.shape == expected.shape
    if first.suffix == ".png":
        chunks = [list(load_data._png_chunks(path.read_bytes())) for path in (first, second)]
        kept = [chunk for chunk in chunks[0] if chunk[4:5].islower() and chunk[4:8] != b"tRNS"]
        assert [chunk for chunk in chunks[1] if chunk[4:5].islower()] == kept


FIVE = np.dstack([RGB, RGB[..., :2]])
REFUSED = {
    "five channels.tif": (tiff(FIVE, {338: (0, 0)}), "channels R, G, B, channel3"),
    "no alpha.tif": (tiff(FIVE[..., :4], {338: 0}), "channels R, G, B, channel3"),
    "multiplied.tif": (tiff(DEEP, {338: 1}), "colours multiplied by alpha"),
    "palette of bytes.tif": (palette(1), "a palette of 8 bits"),
    "lab.tif": (tiff(RGB, LAB), "colours as CIELAB"),
    "pages.tif": (tiff_of_two(0), "several pictures"),
    "signed.tif": (tiff(GREY.astype(np.int16)), "pixels of type int16"),
    "32.tif": (tiff(GREY.astype(np.int32)), "pixels of type int"),
    "half.tif": (tiff(GREY.astype(np.float16)), "pixels of type half"),
    "float.tif": (tiff(GREY.astype(np.float32)), "pixels of type float"),
    "bomb.png": (png(GREY, sides=(60_000, 60_000)), "exceeds the 1500 MB limit"),
    "animation.png": (png(RGB, (b"acTL", struct.pack(">II", 1, 0))), "an animation"),
    "animation.webp": (by_pillow("WEBP", Image.fromarray(255 - RGB)), "several pictures"),
    "eps.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not PNG, JPEG, TIFF or WebP"),
    "empty.jpg": (b"", "not PNG, JPEG, TIFF or WebP"),
    "bmp.png": (by_pillow("BMP"), "but BMP"),
    "gif.png": (by_pillow("GIF"), "but GIF"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rare_pictures_are_refused_by_name(tmp_path, name):
    content, reason = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    line = told_line(read_pixels, tmp_path / name)
    assert line.startswith(f"{tmp_path / name}: not a readable image (") and reason in line
    assert line.endswith("; convert it to plain PNG")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_pictures_that_are_cut_short_are_refused(tmp_path, suffix):
    write_pixels(tmp_path / f"a{suffix}", random_images(200, 300, 3))
    os.truncate(tmp_path / f"a{suffix}", 9000)
    assert "not a readable image" in told_line(read_pixels, tmp_path / f"a{suffix}")


def exif(orientation):
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation], tags[ExifTags.Base.Make] = orientation, "a maker"
    exposure = {ExifTags.Base.MakerNote: b"secret", EXPOSURE: TiffImagePlugin.IFDRational(1, 64)}
    tags.get_ifd(ExifTags.IFD.Exif).update(exposure)
    tags.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    return tags


def metadata_of(path):
    """EXIF, place, XMP, profile and resolution of a picture, as Pillow reads them."""
    with Image.open(path) as image:
        tags = image.getexif()
        kept = {tag: tags.get(tag) for tag in (ExifTags.Base.Make, ExifTags.Base.Orientation)}
        for tag in (EXPOSURE, ExifTags.Base.MakerNote):
            kept[tag] = tags.get_ifd(ExifTags.IFD.Exif).get(tag)
        kept |= {"place": tags.get_ifd(ExifTags.IFD.GPSInfo).get(ExifTags.GPS.GPSLatitudeRef)}
        kept |= {"xmp": image.info.get("xmp"), "profile": image.info.get("icc_profile")}
        return kept | {"dpi": image.info.get("dpi") and round(image.info["dpi"][0])}


@pytest.mark.parametrize("source", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_metadata_are_kept_also_in_another_format(tmp_path, source, suffix):
    tags, texts = exif(6), PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", XMP.decode())
    if source == ".tif":
        tags[700] = XMP
    common = {"exif": tags.tobytes(), "xmp": XMP, "icc_profile": PROFILE, "dpi": (300, 300), "pnginfo": texts}
    Image.fromarray(RGB).save(tmp_path / f"a{source}", **common)
    expected = metadata_of(tmp_path / f"a{source}")
    assert (expected["xmp"], expected["profile"], expected[EXPOSURE]) == (XMP, PROFILE, 1 / 64)
    write_pixels(tmp_path / f"b{suffix}", *read_pixels(tmp_path / f"a{source}"))
    written, lost = metadata_of(tmp_path / f"b{suffix}"), set()
    if suffix == ".tif" or suffix == ".png" != source:
        lost = {ExifTags.Base.MakerNote}
    if ".webp" in (source, suffix):
        lost.add("dpi")
    assert {key for key, value in written.items() if value != expected[key]} <= lost
    if suffix == ".png":  # whose colours are what the profile says
        chunks = load_data._png_chunks((tmp_path / "b.png").read_bytes())
        assert b"sRGB" not in {chunk[4:8] for chunk in chunks}


def test_jpeg_keeps_its_segments_and_tiff_its_tags(tmp_path):
    iptc = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x09\x1c\x02\x78\0\x04text"
    caption = b"\x1c\x02\x78\0\x04text\0\0\0"
    segment = b"\xff\xed" + struct.pack(">H", 2 + len(iptc)) + iptc
    Image.fromarray(RGB).save(tmp_path / "a.jpg", comment="mine", extra=segment)
    tags = {269: "a name", 700: XMP, 33723: caption, 37724: b"layers of noise"}
    raw = tiff(RGB, tags)
    tag, count = struct.pack("<HHI", 33723, 7, 12), struct.pack("<HHI", 33723, 4, 3)
    assert tag in raw
    (tmp_path / "a.tif").write_bytes(raw.replace(tag, count))  # Photoshop writes IPTC as of type LONG
    for suffix, there in ((".jpg", [iptc, b"mine"]), (".tif", [b"a name", b"text"])):
        write_pixels(tmp_path / f"b{suffix}", *read_pixels(tmp_path / f"a{suffix}"))
        written = (tmp_path / f"b{suffix}").read_bytes()
        assert all(part in written for part in there)
    assert XMP in written and b"layers" not in written


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stay_as_they_lie_and_are_read_upright(tmp_path, suffix, orientation):
    ramp = np.arange(0, 240, 10, np.uint8).reshape(4, 6, 1).repeat(3, axis=2)  # which JPEG changes little
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    Image.fromarray(ramp).save(first, exif=exif(orientation), quality=100)
    with Image.open(first) as image:
        expected = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    write_pixels(second, *read_pixels(first))
    assert read_pixels(second)[0].shape == ramp.shape
    for path in (first, second):
        assert abs(read_picture(path) - expected).max() <= (8 if suffix in (".jpg", ".webp") else 0)


def test_pictures_of_any_kind_are_read_as_rgb(tmp_path):
    cmyk = Image.fromarray(RGB).convert("CMYK")
    cmyk.save(tmp_path / "cmyk.tif", icc_profile=PROFILE)
    cmyk.save(tmp_path / "cmyk.jpg", icc_profile=PROFILE, quality=100)
    Image.fromarray(DEEP[..., 0]).save(tmp_path / "deep.png")
    Image.fromarray(GREY[..., 0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "cmyk.tif"), cmyk.convert("RGB"))
    assert abs(read_picture(tmp_path / "cmyk.jpg").astype(int) - np.asarray(cmyk.convert("RGB"))).mean() < 2
    expected = np.round(DEEP[..., :1].repeat(3, axis=2) / 65535 * 255)
    np.testing.assert_array_equal(read_picture(tmp_path / "deep.png"), expected)
    np.testing.assert_array_equal(read_picture(tmp_path / "grey.png"), GREY.repeat(3, axis=2))
    assert read_picture(tmp_path / "grey.png", keep_grey=True).shape == GREY.shape
    for suffix in (".jpg", ".tif"):  # the profile is of CMYK
        write_pixels(tmp_path / f"b{suffix}", *read_pixels(tmp_path / f"cmyk{suffix}"))
        assert "icc_profile" not in Image.open(tmp_path / f"b{suffix}").info


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_pixels_are_written_and_read_without_loss(tmp_path, channels, suffix, depth):
    if suffix == ".webp" and (channels < 3 or depth == np.uint16):
        return
    path, pixels = tmp_path / f"a picture ä{suffix}", DEEP[..., :channels].astype(depth)
    colours, alpha = pixels[..., : 3 if channels > 2 else 1], pixels[..., -1] if channels % 2 == 0 else None
    if alpha is not None:
        alpha[alpha < np.iinfo(depth).max // 2] = 0  # with colours that nobody sees
    write_pixels(path, colours, alpha)
    read = with_alpha(path)
    assert read.dtype == depth and read.shape == pixels.shape
    np.testing.assert_array_equal(read, pixels)
    if channels == 3 and depth == np.uint8:
        np.testing.assert_array_equal(Image.open(path), colours)  # as others read it
    write_pixels(tmp_path / f"again{suffix}", *read_pixels(path))
    np.testing.assert_array_equal(with_alpha(tmp_path / f"again{suffix}"), read)


def test_jpeg_is_of_one_quality_whatever_its_ending_and_keeps_colours(tmp_path):
    written = []
    for suffix in (".jpg", ".jpeg", ".jfif", ".jpe"):
        write_pixels(tmp_path / f"a{suffix}", RGB)  # whose colours change from pixel to pixel
        written.append((tmp_path / f"a{suffix}").read_bytes())
    assert len(set(written)) == 1
    assert abs(iio.imread(written[0], extension=".jpg").astype(int) - RGB).mean() < 5


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    (tmp_path / "long.png").write_bytes(png(RGB, (b"eXIf", b"MM\0*" + bytes(70_000))))
    cases = {
        "a.jpg": ((RGB, GREY[..., 0]), "JPEG holds no transparency; choose .png"),
        "b.jpg": ((DEEP[..., :3],), "JPEG holds no 16 bits; choose .png"),
        "c.jpg": (read_pixels(tmp_path / "long.png"), "JPEG was not written (EXIF data is too long); free"),
        "d.webp": ((np.zeros((1, 66_000, 3), np.uint8),), "WEBP was not written ("),
        "a.pcx": ((RGB,), "no format to write has this ending; choose .png"),
    }
    for name, (arguments, reason) in cases.items():
        assert told_line(write_pixels, tmp_path / name, *arguments).startswith(f"{tmp_path / name}: {reason}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.png"]


def test_full_disk_is_named(tmp_path):
    for suffix in (".png", ".jpg", ".tif", ".webp"):
        with largest_file(1000):
            line = told_line(write_pixels, tmp_path / f"a{suffix}", RGB)
        assert "was not written (" in line and "free space on the disk" in line
    assert not list(tmp_path.iterdir())


def test_pictures_of_telephones_are_read_without_a_warning(tmp_path, recwarn):
    Image.new("1", (14_000, 13_800), 1).save(tmp_path / "a.png")
    assert read_pixels(tmp_path / "a.png")[0].shape == (13_800, 14_000, 1)
    assert not recwarn
