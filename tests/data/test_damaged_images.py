"""No file crashes a decoder, keeps it busy for ten seconds or takes more memory than the limit."""

import json
import re
import subprocess
import sys
from pathlib import Path

import damaged_images
import pytest

PEAK_MIB = 600
ADDRESS = re.compile(r"at 0x[0-9a-f]{6,}")


def outcomes(folder: Path, seed: int, n: int) -> list[str]:
    """The outcome of n damaged images. Raises `CalledProcessError` if one of them ends the process."""
    command = [sys.executable, damaged_images.__file__, str(seed), str(n)]
    lines = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    *found, peak = map(json.loads, lines)
    assert peak < PEAK_MIB
    assert len(found) == n
    return found


@pytest.mark.parametrize(
    "n", [pytest.param(2000, marks=pytest.mark.slow), pytest.param(20_000, marks=pytest.mark.long)]
)
def test_damaged_images_are_read_or_refused_for_a_stable_reason(tmp_path: Path, n: int) -> None:
    """A repeated preparation must quarantine the same images for the same reasons, byte by byte."""
    found = outcomes(tmp_path, 1, n)
    assert found[:200] == outcomes(tmp_path, 1, 200)
    assert not [reason for reason in found if ADDRESS.search(reason) or "\n" in reason or len(reason) > 200]
    assert 0.05 < found.count("read") / n < 0.9  # the changes neither destroy all images nor miss them all
    for format in ("JPEG", "PNG", "WEBP"):
        assert len({reason for reason in found if f"damaged {format}" in reason}) > 3
