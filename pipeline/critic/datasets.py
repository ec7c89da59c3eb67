"""Data sets with a physics score for every video: VideoPhy-2, or a sheet of one's own.

An example is known by its video, by the address or by the content of a local file, and never by its
row. A row that cannot be used stays, with its reason, and is counted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from winnow.operators.errors import ConfigError, MediaError
from winnow.operators.media import hash_file
from winnow.operators.models import cache_folder
from winnow.pipeline.critic import splits
from winnow.pipeline.critic.cells import Scale, read_number, read_rules, read_truth_value, scaled
from winnow.pipeline.critic.download import Stored, VideoStore
from winnow.pipeline.critic.places import Place, is_file, is_plain, read_place
from winnow.pipeline.critic.published import PUBLISHED, fetch_table
from winnow.pipeline.critic.tables import Row, Table, read_table

ProblemKind = Literal[
    "no_video", "missing", "download", "not_video", "no_truth", "bad_truth", "conflict"
]
"""`no_video`: the row names none that can be fetched or opened; `missing`: it is not on this machine;
`not_video`: what is there cannot be used; `conflict`: rows give one video different scores."""


@dataclass(frozen=True, slots=True)
class Example:
    """One video with its human score. With a `problem` it cannot be judged, or not measured."""

    example_id: str
    """24 hex digits of the hash of the video's address, or of the content of a local file."""
    video: Path | None
    uri: str
    """As it is fetched, or as the sheet has it."""
    truth: float | None
    """Physical common sense, 1 (numerous violations) to 5 (none)."""
    caption: str | None
    """What the generator was asked for."""
    group: str
    """Alike for videos of one prompt: they are resampled, and split off, together."""
    generator: str | None
    action: str | None
    is_hard: bool | None
    fields: dict[str, Any]
    """The sheet's other columns. Rules are lists of text, `metadata_rules` maps rules to laws."""
    problem: str | None = None
    problem_kind: ProblemKind | None = None
    sha256: str | None = None
    """Of the video's content, where it is here."""


@dataclass(frozen=True, slots=True)
class Dataset:
    name: str
    fingerprint: str
    """Of what is asked and what is true: alike for the same videos with the same scores, wherever
    they lie and however they are sorted."""
    examples: tuple[Example, ...]
    problems: tuple[str, ...] = ()
    """For people: what of the sheet could not be read or was merged."""

    @property
    def usable(self) -> tuple[Example, ...]:
        return tuple(example for example in self.examples if example.problem is None)

    def counts(self) -> dict[str, int]:
        """Examples by kind of problem, `usable` first."""
        kinds = Counter(e.problem_kind for e in self.examples if e.problem_kind is not None)
        return {"usable": len(self.usable), **dict(sorted(kinds.items()))}


def load_dataset(
    spec: str,
    *,
    videos: Path | None = None,
    cache: Path | None = None,
    split: Literal["train", "held-out"] | None = None,
    share: float = 0.1,
    seed: int = 0,
    balance: bool = False,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    scale: Scale = "auto",
    fetch: bool = True,
    workers: int = 8,
    report: Callable[[str], None] = lambda _: None,
) -> Dataset:
    """Read a data set and find its videos.

    `spec` is `videophy2:test`, `videophy2:train`, or the path of a CSV or XLSX file with a column of
    videos (addresses, or paths from the sheet's folder) and a column of scores. `columns` names
    columns that are called otherwise: video, truth, caption, generator, action, is_hard, group.
    `scale` of the scores: 0-1 becomes 1 + 4x; `auto` tells by the range and refuses to guess.
    `videos` is a folder in which videos are looked for first; what is nowhere is downloaded into
    `cache` if `fetch` allows it. `split` by prompts comes before `balance`, and that before `limit`
    (examples by lot); only what remains is downloaded.
    Raises ConfigError for a sheet or an option that cannot be used, StorageError where the sheet
    cannot be fetched or the cache not be written. A video that cannot be had is its example's
    problem.
    """
    if split not in (None, "train", "held-out"):
        raise ConfigError(f"split: must be train or held-out, not {split!r}")
    if videos is not None and not videos.is_dir():
        raise ConfigError(f"videos: {videos} is not a folder")
    table, name, folder = _open_table(spec, columns, fetch)
    roles = _roles(table.columns, columns or {}, spec)
    if folder is None:
        scale = "1-5"
    reader = _Reader(table, roles, folder, videos, scale, spec)
    examples = _merge(reader.examples(), reader.problems)
    if split is not None:
        rest, held_out = splits.split(examples, share, seed)
        examples = rest if split == "train" else held_out
        name = f"{name}:{split}"
    if balance:
        examples = splits.balance(examples, seed)
    if limit is not None:
        examples = splits.sample(examples, limit, seed)
    store = VideoStore((cache or cache_folder() / "critic") / "videos")
    examples = _with_videos(examples, store, fetch, workers, report)
    examples = _merge_contents(examples, reader.problems)
    return Dataset(name, _fingerprint(examples), tuple(examples), tuple(reader.problems))


# --- where the table comes from ----------------------------------------------------------------------


def _open_table(
    spec: str, columns: Mapping[str, str] | None, fetch: bool
) -> tuple[Table, str, Path | None]:
    """(table, name, folder from which its paths count; None where it may name no local files)."""

    def is_header(names: Sequence[str]) -> bool:
        wanted = (columns or {}).get("video")
        return _find(names, (wanted,) if wanted else _NAMES["video"]) is not None

    if spec in PUBLISHED:
        return read_table(fetch_table(PUBLISHED[spec], fetch), is_header), spec, None
    path = Path(spec)
    if not path.suffix and not path.exists():
        raise ConfigError(
            f"data set {spec!r} is not known: there are {', '.join(PUBLISHED)}, or give the path of a CSV "
            f"or XLSX file"
        )
    return read_table(path, is_header), path.stem, path.absolute().parent


# --- columns ---------------------------------------------------------------------------------------

_NAMES: dict[str, tuple[str, ...]] = {
    "video": ("output_link", "video_url", "video", "path", "videopath", "video_path", "url"),
    "truth": ("physical_common_sense", "physical_commonsense", "pc", "physics_score", "truth",
              "score", "label"),
    "caption": ("caption", "prompt"),
    "generator": ("model_name", "generator"),
    "action": ("action",),
    "is_hard": ("is_hard",),
    "group": ("group", "prompt_id"),
}  # fmt: skip
"""Column names by role, as `_plain_name` writes them; of several the first one counts."""

_RULES = frozenset(
    {"physics_rules_followed", "physics_rules_unfollowed", "physics_rules_cannot_be_determined",
     "human_violated_rules", "metadata_rules"}
)  # fmt: skip


def _plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.casefold()).strip("_")


def _find(columns: Sequence[str], names: Iterable[str]) -> str | None:
    plain = {_plain_name(column): column for column in reversed(columns)}
    return next((plain[key] for name in names if (key := _plain_name(name)) in plain), None)


def _roles(columns: Sequence[str], own: Mapping[str, str], spec: str) -> dict[str, str]:
    """The column of each role that has one. Raises ConfigError for a name that is not there."""
    there = ", ".join(map(repr, columns)) or "none"
    roles = {}
    for role, name in own.items():
        if role not in _NAMES:
            raise ConfigError(f"columns: {role!r} is no role: there are {', '.join(_NAMES)}")
        if (column := _find(columns, (name,))) is None:
            raise ConfigError(f"columns: {role}: {spec} has no column {name!r}: there are {there}")
        roles[role] = column
    for role, names in _NAMES.items():
        column = roles.get(role) or _find(columns, names)
        if column is not None:
            roles[role] = column
        elif role in ("video", "truth"):
            raise ConfigError(
                f"{spec} has no column of the {role}, such as {names[0]!r}: name it by `columns`; "
                f"there are {there}"
            )
    return roles


# --- rows ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Reader:
    """Makes examples of rows, and notes what is wrong with them."""

    table: Table
    roles: dict[str, str]
    folder: Path | None
    videos: Path | None
    scale: Scale
    spec: str
    problems: list[str] = field(default_factory=list)
    _suffixes: Counter[tuple[str, ...]] = field(default_factory=Counter)

    def examples(self) -> list[tuple[int, Example]]:
        self.problems += self.table.problems
        rows = self.table.rows
        column = self.roles["video"]
        places = [read_place(row.cells.get(column), row.links.get(column)) for row in rows]
        for place in {place.uri: place for place in places}.values():
            self._suffixes.update(place.parts[-n:] for n in range(1, len(place.parts) + 1))
        truths = [read_number(row.cells.get(self.roles["truth"])) for row in rows]
        scale = self._told_scale(truths)
        return [
            (row.number, self._example(row, place, truth, scale))
            for row, place, truth in zip(rows, places, truths, strict=True)
        ]

    def _told_scale(self, truths: list[float | str | None]) -> Scale:
        if self.scale != "auto":
            return self.scale
        numbers = [n for n in truths if isinstance(n, float)]
        below = sum(0 <= n < 1 for n in numbers)
        above = sum(1 < n <= 5 for n in numbers)
        if bool(below) != bool(above):
            return "0-1" if below else "1-5"
        if not any(0 <= n <= 5 for n in numbers):
            return "1-5"  # nothing to scale
        column = self.roles["truth"]
        seen = f"{below} below and {above} above 1" if below else "all of them are 1"
        raise ConfigError(
            f"{self.spec}: whether the scores in {column!r} go from 0 to 1 or from 1 to 5 cannot be "
            f"told, {seen}: give the scale"
        )

    def _example(self, row: Row, place: Place, given: float | str | None, scale: Scale) -> Example:
        video = self._find_video(place)
        content, kind, problem = self._content(place, video)
        truth = None
        if isinstance(given, str):
            kind, problem = kind or "bad_truth", problem or f"{given!r:.40} is no score"
        elif given is None:
            kind, problem = kind or "no_truth", problem or "the row has no score"
        elif (score := scaled(given, scale)) is None:
            kind, problem = kind or "bad_truth", problem or f"the score {given:g} is not in {scale}"
        else:
            truth = score
        caption = self._text(row, "caption") or self._prompt_file(place)
        identity = place.uri or json.dumps(row.cells, default=str)
        if content is not None and not place.is_remote:
            identity = content
        example_id = hashlib.sha256(identity.encode()).hexdigest()[:24]
        return Example(
            example_id=example_id,
            video=video if kind != "not_video" else None,
            uri=place.uri,
            truth=truth,
            caption=caption,
            group=_group(self._text(row, "group") or caption or example_id),
            generator=self._text(row, "generator"),
            action=self._text(row, "action"),
            is_hard=read_truth_value(row.cells.get(self.roles.get("is_hard", ""))),
            fields=self._fields(row),
            problem=problem,
            problem_kind=kind,
            sha256=content,
        )

    def _text(self, row: Row, role: str) -> str | None:
        value = row.cells.get(self.roles.get(role, ""))
        return None if value is None else str(value)

    def _content(
        self, place: Place, video: Path | None
    ) -> tuple[str | None, ProblemKind | None, str | None]:
        """(hash, kind of problem, problem) of a local file; what is remote may yet come."""
        if place.problem is not None:
            return None, "no_video", place.problem
        if video is None:
            if place.is_remote:
                return None, None, None
            if self.folder is None:
                return None, "no_video", "a data set of the hub may not name files of this machine"
            where = f"{self.folder}" + (f" or {self.videos}" if self.videos else "")
            return None, "missing", f"{place.uri} is not in {where}{self._ambiguous(place)}"
        try:
            return hash_file(video), None, None
        except MediaError as error:
            return None, "not_video", f"{error.kind}: {error}"

    def _find_video(self, place: Place) -> Path | None:
        """The local file: where the path leads, or in `videos` by the longest end that is there.

        An end that several rows share (VideoPhy-2 has one file name for all generators of a prompt)
        names none of them.
        """
        if place.problem is not None:
            return None
        if not place.is_remote and self.folder is not None:
            path = self.folder / place.uri
            if is_file(path):
                return path
        if self.videos is None:
            return None
        for start in range(len(place.parts)):
            end = place.parts[start:]
            if self._suffixes[end] == 1 and is_plain(end):
                path = self.videos.joinpath(*end)
                if is_file(path):
                    return path
        return None

    def _ambiguous(self, place: Place) -> str:
        shared = place.parts and self._suffixes[place.parts[-1:]] > 1
        return " (other rows name a file like that: keep their folders)" if shared else ""

    def _prompt_file(self, place: Place) -> str | None:
        """The prompt beside the sheet, as the Cosmos recipes keep it: prompts/<video>_prompt.txt."""
        if self.folder is None or not place.parts or not is_plain(place.parts[-1:]):
            return None
        stem = Path(place.parts[-1]).stem
        for name in (f"{stem}_prompt.txt", f"{stem}.txt"):
            try:
                with (self.folder / "prompts" / name).open(
                    encoding="utf-8", errors="replace"
                ) as file:
                    return file.read(100_000).strip() or None
            except OSError:
                continue
        return None

    def _fields(self, row: Row) -> dict[str, Any]:
        fields = {}
        for column, value in row.cells.items():
            if column in self.roles.values():
                continue
            if _plain_name(column) in _RULES:
                value, note = read_rules(value, as_map=_plain_name(column) == "metadata_rules")
                if note is not None:
                    self.problems.append(f"row {row.number}, {column}: {note}")
            fields[column] = value
        return fields


def _group(text: str) -> str:
    """Of one prompt, however it is spaced and spelled in capitals."""
    return hashlib.sha256(" ".join(text.split()).casefold().encode()).hexdigest()[:16]


# --- one video, one example ------------------------------------------------------------------------


def _merge(numbered: list[tuple[int, Example]], problems: list[str]) -> list[Example]:
    alike: dict[str, list[tuple[int, Example]]] = defaultdict(list)
    for number, example in numbered:
        alike[example.example_id].append((number, example))
    return [
        _one_of([e for _, e in rows], f"rows {', '.join(str(n) for n, _ in rows)}", problems)
        for rows in alike.values()
    ]


def _merge_contents(examples: list[Example], problems: list[str]) -> list[Example]:
    """The same for videos that turned out to be one when they were here."""
    alike: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        alike[example.sha256 or example.example_id].append(example)
    return [
        _one_of(same, " and ".join(dict.fromkeys(e.uri for e in same)), problems)
        for same in alike.values()
    ]


def _one_of(same: list[Example], where: str, problems: list[str]) -> Example:
    """The first of them; without a score where they disagree about it."""
    first = same[0]
    if len(same) == 1:
        return first
    if disputed := next((e for e in same if e.problem_kind == "conflict"), None):
        return disputed
    truths = sorted({e.truth for e in same if e.truth is not None})
    if len(truths) > 1:
        said = ", ".join(f"{truth:g}" for truth in truths)
        problems.append(f"{where} are the same video with different scores: {said}")
        return replace(
            first, truth=None, problem=f"the video has different scores: {said}",
            problem_kind="conflict",
        )  # fmt: skip
    problems.append(f"{where} are the same video: kept once")
    return next((e for e in same if e.truth is not None), first)


# --- the videos ------------------------------------------------------------------------------------


def _with_videos(
    examples: list[Example],
    store: VideoStore,
    fetch: bool,
    workers: int,
    report: Callable[[str], None],
) -> list[Example]:
    from huggingface_hub import constants

    wanted = [e.uri for e in examples if e.video is None and e.problem is None]
    if fetch and not constants.is_offline_mode():
        found: Mapping[str, Any] = store.fetch(wanted, workers=workers, report=report)
    else:
        found = {uri: stored for uri in wanted if (stored := store.find(uri)) is not None}
    return [
        _with_video(e, found.get(e.uri)) if e.video is None and e.problem is None else e
        for e in examples
    ]


def _with_video(example: Example, result: Any) -> Example:
    if isinstance(result, Stored):
        return replace(example, video=result.path, sha256=result.sha256)
    if result is None:
        return replace(
            example, problem_kind="missing",
            problem="it is not on this machine: allow its download, or name the folder of the videos",
        )  # fmt: skip
    return replace(example, problem_kind=result.kind, problem=result.reason)


def _fingerprint(examples: list[Example]) -> str:
    lines = sorted(
        json.dumps([e.example_id, e.truth, e.caption, e.group, e.generator, e.action, e.is_hard])
        for e in examples
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]
