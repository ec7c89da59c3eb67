"""Every error that Winnow raises on purpose.

WinnowError
├── ConfigError          a configuration, policy or command line that cannot be run
├── MediaError           a file that cannot be used as a video; `kind` is stored in `sources`
├── MeasureError         one operator could not measure one clip; stored in `<operator>_error`
├── WorkerError          the engine lost the workers that it needs; the run stops
├── StorageError         a place that cannot be read or written
├── LakeError            tables that contradict each other or the contract
├── LakeBusy             another process holds the lake, or has taken it over
├── LedgerError          rows went missing or were counted twice
├── IndexUnavailable     the vector index cannot be opened
└── ModelUnavailable     a model's weights are not on this machine
"""

from __future__ import annotations


class WinnowError(Exception):
    """Root of the hierarchy. The message says what is wrong and what to do about it."""


class ConfigError(WinnowError):
    """The configuration, policy or command line is wrong: names the key, the value, the remedy."""


class MediaError(WinnowError):
    """A file cannot be used as a video.

    `kind` is a short, stable word for tables and counts: empty, not_video, truncated, no_video,
    corrupt, too_large, too_long, too_many_pixels, unreadable, vanished, crashed, timeout.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, str]]:
        # An exception with two arguments does not survive pickling between processes by default.
        return (type(self), (self.kind, str(self)))


class MeasureError(WinnowError):
    """One operator could not measure one clip."""


class WorkerError(WinnowError):
    """The engine lost the workers that it needs. (One source's crash is a MediaError.)"""


class StorageError(WinnowError):
    """A folder, file or bucket cannot be listed, read or written."""


class LakeError(WinnowError):
    """The lake's tables are missing, newer than this version, or contradict the contract."""


class LakeBusy(WinnowError):
    """Another process writes to the lake, or has taken it over. Later, the same may succeed."""


class LedgerError(WinnowError):
    """The counts of a run do not add up."""


class IndexUnavailable(WinnowError):
    """The vector index cannot be opened or does not answer."""


class ModelUnavailable(WinnowError):
    """A model is not on this machine and cannot be fetched from here."""
