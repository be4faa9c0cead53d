"""Every odd image format comes out as correct RGB; what is broken says so."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from qbheat_jax.data import augment, decode

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


def colours():
    """uint8[6, 8, 3], no two pixels alike and no axis alike."""
    return np.stack([RAMP, 255 - RAMP, np.roll(RAMP, 3, 1)], -1)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def smooth(height=48, width=64):
    """uint8[height, width, 3] that JPEG hardly changes, with another colour in each corner."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / (width - 1), 255 * y / (height - 1), 128 + 0 * x], -1).astype(np.uint8)


def close(a, b, most):
    assert a.dtype == np.uint8 and a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() <= most


def png(width, height, depth, colour_type, samples):
    """A PNG written by hand: `samples` is an array of big-endian samples, rows first."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_rgb_in_every_container(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    image = Image.fromarray(colours())
    image = image.quantize(48) if kind == "GIF" else image
    np.testing.assert_array_equal(decode.decode(encoded(image, kind, **options)), colours())


def test_jpeg():
    close(decode.decode(encoded(Image.fromarray(smooth()), "JPEG", quality=95)), smooth(), 6)


def test_grey_becomes_three_equal_channels():
    got = decode.decode(encoded(Image.fromarray(RAMP), "PNG"))
    np.testing.assert_array_equal(got, np.repeat(RAMP[..., None], 3, -1))


def test_one_bit_is_black_and_white():
    got = decode.decode(encoded(Image.fromarray(RAMP > 100), "PNG"))
    np.testing.assert_array_equal(got[..., 0], np.where(RAMP > 100, 255, 0))


def test_palette_without_transparency():
    got = decode.decode(encoded(Image.fromarray(colours()).quantize(48), "PNG"))
    np.testing.assert_array_equal(got, colours())


def test_palette_with_a_transparent_colour_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    got = decode.decode(encoded(image, "PNG", transparency=0))
    np.testing.assert_array_equal(got, [[[255, 255, 255], [200, 100, 50]]])


def test_palette_with_a_transparency_table_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.putpixel((1, 0), 1)
    got = decode.decode(encoded(image, "PNG", transparency=bytes([51, 255])))
    np.testing.assert_array_equal(got, [[[204, 204, 204], [200, 100, 50]]])


def test_grey_and_rgb_with_a_transparent_colour():
    grey = encoded(Image.fromarray(np.array([[0, 90]], np.uint8)), "PNG", transparency=0)
    np.testing.assert_array_equal(decode.decode(grey)[0, :, 0], [255, 90])
    rgb = encoded(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), "PNG", transparency=(1, 2, 3))
    np.testing.assert_array_equal(decode.decode(rgb), [[[255, 255, 255], [4, 5, 6]]])


@pytest.mark.parametrize("alpha, expected", [(255, [200, 100, 0]), (0, [255, 255, 255]), (51, [244, 224, 204])])
def test_rgba_over_white(alpha, expected):
    image = Image.new("RGBA", (3, 2), (200, 100, 0, alpha))
    for kind in ("PNG", "WEBP"):
        got = decode.decode(encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})))
        close(got, np.full((2, 3, 3), expected, np.uint8), 1)


def test_grey_with_alpha_over_white():
    got = decode.decode(encoded(Image.new("LA", (3, 2), (100, 51)), "PNG"))
    close(got, np.full((2, 3, 3), 224, np.uint8), 1)


INKS = (200, 40, 0, 60)
INKS_RGB = [round((255 - ink) * (255 - 60) / 255) for ink in INKS[:3]]


def test_cmyk_jpeg_with_adobes_marker_is_inverted():
    data = encoded(Image.new("CMYK", (16, 16), INKS), "JPEG", quality=100)
    assert b"Adobe" in data
    close(decode.decode(data), np.full((16, 16, 3), INKS_RGB, np.uint8), 3)


def test_cmyk_jpeg_without_adobes_marker_is_not_inverted():
    data = encoded(Image.new("CMYK", (16, 16), tuple(255 - ink for ink in INKS)), "JPEG", quality=100)
    at = data.index(b"\xff\xee")
    length = struct.unpack(">H", data[at + 2 : at + 4])[0]
    plain = data[:at] + data[at + 2 + length :]
    assert b"Adobe" not in plain
    close(decode.decode(plain), np.full((16, 16, 3), INKS_RGB, np.uint8), 3)


def test_ycck_jpeg():
    # Adobe's marker ends with the colour transform; 2 says YCCK, so this is decoded through another conversion.
    data = bytearray(encoded(Image.new("CMYK", (16, 16), INKS), "JPEG", quality=100))
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    data[at] = 2
    # The stored samples, inverted inks, are now read as Y, Cb, Cr of the complement of the stored (inverted) inks.
    y, cb, cr = (255 - ink for ink in INKS[:3])
    red, green, blue = (
        y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)
    )  # fmt: skip
    expected = [(255 - min(255, max(0, value))) * (255 - 60) / 255 for value in (red, green, blue)]
    close(decode.decode(bytes(data)), np.full((16, 16, 3), np.round(expected), np.uint8), 4)


def test_16_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 128, 257, 32768, 65407, 65535]], ">u2")
    got = decode.decode(png(6, 1, 16, 0, values))
    np.testing.assert_array_equal(got[0, :, 0], [0, 0, 1, 128, 255, 255])
    tiff = encoded(Image.fromarray(values.astype(np.uint16)), "TIFF")
    np.testing.assert_array_equal(decode.decode(tiff)[0, :, 0], [0, 0, 1, 128, 255, 255])


def test_16_bit_rgb():
    values = np.array([[[0, 32768, 65535], [65535, 257 * 7, 257 * 200]]], ">u2")
    close(decode.decode(png(2, 1, 16, 2, values)), np.array([[[0, 128, 255], [255, 7, 200]]], np.uint8), 1)


def test_16_bit_rgba_over_white():
    values = np.array([[[65535, 0, 0, 65535], [0, 0, 0, 0]]], ">u2")
    close(decode.decode(png(2, 1, 16, 6, values)), np.array([[[255, 0, 0], [255, 255, 255]]], np.uint8), 1)


# What each EXIF orientation says the stored pixels are, as an operation on the upright ones.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),  # "rotate by 90 degrees clockwise to view": stored turned anticlockwise
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_exif_orientation(orientation, kind):
    upright = smooth()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = encoded(stored, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    close(decode.decode(data), upright, 6 if kind == "JPEG" else 0)


def test_broken_exif_does_not_spoil_the_pixels():
    data = encoded(Image.fromarray(smooth()), "JPEG", quality=95, exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    close(decode.decode(data), smooth(), 6)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (5, 4), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for kind in ("GIF", "PNG", "WEBP"):
        data = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        close(decode.decode(data), np.full((4, 5, 3), (200, 0, 0), np.uint8), 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_truncated_files_are_bad(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    assert decode.decode(data).shape == (64, 64, 3)
    with pytest.raises(decode.BadImage):
        decode.decode(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"hello, I am a text file", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_image_is_bad(data):
    with pytest.raises(decode.BadImage) as caught:
        decode.decode(data)
    assert 0 < len(str(caught.value)) < 250 and "\n" not in str(caught.value)


def test_corrupt_png_data_is_bad():
    data = bytearray(encoded(Image.fromarray(colours()), "PNG"))
    middle = data.index(b"IDAT") + 20
    data[middle : middle + 10] = b"\xff" * 10
    with pytest.raises(decode.BadImage):
        decode.decode(bytes(data))


def test_decompression_bombs_are_bad(recwarn):
    for side in (12_000, 60_000):
        with pytest.raises(decode.BadImage, match="(?i)pixels|bomb"):
            decode.decode(png(side, side, 1, 0, np.zeros((1, 1), np.uint8)))


def test_floats_are_bad():
    with pytest.raises(decode.BadImage, match="floating-point"):
        decode.decode(encoded(Image.new("F", (4, 4), 0.5), "TIFF"))


def test_crop_boxes_lie_inside_and_keep_to_scale_and_ratio():
    areas = []
    for index in range(300):
        top, left, height, width = augment.random_resized_crop_box(
            augment.rng(0, 0, index, "crop"), 120, 200, (0.2, 0.8), (0.75, 4 / 3)
        )
        assert 0 <= top and top + height <= 120 and 0 <= left and left + width <= 200 and height and width
        assert 0.72 < width / height < 1.38
        areas.append(height * width / 120 / 200)
    assert 0.19 < min(areas) < 0.25 and 0.55 < max(areas) < 0.81


def test_crop_box_falls_back_to_the_centre():
    box = augment.random_resized_crop_box(augment.rng(0, 0, 0, "crop"), 10, 1000, (0.9, 1.0), (0.75, 4 / 3))
    assert box == (0, 493, 10, 13)


def test_draws_depend_on_everything_they_are_keyed_by():
    keys = [(0, 0, 0, "crop"), (1, 0, 0, "crop"), (0, 1, 0, "crop"), (0, 0, 1, "crop"), (0, 0, 0, "flip")]
    assert len({augment.bits(*key) for key in keys}) == len(keys)
    assert augment.rng(*keys[0]).random() == augment.rng(*keys[0]).random()
    many = augment.bits(3, 4, np.arange(5), "crop")
    assert many.tolist() == [augment.bits(3, 4, index, "crop") for index in range(5)]


def test_centre_crop_is_the_usual_evaluation_crop():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    np.testing.assert_array_equal(augment.centre(image, 64), image)
    assert augment.centre_box(256, 512, 224) == (16, 144, 224, 224)


def written(values, depth, colour_type, *chunks):
    """A PNG written by hand: values int [height, width, channels], and chunks (kind, content) before the pixels."""
    height, width = values.shape[:2]
    bits = [[(int(v) >> (depth - 1 - b)) & 1 for v in row.reshape(-1) for b in range(depth)] for row in values]
    samples = np.packbits(np.array(bits, np.uint8), axis=1)
    data = png(width, height, depth, colour_type, samples)
    between = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    ]
    return b"".join([data[:33], *between, data[33:]])  # after the header


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_is_white_at_every_depth(depth):
    top = 2**depth - 1
    values = np.array([[0, 1, top, top // 2]])[..., None]
    grey = np.round(values[..., 0] * 255 / top).astype(int)
    for key in (0, 1):
        got = decode.decode(written(values, depth, 0, (b"tRNS", struct.pack(">H", key))))
        expected = np.where(values[..., 0] == key, 255, grey)
        assert np.abs(got.astype(int) - expected[..., None]).max() <= (depth == 16)


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_a_png_is_white_at_every_depth(depth):
    top = 2**depth - 1
    values = np.array([[[top, 0, 0], [top // 2, 1, 2]]])
    got = decode.decode(written(values, depth, 2, (b"tRNS", struct.pack(">HHH", top // 2, 1, 2))))
    assert got.tolist() == [[[255, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"zTXt", b"k\0\0" + zlib.compress(b"a" * (3 << 20)))],
        [(b"iCCP", b"k\0\0" + zlib.compress(b"a" * (3 << 20)))],
        [(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"a" * (3 << 20)))],
        [(b"tEXt", b"k\0" + b"a" * (3 << 20))],
        [(b"tEXt", b"k\0" + b"a" * 60_000)] * 1200,
    ],
    ids=["zTXt", "iCCP", "iTXt", "tEXt", "many"],
)
def test_a_png_with_large_texts_or_profiles_is_sound(chunks):
    values = np.arange(12).reshape(2, 2, 3)
    np.testing.assert_array_equal(decode.decode(written(values, 8, 2, *chunks)), values)


@pytest.mark.parametrize("first", [0, 1])
def test_a_png_still_is_turned_as_its_xmp_says(first):
    packet = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="3"/></rdf:RDF></x:xmpmeta>'
    )
    values = np.arange(12).reshape(2, 2, 3)
    xmp, large = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet), (b"tEXt", b"k\0" + b"a" * (3 << 20))
    chunks = ((large, xmp), (xmp, large))[first]
    np.testing.assert_array_equal(decode.decode(written(values, 8, 2, *chunks)), values[::-1, ::-1])


def test_integers_of_a_tiff_are_of_8_bits_where_none_is_larger_and_of_16_otherwise():
    for most, factor in ((255, 1), (65535, 257)):
        values = np.array([[0, 51 * factor, most]], np.int32)
        got = decode.decode(encoded(Image.fromarray(values), "TIFF"))
        assert got[..., 0].tolist() == [[0, 51, 255]]
    dark = np.array([[0, 51, 255]], np.uint16)
    assert decode.decode(encoded(Image.fromarray(dark), "TIFF"))[..., 0].tolist() == [[0, 0, 1]], "16 bits are 16 bits"
    with pytest.raises(decode.BadImage, match="range is unknown"):
        decode.decode(encoded(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF"))


@pytest.mark.parametrize("kind, top", [(np.uint8, 255), (np.uint16, 65535)])
def test_a_tiff_in_which_zero_is_white(kind, top):
    values = np.array([[0, top // 5, top]], kind)
    stored = values if kind == np.uint16 else top - values  # Pillow inverts 8 bits as it writes them
    got = decode.decode(encoded(Image.fromarray(stored), "TIFF", tiffinfo={262: 0}))
    assert got[..., 0].tolist() == [[255, 204, 0]]


def test_a_pgm_of_16_bits_is_scaled_by_its_own_maximum():
    data = b"P5 3 1 4095\n" + np.array([0, 819, 4095], ">u2").tobytes()
    assert decode.decode(data)[..., 0].tolist() == [[0, 51, 255]]
    dark = b"P5 3 1 65535\n" + np.array([0, 100, 200], ">u2").tobytes()
    assert decode.decode(dark)[..., 0].tolist() == [[0, 0, 1]]


def test_postscript_never_reaches_ghostscript(monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(decode.BadImage, match="not an image in a known format"):
        decode.decode(eps)


def test_a_bomb_is_refused_by_its_header():
    header = written(np.zeros((1, 1, 1), int), 8, 0)
    wide = header[:16] + struct.pack(">II", 60_000, 60_000) + header[24:29]
    wide += struct.pack(">I", zlib.crc32(wide[12:29])) + header[33:]
    with pytest.raises(decode.BadImage, match="pixels"):
        decode.decode(wide)
