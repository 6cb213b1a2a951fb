"""A tar archive, member by member, out of range reads: nothing is extracted, and nothing it says is trusted.

Reads ustar, GNU and PAX archives, long names included. What is no plain file with a harmless name comes back as
`RejectedMember` with a reason, and the walk goes on behind it. After a damaged header it goes on at the next one, as
GNU tar does. An archive whose end is missing raises `SourceError`, because nobody can say what has been lost. Memory:
one header.
"""

from collections.abc import Iterator
from typing import NamedTuple

from igpt_ray.data.sources.ranges import Window
from igpt_ray.errors import SourceError

BLOCK = 512
LONGEST_HEADER = 64 << 10
"""Bytes of a PAX header or long name that we are willing to hold."""
LONGEST_NAME = 4096

FOLDER, SPARSE, LONG_NAME, LONG_LINK, GLOBAL = b"5", b"S", b"L", b"K", b"g"
BEFORE_A_MEMBER = (LONG_NAME, LONG_LINK, GLOBAL, b"x", b"X")
PLAIN = (b"0", b"\0", b"7")
WITHOUT_DATA = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a FIFO"}


class Member(NamedTuple):
    """A plain file in an archive."""

    header: int
    """Where its first header begins: a walk may start there."""
    name: str
    start: int
    """Where its bytes begin."""
    size: int


class RejectedMember(NamedTuple):
    """A member that is none of ours, and why."""

    header: int
    name: str
    reason: str


class _Header(NamedTuple):
    name: str
    type: bytes
    size: int
    more: bool
    """Old GNU sparse files only: further header blocks follow."""


class _Step(NamedTuple):
    found: Member | RejectedMember | None
    at: int
    lost: bool = False
    """Whether the next header must be looked for, from `at` on."""


def members(window: Window, start: int = 0, end: int | None = None) -> Iterator[Member | RejectedMember]:
    """The members of the archive in bytes `start` to `end` of a file, in order; folders are passed over.

    What follows the end mark is padding, as it is for tar itself.
    """
    at: int | None = start
    end = window.size if end is None else end
    while at is not None and (step := _step(window, at, end)) is not None:
        if step.found is not None:
            yield step.found
        at = _next_header(window, step.at, end) if step.lost else step.at


def _step(window: Window, first: int, end: int) -> _Step | None:
    """Read the member whose headers begin at `first`; None at the end mark."""
    at, said = first, dict[str, str]()
    while True:
        block = window.read(at, min(BLOCK, end - at))
        if len(block) < BLOCK:
            raise SourceError(f"{window.uri} is cut: a tar archive in it has no end mark at byte {end}")
        if not any(block):
            return None
        header, at = _parse(block), at + BLOCK
        if header is None:
            return _Step(RejectedMember(first, f"byte-{at - BLOCK}", "its tar header is damaged"), at, lost=True)
        if header.type not in BEFORE_A_MEMBER:
            return _member(window, header, said, first, at, end)
        if header.size > end - at:
            return _Step(RejectedMember(first, header.name, _too_large(header.size, end - at)), at, lost=True)
        said |= _said(window, header, at)
        at += _padded(header.size)


def _member(window: Window, header: _Header, said: dict[str, str], first: int, at: int, end: int) -> _Step:
    """The member of a header that ends at `at`, with what PAX or GNU headers `said` of it before."""
    name = said.get("path", header.name).removeprefix("./")
    has_data = header.type != FOLDER and header.type not in WITHOUT_DATA
    size = int(said.get("size", header.size)) if has_data else 0
    data, more = at, header.more
    while more:
        block = window.read(data, BLOCK)
        data, more = data + BLOCK, len(block) == BLOCK and block[504] != 0
    if size > end - data:
        return _Step(RejectedMember(first, name[:LONGEST_NAME], _too_large(size, end - data)), at, lost=True)
    after = data + _padded(size)
    if header.type == FOLDER:
        return _Step(None, after)
    if reason := _objection(name, header.type, said):
        return _Step(RejectedMember(first, name[:LONGEST_NAME], reason), after)
    return _Step(Member(first, name, data, size), after)


def _objection(name: str, kind: bytes, said: dict[str, str]) -> str | None:
    if "objection" in said:
        return said["objection"]
    if kind in WITHOUT_DATA:
        return f"is {WITHOUT_DATA[kind]} in a tar archive"
    if kind == SPARSE or any(word.startswith("GNU.sparse.") for word in said):
        return "is a sparse file in a tar archive"
    if kind not in PLAIN:
        return f"is of the unknown kind {kind!r} in a tar archive"
    if not name or len(name) > LONGEST_NAME:
        return f"has a name of {len(name)} characters"
    if name.startswith("/") or ".." in name.split("/"):
        return "has a name that points out of its archive"
    return None


def _too_large(size: int, left: int) -> str:
    return f"claims {size} bytes where the archive has {left} left"


def _next_header(window: Window, at: int, end: int) -> int | None:
    """The next block that is a header; None if only the end mark is left. Raises `SourceError` if not even that."""
    while at + BLOCK <= end:
        block = window.read(at, BLOCK)
        if block[257:262] == b"ustar" and _parse(block) is not None:
            return at
        at += BLOCK
    if end < 2 * BLOCK or any(window.read(end - 2 * BLOCK, 2 * BLOCK)):
        raise SourceError(f"{window.uri} is cut: a tar archive in it has no end mark at byte {end}")
    return None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _parse(block: bytes) -> _Header | None:
    """A header block, unless its checksum or its size is none."""
    size, kind = _number(block[124:136]), block[156:157]
    if size is None or not _checks(block):
        return None
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and (prefix := _text(block[345:500])):  # GNU keeps times there
        name = f"{prefix}/{name}"
    if kind == b"\0" and name.endswith("/"):  # how archives spelled folders before POSIX
        kind = FOLDER
    return _Header(name, kind, size, kind == SPARSE and block[482] != 0)


def _checks(block: bytes) -> bool:
    summed = block[:148] + b" " * 8 + block[156:]
    unsigned, said = sum(summed), _number(block[148:156])
    return said == unsigned or said == unsigned - 256 * sum(byte > 127 for byte in summed)  # some tars summed chars


def _number(field: bytes) -> int | None:
    """Octal digits, or base 256 behind a byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _said(window: Window, header: _Header, at: int) -> dict[str, str]:
    """What a header before a member says of it: its path, its size, that it is sparse; or an objection to it."""
    if header.size > LONGEST_HEADER:
        return {"objection": f"has a header of {header.size} bytes, more than the {LONGEST_HEADER} we read"}
    data = window.read(at, header.size)
    if header.type == LONG_LINK:
        return {}
    if header.type == LONG_NAME:
        return {"path": _text(data)}
    said = _records(data)
    if header.type == GLOBAL and (said.keys() & {"path", "size", "objection"}):
        raise SourceError(f"{window.uri} has a global PAX header that sets {', '.join(said)} for all members")
    return said if header.type != GLOBAL else {}


def _records(data: bytes) -> dict[str, str]:
    """PAX: records of `<length> <key>=<value>\\n`, the length counting the whole record."""
    records = {}
    while data.strip(b"\0"):
        digits = data[:20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = data[len(digits) + 1 : max(length - 1, 0)].partition(b"=")
        if (
            not equals
            or data[length - 1 : length] != b"\n"
            or (key == b"size" and not (value.isdigit() and len(value) < 20))
        ):
            return {"objection": "has a malformed PAX header"}
        records[key.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        data = data[length:]
    return records
