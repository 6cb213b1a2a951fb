"""The client does not need torch."""

import subprocess
import sys

from conftest import ROOT


def test_the_client_imports_neither_torch_nor_ray() -> None:
    program = "import sys, igpt_ray.serve.client; print(sorted({'torch', 'ray', 'fastapi'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"
