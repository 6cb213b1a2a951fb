"""The errors a user can mend. Each message says what was expected, what came, and what to do.

    IgptError (ValueError)
    ├── SettingError         a setting that cannot work
    ├── StorageError         a place that cannot be reached, read or written
    │   └── NotFound         nothing is there
    ├── ImageError           bytes that are not a picture we read
    ├── SourceError          a folder of images that does not look like one
    ├── PaletteError         a palette that is malformed, or not the one expected
    ├── TokenStoreError      a token store that is incomplete, damaged or of another kind
    ├── CheckpointError      a checkpoint or release that is incomplete, damaged or of another shape
    ├── FeatureError         features that nothing can be concluded from
    ├── TrainingError        a run that cannot go on
    └── EndpointError        a server that does not answer, or refuses

All take one message, so that they survive pickling between Ray processes.
Jobs print them as one line; anything else is a bug and keeps its traceback.
"""


class IgptError(ValueError):
    """Root of the tree above."""


class SettingError(IgptError):
    """A setting that cannot work."""


class StorageError(IgptError):
    """A place that cannot be reached, read or written."""


class NotFound(StorageError):
    """Nothing is stored under this name."""


class ImageError(IgptError):
    """Bytes that are not a picture we read."""


class SourceError(IgptError):
    """A source of images that cannot be planned or read within its budget."""


class PaletteError(IgptError):
    """A palette that is malformed, or not the one expected."""


class TokenStoreError(IgptError):
    """A token store that is incomplete, damaged or of another kind."""


class CheckpointError(IgptError):
    """A checkpoint or release that is incomplete, damaged or of another shape."""


class FeatureError(IgptError):
    """Features or embeddings that nothing can be concluded from."""


class TrainingError(IgptError):
    """A training run that cannot go on."""


class EndpointError(IgptError):
    """A server of ours that does not answer, or refuses."""
