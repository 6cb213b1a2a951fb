"""All uses of torch's private names in training."""

from typing import Any

from igpt_ray.errors import private_names_of

TRIED_ON = "2.11 to 2.13"

with private_names_of("torch", TRIED_ON):
    from torch.utils._pytree import tree_flatten as tree_flatten
    from torch.utils._pytree import tree_unflatten as tree_unflatten


@private_names_of("torch", TRIED_ON)
def fake_store() -> Any:
    """The store of the process group "fake", whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()
