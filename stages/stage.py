"""What a stage is: one step of a run, taking a source with its clips and giving it back.

A stage is constructed from plain settings, pickled to where it runs, `setup()` there once, and then
called with one source at a time. It adds rows and columns; it never drops a row and never decides by
score: the policy marks rejected clips between stages, and a stage works on the clips still alive.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Protocol

from winnow.operators.operator import Column
from winnow.stages.records import Source


class Files(Protocol):
    """Where source files are read from."""

    def local(self, key: str) -> AbstractContextManager[Path]:
        """The file as a local path, for the duration of the context."""

    def read(self, key: str, limit: int) -> bytes: ...

    def exists(self, key: str) -> bool: ...


class MediaSink(Protocol):
    """Where encoded clips are written to."""

    def put(self, path: Path, key: str) -> str:
        """Store a local file under a key, atomically; returns its uri."""


class Stage(ABC):
    """Base of all stages."""

    name: ClassVar[str]
    ordered: ClassVar[bool] = False
    """One instance sees every source, in listing order (it owns state)."""
    label: str
    """Name in tables and progress; unique in a run."""

    def columns(self) -> tuple[Column, ...]:
        """The clip columns that this stage writes."""
        return ()

    def embeddings(self) -> tuple[str, ...]:
        """The embedding models whose vectors this stage writes."""
        return ()

    def versions(self) -> dict[str, str]:
        """What produced the columns, for the `runs` table and reruns."""
        return {}

    def setup(self) -> None:  # noqa: B027 - optional hook
        """Load models, open connections. Called once in the process that does the work."""

    def wants(self, source: Source) -> bool:
        """There is something to do for this source. Until one is wanted, nothing is set up."""
        return True

    @abstractmethod
    def process(self, source: Source) -> None:
        """Do the step, in place. Raises MediaError where the whole source cannot be used."""

    def close(self) -> None:  # noqa: B027 - optional hook
        """Release what setup() took."""


class Collected(Protocol):
    """What a batch stage decoded of one source. It is pickled from a child process."""

    @property
    def clips(self) -> int: ...

    @property
    def pixels(self) -> int: ...


class BatchStage(Stage):
    """A stage with a model: many sources at once, decoded apart from the model.

    `collect` decodes, in a child process, one source at a time; `measure` runs where the model is,
    on a batch of what was collected, while the children decode what comes next. The outcome for a
    source does not depend on its batch.
    """

    batch_clips: int
    """A batch is complete at this number of clips."""
    batch_pixels: int
    """Or at this number of pixels."""

    def needed_models(self) -> tuple[str, ...]:
        """Names in configs/models.yaml of the models that must be on the machine."""
        return ()

    def setup_collecting(self) -> None:
        """What `collect` needs, in a child process: no model."""

    @abstractmethod
    def collect(self, source: Source) -> Any:
        """Decode what the model is to see: a `Collected`, or None where there is nothing to do.

        Raises MediaError where the whole source cannot be used.
        """

    @abstractmethod
    def measure(self, batch: Sequence[tuple[Source, Any]]) -> None:
        """Give a batch of what was collected to the model; writes into the sources, in place."""

    def process(self, source: Source) -> None:
        collected = self.collect(source)
        if collected is not None:
            self.measure([(source, collected)])
