"""The files of a source: what `--source` may name, and which files are passed over because they are no images.

A source is a folder or bucket, one file, or a pattern: `train-{000..009}.tar` and `{train,val}/*.parquet`, with the
wildcards of a shell in single path components. A folder whose name contains such characters is taken literally.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import NamedTuple

from igpt_ray import storage
from igpt_ray.errors import SourceError

IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
UNSUPPORTED_IMAGES = (
    *(".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm"),
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".psd", ".svg", ".tga", ".exr", ".eps"),
    *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"),
)
"""Formats that the decoders do not read. Such files are passed over with a warning."""
NOT_IMAGES = ("readme", "license", "licence", "copying", "makefile", "dockerfile", "checksums", "md5sums", "sha256sums")
"""File names without an extension that are no images. Another name without an extension may be one."""
CONTAINERS = {
    ".zip": "a zip archive: unpack it, or pack its images as .tar",
    ".7z": "a 7z archive: unpack it",
    ".rar": "a rar archive: unpack it",
    ".arrow": "an Arrow file of Hugging Face's save_to_disk: write Parquet with datasets' Dataset.to_parquet",
    ".mds": "a shard of MosaicML's streaming: write WebDataset shards or Parquet files instead",
    ".tfrecord": "a TFRecord file: write WebDataset shards or Parquet files instead",
    ".mdb": "an LMDB file: write WebDataset shards or Parquet files instead",
    ".h5": "an HDF5 file: write image files, WebDataset shards or Parquet files instead",
    ".hdf5": "an HDF5 file: write image files, WebDataset shards or Parquet files instead",
    ".npz": "a NumPy archive: write image files, WebDataset shards or Parquet files instead",
    ".mat": "a MATLAB file: write image files, WebDataset shards or Parquet files instead",
}
"""Containers that are not read, by extension, with the way out."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MAX_EXPANDED = 1_000_000
"""Most names that a pattern with braces may stand for."""


class File(NamedTuple):
    path: str
    """Relative to the root of the listing."""
    size: int
    """Bytes."""


class Listing(NamedTuple):
    """The files of a source, without names that begin with a dot."""

    source: str
    root: str
    """URI of the folder that the paths are relative to."""
    files: list[File]
    """In the order of their URIs."""

    def uri(self, path: str) -> str:
        return storage.join(self.root, path)

    def path(self, entry: storage.Entry) -> str:
        """The path of one of the files."""
        return storage.relative_to(self.root, entry.uri)

    def entries(self, suffixes: str | tuple[str, ...]) -> list[storage.Entry]:
        """The files whose lower-case path ends in one of `suffixes`, with their URIs."""
        return [storage.Entry(self.uri(file.path), file.size) for file in self.named(suffixes)]

    def named(self, suffixes: str | tuple[str, ...]) -> list[File]:
        """The files whose lower-case path ends in one of `suffixes`. Adds no memory per file."""
        return [file for file in self.files if file.path.lower().endswith(suffixes)]

    def below(self, folder: str) -> "Listing":
        """The files below one folder of this listing."""
        n = len(folder) + 1
        files = [File(path[n:], size) for path, size in self.files if path.startswith(f"{folder}/")]
        return Listing(self.source, self.uri(folder), files)


def list_files(source: str) -> Listing:
    """List a folder, a bucket, one file, or the files that a pattern names.

    Raises `SourceError` if a name that the braces of a pattern stand for does not exist.
    """
    files = _files(source)
    if files:
        return Listing(source, source, files)
    if storage.exists(source):
        folder = source.rpartition("/")[0]
        named = [file for file in _files(folder) if file.path == storage.name(source)]
        return Listing(source, folder, named)
    root, pattern = _split_pattern(source)
    if not pattern:
        return Listing(source, source, [])
    patterns = list(dict.fromkeys(itertools.islice(expand_braces(pattern), MAX_EXPANDED + 1)))
    if len(patterns) > MAX_EXPANDED:
        raise SourceError(f"{source} stands for more than {MAX_EXPANDED} names: use wildcards instead of braces")
    literal = {name for name in patterns if not re.search(r"[*?\[]", name)}
    wild = [name.split("/") for name in patterns if name not in literal]
    chosen = [file for file in _files(root) if file.path in literal or _matches(file.path, wild)]
    if missing := sorted(literal - {file.path for file in chosen}):
        raise SourceError(
            f"{source} names {len(patterns)} files, but {len(missing)} of them do not exist, such as"
            f" {storage.join(root, missing[0])}"
        )
    return Listing(source, root, chosen)


def _files(folder: str) -> list[File]:
    return [File(storage.relative_to(folder, entry.uri), entry.size) for entry in storage.walk(folder)]


def _split_pattern(source: str) -> tuple[str, str]:
    """The folder before the first component with a special character, and the rest of the source."""
    special = re.search(r"[{*?\[]", source)
    if special is None:
        return source, ""
    folder = source[: special.start()].rpartition("/")[0]
    return folder, source[len(folder) + 1 :]


def expand_braces(pattern: str) -> Iterator[str]:
    """`a-{00..02}` -> a-00, a-01, a-02; `{b,c}/d` -> b/d, c/d. Ranges keep the width of their first number."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        first, last, width = int(numbers[1]), int(numbers[2]), len(numbers[1])
        words: Iterable[str] = (f"{i:0{width}d}" for i in range(first, last + 1))
    else:
        words = match[1].split(",")
    for word in words:
        yield from expand_braces(pattern[: match.start()] + word + pattern[match.end() :])


def _matches(path: str, patterns: list[list[str]]) -> bool:
    parts = path.split("/")
    return any(len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern)) for pattern in patterns)


def kind_of(path: str) -> str:
    """The kind under which a file that is no image is counted: its lower-case extension, or its name without one."""
    name = PurePosixPath(path).name
    if name.startswith("._"):
        return "AppleDouble (._*)"
    return PurePosixPath(name).suffix.lower() or name


def is_image(path: str) -> bool:
    """Whether a file is an image by its name: a known extension, or none (or a number) with an unknown name."""
    name = PurePosixPath(path).name.lower()
    suffix = PurePosixPath(name).suffix
    if name.startswith("."):
        return False
    return suffix in IMAGES or (name not in NOT_IMAGES and (not suffix or suffix[1:].isdigit()))


def count_others(files: Iterable[File], used: Callable[[str], bool]) -> Counter[str]:
    """The number of files by kind that are not `used`."""
    return Counter(kind_of(file.path) for file in files if not used(file.path))


def escaped(path: str) -> str:
    """`path` as valid Unicode: bytes of a local file name that are not UTF-8 become `\\xe9`."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
