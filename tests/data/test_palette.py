"""The palette: the table gives the exact nearest colour, damaged files are errors, and fits are good."""

import fnmatch
import hashlib
import io
import itertools
import pickle
import tarfile
import tomllib
import tracemalloc
import zipfile
from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from igpt_ray import storage
from igpt_ray.data import kmeans, palette
from igpt_ray.data import pixels as images
from igpt_ray.data.config import PrepareConfig
from igpt_ray.data.palette import Palette, nearest_table
from igpt_ray.errors import PaletteError


@pytest.fixture(scope="module")
def openai() -> Palette:
    """OpenAI's own 512 colours."""
    return Palette.load("openai")


@pytest.fixture(scope="module")
def openai_table(openai: Palette) -> NDArray[np.uint16]:
    return nearest_table(openai.colours)


def random_pixels(n: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------ the table


def plane(colours: NDArray[np.float32], red: int) -> NDArray[np.int64]:
    """Nearest colours of all 65,536 pixels with this red value, by brute force."""
    squared = (np.arange(256)[:, None, None] / 127.5 - 1 - colours.astype(np.float64)) ** 2  # (256, k, 3)
    return (squared[red, :, 0] + squared[:, None, :, 1] + squared[None, :, :, 2]).argmin(-1).ravel()


def test_the_table_equals_brute_force_for_openais_palette(openai: Palette, openai_table: NDArray[np.uint16]) -> None:
    """float32, or too much pruning, would give a few colours in a million the second nearest colour."""
    rgb = random_pixels(10_000, 0)
    np.testing.assert_array_equal(openai.encode(rgb), palette.nearest_float64(openai.colours, rgb))
    for red in (95, 96):  # both sides of a cell's border
        np.testing.assert_array_equal(openai_table.reshape(256, -1)[red], plane(openai.colours, red))


def test_the_table_of_a_small_palette_equals_brute_force_everywhere(palette: Palette) -> None:
    """All 2^24 entries."""
    table = nearest_table(palette.colours).reshape(256, -1)
    for red in range(256):
        np.testing.assert_array_equal(table[red], plane(palette.colours, red))


def test_the_table_equals_brute_force_near_cell_borders(openai: Palette, openai_table: NDArray[np.uint16]) -> None:
    """Random colours rarely lie near a border: this test uses neighbours with different tokens."""
    different = np.flatnonzero(openai_table[:-1] != openai_table[1:])
    rgb = palette.unpack(np.random.default_rng(1).choice(different, 10_000, replace=False))
    np.testing.assert_array_equal(openai_table[palette.pack(rgb)], palette.nearest_float64(openai.colours, rgb))


def test_a_tie_goes_to_the_lowest_index() -> None:
    """For equal colours and exact midpoints, another rule than OpenAI's would give other tokens."""
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


def test_a_midpoint_goes_to_the_lowest_index() -> None:
    """With powers of two, both distances are exact and equal in any arithmetic."""
    colours = np.array([[0.5, -1, -1], [-0.5, -1, -1], [0.5, 1, 1], [-0.5, 1, 1]], np.float32)
    squared = ((np.array([[0.0, -1, -1], [0, 1, 1]])[:, None] - colours) ** 2).sum(-1)
    assert squared[0, 0] == squared[0, 1]
    grey = np.array([[127, 0, 0], [128, 0, 0], [127, 255, 255], [128, 255, 255]], np.uint8)
    for c in (colours, colours[::-1].copy()):
        table = nearest_table(c)
        np.testing.assert_array_equal(table[palette.pack(grey)], palette.nearest_float64(c, grey))


@pytest.mark.slow
def test_the_table_of_many_colours_is_exact_in_bounded_memory() -> None:
    """The distances of every colour to every level would take 50 MB here, and no block may lose a candidate."""
    rng = np.random.default_rng(4)
    colours = rng.normal(0, 0.35, (8192, 3)).clip(-1, 1).astype(np.float32)  # dense in the middle, as photographs are
    tracemalloc.start()
    table = nearest_table(colours)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # 33.6 MB are the table
    rgb = rng.normal(127, 60, (200, 3)).clip(0, 255).astype(np.uint8)
    expected = np.concatenate([palette.nearest_float64(colours, rgb[i : i + 10]) for i in range(0, len(rgb), 10)])
    np.testing.assert_array_equal(table[palette.pack(rgb)], expected)


@pytest.mark.parametrize("n", [0, 1, 2, palette.CHUNK, palette.CHUNK + 1, 3 * palette.CHUNK + 7])
def test_any_number_of_pixels_is_encoded(openai: Palette, openai_table: NDArray[np.uint16], n: int) -> None:
    """A pixel is read with the byte after it, which the last pixel does not have, and chunks end anywhere."""
    rgb = random_pixels(n, n)
    rgb.flags.writeable = False
    np.testing.assert_array_equal(openai.encode(rgb), openai_table[palette.pack(rgb)])


def test_pixels_in_any_memory_layout_are_encoded(openai: Palette, openai_table: NDArray[np.uint16]) -> None:
    """Crops, mirrored images, swapped axes and channels are not contiguous in memory."""
    rgb = random_pixels(6 * 8 * 10, 12).reshape(6, 8, 10, 3)
    for view in (rgb[:, 2:5, ::-2], rgb.transpose(2, 0, 1, 3), rgb[..., ::-1], rgb[0, 0, 0], np.asfortranarray(rgb)):
        tokens = openai.encode(view)
        assert tokens.shape == view.shape[:-1]
        np.testing.assert_array_equal(tokens, openai_table[palette.pack(view)])


def test_the_table_is_computed_once_and_cached(palette: Palette, cache: Path) -> None:
    """Otherwise every process of a node would take a second; the cache must not mix palettes."""
    rgb = random_pixels(1000, 2)
    first = palette.encode(rgb)
    files = {p.name: p.stat().st_mtime_ns for p in cache.glob("table-*")}
    again = Palette(palette.colours.copy())
    np.testing.assert_array_equal(again.encode(rgb), first)
    assert {p.name: p.stat().st_mtime_ns for p in cache.glob("table-*")} == files
    assert any(palette.fingerprint.startswith(name[6:30]) for name in files)


# ------------------------------------------------------------------------------------------------ colours and bytes


def test_every_24_bit_colour_is_packed_and_unpacked() -> None:
    """A shift in uint8 would drop the high bits."""
    rgb = random_pixels(1000, 3)
    np.testing.assert_array_equal(palette.unpack(palette.pack(rgb)), rgb)
    assert palette.pack(np.array([1, 2, 3], np.uint8)) == 0x010203
    assert palette.pack(np.array([255, 255, 255], np.uint8)) == palette.COLOURS - 1


def test_a_palette_decodes_to_its_own_colours(openai: Palette) -> None:
    """Truncation instead of rounding would darken every image by half a level."""
    rgb = openai.decode(np.arange(512))
    assert rgb.dtype == np.uint8
    assert np.abs(rgb - 127.5 * (openai.colours.astype(np.float64) + 1)).max() <= 0.5 + 1e-4
    # A decoded colour is encoded as itself, unless another colour rounds to the same eight bits.
    np.testing.assert_array_equal(openai.decode(openai.encode(rgb)), rgb)
    assert openai.decode(np.zeros((2, 3), np.uint16)).shape == (2, 3, 3)


def test_colours_outside_eight_bits_are_clipped() -> None:
    """k-means centres may leave [-1, 1] by rounding; uint8 would wrap white to black."""
    outside = Palette(np.array([[1.2, -1.2, 0], [1, 1, 1]], np.float32))
    assert outside.decode(np.array([0]))[0].tolist() == [255, 0, 128]


def test_the_fingerprint_depends_on_the_colours_alone(openai: Palette, tmp_path: Path) -> None:
    """A hash of the file would change with numpy's header or the memory order."""
    assert openai.fingerprint == Palette(np.asfortranarray(openai.colours)).fingerprint
    openai.save(str(tmp_path / "copy.npy"))
    assert Palette.load(str(tmp_path / "copy.npy")).fingerprint == openai.fingerprint
    other = openai.colours.copy()
    other[511, 2] = np.nextafter(other[511, 2], 2)
    assert Palette(other).fingerprint != openai.fingerprint
    assert Palette(openai.colours[::-1].copy()).fingerprint != openai.fingerprint


@pytest.mark.parametrize("pixels", [np.zeros((4, 3), np.int64), np.zeros((4, 4), np.uint8), np.zeros(4, np.uint8)])
def test_only_rgb_pixels_of_8_bits_are_encoded(palette: Palette, pixels: NDArray[np.integer]) -> None:
    """Scaled floats or grey images would index the table incorrectly."""
    with pytest.raises(PaletteError, match=r"\(\.\.\., 3\) uint8"):
        palette.encode(pixels)


def test_real_photographs_keep_their_quality(openai: Palette, shared: Path) -> None:
    """Swapped channels or another scale would not reach 33.5 dB (facts.md, section 3)."""
    with tarfile.open(shared / "data" / "imagenet_sample" / "ILSVRC2012_img_val.tar") as tar:
        files = [tar.extractfile(member) for member in tar]
        views = np.stack([images.centre_view(f.read(), 32, images.REFERENCE) for f in files if f is not None])
    assert palette.psnr(views, openai.decode(openai.encode(views))) == pytest.approx(33.5, abs=1.5)


def test_psnr_is_in_decibels_of_the_mean_squared_error() -> None:
    """Differences in uint8 would wrap around."""
    dark, bright = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 10, np.uint8)
    assert palette.psnr(dark, bright) == pytest.approx(10 * np.log10(255**2 / 100))
    assert palette.psnr(bright, dark) == palette.psnr(dark, bright)
    assert palette.psnr(dark, dark) == float("inf")


def test_a_report_weights_colours_by_their_pixels() -> None:
    """By hand: three of four pixels are exact. Squares must not wrap around in uint8."""
    two = Palette(np.array([[-1, -1, -1], [1, 1, 1]], np.float32))
    fitted = histogram_of(np.array([[0, 0, 0], [235, 255, 255]], np.uint8), np.array([3, 1]))
    other = histogram_of(np.array([[10, 0, 0]], np.uint8), np.array([7]))
    assert palette.quality(two, fitted, other) == {
        "pixels": 4,
        "distinct_colours": 2,
        "mse": 100.0,
        "held_out_mse": 100.0,
        "psnr_db": round(10 * np.log10(255**2 / (100 / 3)), 2),
        "entropy_nats": round(-0.75 * np.log(0.75) - 0.25 * np.log(0.25), 4),
        "colours_used": 2,
    }
    exact = palette.quality(two, histogram_of(np.zeros((1, 3), np.uint8), np.array([5])))
    assert (exact["mse"], exact["psnr_db"], exact["colours_used"]) == (0, None, 1)


@pytest.mark.parametrize("k", [2, 3, 7, 512])
def test_swatches_show_every_colour(openai: Palette, k: int) -> None:
    """The last column is rarely full; no colour may be lost."""
    some = Palette(openai.colours[:k])
    picture = palette.swatches(some)
    shown = {tuple(rgb) for rgb in picture.reshape(-1, 3).tolist()}
    assert shown | {(255, 255, 255)} == {tuple(rgb) for rgb in some.decode(np.arange(k)).tolist()} | {(255, 255, 255)}


# ------------------------------------------------------------------------------------------------ files


def test_openais_palette_comes_with_the_package(shared: Path) -> None:
    """It is a file of the wheel, and not looked up in the working directory."""
    file = Path(palette.__file__).parent / "openai_palette.npy"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == (
        "c614a3d27f02fd6cf02fbbaf9f02e2431fa202726f3e44750658a85eb226bebd"
    )
    there = Palette.load(str(shared / "data" / "openai_palette.npy"))
    assert Palette.load("openai").fingerprint == there.fingerprint
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = declared["tool"]["setuptools"]["package-data"]["igpt_ray"]
    for name in ("openai_palette.npy", "openai_palette.LICENSE"):
        assert any(fnmatch.fnmatch(f"data/{name}", pattern) for pattern in patterns)


def test_a_setting_is_the_name_of_openais_palette_or_a_uri() -> None:
    """Settings make paths absolute, but not this name; a file of the same name can be given as `./openai`."""

    def asked(uri: str) -> str:
        return PrepareConfig(source="images", palette=uri, tokens="tokens").palette

    assert asked("openai") == "openai"
    assert asked("./openai") == str(Path("openai").absolute())
    assert asked("s3://bucket/openai/") == "s3://bucket/openai"


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
def test_a_malformed_palette_is_an_error(name: str, tmp_path: Path) -> None:
    """numpy raises SyntaxError, BadZipFile, AttributeError or MemoryError for half of these."""
    (tmp_path / "palette.npy").write_bytes(MALFORMED[name])
    with pytest.raises(PaletteError):
        Palette.load(str(tmp_path / "palette.npy"))


def test_a_damaged_header_is_an_error_or_has_no_effect(palette: Palette, tmp_path: Path) -> None:
    """numpy's header is Python source, so that a flipped byte can raise any error of the parser."""
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
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def test_a_pickle_is_an_error_and_is_not_opened(tmp_path: Path) -> None:
    """An object array in a downloaded palette would run its author's code."""
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


def test_well_separated_colours_are_recovered_exactly() -> None:
    """An initialisation with two centres in one cluster must not be final."""
    corners = np.array(list(itertools.product([20, 230], repeat=3)), np.uint8)
    fitted = Palette.fit(histogram_of(corners, np.arange(1, 9) * 1000), 8)
    np.testing.assert_array_equal(fitted.decode(np.arange(8)), corners)  # and in the order of red, green, blue


def test_a_fit_weights_colours_by_their_pixels() -> None:
    """The optimum is computed by enumeration. Without the counts, one pixel would weigh as much as a large area."""
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


def test_equal_settings_fit_equal_palettes() -> None:
    """Otherwise two stores could never be used together."""
    histogram = histogram_of(random_pixels(500, 10), np.ones(500, np.int64))
    assert Palette.fit(histogram, 8, seed=1).fingerprint == Palette.fit(histogram, 8, seed=1).fingerprint


def test_fewer_colours_than_k_are_an_error() -> None:
    """faiss would abort the process."""
    with pytest.raises(PaletteError, match="3 distinct colours, fewer than k = 4"):
        Palette.fit(histogram_of(random_pixels(3, 11), np.ones(3, np.int64)), 4)


@pytest.fixture(scope="module")
def photographs(shared: Path) -> NDArray[np.uint8]:
    """Pixels of 20 real photographs, 20,480 of them."""
    with tarfile.open(shared / "data" / "imagenet_sample" / "ILSVRC2012_img_val.tar") as tar:
        files = [tar.extractfile(member) for member in tar]
        views = [images.centre_view(f.read(), 32, images.REFERENCE) for f in files if f is not None]
    return np.concatenate(views).reshape(-1, 3)


def test_a_fit_costs_no_more_than_sklearns(photographs: NDArray[np.uint8]) -> None:
    """Lloyd's algorithm ends near its initial centres; with faiss's defaults the cost is 9 % higher."""
    points = photographs / 127.5 - 1
    ones = np.ones(len(points), np.int64)
    sklearn = [
        KMeans(64, n_init=1, max_iter=25, tol=0, random_state=seed).fit(points).cluster_centers_ for seed in range(3)
    ]
    fitted = Palette.fit(histogram_of(photographs, ones), 64)
    ours = cost(points, fitted.colours.astype(np.float64), ones)
    assert ours <= min(cost(points, centres, ones) for centres in sklearn)


def test_centres_move_from_dense_clusters_to_missing_ones() -> None:
    """Splitting alone leaves some clusters with two centres and others with none. The cost with faiss's defaults is 2
    to 35 times higher on such pixels."""
    rng = np.random.default_rng(13)
    planted = rng.integers(8, 248, (40, 3))
    colours = np.concatenate([planted + rng.integers(-2, 3, (40, 3)) for _ in range(20)]).astype(np.uint8)
    counts = np.tile(10 ** rng.uniform(0, 3, 40), 20).astype(np.int64)
    points = colours / 127.5 - 1
    members = np.tile(np.arange(40), 20)
    optimum = np.stack([np.average(points[members == i], axis=0, weights=counts[members == i]) for i in range(40)])
    fitted = Palette.fit(histogram_of(colours, counts), 40)
    assert cost(points, fitted.colours.astype(np.float64), counts) <= 1.2 * cost(points, optimum, counts)


def test_with_k_equal_to_the_number_of_colours_the_fit_is_exact() -> None:
    """Splitting must not stop early, and no two colours may share a centre."""
    colours = np.unique(random_pixels(3000, 14), axis=0)
    fitted = Palette.fit(histogram_of(colours, np.arange(1, len(colours) + 1)), len(colours))
    np.testing.assert_array_equal(fitted.decode(np.arange(len(colours))), colours)


def test_a_fit_does_not_depend_on_threads(photographs: NDArray[np.uint8]) -> None:
    """Sums in the order in which threads finish would give another palette on every machine."""
    histogram = histogram_of(photographs, np.ones(len(photographs), np.int64))
    before, fingerprints = faiss.omp_get_max_threads(), set()
    for threads in (1, 2, 3):
        faiss.omp_set_num_threads(threads)
        fingerprints.add(Palette.fit(histogram, 100).fingerprint)
    faiss.omp_set_num_threads(before)
    assert len(fingerprints) == 1


def test_merged_colours_keep_their_mean_and_count() -> None:
    """A merged cell has the mean of its colours, not its midpoint, and white has no cell beyond the grid."""
    rgb = np.array([[0, 0, 0], [3, 1, 2], [4, 0, 0], [255, 255, 255], [252, 252, 252]], np.uint8)
    merged = kmeans.merge(kmeans.Points(palette.scale(rgb), np.array([1.0, 3, 5, 1, 1])), 6)
    np.testing.assert_allclose((merged.xyz + 1) * 127.5, [[2.25, 0.75, 1.5], [4, 0, 0], [253.5] * 3], atol=1e-4)
    assert merged.weights.tolist() == [4, 5, 2]


def no_gpu() -> bool:
    return getattr(faiss, "get_num_gpus", int)() == 0


@pytest.mark.skipif(not no_gpu(), reason="faiss sees a GPU here")
def test_gpu_clustering_without_a_gpu_is_an_error() -> None:
    """A fallback to the CPU would be slow and unnoticed."""
    expected = "sees no GPU" if hasattr(faiss, "StandardGpuResources") else "no GPU code: install the extra"
    with pytest.raises(PaletteError, match=expected):
        Palette.fit(histogram_of(random_pixels(50, 15), np.ones(50, np.int64)), 4, gpu=True)


@pytest.mark.gpu
@pytest.mark.skipif(no_gpu(), reason="faiss sees no GPU: it needs faiss-gpu and a CUDA device")
def test_a_gpu_fits_as_well_as_the_cpu(photographs: NDArray[np.uint8]) -> None:
    """The results may differ only by rounding."""
    ones = np.ones(len(photographs), np.int64)
    on_cpu, on_gpu = (Palette.fit(histogram_of(photographs, ones), 64, gpu=gpu) for gpu in (False, True))
    points = photographs / 127.5 - 1
    costs = [cost(points, fitted.colours.astype(np.float64), ones) for fitted in (on_cpu, on_gpu)]
    assert costs[1] == pytest.approx(costs[0], rel=0.01)
