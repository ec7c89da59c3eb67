"""A lake as it was: every table at the version that it had at one moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from winnow.operators.errors import ConfigError, LakeError
from winnow.pipeline.lake import Lake


@dataclass
class PastLake(Lake):
    """A lake at a moment of the past, to read. Tables that were not there yet are empty."""

    moment_ms: int = 0
    """Milliseconds since 1970, by the clock of whoever committed."""
    _versions: dict[str, int | None] = field(default_factory=dict, repr=False)

    def open(self, table: str) -> DeltaTable | None:
        present = super().open(table)
        if present is None:
            return None
        if table not in self._versions:
            self._versions[table] = _version_at(present, table, self.moment_ms)
        version = self._versions[table]
        if version is None:
            return None
        try:
            present.load_as_version(version)
        except DeltaError as error:
            raise LakeError(f"version {version} of {table} is no longer there: {error}") from error
        return present

    def require(self) -> None:
        Lake(self.uri, self.options).require()
        if not self.exists():
            raise LakeError(f"nothing was committed to {self.uri} before {_said(self.moment_ms)}")


def lake_as_of(lake: Lake, when: str) -> PastLake:
    """The lake as it was: `when` is a version of `sources`, or a time in ISO 8601 (UTC if unsaid).

    Raises ConfigError for what is neither, LakeError for a version that the lake has not.
    """
    lake.require()
    text = when.strip()
    moment = _moment_of_version(lake, int(text)) if text.isdecimal() else _moment(text)
    return PastLake(lake.uri, lake.options, moment_ms=moment)


def is_version(when: str) -> bool:
    return when.strip().isdecimal()


def _moment(text: str) -> int:
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(
            f"--as-of {text!r}: give a version of the table `sources`, or a time such as 2026-11-20, "
            "2026-11-20T15:30 or 2026-11-20T15:30:00+01:00"
        ) from error
    time = time if time.tzinfo else time.replace(tzinfo=UTC)
    return int(time.timestamp() * 1000)


def _moment_of_version(lake: Lake, version: int) -> int:
    sources = lake.open("sources")
    assert sources is not None, "the lake was required"
    times = _commit_times(sources)
    if version not in times:
        raise LakeError(
            f"`sources` of {lake.uri} has no version {version}: "
            f"there are {min(times)} to {max(times)}"
        )
    return times[version]


def _commit_times(table: DeltaTable) -> dict[int, int]:
    """Milliseconds since 1970 by version, oldest first, of the versions whose log is kept.

    A commit tells its time itself: those of the log's files change when a lake is copied.
    """
    history = sorted(table.history(), key=lambda commit: commit["version"])
    return {int(commit["version"]): int(commit["timestamp"]) for commit in history}


def _version_at(table: DeltaTable, name: str, moment_ms: int) -> int | None:
    times = _commit_times(table)
    # Clocks of several writers differ: the latest version that is old enough.
    found = [version for version, time in times.items() if time <= moment_ms]
    if found:
        return max(found)
    if min(times) > 0:
        raise LakeError(
            f"the log of {name} reaches back to {_said(times[min(times)])} only, not to "
            f"{_said(moment_ms)}: older versions were cleaned up"
        )
    return None


def _said(moment_ms: int) -> str:
    return datetime.fromtimestamp(moment_ms / 1000, UTC).isoformat(timespec="milliseconds")
