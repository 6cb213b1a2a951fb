"""CRC-32C of large arrays with numpy alone: the checksum of TensorFlow's checkpoints.

A checksum depends on the byte before, so one byte a step it would take a minute for a gigabyte. But it is linear over
bits: the register after A followed by B is that after A, moved on by as many zero bytes as B has, xor that after B
alone. So the data is cut into lanes of equal length, all lanes go forward together four bytes a step, and neighbours
are joined until one register is left. Zeros in front of everything change nothing, so lanes need not fit.
"""

import numpy as np
from numpy.typing import NDArray

Registers = NDArray[np.uint32]

POLYNOMIAL = 0x82F63B78
"""Castagnoli's, bits reversed."""
LANES = 1 << 14
"""At most; their registers fit in the processor's cache."""


def crc32c(data: bytes) -> int:
    slots = min(LANES, 1 << (len(data) // 64).bit_length())
    n_words = -(-len(data) // (4 * slots))
    padded = np.zeros(4 * slots * n_words, np.uint8)
    padded[len(padded) - len(data) :] = np.frombuffer(data, np.uint8)
    registers = np.zeros(slots, np.uint32)
    for words in np.ascontiguousarray(padded.view("<u4").reshape(slots, n_words).T):
        registers ^= words
        registers = _LOW[registers & 0xFFFF] ^ _HIGH[registers >> 16]
    move = _moved_by(4 * n_words)
    while len(registers) > 1:
        registers = _apply(move, registers[0::2]) ^ registers[1::2]
        move = _apply(move, move)
    start = _apply(_moved_by(len(data)), np.full(1, 0xFFFFFFFF, np.uint32))
    return int(registers[0] ^ start[0]) ^ 0xFFFFFFFF


def _apply(move: Registers, registers: Registers) -> Registers:
    """A linear map, given by its images of the 32 single bits, of every register."""
    out = np.zeros_like(registers)
    for bit, image in enumerate(move):
        out ^= (registers >> np.uint32(bit) & np.uint32(1)) * image
    return out


def _moved_by(n_bytes: int) -> Registers:
    """The map that feeds a register n zero bytes, by squaring."""
    result: Registers = np.uint32(1) << np.arange(32, dtype=np.uint32)
    square = _BYTES[0][result & 255] ^ result >> 8
    while n_bytes:
        if n_bytes & 1:
            result = _apply(square, result)
        square = _apply(square, square)
        n_bytes >>= 1
    return result


def _tables() -> Registers:
    """(4, 256): what a byte does to the register if 0, 1, 2 or 3 zero bytes follow."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = table >> np.uint32(1) ^ (table & np.uint32(1)) * np.uint32(POLYNOMIAL)
    tables = [table]
    for _ in range(3):
        tables.append(table[tables[-1] & 255] ^ tables[-1] >> 8)
    return np.stack(tables)


_BYTES = _tables()
_PAIR = np.arange(1 << 16)
_LOW = _BYTES[3][_PAIR & 255] ^ _BYTES[2][_PAIR >> 8]
_HIGH = _BYTES[1][_PAIR & 255] ^ _BYTES[0][_PAIR >> 8]
"""What the lower and the upper half of a word do."""
