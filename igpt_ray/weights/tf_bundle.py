"""TensorFlow's checkpoints ("tensor bundles"), read without TensorFlow. Numbers come out; nothing in them can run.

    <prefix>.index                     a table of name -> where the tensor lies
    <prefix>.data-00000-of-00032 ...   the tensors, raw and little-endian

The index is a LevelDB table: blocks of sorted (key, value) pairs, found through a block of their places, which a
footer of 48 bytes finds in turn. Values are protocol buffers. Blocks and tensors carry a CRC-32C. Everything is
checked: what is cut off, altered or of another kind is a `CheckpointError` that names its file.
"""

from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from igpt_ray import storage
from igpt_ray.errors import CheckpointError, NotFound
from igpt_ray.weights.crc32c import crc32c

FOOTER = 48
MAGIC = bytes.fromhex("57fb808b247547db")
FLOAT32 = 1
"""TensorFlow's DT_FLOAT."""
Fields = dict[int, list[int | bytes]]
"""A protocol buffer: field number -> its values, in order."""


class _Malformed(Exception):
    """Said with the name of the file by `Bundle.open`."""


@dataclass(frozen=True)
class Variable:
    """Where a tensor lies."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    n_bytes: int
    crc: int
    in_slices: bool
    """Cut over several entries, as a partitioned variable is."""


@dataclass(frozen=True)
class Bundle:
    prefix: str
    n_shards: int
    variables: dict[str, Variable] = field(repr=False)

    @classmethod
    def open(cls, prefix: str) -> "Bundle":
        """Read the index, and see that every data file is there and long enough."""
        uri = f"{prefix}.index"
        try:
            entries = _table(storage.read(uri))
            header = _fields(entries.pop(b"", b""))
            bundle = cls(prefix, _int(header, 1), {key.decode(): _variable(value) for key, value in entries.items()})
        except NotFound as error:
            raise CheckpointError(
                f"no TensorFlow checkpoint at {prefix}: expected the name that stands before .index,"
                f" as in DIR/model.ckpt-1000000 ({error})"
            ) from error
        except (_Malformed, UnicodeDecodeError) as error:
            raise CheckpointError(f"{uri} is damaged, or no index of a TensorFlow checkpoint: {error}") from error
        if _int(header, 2):
            raise CheckpointError(f"{uri} says that its data are big-endian; only little-endian ones are read")
        bundle._check_data_files()
        return bundle

    def read(self, name: str) -> NDArray[np.float32]:
        """One tensor, its checksum verified."""
        v, uri = self.variables[name], self._data_file(self.variables[name].shard)
        if v.dtype != FLOAT32 or v.in_slices:
            kind = "cut into slices" if v.in_slices else f"of TensorFlow's type {v.dtype}"
            raise CheckpointError(f"{self.prefix}: {name} is {kind}; only whole float32 variables are read")
        data = storage.read(uri, v.offset, v.n_bytes)
        if len(data) != v.n_bytes:
            raise self._cut(v.shard)
        if _masked(crc32c(data)) != v.crc:
            raise CheckpointError(f"{uri} is damaged: the checksum of {name} is not the one in the index")
        return np.frombuffer(data, "<f4").reshape(v.shape)

    def _data_file(self, shard: int) -> str:
        return f"{self.prefix}.data-{shard:05d}-of-{self.n_shards:05d}"

    def _check_data_files(self) -> None:
        """Also, that sizes agree: what is announced is then no larger than what is there."""
        ends: dict[int, int] = {}
        for name, v in self.variables.items():
            if v.shard >= self.n_shards:
                raise CheckpointError(f"{self.prefix}.index puts {name} into data file {v.shard} of {self.n_shards}")
            if v.dtype == FLOAT32 and not v.in_slices and v.n_bytes != 4 * prod(v.shape):
                raise CheckpointError(
                    f"{self.prefix}.index contradicts itself: {v.shape} of {name} in {v.n_bytes} bytes"
                )
            ends[v.shard] = max(ends.get(v.shard, 0), v.offset + v.n_bytes)
        for shard in range(self.n_shards):
            end = ends.get(shard, 0)
            try:
                last = storage.read(self._data_file(shard), max(0, end - 1), 1)
            except NotFound as error:
                raise CheckpointError(f"{self._data_file(shard)} is missing") from error
            if len(last) != min(end, 1):
                raise self._cut(shard)

    def _cut(self, shard: int) -> CheckpointError:
        return CheckpointError(f"{self._data_file(shard)} is cut off: the index says that more follows")


# ------------------------------------------------------------------------------------------------ LevelDB's table


def _table(data: bytes) -> dict[bytes, bytes]:
    if len(data) < FOOTER or data[-8:] != MAGIC:
        raise _Malformed("it does not end as such a table does")
    footer = _Cursor(data[-FOOTER:])
    footer.varint(), footer.varint()  # where the metaindex lies, which is empty
    entries: dict[bytes, bytes] = {}
    for _, handle in _block(data, footer.varint(), footer.varint()):
        place = _Cursor(handle)
        for key, value in _block(data, place.varint(), place.varint()):
            if key in entries:
                raise _Malformed(f"{key!r} occurs twice")
            entries[key] = value
    return entries


def _block(data: bytes, offset: int, size: int) -> list[tuple[bytes, bytes]]:
    """The pairs of a block. A key shares its beginning with the one before; a list of restart points follows at the
    end, then the kind of compression and the checksum."""
    block, crc = data[offset : offset + size + 1], data[offset + size + 1 : offset + size + 5]
    if len(crc) != 4 or size < 4:
        raise _Malformed("a block lies beyond its end")
    if _masked(crc32c(block)) != int.from_bytes(crc, "little"):
        raise _Malformed("a block's checksum is wrong")
    if block[-1]:
        raise _Malformed("a block is compressed, which those of checkpoints never are")
    n_restarts = int.from_bytes(block[-5:-1], "little")
    cursor, pairs, key = _Cursor(block[: max(0, size - 4 - 4 * n_restarts)]), [], b""
    while cursor.left:
        shared, fresh, length = cursor.varint(), cursor.varint(), cursor.varint()
        key = key[:shared] + cursor.take(fresh)
        pairs.append((key, cursor.take(length)))
    return pairs


class _Cursor:
    """Bytes, read from the front; running past their end is an error."""

    def __init__(self, data: bytes):
        self.data = data
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, n: int) -> bytes:
        if n > self.left:
            raise _Malformed("it ends too early")
        self.at += n
        return self.data[self.at - n : self.at]

    def varint(self) -> int:
        """Seven bits a byte, the lowest first; the highest bit says that more follow."""
        value = 0
        for shift in range(0, 64, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise _Malformed("a number does not end")


def _masked(crc: int) -> int:
    """LevelDB's rotation, so that the checksum of data with checksums in it stays meaningful."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ------------------------------------------------------------------------------------------------ protocol buffers


def _fields(message: bytes) -> Fields:
    cursor = _Cursor(message)
    fields: Fields = {}
    while cursor.left:
        tag = cursor.varint()
        kind = tag & 7
        if kind == 0:
            value: int | bytes = cursor.varint()
        elif kind == 2:
            value = cursor.take(cursor.varint())
        elif kind in (1, 5):
            value = int.from_bytes(cursor.take(8 if kind == 1 else 4), "little")
        else:
            raise _Malformed(f"a field of wire type {kind}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _int(fields: Fields, number: int) -> int:
    """The last value of a field; zero, which is not written, if there is none."""
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int):
        raise _Malformed(f"field {number} is no number")
    return value


def _messages(fields: Fields, number: int) -> list[Fields]:
    values = fields.get(number, [])
    if not all(isinstance(value, bytes) for value in values):
        raise _Malformed(f"field {number} is no message")
    return [_fields(value) for value in values if isinstance(value, bytes)]


def _variable(entry: bytes) -> Variable:
    """A BundleEntryProto."""
    fields = _fields(entry)
    dimensions = [_int(d, 1) for shape in _messages(fields, 2) for d in _messages(shape, 2)]
    return Variable(
        dtype=_int(fields, 1),
        shape=tuple(dimensions),
        shard=_int(fields, 3),
        offset=_int(fields, 4),
        n_bytes=_int(fields, 5),
        crc=_int(fields, 6),
        in_slices=7 in fields,
    )
