"""The small faiss-gpu wheel: which device code is left, and what the cuBLAS 12 library forwards."""

import base64
import ctypes
import hashlib
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_wheels

PTX = 1
needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is missing: it compiles the forwarding library")


def entry(kind: int, architecture: int, payload: bytes) -> bytes:
    return (
        struct.pack("<HHIQ", kind, 0x101, 64, len(payload)).ljust(28, b"\0")
        + struct.pack("<I32x", architecture)
        + payload
    )


def fat_binary(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", gpu_wheels.FATBIN, 1, 16, len(body)) + body


def test_only_machine_code_of_sm_90_is_left() -> None:
    old, own, ptx = entry(2, 80, b"o" * 96), entry(2, 90, b"m" * 40), entry(PTX, 90, b"p" * 8)
    chance = struct.pack("<IHHQ", gpu_wheels.FATBIN, 1, 7, 1)  # the magic number in other data
    library = b"ELF" + chance + fat_binary(old, own, ptx) + b"data" + fat_binary(own) + b"end"
    stripped = gpu_wheels.only_sm_90(library)
    assert stripped == library.replace(b"o" * 96, bytes(96)).replace(b"p" * 8, bytes(8))


def test_a_library_without_sm_90_is_an_error() -> None:
    with pytest.raises(SystemExit, match="no machine code for sm_90"):
        gpu_wheels.only_sm_90(fat_binary(entry(2, 80, b"old")))


@needs_gcc
def test_the_forwarding_library_passes_all_arguments(tmp_path: Path) -> None:
    """cublasSgemmEx has 17 arguments: six in registers, the others on the stack. The first call also resolves."""
    names = [f"a{i}" for i in range(17)]
    terms = " + ".join(f"{i + 1} * {name}" for i, name in enumerate(names))
    (tmp_path / "real.c").write_text(
        f"long cublasSgemmEx({', '.join(f'long {n}' for n in names)}) {{ return {terms}; }}"
    )
    real = tmp_path / "libcublas.so.13"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcublas.so.13", tmp_path / "real.c", "-o", real], check=True
    )
    (tmp_path / "forward.so").write_bytes(gpu_wheels.shared_library(tmp_path, "libcublas.so.12", ["cublasSgemmEx"]))
    arguments = [7**i % 1000 for i in range(17)]
    program = f"""import ctypes
ctypes.CDLL({str(real)!r})
call = ctypes.CDLL({str(tmp_path / "forward.so")!r}).cublasSgemmEx
call.restype = ctypes.c_long
print([call(*map(ctypes.c_long, {arguments})) for _ in range(2)])"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([sum((i + 1) * a for i, a in enumerate(arguments))] * 2)


@needs_gcc
def test_a_call_without_cublas_13_is_a_clear_error(tmp_path: Path) -> None:
    library = tmp_path / "forward.so"
    library.write_bytes(gpu_wheels.shared_library(tmp_path, "libcublas.so.12", ["cublasCreate_v2"]))
    ctypes.CDLL(str(library))  # loading works on a machine without a GPU
    program = f"import ctypes; ctypes.CDLL({str(library)!r}).cublasCreate_v2(None)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert "import torch before faiss" in done.stderr


def test_a_wheel_records_its_files_and_its_programs_are_executable(tmp_path: Path) -> None:
    """pip sets the permission of regular files only. Ray has a copy of another package, with its dist-info."""
    files = {"ray/copy/b-2.dist-info/METADATA": b"", "ray/core/gcs_server": b"\x7fELF"}
    files |= {"faiss_gpu-1.dist-info/METADATA": b"Name: faiss-gpu\n"}
    with zipfile.ZipFile(gpu_wheels.write_wheel(tmp_path / "w.whl", files)) as wheel:
        *lines, own = wheel.read("faiss_gpu-1.dist-info/RECORD").decode().splitlines()
        assert {name: wheel.read(name) for name in files} == files
        mode = wheel.getinfo("ray/core/gcs_server").external_attr >> 16
        assert stat.S_ISREG(mode)
        assert mode & stat.S_IXUSR
    assert own == "faiss_gpu-1.dist-info/RECORD,,"
    for line in lines:
        name, digest, size = line.split(",")
        expected = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).decode().rstrip("=")
        assert (digest, int(size)) == (f"sha256={expected}", len(files[name]))


def test_an_unpinned_package_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no-such-package are not pinned"):
        gpu_wheels.download(["pydantic", "no-such-package"], tmp_path)


def test_every_base_package_is_pinned() -> None:
    text = (gpu_wheels.ROOT / "constraints.txt").read_text().lower().replace("_", "-")
    names = [name.lower().replace("_", "-") for name in gpu_wheels.BASE + gpu_wheels.RAY]
    assert [name for name in names if f"\n{name}==" not in text] == []
