"""Hostile image bytes: every one is either a bounded RGB image or an `ImageError` that names its limit."""

import struct
import time
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from models.vision.images import ImageError, ImageLimits, decode_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


def encode(image: Image.Image, fmt: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def quadrants(width: int = 48, height: int = 32) -> Image.Image:
    """Red, green over blue, white: every rotation and mirroring of it looks different."""
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (0, 0, width // 2, height // 2))
    image.paste("lime", (width // 2, 0, width, height // 2))
    image.paste("blue", (0, height // 2, width // 2, height))
    return image


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises `width`×`height` pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("fmt", FORMATS)
def test_each_format_decodes_to_the_same_picture(fmt: str) -> None:
    decoded = decode_image(encode(quadrants(), fmt, **({"lossless": True} if fmt == "WEBP" else {})))
    assert decoded.mode == "RGB"
    difference = np.abs(np.asarray(decoded, int) - np.asarray(quadrants(), int))
    assert difference.mean() < 6  # JPEG blurs the borders


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    # What a camera stores for each orientation: the inverse of the turn that makes it upright.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation](np.asarray(quadrants()))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(quadrants()))


# Pillow warns of damaged metadata and reads on. Here it shall, as in production, where nobody hears it.
READS_ON = pytest.mark.filterwarnings(r"ignore:::PIL\.")


@READS_ON
def test_a_broken_exif_block_costs_only_the_orientation() -> None:
    data = encode(quadrants(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert decode_image(data).size == (48, 32)


def test_transparency_lies_over_white() -> None:
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert decode_image(encode(half)).getpixel((0, 0)) == (255, 127, 127)
    grey = Image.new("LA", (4, 4), (0, 0))
    assert decode_image(encode(grey)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    assert decode_image(encode(palette, "GIF", transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encode(palette, "PNG", transparency=b"\x80")).getpixel((0, 0)) == (132, 137, 142)


def grey_png(depth: int, samples: list[int], transparent: int) -> bytes:
    """One row of grey in which a PNG makes one value transparent."""
    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    row = int(bits.ljust(-len(bits) % 8 + len(bits), "0"), 2).to_bytes(-(-len(bits) // 8))
    return png_row(len(samples), depth, 0, row, struct.pack(">H", transparent))


def png_row(width: int, depth: int, color: int, row: bytes, transparent: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0)
    pixels = chunk(b"tRNS", transparent) + chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("depth", "samples", "transparent", "seen"),
    [
        (1, [0, 1], 0, [255, 255]),
        (2, [0, 1, 2, 3], 1, [0, 255, 170, 255]),
        (4, [0, 1, 8, 15], 8, [0, 17, 255, 255]),
        (8, [0, 1, 128], 1, [0, 255, 128]),
        (16, [0, 128, 255, 32768], 0, [255, 0, 0, 127]),
        (16, [0, 128, 255, 32768], 128, [0, 255, 0, 127]),
        (16, [32767, 32768, 32769, 65535], 32768, [127, 255, 127, 255]),
    ],
)
def test_one_transparent_grey(depth: int, samples: list[int], transparent: int, seen: list[int]) -> None:
    decoded = decode_image(grey_png(depth, samples, transparent))
    assert [decoded.getpixel((x, 0)) for x in range(decoded.width)] == [(value,) * 3 for value in seen]


def test_one_transparent_color_of_sixteen_bits() -> None:
    row = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 1, 2, 3)
    decoded = decode_image(png_row(2, 16, 2, row, row[:6]))
    assert [decoded.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 0)]


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(fmt: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:], duration=50, **options)
    assert decode_image(data).getpixel((4, 4)) == (255, 0, 0)


def test_sixteen_bit_grey_keeps_its_range() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(ramp))))[..., 0].astype(int)
    np.testing.assert_allclose(decoded.ravel(), np.arange(256), atol=1)


def test_cmyk_jpeg_is_read() -> None:
    decoded = decode_image(encode(quadrants().convert("CMYK"), "JPEG", quality=95))
    np.testing.assert_allclose(decoded.getpixel((4, 4)), (255, 0, 0), atol=12)


def test_too_many_bytes() -> None:
    data = encode(quadrants())
    assert decode_image(data, ImageLimits(max_bytes=len(data))).size == (48, 32)
    with pytest.raises(ImageError, match=f"has {len(data)} bytes; at most {len(data) - 1}") as refused:
        decode_image(data, ImageLimits(max_bytes=len(data) - 1))
    assert refused.value.limit == "bytes"


@pytest.mark.parametrize(
    ("width", "height"), [(7000, 7000), (10_000, 10_000), (60_000, 60_000), (1, 50_000_000)]
)
def test_too_many_pixels_are_refused_by_the_header(width: int, height: int) -> None:
    with pytest.raises(ImageError) as refused:
        decode_image(png_claiming(width, height))
    assert refused.value.limit == "pixels"


@pytest.mark.parametrize("size", [(1, 65_536), (65_536, 1), (1, 39_000_000)])
def test_endless_sides_are_refused_by_the_header(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match="a side may have 65535") as refused:
        decode_image(png_claiming(*size))
    assert refused.value.limit == "pixels"
    assert decode_image(encode(Image.new("L", (1, 65_535)))).size == (1, 65_535)


def test_the_pixel_limit_is_inclusive() -> None:
    data = encode(quadrants())
    assert decode_image(data, ImageLimits(max_pixels=48 * 32)).size == (48, 32)
    with pytest.raises(ImageError, match="48×32 pixels"):
        decode_image(data, ImageLimits(max_pixels=48 * 32 - 1))


@pytest.mark.parametrize("fmt", ["BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_are_refused(fmt: str) -> None:
    with pytest.raises(ImageError) as refused:
        decode_image(encode(quadrants(), fmt))
    assert refused.value.limit == "format"


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP"])
def test_no_image_at_all(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode_image(data)


def test_a_truncated_file_is_corrupt_and_not_half_a_picture() -> None:
    data = encode(Image.effect_noise((64, 64), 80).convert("RGB"), "PNG")
    with pytest.raises(ImageError) as refused:
        decode_image(data[: len(data) // 2])
    assert refused.value.limit == "data"


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def endless(kind: str) -> bytes:
    """A file of up to 20 MB with more metadata than pixels, on which Pillow by itself works for long."""
    picture, photo = encode(quadrants()), encode(quadrants(), "JPEG")
    profile = chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(2**20 - 8), 9))
    segment = b"\xff\xe1" + struct.pack(">H", 400) + b"Exif\0\0" + bytes(392)
    match kind:
        case "comments":
            return photo[:2] + b"\xff\xfe\0\2" * 5_000_000 + photo[2:]
        case "exif":
            return photo[:2] + segment * 40_000 + photo[2:]
        case "profiles":
            return picture[:33] + profile * 18_000 + picture[33:]
        case "profiles after the pixels":
            return picture[:-12] + profile * 18_000 + picture[-12:]
    return picture[:-12] + chunk(b"teSt", b"") * 1_600_000 + picture[-12:]


@pytest.mark.parametrize(
    "kind", ["comments", "exif", "profiles", "profiles after the pixels", "chunks after the pixels"]
)
def test_metadata_without_an_end(kind: str) -> None:
    data = endless(kind)
    begun = time.thread_time()
    with pytest.raises(ImageError, match="more metadata than is read") as refused:
        decode_image(data)
    assert time.thread_time() - begun < 1.5
    assert refused.value.limit == "data"


def test_scans_without_an_end() -> None:
    """Sixty bytes each, which take as long as there are pixels: for a file of 20 MB it would be hours."""
    data = encode(Image.new("L", (1000, 1000), 9), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    few = data[:-2] + last * 50 + data[-2:]
    assert decode_image(few).size == (1000, 1000)
    begun = time.thread_time()
    with pytest.raises(ImageError, match="over 64 scans") as refused:
        decode_image(data[:-2] + last * 5_000 + data[-2:])
    assert time.thread_time() - begun < 0.5
    assert refused.value.limit == "data"


@READS_ON
def test_of_endless_exif_the_orientation_is_not_sought() -> None:
    """WebP's is read in one piece, of any size: here an orientation of two million numbers."""
    numbers = b"\1\0\0\0\3\0\0\0" * 2_000_000
    exif = b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHLLL", 0x0112, 5, 2_000_000, 26, 0) + numbers
    data = encode(quadrants(), "WEBP", exif=exif)
    begun = time.thread_time()
    assert decode_image(data).size == (48, 32)
    assert time.thread_time() - begun < 0.5


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("PNG", {"compress_level": 1}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("JPEG", {"quality": 95, "progressive": True, "icc_profile": bytes(2**21), "comment": b"c" * 60_000}),
        ("GIF", {}),
        ("WEBP", {"quality": 80, "method": 0}),
    ],
)
def test_large_pictures_are_within_what_is_read(fmt: str, options: dict[str, object]) -> None:
    noise = Image.effect_noise((1200, 1200), 90).convert("RGB")
    assert decode_image(encode(noise, fmt, **options)).size == (1200, 1200)


def test_a_png_of_the_largest_size_in_small_chunks() -> None:
    """20 MiB in pieces of 1 KiB; encoders make them of 8 KiB and more."""
    pixels = zlib.compress(bytes(1 + 7000 * 3) * 950, 0)
    header = struct.pack(">IIBBBBB", 7000, 950, 8, 2, 0, 0, 0)
    pieces = [chunk(b"IDAT", pixels[i : i + 1024]) for i in range(0, len(pixels), 1024)]
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(pieces) + chunk(b"IEND", b"")
    assert 19 * 2**20 < len(data) < 20 * 2**20
    assert decode_image(data).size == (7000, 950)


def samples() -> list[bytes]:
    noise = Image.effect_noise((24, 24), 60).convert("RGB")
    frames = [noise, quadrants(24, 24)]
    plain = [encode(noise, fmt) for fmt in FORMATS]
    animated = [encode(noise, fmt, save_all=True, append_images=frames) for fmt in ("GIF", "WEBP", "PNG")]
    exif = Image.Exif()
    exif[0x0112] = 6
    return [*plain, *animated, encode(noise.convert("RGBA"), "PNG"), encode(noise, "JPEG", exif=exif)]


SAMPLES = samples()
LIMITS = ImageLimits(max_bytes=100_000, max_pixels=10_000)


def outcome(data: bytes) -> None:
    """Either an RGB image inside the limits, or `ImageError`; any other exception fails the test."""
    try:
        image = decode_image(data, LIMITS)
    except ImageError:
        return
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= LIMITS.max_pixels


FUZZ = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@READS_ON
@FUZZ
@given(st.data())
def test_mutated_files(data: st.DataObject) -> None:
    mutant = bytearray(data.draw(st.sampled_from(SAMPLES)))
    for _ in range(data.draw(st.integers(1, 8))):
        mutant[data.draw(st.integers(0, len(mutant) - 1))] = data.draw(st.integers(0, 255))
    outcome(bytes(mutant))


@READS_ON
@FUZZ
@given(st.sampled_from(SAMPLES), st.floats(0, 1), st.binary(max_size=64))
def test_truncated_files_with_a_foreign_tail(sample: bytes, part: float, tail: bytes) -> None:
    outcome(sample[: int(len(sample) * part)] + tail)


@READS_ON
@FUZZ
@given(
    st.sampled_from(
        [
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff\xe0",
            b"GIF89a",
            b"RIFF\x40\0\0\0WEBPVP8X",
            b"RIFF\x40\0\0\0WEBPVP8L",
        ]
    ),
    st.binary(max_size=256),
)
def test_noise_behind_a_magic_number(magic: bytes, noise: bytes) -> None:
    outcome(magic + noise)
