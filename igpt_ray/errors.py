"""User errors. Each message states what was expected, what came, and what to do.

    IgptError (ValueError)
    ├── SettingError     a setting that cannot work
    ├── StorageError     a location that cannot be reached, read or written
    │   └── NotFound     no object exists at this location
    ├── ImageError       bytes that are not an image in a supported format
    ├── SourceError      a source of images that cannot be planned, or not read within its limits
    ├── PaletteError     a palette that is malformed, or not the expected one
    ├── TokenStoreError  a token store that is incomplete, damaged or incompatible
    ├── CheckpointError  a checkpoint or release that is incomplete, damaged or incompatible
    ├── FeatureError     features or embeddings that are insufficient for the computation
    ├── TrainingError    a training run that cannot continue
    └── EndpointError    an igpt_ray server that does not answer, or rejects a request

All take one message, so that they can be pickled between Ray processes. Commands print them as one line; any other
exception is a bug and keeps its traceback.
"""


class IgptError(ValueError):
    """Root of the tree above."""


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
