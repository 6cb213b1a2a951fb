"""Collect the wheels for a GPU machine that has torch, numpy and pyarrow but no network.

    python -m benchmarks.gpu_wheels build/gpu-wheels --faiss-gpu    # or --ray: both together are too large
    pip install --no-index --no-deps --target SITE build/gpu-wheels/*.whl    # on the GPU machine, then PYTHONPATH=SITE

The wheels suit CPython 3.12 on x86-64 Linux; their versions are those of constraints.txt and constraints-gpu.txt.
`BASE` is what training, sampling and evaluation import in addition to torch 2.11, numpy, pyarrow, safetensors and
Pillow. Object stores (boto3, obstore) are not included.

`--ray` adds Ray with what Ray Train and Ray Data import, in 43 MB instead of 79: without Java, RLlib, LLM and the pages
of the dashboard.

`--faiss-gpu` adds faiss-gpu for one architecture, sm_90 (H100, H200), in 35 MB instead of 790. Other architectures'
machine code is overwritten with zeros, which compress well. CUDA 12's runtime is included. cuBLAS 12 (581 MB) is
replaced by a library of the eight functions that faiss imports, which forwards to CUDA 13's: torch must be imported
before faiss calculates on a GPU, because it loads that one. On a CPU the wheel works without torch.
"""

import argparse
import base64
import hashlib
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASE = [
    "annotated-types",
    "docstring_parser",
    "google-crc32c",
    "packaging",
    "pydantic",
    "pydantic_core",
    "simplejpeg",
    "tqdm",
    "typeguard",
    "typing-inspection",
    "typing_extensions",
    "tyro",
]
RAY = ["attrs", "jsonschema", "jsonschema-specifications", "referencing", "rpds-py", "tensorboardX"]
"""What Ray Train and Ray Data import, besides Ray, click, filelock, fsspec, msgpack, pandas, protobuf and requests."""
UNUSED_BY_RAY = ("ray/jars/", "ray/rllib/", "ray/llm/", "ray/dashboard/client/")
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
LIMIT = 64 << 20
"""Most bytes that one transfer to the GPU machine may have."""

SM_90 = 90
FATBIN, ELF = 0xBA55ED50, 2
"""Magic number of a container of device code, and the kind of an entry that holds machine code."""
CUBLAS = [
    "cublasCreate_v2",
    "cublasDestroy_v2",
    "cublasGemmEx",
    "cublasGemmStridedBatchedEx",
    "cublasGetMathMode",
    "cublasSetMathMode",
    "cublasSetStream_v2",
    "cublasSgemmEx",
]
"""The functions that faiss imports from libcublas.so.12. Their signatures and enumerations are the same in CUDA 13."""
FORWARD = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#define POINTER(name) void *to_##name;
#define RESOLVE(name) to_##name = dlsym(cublas, #name);
FUNCTIONS(POINTER)
void resolve(void) {
    void *cublas = dlopen("libcublas.so.13", RTLD_NOW | RTLD_LOCAL);
    if (!cublas) {
        fputs("libcublas.so.13 is not loaded: import torch before faiss calculates on a GPU\\n", stderr);
        abort();
    }
    FUNCTIONS(RESOLVE)
}
/* Jumps with registers and stack as they came. Arguments are integers and pointers, so rdi to r9 are saved. */
#define JUMP(name) __asm__(".globl " #name "\\n.type " #name ", @function\\n" #name ":\\n" \\
    "movq to_" #name "@GOTPCREL(%rip), %rax\\n cmpq $0, (%rax)\\n jne 1f\\n" \\
    "push %rdi\\n push %rsi\\n push %rdx\\n push %rcx\\n push %r8\\n push %r9\\n subq $8, %rsp\\n" \\
    "call resolve@PLT\\n addq $8, %rsp\\n" \\
    "pop %r9\\n pop %r8\\n pop %rcx\\n pop %rdx\\n pop %rsi\\n pop %rdi\\n" \\
    "movq to_" #name "@GOTPCREL(%rip), %rax\\n" \\
    "1: jmp *(%rax)\\n");
FUNCTIONS(JUMP)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the wheels; wheels in it are removed first")
    parser.add_argument("--faiss-gpu", action="store_true", help="add faiss-gpu with machine code of sm_90 only")
    parser.add_argument("--ray", action="store_true", help="add Ray Train and Ray Data")
    settings = parser.parse_args()
    settings.out.mkdir(parents=True, exist_ok=True)
    for old in settings.out.glob("*.whl"):
        old.unlink()
    download(BASE + (RAY if settings.ray else []), settings.out)
    if settings.ray:
        ray_wheel(settings.out)
    if settings.faiss_gpu:
        faiss_wheel(settings.out)
    wheels = sorted(settings.out.glob("*.whl"), key=lambda wheel: -wheel.stat().st_size)
    total = sum(wheel.stat().st_size for wheel in wheels)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:7.2f} MB  {wheel.name}")
    print(f"{total / 1e6:7.2f} MB  in {len(wheels)} wheels")
    if total > LIMIT:
        sys.exit(f"error: the wheels have {total:,} bytes, the limit is {LIMIT:,}")


def download(packages: list[str], folder: Path) -> None:
    """Download one wheel of each package, in the pinned version. Raises SystemExit if a package is not pinned."""
    pins = {
        match[1].lower().replace("_", "-"): match[2]
        for name in ("constraints.txt", "constraints-gpu.txt")
        for match in re.finditer(r"^([\w.-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE)
    }
    if missing := [package for package in packages if package.lower().replace("_", "-") not in pins]:
        sys.exit(f"error: {', '.join(missing)} are not pinned in constraints.txt or constraints-gpu.txt")
    pinned = [f"{package}=={pins[package.lower().replace('_', '-')]}" for package in packages]
    where = [option for name in PLATFORMS for option in ("--platform", f"{name}_x86_64")]
    what = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    command = [sys.executable, "-m", "pip", "download", *what, *where, "--dest", str(folder), *pinned]
    subprocess.run(command, check=True)


def ray_wheel(out: Path) -> Path:
    """Write a wheel of Ray without the parts that training and Ray Data do not use."""
    with tempfile.TemporaryDirectory() as folder:
        download(["ray"], Path(folder))
        (published,) = Path(folder).glob("ray*.whl")
        files = files_of(published)
    return write_wheel(out / published.name, {n: f for n, f in files.items() if not n.startswith(UNUSED_BY_RAY)})


def faiss_wheel(out: Path) -> Path:
    """Write a wheel of faiss-gpu with the device code of sm_90, CUDA 12's runtime and the forwarding cuBLAS."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        download(["faiss-gpu", "nvidia-cuda-runtime-cu12"], folder)
        (published,), (runtime,) = folder.glob("faiss_gpu*.whl"), folder.glob("nvidia_cuda_runtime*.whl")
        files = files_of(published)
        with zipfile.ZipFile(runtime) as archive:
            files["faiss_gpu.libs/libcudart.so.12"] = archive.read("nvidia/cuda_runtime/lib/libcudart.so.12")
        files["faiss_gpu.libs/libcublas.so.12"] = shared_library(folder, "libcublas.so.12", CUBLAS)
        files["faiss_gpu.libs/libcublasLt.so.12"] = shared_library(folder, "libcublasLt.so.12", [])
        files["faiss/libfaiss.so"] = only_sm_90(files["faiss/libfaiss.so"])
        del files["faiss/_gpu_build.py"]  # its presence makes faiss look for the nvidia-*-cu12 packages
        return write_wheel(out / published.name, files)


def only_sm_90(library: bytes) -> bytes:
    """The library with the device code of other architectures, and all PTX, overwritten with zeros.

    A fat binary is a header (magic, version, header size, size) and entries (kind, version, header size, payload size,
    ..., architecture at byte 28). Sizes and offsets stay as they are. Raises SystemExit if no code of sm_90 is left.
    """
    data = bytearray(library)
    n_kept = n_zeroed = 0
    magic = struct.pack("<I", FATBIN)
    at = data.find(magic)
    while at >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, at)
        entry, end = at + header, at + header + size
        if header != 16 or end > len(data):  # the four bytes of the magic number by chance
            at = data.find(magic, at + 4)
            continue
        while entry < end:
            kind, _, header, payload = struct.unpack_from("<HHIQ", data, entry)
            if kind == ELF and struct.unpack_from("<I", data, entry + 28)[0] == SM_90:
                n_kept += 1
            else:
                data[entry + header : entry + header + payload] = bytes(payload)
                n_zeroed += 1
            entry += header + payload
        if entry != end:
            sys.exit(f"error: the fat binary at byte {at:,} has an unknown layout")
        at = data.find(magic, end)
    if not n_kept:
        sys.exit("error: the library has no machine code for sm_90")
    print(f"device code: {n_kept} entries of sm_90 are left, {n_zeroed} others are removed")
    return bytes(data)


def shared_library(folder: Path, name: str, functions: list[str]) -> bytes:
    """Compile a library that forwards `functions` to libcublas.so.13, with faiss's symbol version."""
    calls = " ".join(f"F({function})" for function in functions)
    source = f"#define FUNCTIONS(F) {calls}\n{FORWARD}" if functions else ""
    (folder / "forward.c").write_text(source)
    (folder / "versions").write_text(f"{name} {{ global: cublas*; local: *; }};")
    options = ["-shared", "-fPIC", "-O1", f"-Wl,--version-script={folder / 'versions'}", f"-Wl,-soname,{name}"]
    subprocess.run(["gcc", *options, str(folder / "forward.c"), "-o", str(folder / name), "-ldl"], check=True)
    return (folder / name).read_bytes()


def files_of(wheel: Path) -> dict[str, bytes]:
    """The wheel's files without its RECORD."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith(("/RECORD", "/"))}


def write_wheel(path: Path, files: dict[str, bytes]) -> Path:
    """Write the files as a wheel, with its RECORD of hashes."""
    (info,) = {name.split("/")[0] for name in files if name.split("/")[0].endswith(".dist-info")}
    record = ""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(data)}\n"
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o100755 << 16  # executable: Ray's servers are programs
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED, compresslevel=9)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


if __name__ == "__main__":
    main()
