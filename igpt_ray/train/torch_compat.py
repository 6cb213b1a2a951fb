"""All uses of torch's private names in training, tried on torch 2.11 to 2.13."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from igpt_ray.errors import SettingError


@contextmanager
def _private_names() -> Iterator[None]:
    """Raises `SettingError` where torch lacks a private name."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise SettingError(
            f"torch {torch.__version__} lacks an internal interface that igpt_ray uses ({error}); it was tried on torch"
            " 2.11 to 2.13: pip install 'torch>=2.11,<2.14'"
        ) from error


@_private_names()
def tree_flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of nested containers, and their structure for `tree_unflatten`."""
    from torch.utils import _pytree

    return _pytree.tree_flatten(tree)


@_private_names()
def tree_unflatten(leaves: list[Any], structure: Any) -> Any:
    from torch.utils import _pytree

    return _pytree.tree_unflatten(leaves, structure)


@_private_names()
def fake_store() -> Any:
    """The store of the process group "fake", whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()
