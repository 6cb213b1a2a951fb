"""Image GPT ("Generative Pretraining from Pixels") as a distributed system on Ray.

`load` opens a release for use in Python; `TokenStore` and `Palette` are the data formats. They are imported on first
use, so that `import igpt_ray` is fast and needs neither torch nor ray.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from igpt_ray.data.palette import Palette as Palette
    from igpt_ray.data.token_store import TokenStore as TokenStore
    from igpt_ray.pretrained import Pretrained as Pretrained
    from igpt_ray.pretrained import load as load

__version__ = "0.2.0"
__all__ = ["Palette", "Pretrained", "TokenStore", "__version__", "load"]

_MODULES = {
    "load": "pretrained",
    "Pretrained": "pretrained",
    "TokenStore": "data.token_store",
    "Palette": "data.palette",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'igpt_ray' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"igpt_ray.{_MODULES[name]}"), name)
