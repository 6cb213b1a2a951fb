"""Read and write weights: our releases, OpenAI's checkpoints and transformers' folders.

A literal table maps the names that differ. A load raises `CheckpointError` if a weight is missing,
unexpected, of another shape or not finite. No pickle is opened, and no code in a file is executed.
"""

from igpt_ray.weights.hf import load_hf as load_hf
from igpt_ray.weights.hf import save_hf as save_hf
from igpt_ray.weights.openai import load_openai as load_openai
from igpt_ray.weights.release import FORMAT as FORMAT
from igpt_ray.weights.release import Release as Release
from igpt_ray.weights.release import ReleaseConfig as ReleaseConfig
from igpt_ray.weights.release import check_kind as check_kind
from igpt_ray.weights.release import check_next as check_next
from igpt_ray.weights.release import load_config as load_config
from igpt_ray.weights.release import load_release as load_release
from igpt_ray.weights.release import save_release as save_release
