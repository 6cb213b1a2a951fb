"""A small release in files of limited size, for a machine that returns no larger ones."""

import io
import tarfile
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from igpt_ray import artifact, storage, weights

PART_BYTES = 15_500_000
"""Largest size of a file."""


def write_parts(release: str, out: str, name: str) -> list[str]:
    """Write a release with bfloat16 weights as the parts of a tar archive: `cat NAME.part* | tar x` gives a release."""
    loaded = weights.load_release(release)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file({k: v.bfloat16().contiguous() for k, v in loaded.model.state_dict().items()}, path)
        config = loaded.config.model_copy(update={"sha256": artifact.sha256_of(path)})
        Path(folder, "config.json").write_text(config.model_dump_json(indent=1) + "\n")
        for copied in ("palette.npy", "README.md"):
            Path(folder, copied).write_bytes(storage.read(storage.join(release, copied)))
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w") as tar:
            for file in sorted(Path(folder).iterdir()):
                tar.add(file, file.name)
    data, names = sink.getvalue(), []
    for i in range(0, len(data), PART_BYTES):
        names.append(f"{name}.part{i // PART_BYTES}")
        storage.write(storage.join(out, names[-1]), data[i : i + PART_BYTES])
    return names


def join_parts(folder: str, name: str, work: str) -> str:
    """The release of `write_parts` in `folder`, unpacked into `work`; `folder` itself if it has no parts of `name`."""
    parts = sorted(Path(folder).glob(f"{name}.part*"), key=lambda path: int(path.suffix[len(".part") :]))
    if not parts:
        return folder
    release = Path(work, name)
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as tar:
        tar.extractall(release, filter="data")
    return str(release)
