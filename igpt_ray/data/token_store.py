"""The token store: Parquet shards (key, label, tokens), listed and committed by one manifest.

    <root>/manifest.json                     written last, by a conditional write: the commit
    <root>/palette.npy
    <root>/<split>/<unit>-v<view>.parquet
    <root>/quarantine/<split>-<unit>-v<view>.json    unreadable images, with the reason

Readers use only the shards in the manifest and verify the size and sha256 of each. The manifest ends with its own
sha256. The path of a shard is a function of its unit and view, and its bytes are a function of its rows, so a repeated
task overwrites its output with identical bytes.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from igpt_ray import artifact, storage
from igpt_ray.data import pixels
from igpt_ray.data.image_files import RGB
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_format import Strict, TokenFormat, Tokens
from igpt_ray.errors import NotFound, TokenStoreError

FORMAT = "igpt_ray tokens 1"
SHEET = 64
"""Images on a contact sheet."""


class Statistics(Strict):
    """Statistics of a shard, as sums that add up over shards. Every repeat gives the same values."""

    quarantined: int
    """Number of unreadable images."""
    source_bytes: int
    """Encoded bytes of the readable images."""
    squared_error: int
    """Squared quantisation error in 8-bit units, summed over pixels and channels."""
    passed_over: dict[str, int] = Field(default_factory=dict)
    """Number of members of the unit's archive that are no images, by kind."""


class Shard(Strict):
    """One Parquet file; `path` is relative to the store's root."""

    path: str
    split: str
    view: int
    rows: int
    bytes: int
    sha256: str
    source: str
    """Digest of its work unit."""
    statistics: Statistics


class Quarantined(Strict):
    """An image that could not be read."""

    key: str
    reason: str


class Manifest(Strict):
    format: str
    kind: TokenFormat
    classes: list[str]
    shards: list[Shard]
    """Ordered by split, view and unit: the order of the rows."""
    made_by: dict[str, Any]

    @property
    def splits(self) -> list[str]:
        return sorted({shard.split for shard in self.shards})

    def views(self, split: str) -> int:
        """The number of views of a split. Raises `TokenStoreError` as `select` does."""
        self.select(split)
        views = 1 + max(shard.view for shard in self.shards if shard.split in split.split("+"))
        for view in range(1, views):
            self.select(split, view)
        return views

    def select(self, split: str, view: int = 0) -> list[Shard]:
        """The shards of a split, or of several in order, such as `train+holdout`.

        Raises `TokenStoreError` if a split is unknown or empty.
        """
        chosen: list[Shard] = []
        for name in split.split("+"):
            part = [shard for shard in self.shards if shard.split == name and shard.view == view]
            if not part and view == 0:
                raise TokenStoreError(f"no split {name!r} in this token store: it has {', '.join(self.splits)}")
            if not part:
                raise TokenStoreError(f"{split} cannot be joined: {name!r} has fewer views than the other split")
            chosen += part
        if not any(shard.rows for shard in chosen):
            raise TokenStoreError(f"the split {split!r} of this token store has no images")
        return chosen

    def rows(self, split: str) -> int:
        return sum(shard.rows for shard in self.select(split))


class TokenStore:
    """A committed token store, open for reading."""

    def __init__(self, root: str, manifest: Manifest, sha256: str):
        self.root = root
        self.manifest = manifest
        self.sha256 = sha256
        """sha256 of the manifest file, which identifies the whole content."""

    @classmethod
    def open(cls, root: str) -> "TokenStore":
        """Raises `TokenStoreError` if no store is committed at `root`, or its manifest is invalid."""
        root = storage.absolute(root)
        try:
            data = storage.read(storage.join(root, "manifest.json"))
        except NotFound as error:
            raise TokenStoreError(f"no token store is committed at {root}: run jobs/prepare.py ({error})") from error
        body = artifact.unseal(data)
        if body is None:
            raise TokenStoreError(
                f"{root}/manifest.json is damaged or of another version (it does not end with the sha256 of its"
                " other bytes): delete it and repeat jobs/prepare.py, which reuses intact shards"
            )
        try:
            manifest = Manifest.model_validate_json(body)
        except ValidationError as error:
            raise TokenStoreError(f"{root}/manifest.json is damaged or of another version: {_first(error)}") from error
        if manifest.format != FORMAT:
            raise TokenStoreError(f"{root} is {manifest.format!r}; this version reads {FORMAT!r}")
        return cls(root, manifest, hashlib.sha256(data).hexdigest())

    @property
    def kind(self) -> TokenFormat:
        return self.manifest.kind

    def palette(self) -> Palette:
        """The store's palette. Raises `TokenStoreError` if its fingerprint differs from the manifest's."""
        palette = Palette.load(storage.join(self.root, "palette.npy"))
        if palette.fingerprint != self.kind.palette:
            raise TokenStoreError(f"{self.root}/palette.npy is not the palette of its tokens")
        return palette

    def read(self, shard: Shard) -> pa.Table:
        """The rows of a shard. Raises `TokenStoreError` if its size or sha256 differs from the manifest's."""
        return read_shard(self.root, shard)

    def read_split(self, split: str) -> Iterator[pa.Table]:
        """The shards of a split, one table at a time."""
        for shard in self.manifest.select(split):
            yield self.read(shard)


def read_shard(root: str, shard: Shard) -> pa.Table:
    """The rows of a shard of the store at `root`, as `TokenStore.read`, without the manifest."""
    uri = storage.join(root, shard.path)
    return parse(artifact.read(uri, shard.bytes, shard.sha256, TokenStoreError, "jobs/prepare.py"))


def encode(keys: list[str], labels: list[int], tokens: Tokens, kind: TokenFormat, unit: dict[str, Any]) -> bytes:
    """The bytes of a shard; equal rows give equal bytes. `tokens` is (rows, n_px * n_px), `unit` is other metadata."""
    T = tokens.shape[1]
    values = pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel(), pa.uint16()), T)
    column = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.uint16(), [T]), values)  # also for zero rows
    table = pa.table({"key": pa.array(keys, pa.string()), "label": pa.array(labels, pa.int32()), "tokens": column})
    metadata = json.dumps({"format": FORMAT, **kind.model_dump(), **unit}, sort_keys=True)
    table = table.replace_schema_metadata({"igpt_ray": metadata})
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", use_dictionary=["key"], write_page_checksum=True)
    return out.getvalue()


def parse(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data), page_checksum_verification=True)


def read_footer(data: bytes) -> tuple[int, dict[str, Any]]:
    """The number of rows and the metadata of a shard, from its Parquet footer alone."""
    footer = pq.read_metadata(io.BytesIO(data))
    return footer.num_rows, metadata(footer)


def reencode(table: pa.Table) -> bytes:
    """The encoding of a shard's rows, which equals the bytes that it was read from unless they are damaged.

    Parquet pages have checksums. The other bytes of the file have none and are covered by this comparison.
    """
    unit = metadata(table.schema)
    kind = TokenFormat(**{field: unit.pop(field) for field in TokenFormat.model_fields})
    return encode(table["key"].to_pylist(), table["label"].to_pylist(), tokens_of(table), kind, unit)


def metadata(shard: pa.Schema | pq.FileMetaData) -> dict[str, Any]:
    """A shard's own metadata: token format, unit, split, view and statistics."""
    stored: dict[str, Any] = json.loads((shard.metadata or {}).get(b"igpt_ray", b"{}"))
    return stored


def tokens_of(table: pa.Table) -> Tokens:
    """The token column as (rows, n_px * n_px) uint16."""
    column = table["tokens"].combine_chunks()
    return np.asarray(column.to_numpy_ndarray())


def contact_sheet(store: TokenStore, split: str) -> RGB:
    """An image of 64 samples of a split, decoded from their tokens.

    The samples are evenly spaced over at most 8 shards, so the cost does not grow with the store.
    """
    with_rows = [shard for shard in store.manifest.select(split) if shard.rows]
    chosen = [with_rows[i] for i in evenly(len(with_rows), 8)]
    palette, n_px, pictures = store.palette(), store.kind.n_px, list[RGB]()
    for n, shard in enumerate(chosen):
        tokens = tokens_of(store.read(shard))
        n_samples = (SHEET - len(pictures)) // (len(chosen) - n)
        pictures += [palette.decode(tokens[i].reshape(n_px, n_px)) for i in evenly(len(tokens), n_samples)]
    across = math.ceil(math.sqrt(len(pictures)))
    pictures += [np.full_like(pictures[0], 255)] * (-len(pictures) % across)
    rows = [pictures[start : start + across] for start in range(0, len(pictures), across)]
    return pixels.sheet(rows, scale=max(1, 64 // n_px))


def evenly(n: int, most: int) -> NDArray[np.int64]:
    """At most `most` evenly spaced integers of 0 .. n-1, including the first and the last."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))


def commit(root: str, manifest: Manifest) -> TokenStore:
    """Write the manifest, which commits the store. If an equal store is already committed, nothing changes.

    Raises `TokenStoreError` if a different store has been committed under this root in the meantime.
    """
    data = artifact.seal(manifest.model_dump_json(indent=1))
    if not storage.write_new(storage.join(root, "manifest.json"), data):
        committed = TokenStore.open(root)
        if committed.manifest.shards != manifest.shards or committed.kind != manifest.kind:
            raise TokenStoreError(f"another token store was committed at {root} meanwhile: choose another --tokens")
    return TokenStore.open(root)


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
