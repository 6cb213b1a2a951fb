"""The comparison of images with PIL's pixels notices equal, refused and crashing files."""

from pathlib import Path

from image_cases import encoded

from benchmarks.corpus import BenchCorpusConfig, Child, corpus
from igpt_ray.data.image_files import RGB


def test_files_are_counted_by_verdict_and_format(tmp_path: Path, smooth: RGB) -> None:
    jpeg = encoded(smooth, "JPEG")
    files = {"a.png": encoded(smooth, "PNG"), "b.jpg": jpeg, "c.gif": encoded(smooth, "GIF"), "d.txt": b"text"}
    files["e.jpg"] = jpeg[: len(jpeg) // 2] + jpeg[-2:]  # PIL reads it, and half of it is grey
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    verdicts = ["equal: JPEG", "equal: PNG", "refused by PIL too: unknown", "refused: GIF", "refused: JPEG"]
    report = corpus(BenchCorpusConfig(images=(tmp_path,)))
    assert report == {"files": 5, "verdicts": dict.fromkeys(verdicts, 1)}


def test_a_file_that_ends_the_process_is_counted_and_the_next_is_examined(tmp_path: Path, smooth: RGB) -> None:
    (tmp_path / "a.png").write_bytes(encoded(smooth, "PNG"))
    child = Child()
    assert child.examined(tmp_path / "missing.png").verdict == "crashed"
    assert child.examined(tmp_path / "a.png").verdict == "equal"
    child.process.kill()
