"""The rows that travel between stages: a source and its clips.

A source travels with its clips because it is the unit of commit. Pixels never travel: a record holds
names, numbers, short texts and small vectors, and is pickled between processes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from winnow.operators.errors import MediaError
from winnow.operators.frames import Span
from winnow.operators.media import MediaInfo
from winnow.stages.sidecars import Sidecar

Status = Literal["pending", "done", "copy", "failed", "incomplete"]
Verdict = Literal["keep", "reject", "duplicate", "error"]


def clip_identity(source_id: str, span: Span) -> str:
    """The deterministic id of a clip: a hash of the source's content hash and the frame span."""
    text = f"{source_id}:{span.start}:{span.end}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(slots=True)
class ClipMedia:
    """The encoded file of a kept clip."""

    uri: str
    bytes: int
    frames: int
    fps: float
    width: int
    height: int
    copied: bool
    """True where the source's stream was copied without encoding."""
    sha256: str
    """Of the file's bytes."""


@dataclass(slots=True)
class Decision:
    """What a policy says of a clip."""

    verdict: Verdict = "keep"
    reasons: tuple[str, ...] = ()
    duplicate_of: str | None = None
    similarity: float | None = None


@dataclass(slots=True)
class Caption:
    """What a vision-language model wrote of one window of a clip, in one length."""

    window_number: int
    start_s: float
    """Start of the window from the clip's first frame."""
    end_s: float
    length: Literal["short", "medium", "long"]
    status: Literal["ok", "truncated", "refused", "error"]
    text: str | None
    flags: tuple[str, ...]
    """What is wrong with the text: empty, too_long, repeated, copied, ..."""
    error: str | None
    model: str
    prompt: str
    """Name and hash of the prompt."""
    fps: float
    frames: int
    pixels: int
    """Pixels of one frame."""


@dataclass(slots=True)
class Clip:
    """A span of a source and everything measured on it."""

    clip_id: str
    span: Span
    start_s: float
    end_s: float
    columns: dict[str, Any] = field(default_factory=dict)
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    rejected: bool = False
    """A rule has already rejected it: later stages leave it alone."""
    failure: str | None = None
    """Why a stage could not do its work on this clip; its verdict is then `error`."""
    decision: Decision = field(default_factory=Decision)
    media: ClipMedia | None = None
    captions: list[Caption] = field(default_factory=list)
    captioned: bool = False
    """The lake has captions of it: it gets no more."""
    partition: dict[str, str] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        return not self.rejected and self.failure is None and self.decision.duplicate_of is None

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(slots=True)
class Demotion:
    """A clip kept earlier that a better copy replaces."""

    clip_id: str
    duplicate_of: str
    similarity: float


@dataclass(slots=True)
class Source:
    """A file that the run was pointed at, on its way through the stages."""

    ordinal: int
    """Place in the run's listing: the order of every decision that depends on order."""
    uri: str
    key: str
    bytes: int
    modified: float
    etag: str | None
    attempt_id: str
    status: Status = "pending"
    error_kind: str | None = None
    error: str | None = None
    source_id: str | None = None
    copy_of: str | None = None
    media: MediaInfo | None = None
    sidecar: Sidecar | None = None
    other_prompts: tuple[str, ...] = ()
    """Prompts of other generations of this run: what the clip should match less than its own."""
    clips: list[Clip] = field(default_factory=list)
    demotions: list[Demotion] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """Time spent, by stage and by `stage/operator`."""

    def fail(self, error: MediaError) -> None:
        """Quarantine the source: no clips, a kind to count by, and a text for people."""
        self.status, self.error_kind, self.error = "failed", error.kind, str(error)
        self.clips.clear()
        self.demotions.clear()

    def postpone(self, why: str, kind: str = "being_written") -> None:
        """Leave the source for a later run, which looks at it again."""
        self.status, self.error_kind, self.error = "incomplete", kind, why
        self.clips.clear()

    @property
    def pending(self) -> bool:
        return self.status == "pending"
