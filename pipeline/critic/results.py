"""What an evaluation leaves in its folder: what was evaluated, one line a video, and the figures.

    evaluation.json   data set, model, prompt and settings: who goes on must have the same
    videos.jsonl      one line a video, written when it is judged
    results.json      the figures over all of them, written at the end
    report.html       the same for people

A line is written in one piece and flushed; of a killed process the last one may be torn, and is then
done again. Opening the folder again goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from winnow.operators.critic.judgement import Judgement
from winnow.operators.errors import ConfigError, StorageError

HEADER, LINES, RESULTS, REPORT = "evaluation.json", "videos.jsonl", "results.json", "report.html"
_LOCK = ".lock"

FAILURES = ("download", "decode", "unparsed", "refused", "error", "unscored")
"""Why a video has no score: no video is there, it cannot be decoded, or what the critic says."""


@dataclass(frozen=True, slots=True)
class Line:
    """One video of the evaluation: what was known of it, and what the critic said."""

    example_id: str
    uri: str
    video: str | None
    """The local file."""
    truth: float
    caption: str | None
    group: str
    """Videos of one prompt."""
    generator: str | None
    action: str | None
    is_hard: bool | None
    status: str
    """`ok`, or one of FAILURES."""
    probabilities: tuple[float, ...] | None = None
    score: float | None = None
    argmax: int | None = None
    entropy: float | None = None
    leaked: float | None = None
    trace: str | None = None
    samples: tuple[int | None, ...] = ()
    mode: str | None = None
    model: str | None = None
    prompt: str | None = None
    fps: float | None = None
    frames: int | None = None
    pixels: int | None = None
    seconds: float | None = None
    error: str | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Line:
        """A line from its JSON. Raises KeyError, TypeError or ValueError where it is none."""
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in content.items() if name in known}
        for name in ("probabilities", "samples", "notes"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        line = cls(**values)
        if line.status != "ok" and line.status not in FAILURES:
            raise ValueError(f"status {line.status!r}")
        if line.status == "ok" and (line.probabilities is None or len(line.probabilities) != 5):
            raise ValueError("status ok without five probabilities")
        return line


def judged(judgement: Judgement) -> dict[str, Any]:
    """What a judgement says, as the fields of a line."""
    return {
        "status": judgement.status,
        "probabilities": judgement.probabilities,
        "score": judgement.score,
        "argmax": judgement.argmax,
        "entropy": judgement.entropy,
        "leaked": judgement.leaked,
        "trace": judgement.trace,
        "samples": tuple(judgement.samples),
        "mode": judgement.mode,
        "model": judgement.model,
        "prompt": judgement.prompt,
        "fps": judgement.fps,
        "frames": judgement.frames,
        "pixels": judgement.pixels,
        "seconds": judgement.seconds,
        "error": judgement.error,
        "notes": tuple(judgement.notes),
    }


class Record:
    """The lines of an evaluation that is under way; a folder has one writer at a time."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, restart: bool = False) -> None:
        """Open `folder` to go on with the evaluation that has this identity.

        With `restart`, what another left is thrown away. Raises ConfigError where the folder holds an
        evaluation of something else, is damaged, or is in use; StorageError where it cannot be written.
        """
        self.folder = folder
        self.lines: dict[str, Line] = {}
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(folder)
        try:
            with _writing(folder):
                if restart:
                    for name in (HEADER, LINES, RESULTS, REPORT):
                        (folder / name).unlink(missing_ok=True)
                self._check(identity)
                self.lines = {line.example_id: line for line in read_lines(folder, torn=True)}
                self._rewrite()
        except BaseException:
            self._lock.close()
            raise

    def _check(self, identity: Mapping[str, Any]) -> None:
        present = plain(identity)
        if not (self.folder / HEADER).exists():
            if (self.folder / LINES).exists():
                raise _damaged(self.folder, f"{HEADER} is missing")
            write_json(self.folder / HEADER, present)
            return
        found = read_json(self.folder, HEADER)
        differing = [k for k in sorted({*found, *present}) if found.get(k) != present.get(k)]
        if differing:
            changes = "; ".join(
                f"{name} {_short(found.get(name))} there, {_short(present.get(name))} now"
                for name in differing
            )
            raise ConfigError(
                f"{self.folder} holds another evaluation: {changes}: give --out another folder, or "
                "--restart to throw away what is there"
            )

    def _rewrite(self) -> None:
        text = "".join(_text(line) for line in self.lines.values())
        replace_file(self.folder / LINES, text)
        self._file: IO[str] = (self.folder / LINES).open("a", encoding="ascii", newline="\n")

    def forget(self, example_ids: Iterable[str]) -> None:
        """Drop lines, so that their videos are done again."""
        gone = set(example_ids) & self.lines.keys()
        if gone:
            self._file.close()
            self.lines = {k: line for k, line in self.lines.items() if k not in gone}
            with _writing(self.folder):
                self._rewrite()

    def add(self, line: Line) -> None:
        """Write one line, so that a kill from now on does not cost it."""
        with _writing(self.folder):
            self._file.write(_text(line))
            self._file.flush()
        self.lines[line.example_id] = line

    def close(self) -> None:
        self._file.close()
        self._lock.close()

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_lines(folder: Path, *, torn: bool = False) -> list[Line]:
    """The lines of an evaluation, in the order of writing; [] where there are none.

    With `torn`, a last line that was not finished is left out. Raises ConfigError where the file is
    damaged otherwise, or has a video twice.
    """
    try:
        pieces = (folder / LINES).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    # What stands after the last line feed is no line yet.
    if pieces.pop() and not torn:
        raise _damaged(folder, f"the last line of {LINES} is torn")
    lines: dict[str, Line] = {}
    for number, piece in enumerate(pieces, 1):
        try:
            line = Line.read(json.loads(piece))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(folder, f"line {number} of {LINES} cannot be read: {error}") from error
        if line.example_id in lines:
            raise _damaged(folder, f"{LINES} has {line.example_id} twice, again in line {number}")
        lines[line.example_id] = line
    return list(lines.values())


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """evaluation.json or results.json. Raises ConfigError where it is missing or damaged."""
    try:
        content = json.loads((folder / name).read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} has no {name}: give the folder of an evaluation that has come to its end; "
            "`winnow critic evaluate` with the same --out goes on with one that has not"
        ) from error
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise _damaged(folder, f"{name} is no mapping")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write in one piece: there is never half a file under this name."""
    replace_file(path, json.dumps(plain(content), indent=2) + "\n")


def replace_file(path: Path, text: str) -> None:
    """Write beside, then rename. Raises OSError."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    beside = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.chmod(0o644)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def plain(value: Any) -> Any:
    """A value as JSON has it: no NaN or infinity (null instead), tuples as lists, numpy as numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)


def _text(line: Line) -> str:
    # ASCII: file names and captions may hold what is no valid Unicode, and survive as escapes.
    return json.dumps(plain(asdict(line)), ensure_ascii=True, allow_nan=False) + "\n"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _damaged(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{folder} is damaged: {reason}: give --out another folder, or --restart to throw away what "
        "is there"
    )


def _lock(folder: Path) -> IO[str]:
    """Keep other writers out for as long as the file is open, or the process lives."""
    import fcntl

    file = (folder / _LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(
            f"another process is writing to {folder}: wait for it, or give --out another folder"
        ) from error
    return file


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written: {error.strerror or error}: choose another place with --out"
        ) from error
