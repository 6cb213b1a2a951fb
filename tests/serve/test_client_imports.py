"""The client loads no heavy library, so that it is usable where none is installed."""

import subprocess
import sys

from conftest import ROOT

HEAVY = {"torch", "ray", "fastapi", "pyarrow", "PIL", "boto3", "igpt_ray.storage"}


def test_the_client_imports_no_heavy_library() -> None:
    program = f"import sys, igpt_ray.serve.client; print(sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"
