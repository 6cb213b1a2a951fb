"""The tar reader, compared with Python's tarfile, and with malicious archives."""

import io
import os
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from igpt_ray import storage
from igpt_ray.data.sources import ranges
from igpt_ray.data.sources.ranges import RangeFile, Window, ahead
from igpt_ray.data.sources.tars import Member, RejectedMember, members
from igpt_ray.errors import SourceError

QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture
def walk(tmp_path: Path) -> Callable[[bytes], list[RejectedMember | tuple[str, bytes]]]:
    """Bytes of an archive -> its members according to the reader: (name, data), or the rejected member."""

    def walked(archive: bytes) -> list[RejectedMember | tuple[str, bytes]]:
        path = tmp_path / "archive.tar"
        path.write_bytes(archive)
        with Window(str(path), len(archive)) as window:
            found = members(window)
            return [m if isinstance(m, RejectedMember) else (m.name, window.read_all(m.start, m.size)) for m in found]

    return walked


def member(
    name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar(*parts: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for info, data in parts:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def with_size(header: bytes, size: int) -> bytes:
    """A header with another size and a valid checksum."""
    field = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    changed = header[:124] + field + header[136:148] + b" " * 8 + header[156:]
    return changed[:148] + b"%06o\0 " % sum(changed) + changed[156:]


WORD = st.text(
    st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40
)
NAME = st.lists(WORD.filter(lambda word: word not in (".", "..")), min_size=1, max_size=8).map("/".join)
FILES = st.lists(st.tuples(NAME, st.binary(max_size=1500)), max_size=6)


@QUICK
@given(files=FILES, format=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_it_reads_what_python_s_tarfile_reads(
    files: list[tuple[str, bytes]], format: int, walk: Callable[[bytes], object]
) -> None:
    """Long names, names of other scripts, padding: in the three formats that are written."""
    try:
        archive = tar(*(member(name, data) for name, data in files), format=format)
    except ValueError:  # ustar has no room for long names
        return
    with tarfile.open(fileobj=io.BytesIO(archive)) as reference:
        expected = [(m.name, reference.extractfile(m).read()) for m in reference if m.isreg()]
    assert walk(archive) == expected


@QUICK
@given(files=FILES.filter(bool), data=st.data())
def test_no_flipped_bit_or_truncation_yields_a_file_that_was_not_there(
    files: list[tuple[str, bytes]],
    data: st.DataObject,
    walk: Callable[[bytes], list[RejectedMember | tuple[str, bytes]]],
) -> None:
    """A damaged archive gives `SourceError` or `RejectedMember`s: no crash, no endless loop, no file lost without an
    error."""
    archive = bytearray(tar(*(member(name, content) for name, content in files)))
    end = len(archive) - len(archive) % 10240 or len(archive)
    if data.draw(st.booleans()):
        used = sum(512 + -(-len(content) // 512) * 512 for _, content in files)
        archive = archive[: data.draw(st.integers(0, used))]
        with pytest.raises(SourceError, match="is cut"):
            walk(bytes(archive))
        return
    at = data.draw(st.integers(0, 511))
    archive[at] ^= 1 << data.draw(st.integers(0, 7))
    found = walk(bytes(archive[:end]))
    assert isinstance(found[0], RejectedMember)
    assert len(found) == len(files) or len(files[0][0].encode()) > 100  # a long name is a member of its own


HARM = {
    "absolute": (member("/etc/passwd", b"x"), "points out of its archive"),
    "above": (member("a/../../x.jpg", b"x"), "points out of its archive"),
    "symlink": (member("link.jpg", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a symbolic link"),
    "hardlink": (member("hard.jpg", kind=tarfile.LNKTYPE, linkname="a.jpg"), "is a hard link"),
    "device": (member("null", kind=tarfile.CHRTYPE, devmajor=1, devminor=3), "is a device"),
    "fifo": (member("pipe", kind=tarfile.FIFOTYPE), "is a FIFO"),
    "unknown": (member("odd.jpg", b"x" * 700, kind=b"Z"), "unknown kind"),
    "pax sparse": (member("s.jpg", b"x" * 700, pax_headers={"GNU.sparse.realsize": str(1 << 40)}), "is a sparse file"),
    "long pax": (member("p.jpg", b"x", pax_headers={"comment": "y" * 70_000}), "has a header of 7"),
    "long name": (member("n/" * 3000 + "x", b"x"), "has a name of 6001 characters"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_malicious_member_is_rejected_and_the_others_are_read(
    harm: str, walk: Callable[[bytes], object], tmp_path: Path
) -> None:
    """Nothing is read as an image or written to disk, and no other member is lost."""
    bad, reason = HARM[harm]
    archive = tar(member("a.jpg", b"one"), bad, member("b.jpg", b"two" * 300), format=tarfile.PAX_FORMAT)
    first, second, third = walk(archive)
    assert (first, third) == (("a.jpg", b"one"), ("b.jpg", b"two" * 300))
    assert isinstance(second, RejectedMember)
    assert reason in second.reason
    assert os.listdir(tmp_path) == ["archive.tar"]


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_of_a_terabyte_costs_its_own_image_only(
    kind: bytes, walk: Callable[[bytes], list[RejectedMember | tuple[str, bytes]]]
) -> None:
    """The size must neither be allocated nor end the archive without an error."""
    liar = with_size(member("liar.jpg", kind=kind)[0].tobuf(tarfile.GNU_FORMAT), 1 << 40)
    archive = tar(member("a.jpg", b"one"))[:1024] + liar + b"\1" * 1024 + tar(member("b.jpg", b"two"))
    first, bad, last = walk(archive)
    assert (first, last) == (("a.jpg", b"one"), ("b.jpg", b"two"))
    assert isinstance(bad, RejectedMember)
    assert (bad.name, bad.reason[:20]) == ("liar.jpg", "claims 1099511627776")


def test_old_sparse_files_are_skipped_with_all_their_headers(
    walk: Callable[[bytes], list[RejectedMember | tuple[str, bytes]]],
) -> None:
    """GNU's sparse files have more header blocks, which must not be read as headers of other members."""
    header = bytearray(member("s.jpg", b"x" * 600, kind=tarfile.GNUTYPE_SPARSE)[0].tobuf(tarfile.GNU_FORMAT))
    header[482] = 1
    more = b"\1" * 504 + b"\1" + b"\0" * 7 + b"\1" * 504 + b"\0" * 8
    archive = with_size(bytes(header), 600) + more + b"x" * 1024 + tar(member("b.jpg", b"two"))
    bad, last = walk(archive)
    assert isinstance(bad, RejectedMember)
    assert "sparse" in bad.reason
    assert last == ("b.jpg", b"two")


def test_a_global_header_must_not_name_or_size_all_members(walk: Callable[[bytes], object]) -> None:
    """Such a header would give every image the same name; git's, which has only a comment, is accepted."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"path": "x.jpg"}) as archive:
        archive.addfile(member("a.jpg", b"")[0])
    with pytest.raises(SourceError, match="global PAX header"):
        walk(out.getvalue())
    harmless = out.getvalue().replace(b"14 path=x.jpg\n", b"14 note=x.jpg\n")
    assert walk(harmless) == [("a.jpg", b"")]


@pytest.mark.parametrize("archive", [b"", b"x" * 512, b"x" * 511, b"x" * 5000, bytes(511)])
def test_a_file_that_is_no_archive_is_an_error(archive: bytes, walk: Callable[[bytes], object]) -> None:
    """An empty file, a web page or an image with the name of a tar is not an archive without members."""
    with pytest.raises(SourceError, match="is cut"):
        walk(archive)


def test_folders_are_skipped_and_a_leading_dot_is_removed(walk: Callable[[bytes], object]) -> None:
    """`tar c .` writes ./ before every name, which would change the keys of the images."""
    archive = tar(member("./", kind=tarfile.DIRTYPE), member("./a", kind=tarfile.DIRTYPE), member("./a/x.jpg", b"x"))
    assert walk(archive) == [("a/x.jpg", b"x")]


def test_thousands_of_members_use_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tarfile keeps a list of all members, and a flat tar may have millions."""
    monkeypatch.setattr(ranges, "LARGEST", ranges.FIRST)
    header = member("x.jpg")[0].tobuf()
    path = tmp_path / "many.tar"
    path.write_bytes(header * 10_000 + bytes(1024))
    tracemalloc.start()
    with Window(str(path), path.stat().st_size) as window:
        assert sum(1 for _ in members(window)) == 10_000
    assert tracemalloc.get_traced_memory()[1] < 4 * ranges.FIRST
    tracemalloc.stop()


# ------------------------------------------------------------------------------------------------ range reads


@QUICK
@given(reads=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 900)), max_size=30), ordered=st.booleans())
def test_a_window_reads_the_bytes_of_the_file(reads: list[tuple[int, int]], ordered: bool, tmp_path: Path) -> None:
    """Reads may cross blocks, end inside a prefetched block, or go back."""
    content = bytes(i * i % 251 for i in range(4321))
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "FIRST", 64)
        patch.setattr(ranges, "LARGEST", 256)
        with Window(str(path), len(content)) as window:
            for start, length in sorted(reads) if ordered else reads:
                assert window.read(start, length) == content[start : start + length]


def test_sequential_reads_use_few_large_requests_and_skips_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request per header would take hours for 1,000 class archives, and blocks of 8 MiB would read all 138 GB."""
    path = tmp_path / "file"
    with open(path, "wb") as f:
        f.truncate(200 << 20)
    asked: list[int] = []
    real = storage.read_versioned
    monkeypatch.setattr(
        storage, "read_versioned", lambda uri, start, length: asked.append(length) or real(uri, start, length)
    )
    with Window(str(path), 200 << 20) as window:
        for start in range(0, 100 << 20, 100_000):
            window.read(start, 512)
    assert len(asked) < 24
    asked.clear()
    with Window(str(path), 200 << 20) as window:
        for start in range(0, 200 << 20, 20 << 20):
            window.read(start, 512)
    assert asked == [ranges.FIRST] * 10


@pytest.mark.parametrize("place", ["local", "moto"], indirect=True)
@pytest.mark.parametrize("kind", [Window, RangeFile])
def test_a_file_that_is_replaced_while_it_is_read_is_an_error(place: str, kind: type) -> None:
    """The header of one tar with the pictures of another of the same size."""
    uri = storage.join(place, "file")
    storage.write(uri, bytes(4 << 20))
    reader = kind(uri, 4 << 20)
    read = reader.read if kind is Window else lambda start, length: (reader.seek(start), reader.read(length))[1]
    assert read(0, 512) == bytes(512)
    storage.write(uri, b"1" * (4 << 20))
    with pytest.raises(SourceError, match=f"{uri} has changed while it was read"):
        read(3 << 20, 512)


@pytest.mark.parametrize("place", ["local", "moto"], indirect=True)
@pytest.mark.parametrize("kind", [Window, RangeFile])
@pytest.mark.parametrize("size", [5, 3000, 4097, 9000])
def test_a_file_of_another_size_than_listed_is_an_error(place: str, kind: type, size: int) -> None:
    """Offsets of the listed archive in a later one: other images under the listing's digest."""
    uri = storage.join(place, "file")
    storage.write(uri, bytes(size))
    reader = kind(uri, 4096)
    read = reader.read if kind is Window else lambda start, length: (reader.seek(start), reader.read(length))[1]
    with pytest.raises(SourceError, match=f"{uri} has changed since it was listed with 4096 bytes"):
        read(3500, 100)


def test_bytes_behind_the_end_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"short")
    with Window(str(path), 5) as window, pytest.raises(SourceError, match="ends before byte 50"):
        window.read_all(0, 50)


def test_a_range_file_is_a_file(tmp_path: Path) -> None:
    """pyarrow seeks from both ends and reads past the last byte."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    file = RangeFile(str(path), 10)
    assert (file.seek(-3, io.SEEK_END), file.read(2), file.tell(), file.read(), file.read(5)) == (
        7,
        b"78",
        9,
        b"9",
        b"",
    )
    assert (file.seek(2), file.seek(2, io.SEEK_CUR), file.read(3)) == (2, 4, b"456")


def test_prefetching_preserves_order_and_errors() -> None:
    """A lost error of the thread would look like the end of the data."""

    def items() -> Iterator[int]:
        yield from range(5)
        raise SourceError("six")

    seen: list[int] = []
    with pytest.raises(SourceError, match="six"):
        seen.extend(ahead(items()))
    assert seen == [0, 1, 2, 3, 4]


def test_a_member_has_the_offset_of_its_first_header(tmp_path: Path) -> None:
    """A unit that starts after the header with the long name would lose the name."""
    archive = tar(member("a.jpg", b"1"), member("n" * 150 + ".jpg", b"2"))
    path = tmp_path / "a.tar"
    path.write_bytes(archive)
    with Window(str(path), len(archive)) as window:
        last = list(members(window))[-1]
        assert next(members(window, last.header)) == last
        assert isinstance(last, Member)
