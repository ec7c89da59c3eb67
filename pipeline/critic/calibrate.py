"""`winnow critic calibrate`: from what an evaluation left to a calibration file."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from winnow.operators.critic.calibration import Calibration, CriticIdentity, load_calibration
from winnow.operators.critic.calibration_fit import fit
from winnow.operators.errors import ConfigError, StorageError
from winnow.operators.settings import validate
from winnow.pipeline.critic.results import HEADER, LINES

SUFFIXES = (".yaml", ".yml", ".json")


class _Line(BaseModel):
    """Of one video what a calibration is fitted to; results.py has the whole line."""

    model_config = ConfigDict(extra="ignore")

    example_id: str
    truth: float | None
    group: str = ""
    status: str
    probabilities: tuple[float, float, float, float, float] | None = None
    model: str | None = None
    prompt: str | None = None
    mode: Literal["direct", "reasoning"] | None = None
    fps: float | None = None
    pixels: float | None = Field(None)

    @property
    def usable(self) -> bool:
        return self.status == "ok" and self.probabilities is not None and self.truth is not None


def calibrate(
    results: Path,
    target_precisions: Sequence[float],
    name: str,
    *,
    confidence: float | None = 0.9,
    fitted_at: datetime | None = None,
) -> Calibration:
    """Fit a calibration to the judged videos of an evaluation.

    `results` is the folder of `winnow critic evaluate`, or its videos.jsonl. Videos without a
    judgement are left out and counted in the notes. Raises ConfigError where there is nothing to read,
    too little to fit to, or the judgements are of more than one model, prompt or mode.
    """
    file = results / LINES if results.is_dir() else results
    lines = _read(file)
    used = [line for line in lines if line.usable]
    if not used:
        said = ", ".join(f"{n} {status}" for status, n in _statuses(lines)) or "it is empty"
        raise ConfigError(f"{file} has no judged video with a rating: {said}")
    critic = _critic(used, file)
    return fit(
        np.array([line.probabilities for line in used], np.float64),
        np.array([line.truth for line in used], np.float64),
        [line.group or line.example_id for line in used],
        name=name,
        critic=critic,
        dataset=_dataset(file),
        fingerprint=_fingerprint(used),
        precisions=target_precisions,
        confidence=confidence,
        fitted_at=fitted_at,
        notes=_left_out(lines, used),
    )


def write_calibration(calibration: Calibration, out: Path) -> Path:
    """Write a calibration file (.yaml or .json) and return its path.

    No file is ever overwritten: what a policy names stays what it is. Where `out` exists the next
    free of `<name>-v2`, `<name>-v3` ... is written, unless the latest of them says the same already.
    Raises ConfigError, StorageError.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"{out}: give a name that ends in {', '.join(SUFFIXES)}")
    latest: Path | None = None
    version = 1
    while True:
        target = out if version == 1 else out.with_name(f"{out.stem}-v{version}{out.suffix}")
        if not os.path.lexists(target):
            if latest is not None and _same(calibration, latest):
                return latest
            if _create(target, _text(calibration, version, out.suffix)):
                return target
        latest, version = target, version + 1


def _read(file: Path) -> list[_Line]:
    try:
        pieces = file.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(
            f"cannot read {file}: {error.strerror or error}: give the folder that `winnow critic "
            "evaluate` wrote"
        ) from error
    pieces.pop()  # what follows the last line feed was never finished
    lines: dict[str, _Line] = {}
    for number, piece in enumerate(pieces, 1):
        try:
            line = _Line.model_validate_json(piece)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{file}, line {number}: {where} {first['msg']}") from error
        if line.example_id in lines:
            raise ConfigError(f"{file}, line {number}: the example {line.example_id} comes again")
        lines[line.example_id] = line
    return list(lines.values())


def _critic(used: Sequence[_Line], file: Path) -> CriticIdentity:
    critics = Counter((line.model, line.prompt, line.mode) for line in used)
    if len(critics) > 1:
        said = "; ".join(f"{n} by {', '.join(map(str, c))}" for c, n in critics.most_common(5))
        raise ConfigError(
            f"{file} holds judgements of several models, prompts or modes ({said}): each needs a "
            "calibration of its own. Evaluate them apart (of a cascade, mode direct and mode "
            "reasoning); a policy may name several calibrations"
        )
    ((model, prompt, mode),) = critics
    content = {
        "model": model,
        "prompt": prompt,
        "mode": mode,
        "fps": _median([line.fps for line in used]),
        "pixels": _whole(_median([line.pixels for line in used])),
    }
    return validate(CriticIdentity, content, str(file))


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.median(known)), 6) if known else None


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _dataset(file: Path) -> str:
    """The data set's name, as the evaluation's head says it, else the file's."""
    try:
        content = json.loads((file.parent / HEADER).read_text("utf-8"))
        return str(content["dataset"])
    except (OSError, ValueError, KeyError, TypeError):
        return file.stem


def _fingerprint(used: Sequence[_Line]) -> str:
    said = sorted(json.dumps([line.example_id, line.truth]) for line in used)
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def _statuses(lines: Sequence[_Line]) -> list[tuple[str, int]]:
    return Counter(
        "without a rating" if line.truth is None else line.status
        for line in lines
        if not line.usable
    ).most_common()


def _left_out(lines: Sequence[_Line], used: Sequence[_Line]) -> list[str]:
    if len(used) == len(lines):
        return []
    said = ", ".join(f"{n} {status}" for status, n in _statuses(lines))
    return [f"{len(lines) - len(used)} of {len(lines)} videos are in no figure here: {said}"]


def _same(calibration: Calibration, path: Path) -> bool:
    """The file holds these numbers, whenever they were fitted."""
    try:
        present = load_calibration(path)
    except ConfigError:
        return False
    change = {"version": calibration.version, "fitted_at": calibration.fitted_at}
    return present.model_copy(update=change) == calibration


def _text(calibration: Calibration, version: int, suffix: str) -> str:
    content = calibration.model_copy(update={"version": version}).model_dump(mode="json")
    if suffix == ".json":
        return json.dumps(content, indent=2) + "\n"
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100))


def _create(target: Path, text: str) -> bool:
    """Write a whole file under a name that is free. False where another has taken it meanwhile."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name}.", suffix=".part"
        )
        beside = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.chmod(0o644)
            return _link(beside, target, text)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{target} cannot be written: {error.strerror or error}: choose another place with --out"
        ) from error


def _link(beside: Path, target: Path, text: str) -> bool:
    try:
        # A rename would take the place of what is there.
        target.hardlink_to(beside)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: not in one piece, but never over another file
        try:
            with target.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
        except FileExistsError:
            return False
    return True
