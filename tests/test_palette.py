"""The palette: the table is the nearest colour to the bit, files are read or refused, and fits are good."""

import io
import itertools
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from igpt_ray import images, palette, storage
from igpt_ray.errors import PaletteError
from igpt_ray.palette import Palette, nearest_table


@pytest.fixture(scope="module")
def openai(shared: Path) -> Palette:
    """OpenAI's own 512 colours."""
    return Palette.load(str(shared / "data" / "openai_palette.npy"))


@pytest.fixture(scope="module")
def openai_table(openai: Palette) -> NDArray[np.uint16]:
    return nearest_table(openai.colours)


def random_pixels(n: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------ the table


def plane(colours: NDArray[np.float32], red: int) -> NDArray[np.int64]:
    """Nearest colours of all 65,536 pixels with this red, by looking at every colour for each."""
    squared = (np.arange(256)[:, None, None] / 127.5 - 1 - colours.astype(np.float64)) ** 2  # (256, k, 3)
    return (squared[red, :, 0] + squared[:, None, :, 1] + squared[None, :, :, 2]).argmin(-1).ravel()


def test_the_table_is_brute_force_for_openais_palette(openai: Palette, openai_table: NDArray[np.uint16]) -> None:
    """float32, or cells pruned a little too far: a few colours in a million would land on the second nearest."""
    rgb = random_pixels(10_000, 0)
    np.testing.assert_array_equal(openai.encode(rgb), palette.nearest_float64(openai.colours, rgb))
    for red in (95, 96):  # both sides of a cell's border
        np.testing.assert_array_equal(openai_table.reshape(256, -1)[red], plane(openai.colours, red))


def test_the_table_of_a_small_palette_is_brute_force_everywhere(palette: Palette) -> None:
    """All 2^24 entries."""
    table = nearest_table(palette.colours).reshape(256, -1)
    for red in range(256):
        np.testing.assert_array_equal(table[red], plane(palette.colours, red))


def test_the_table_is_brute_force_near_its_borders(openai: Palette, openai_table: NDArray[np.uint16]) -> None:
    """Random colours rarely lie between two of the palette: look at neighbours that get different tokens."""
    different = np.flatnonzero(openai_table[:-1] != openai_table[1:])
    rgb = palette.unpack(np.random.default_rng(1).choice(different, 10_000, replace=False))
    np.testing.assert_array_equal(openai_table[palette.pack(rgb)], palette.nearest_float64(openai.colours, rgb))


def test_a_tie_goes_to_the_lowest_index() -> None:
    """Equal colours, and colours exactly half way: any other rule than OpenAI's gives other tokens."""
    levels = np.array([[0, 0, 0], [2, 0, 0], [0, 0, 0], [2, 0, 0], [0, 2, 0], [255, 255, 255]], np.float64)
    for order in ([0, 1, 2, 3, 4, 5], [3, 2, 4, 1, 5, 0]):
        colours = (levels[order] / 255 * 2 - 1).astype(np.float32)
        rgb = np.array(list(itertools.product(range(6), repeat=3)), np.uint8)
        expected = palette.nearest_float64(colours, rgb)
        table = nearest_table(colours)
        np.testing.assert_array_equal(table[palette.pack(rgb)], expected)
        for colour in ([0, 0, 0], [2, 0, 0]):
            first = min(i for i, o in enumerate(order) if levels[o].tolist() == colour)
            assert table[palette.pack(np.array(colour, np.uint8))] == first


def test_exact_ties_half_way_go_to_the_lowest_index() -> None:
    """Powers of two keep the distances exact, so that both colours are equally far in any arithmetic."""
    colours = np.array([[0.5, -1, -1], [-0.5, -1, -1], [0.5, 1, 1], [-0.5, 1, 1]], np.float32)
    squared = ((np.array([[0.0, -1, -1], [0, 1, 1]])[:, None] - colours) ** 2).sum(-1)
    assert squared[0, 0] == squared[0, 1]
    grey = np.array([[127, 0, 0], [128, 0, 0], [127, 255, 255], [128, 255, 255]], np.uint8)
    for c in (colours, colours[::-1].copy()):
        table = nearest_table(c)
        np.testing.assert_array_equal(table[palette.pack(grey)], palette.nearest_float64(c, grey))


def test_the_table_is_made_once_and_found_again(palette: Palette, cache: Path) -> None:
    """Every process of a node would spend a second, or read another palette's table."""
    rgb = random_pixels(1000, 2)
    first = palette.encode(rgb)
    files = {p.name: p.stat().st_mtime_ns for p in cache.glob("table-*")}
    again = Palette(palette.colours.copy())
    np.testing.assert_array_equal(again.encode(rgb), first)
    assert {p.name: p.stat().st_mtime_ns for p in cache.glob("table-*")} == files
    assert any(palette.fingerprint.startswith(name[6:30]) for name in files)


# ------------------------------------------------------------------------------------------------ colours and bytes


def test_every_24_bit_colour_is_packed_and_unpacked() -> None:
    """A shift in uint8 drops the high bits."""
    rgb = random_pixels(1000, 3)
    np.testing.assert_array_equal(palette.unpack(palette.pack(rgb)), rgb)
    assert palette.pack(np.array([1, 2, 3], np.uint8)) == 0x010203
    assert palette.pack(np.array([255, 255, 255], np.uint8)) == palette.COLOURS - 1


def test_a_palette_decodes_to_its_own_colours(openai: Palette) -> None:
    """Truncation instead of rounding darkens every picture by half a level."""
    rgb = openai.decode(np.arange(512))
    assert rgb.dtype == np.uint8
    assert np.abs(rgb - 127.5 * (openai.colours.astype(np.float64) + 1)).max() <= 0.5 + 1e-4
    # A decoded colour is encoded as itself, unless another colour rounds to the same eight bits.
    np.testing.assert_array_equal(openai.decode(openai.encode(rgb)), rgb)
    assert openai.decode(np.zeros((2, 3), np.uint16)).shape == (2, 3, 3)


def test_colours_outside_eight_bits_are_clipped() -> None:
    """k-means centres may leave the cube by rounding; uint8 would wrap white round to black."""
    outside = Palette(np.array([[1.2, -1.2, 0], [1, 1, 1]], np.float32))
    assert outside.decode(np.array([0]))[0].tolist() == [255, 0, 128]


def test_the_fingerprint_is_of_the_colours_alone(openai: Palette, tmp_path: Path) -> None:
    """A fingerprint of the file would change with numpy's header, or with the order in memory."""
    assert openai.fingerprint == Palette(np.asfortranarray(openai.colours)).fingerprint
    openai.save(str(tmp_path / "copy.npy"))
    assert Palette.load(str(tmp_path / "copy.npy")).fingerprint == openai.fingerprint
    other = openai.colours.copy()
    other[511, 2] = np.nextafter(other[511, 2], 2)
    assert Palette(other).fingerprint != openai.fingerprint
    assert Palette(openai.colours[::-1].copy()).fingerprint != openai.fingerprint


@pytest.mark.parametrize("pixels", [np.zeros((4, 3), np.int64), np.zeros((4, 4), np.uint8), np.zeros(4, np.uint8)])
def test_what_is_not_pixels_is_not_encoded(palette: Palette, pixels: NDArray[np.integer]) -> None:
    """Scaled floats or grey pictures would index the table with nonsense."""
    with pytest.raises(PaletteError, match=r"\(\.\.\., 3\) uint8"):
        palette.encode(pixels)


def test_real_photographs_keep_their_quality(openai: Palette, shared: Path) -> None:
    """Swapped channels or another scale still give pictures, but not 33.5 dB (facts.md, section 3)."""
    with tarfile.open(shared / "data" / "imagenet_sample" / "ILSVRC2012_img_val.tar") as tar:
        files = [tar.extractfile(member) for member in tar]
        views = np.stack([images.centre_view(f.read(), 32, images.REFERENCE) for f in files if f is not None])
    assert palette.psnr(views, openai.decode(openai.encode(views))) == pytest.approx(33.5, abs=1.5)


def test_psnr_is_in_decibels_of_the_mean_squared_error() -> None:
    """uint8 differences wrap around."""
    dark, bright = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 10, np.uint8)
    assert palette.psnr(dark, bright) == pytest.approx(10 * np.log10(255**2 / 100))
    assert palette.psnr(bright, dark) == palette.psnr(dark, bright)
    assert palette.psnr(dark, dark) == float("inf")


# ------------------------------------------------------------------------------------------------ files


def npy(array: NDArray[np.generic]) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def npz() -> bytes:
    out = io.BytesIO()
    np.savez(out, palette=np.zeros((4, 3), np.float32))
    return out.getvalue()


def archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("palette.npy", npy(np.zeros((4, 3), np.float32)))
    return out.getvalue()[:-10]


GOOD = npy(np.zeros((4, 3), np.float32))
MALFORMED = {
    "empty": b"",
    "text": b"0 0 0\n255 255 255\n",
    "cut": GOOD[:-1],
    "header only": GOOD[:60],
    "npz": npz(),
    "cut zip": archive(),
    "vast": GOOD.replace(b"(4, 3), }" + b" " * 12, b"(9999999999999, 3), }"),
    "unclosed": GOOD.replace(b"(4, 3)", b"(4, 3,"),
    "float64": npy(np.zeros((4, 3))),
    "uint8": npy(np.zeros((4, 3), np.uint8)),
    "grey": npy(np.zeros(4, np.float32)),
    "rgba": npy(np.zeros((4, 4), np.float32)),
    "one colour": npy(np.zeros((1, 3), np.float32)),
    "65537 colours": npy(np.zeros((65537, 3), np.float32)),
    "not scaled": npy(np.full((4, 3), 255, np.float32)),
    "NaN": npy(np.full((4, 3), np.nan, np.float32)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_palette_is_refused(name: str, tmp_path: Path) -> None:
    """Half of these come out of numpy as SyntaxError, BadZipFile, AttributeError or MemoryError."""
    (tmp_path / "palette.npy").write_bytes(MALFORMED[name])
    with pytest.raises(PaletteError):
        Palette.load(str(tmp_path / "palette.npy"))


def test_a_damaged_header_is_refused_or_harmless(palette: Palette, tmp_path: Path) -> None:
    """numpy's header is Python source: a flipped byte in it raises whatever its parser raises."""
    data = palette.npy()
    rng = np.random.default_rng(5)
    for position in range(128):
        for value in rng.integers(0, 256, 8):
            damaged = bytearray(data)
            damaged[position] = value
            (tmp_path / "palette.npy").write_bytes(damaged)
            try:
                assert len(Palette.load(str(tmp_path / "palette.npy"))) >= 2
            except PaletteError:
                continue


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    """A palette comes from a bucket; an object array in it would run its author's code here."""
    trace, uri = tmp_path / "ran", str(tmp_path / "palette.npy")
    for data in (npy(np.array([Bomb(trace)], object)), pickle.dumps(Bomb(trace))):
        storage.write(uri, data)
        with pytest.raises(PaletteError, match="is not a palette"):
            Palette.load(uri)
    assert not trace.exists()
    pickle.loads(data)
    assert trace.exists()  # the bomb was live


# ------------------------------------------------------------------------------------------------ fitting


def histogram_of(colours: NDArray[np.uint8], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    histogram = np.zeros(palette.COLOURS, np.int64)
    np.add.at(histogram, palette.pack(colours), counts)
    return histogram


def cost(colours: NDArray[np.float64], centres: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    """Mean squared distance of a pixel to the nearest centre."""
    squared = ((colours[:, None] - centres[None]) ** 2).sum(-1).min(1)
    return float((squared * counts).sum() / counts.sum())


def test_well_separated_colours_are_found_exactly() -> None:
    """A seeding that falls into one cluster twice, without another try."""
    corners = np.array(list(itertools.product([20, 230], repeat=3)), np.uint8)
    fitted = Palette.fit(histogram_of(corners, np.arange(1, 9) * 1000), 8)
    np.testing.assert_array_equal(fitted.decode(np.arange(8)), corners)  # and in the order of red, green, blue


def test_a_fit_minimises_the_cost_of_pixels_not_of_distinct_colours() -> None:
    """Counts that are ignored: one odd pixel would weigh as much as the sky. The optimum is found by trying all."""
    rng = np.random.default_rng(8)
    colours, counts = random_pixels(9, 9), (10 ** rng.uniform(0, 5, 9)).astype(np.int64)
    points = colours / 127.5 - 1
    best = np.inf
    for sides in itertools.product([0, 1], repeat=9):
        in_one = np.array(sides, bool)
        if in_one.any() and not in_one.all():
            centres = np.stack([np.average(points[s], axis=0, weights=counts[s]) for s in (in_one, ~in_one)])
            best = min(best, cost(points, centres, counts))
    fitted = Palette.fit(histogram_of(colours, counts), 2)
    assert cost(points, fitted.colours.astype(np.float64), counts) == pytest.approx(best, rel=1e-4)
    unweighted = Palette.fit(histogram_of(colours, np.ones(9, np.int64)), 2)
    assert cost(points, unweighted.colours.astype(np.float64), counts) > 1.1 * best


def test_equal_words_fit_equal_palettes() -> None:
    """Another fingerprint each time: no two stores would ever fit together."""
    histogram = histogram_of(random_pixels(500, 10), np.ones(500, np.int64))
    assert Palette.fit(histogram, 8, seed=1).fingerprint == Palette.fit(histogram, 8, seed=1).fingerprint


def test_fewer_colours_than_k_are_refused() -> None:
    """faiss would abort from C++."""
    with pytest.raises(PaletteError, match="3 distinct colours, fewer than k = 4"):
        Palette.fit(histogram_of(random_pixels(3, 11), np.ones(3, np.int64)), 4)
