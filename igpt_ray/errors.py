"""User errors. Each message states what was expected, what came, and what to do.

All take one message, so that they can be pickled between Ray processes. Commands print them as one line; any other
exception is a bug and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata


class IgptError(ValueError):
    """Root of all user errors."""


class SettingError(IgptError):
    """A setting that cannot work."""


class StorageError(IgptError):
    """A location that cannot be reached, read or written."""


class NotFound(StorageError):
    """No object exists at this location."""


class ImageError(IgptError):
    """Bytes that are not an image in a supported format."""


class SourceError(IgptError):
    """A source of images that cannot be planned, or not read within its limits."""


class PaletteError(IgptError):
    """A palette that is malformed, or not the expected one."""


class TokenStoreError(IgptError):
    """A token store that is incomplete, damaged or incompatible."""


class CheckpointError(IgptError):
    """A checkpoint or release that is incomplete, damaged or incompatible."""


class FeatureError(IgptError):
    """Features or embeddings that are insufficient for the computation."""


class TrainingError(IgptError):
    """A training run that cannot continue."""


class EndpointError(IgptError):
    """An igpt_ray server that does not answer, or rejects a request."""


@contextmanager
def private_names_of(package: str, tried_on: str) -> Iterator[None]:
    """Raises `SettingError` where a package lacks a private name that is used, because no API guarantees it."""
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        raise SettingError(
            f"{package} {metadata.version(package)} lacks an internal interface that igpt_ray uses ({error}); it was"
            f" tried on {package} {tried_on}: install that version"
        ) from error
