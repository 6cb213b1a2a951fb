"""Iterate over the members of an untrusted tar archive with range reads. Nothing is extracted.

The reader supports ustar, GNU and PAX archives, long names included. A member that is not a plain file with a safe name
is returned as `RejectedMember` with a reason. After a damaged header, reading continues at the next valid header, as in
GNU tar. An archive without its end mark raises `SourceError`, because an unknown number of members is lost. Memory use
is one header.

The standard library's `tarfile` is not used: it reads a malformed PAX size as zero, rejects a file whose owner or time
field is malformed, keeps all headers in memory, and takes about five times as long per header.
"""

from collections.abc import Iterator
from typing import NamedTuple

from igpt_ray.data.sources.ranges import Window
from igpt_ray.errors import SourceError

BLOCK = 512
"""Bytes per tar block."""
MAX_HEADER = 64 << 10
"""Largest PAX header or long name that is read, in bytes."""
MAX_NAME = 4096

FOLDER, SPARSE, LONG_NAME, LONG_LINK, GLOBAL = b"5", b"S", b"L", b"K", b"g"
BEFORE_A_MEMBER = (LONG_NAME, LONG_LINK, GLOBAL, b"x", b"X")
PLAIN = (b"0", b"\0", b"7")
WITHOUT_DATA = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a FIFO"}


class Member(NamedTuple):
    """A plain file in an archive."""

    header: int
    """Offset of its first header, a valid start for `members`."""
    name: str
    start: int
    """Offset of its content."""
    size: int


class RejectedMember(NamedTuple):
    """A member that is not read, and the reason."""

    header: int
    name: str
    reason: str


class _Header(NamedTuple):
    name: str
    type: bytes
    size: int
    more: bool
    """For old GNU sparse files: more header blocks follow."""


class _Step(NamedTuple):
    member: Member | RejectedMember | None
    next_offset: int
    lost: bool = False
    """The next header's offset is unknown: search for it from `next_offset`."""


def members(window: Window, start: int = 0, end: int | None = None) -> Iterator[Member | RejectedMember]:
    """The members of the archive in bytes `start` to `end` of a file, in order, without folders.

    Bytes after the end mark are ignored, as in tar.
    """
    offset: int | None = start
    end = window.size if end is None else end
    while offset is not None and (step := _step(window, offset, end)) is not None:
        if step.member is not None:
            yield step.member
        offset = _next_header(window, step.next_offset, end) if step.lost else step.next_offset
    window.finish()


def _step(window: Window, first: int, end: int) -> _Step | None:
    """Read the member whose headers begin at `first`; None at the end mark."""
    at, extended = first, dict[str, str]()
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
            return _member(window, header, extended, first, at, end)
        if header.size > end - at:
            return _Step(RejectedMember(first, header.name, _too_large(header.size, end - at)), at, lost=True)
        extended |= _extended(window, header, at)
        at += _padded(header.size)


def _member(window: Window, header: _Header, extended: dict[str, str], first: int, at: int, end: int) -> _Step:
    """The member whose header ends at `at`; `extended` holds the fields of the PAX or GNU headers before it."""
    name = extended.get("path", header.name).removeprefix("./")
    has_data = header.type != FOLDER and header.type not in WITHOUT_DATA
    size = int(extended.get("size", header.size)) if has_data else 0
    data, more = at, header.more
    while more:
        block = window.read(data, BLOCK)
        data, more = data + BLOCK, len(block) == BLOCK and block[504] != 0
    if size > end - data:
        return _Step(RejectedMember(first, name[:MAX_NAME], _too_large(size, end - data)), at, lost=True)
    after = data + _padded(size)
    if header.type == FOLDER:
        return _Step(None, after)
    if reason := _objection(name, header.type, extended):
        return _Step(RejectedMember(first, name[:MAX_NAME], reason), after)
    return _Step(Member(first, name, data, size), after)


def _objection(name: str, kind: bytes, extended: dict[str, str]) -> str | None:
    if "objection" in extended:
        return extended["objection"]
    if kind in WITHOUT_DATA:
        return f"is {WITHOUT_DATA[kind]} in a tar archive"
    if kind == SPARSE or any(word.startswith("GNU.sparse.") for word in extended):
        return "is a sparse file in a tar archive"
    if kind not in PLAIN:
        return f"is of the unknown kind {kind!r} in a tar archive"
    if not name or len(name) > MAX_NAME:
        return f"has a name of {len(name)} characters"
    if name.startswith("/") or ".." in name.split("/"):
        return "has a name that points out of its archive"
    return None


def _too_large(size: int, left: int) -> str:
    return f"claims {size} bytes where the archive has {left} left"


def _next_header(window: Window, at: int, end: int) -> int | None:
    """Offset of the next header; None at the end mark. Raises `SourceError` if the end mark is missing."""
    zeros = 0
    while at + BLOCK <= end and len(block := window.read(at, BLOCK)) == BLOCK:
        if block[257:262] == b"ustar" and _parse(block) is not None:
            return at
        zeros = 0 if any(block) else zeros + 1
        at += BLOCK
    if zeros < 2:
        raise SourceError(f"{window.uri} is cut: a tar archive in it has no end mark at byte {end}")
    return None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _parse(block: bytes) -> _Header | None:
    """Parse a header block; None if its checksum or its size is invalid."""
    size, kind = _number(block[124:136]), block[156:157]
    if size is None or not _checks(block):
        return None
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and (prefix := _text(block[345:500])):  # GNU tar stores times in this field
        name = f"{prefix}/{name}"
    if kind == b"\0" and name.endswith("/"):  # folders in archives older than POSIX
        kind = FOLDER
    return _Header(name, kind, size, kind == SPARSE and block[482] != 0)


def _checks(block: bytes) -> bool:
    summed = block[:148] + b" " * 8 + block[156:]
    unsigned, stored = sum(summed), _number(block[148:156])
    return stored == unsigned or stored == unsigned - 256 * sum(byte > 127 for byte in summed)  # old tars: signed


def _number(field: bytes) -> int | None:
    """Parse octal digits, or base 256 after a byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _extended(window: Window, header: _Header, at: int) -> dict[str, str]:
    """The fields of a header that precedes a member (path, size, sparse), or an "objection" to the member."""
    if header.size > MAX_HEADER:
        return {"objection": f"has a header of {header.size} bytes, more than the limit of {MAX_HEADER}"}
    data = window.read(at, header.size)
    if header.type == LONG_LINK:
        return {}
    if header.type == LONG_NAME:
        return {"path": _text(data)}
    records = _records(data)
    if header.type == GLOBAL and (records.keys() & {"path", "size", "objection"}):
        raise SourceError(f"{window.uri} has a global PAX header that sets {', '.join(records)} for all members")
    return records if header.type != GLOBAL else {}


def _records(data: bytes) -> dict[str, str]:
    """Parse PAX records `<length> <key>=<value>\\n`, where the length counts the whole record."""
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
