"""Read TensorFlow checkpoints ("tensor bundles") without TensorFlow. No code in a checkpoint is executed.

    <prefix>.index                     table of name -> dtype, shape, data file, offset and checksum of the tensor
    <prefix>.data-00000-of-00032 ...   the tensors, raw and little-endian

The index is a LevelDB table: a footer of 48 bytes points to an index block, which points to data blocks of sorted
(key, value) pairs. The values are `BundleEntryProto` messages (tensorflow/core/protobuf/tensor_bundle.proto). Blocks
and tensors have a CRC-32C. A file that is truncated, altered or of another format raises `CheckpointError`.
"""

import io
import sys
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from igpt_ray import storage
from igpt_ray.errors import CheckpointError, NotFound

FOOTER = 48
MAGIC = bytes.fromhex("57fb808b247547db")
FLOAT32 = 1
"""TensorFlow's DT_FLOAT."""
Fields = dict[int, list[int | bytes]]
"""A parsed protocol buffer message: field number -> its values, in order."""


class _Malformed(Exception):
    """The index is malformed. `Bundle.open` adds the file name."""


@dataclass(frozen=True)
class Variable:
    """The index entry of a tensor."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    n_bytes: int
    crc: int
    in_slices: bool
    """Whether it is a partitioned variable, stored as several entries."""


@dataclass(frozen=True)
class Bundle:
    prefix: str
    n_shards: int
    variables: dict[str, Variable] = field(repr=False)

    @classmethod
    def open(cls, prefix: str) -> "Bundle":
        """Read the index, and check that every data file exists and is long enough."""
        uri = f"{prefix}.index"
        try:
            entries = _table(storage.read(uri))
            header = _fields(entries.pop(b"", b""))
            bundle = cls(prefix, _int(header, 1), {key.decode(): _variable(value) for key, value in entries.items()})
        except NotFound as error:
            raise CheckpointError(
                f"no TensorFlow checkpoint at {prefix}: expected the path without .index,"
                f" as in DIR/model.ckpt-1000000 ({error})"
            ) from error
        except (_Malformed, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{uri} is damaged, or is not the index of a TensorFlow checkpoint: {error}"
            ) from error
        if _int(header, 2):
            raise CheckpointError(f"{uri} is big-endian; only little-endian checkpoints can be read")
        bundle._check_data_files()
        return bundle

    def read(self, name: str) -> NDArray[np.float32]:
        """The tensor `name`, after a check of its checksum. Raises `CheckpointError` if it is not a float32 tensor."""
        v, uri = self.variables[name], self._data_file(self.variables[name].shard)
        if v.dtype != FLOAT32 or v.in_slices:
            kind = "is partitioned into slices" if v.in_slices else f"has the TensorFlow dtype {v.dtype}"
            raise CheckpointError(f"{self.prefix}: {name} {kind}; only unpartitioned float32 variables can be read")
        data = storage.read(uri, v.offset, v.n_bytes)
        if len(data) != v.n_bytes:
            raise self._truncated(v.shard)
        if _masked_crc32c(data) != v.crc:
            raise CheckpointError(f"{uri} is damaged: the checksum of {name} differs from the index")
        return np.frombuffer(data, "<f4").reshape(v.shape)

    def _data_file(self, shard: int) -> str:
        return f"{self.prefix}.data-{shard:05d}-of-{self.n_shards:05d}"

    def _check_data_files(self) -> None:
        """Check that each tensor's shape matches its size, and that the data files contain every tensor."""
        ends: dict[int, int] = {}
        for name, v in self.variables.items():
            if v.shard >= self.n_shards:
                raise CheckpointError(f"{self.prefix}.index puts {name} into data file {v.shard} of {self.n_shards}")
            if v.dtype == FLOAT32 and not v.in_slices and v.n_bytes != 4 * prod(v.shape):
                raise CheckpointError(
                    f"{self.prefix}.index is inconsistent: {name} has the shape {v.shape} but {v.n_bytes} bytes"
                )
            ends[v.shard] = max(ends.get(v.shard, 0), v.offset + v.n_bytes)
        for shard in range(self.n_shards):
            end = ends.get(shard, 0)
            try:
                last = storage.read(self._data_file(shard), max(0, end - 1), 1)
            except NotFound as error:
                raise CheckpointError(f"{self._data_file(shard)} is missing") from error
            if len(last) != min(end, 1):
                raise self._truncated(shard)

    def _truncated(self, shard: int) -> CheckpointError:
        return CheckpointError(f"{self._data_file(shard)} is truncated: its last tensor ends after the end of the file")


# ------------------------------------------------------------------------------------------------ LevelDB table


def _table(data: bytes) -> dict[bytes, bytes]:
    if len(data) < FOOTER or data[-8:] != MAGIC:
        raise _Malformed("it has no LevelDB table footer")
    footer = io.BytesIO(data[-FOOTER:])
    _varint(footer), _varint(footer)  # offset and size of the metaindex block, which is empty
    entries: dict[bytes, bytes] = {}
    for _, handle in _block(data, _varint(footer), _varint(footer)):
        block = io.BytesIO(handle)
        for key, value in _block(data, _varint(block), _varint(block)):
            if key in entries:
                raise _Malformed(f"{key!r} occurs twice")
            entries[key] = value
    return entries


def _block(data: bytes, offset: int, size: int) -> list[tuple[bytes, bytes]]:
    """The (key, value) pairs of a block.

    Keys are prefix-compressed against the preceding key. After the pairs come the restart points, their number, the
    compression type and the checksum.
    """
    block, crc = data[offset : offset + size + 1], data[offset + size + 1 : offset + size + 5]
    if len(crc) != 4 or size < 4:
        raise _Malformed("a block extends past its end")
    if _masked_crc32c(block) != int.from_bytes(crc, "little"):
        raise _Malformed("a block's checksum is wrong")
    if block[-1]:
        raise _Malformed("a block is compressed, which is not supported")
    n_restarts = int.from_bytes(block[-5:-1], "little")
    end = max(0, size - 4 - 4 * n_restarts)
    stream, pairs, key = io.BytesIO(block[:end]), [], b""
    while stream.tell() < end:
        shared, fresh, length = _varint(stream), _varint(stream), _varint(stream)
        key = key[:shared] + _take(stream, fresh)
        pairs.append((key, _take(stream, length)))
    return pairs


def _take(stream: io.BytesIO, n: int) -> bytes:
    data = stream.read(min(n, sys.maxsize))
    if len(data) < n:
        raise _Malformed("it ends in the middle of a value")
    return data


def _varint(stream: io.BytesIO) -> int:
    """A base-128 varint: seven bits per byte, low bits first; the high bit is set in all bytes but the last."""
    value = 0
    for shift in range(0, 64, 7):
        byte = _take(stream, 1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise _Malformed("a varint is longer than 64 bits")


def _masked_crc32c(data: bytes) -> int:
    """CRC-32C, masked as in LevelDB (util/crc32c.h), because the CRC of data that contains CRCs is a weak check."""
    import google_crc32c  # here, because only TensorFlow bundles need it and every program imports this module

    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ------------------------------------------------------------------------------------------------ protocol buffers


def _fields(message: bytes) -> Fields:
    stream = io.BytesIO(message)
    fields: Fields = {}
    while stream.tell() < len(message):
        tag = _varint(stream)
        kind = tag & 7
        if kind == 0:
            value: int | bytes = _varint(stream)
        elif kind == 2:
            value = _take(stream, _varint(stream))
        elif kind in (1, 5):
            value = int.from_bytes(_take(stream, 8 if kind == 1 else 4), "little")
        else:
            raise _Malformed(f"it has a field of wire type {kind}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _int(fields: Fields, number: int) -> int:
    """The last value of a field; zero if the field is absent, as in proto3."""
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int):
        raise _Malformed(f"field {number} is not an integer")
    return value


def _messages(fields: Fields, number: int) -> list[Fields]:
    values = fields.get(number, [])
    if not all(isinstance(value, bytes) for value in values):
        raise _Malformed(f"field {number} is not a message")
    return [_fields(value) for value in values if isinstance(value, bytes)]


def _variable(entry: bytes) -> Variable:
    """Parse a `BundleEntryProto`."""
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
