"""`winnow models`: what of the registry is on this machine, and fetching the rest beforehand."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from winnow.operators.errors import ConfigError, ModelUnavailable
from winnow.operators.models import Model, Models, is_trusted_url, sha256

if TYPE_CHECKING:
    import httpx2

ATTEMPTS = 4
LINE_EVERY_S = 15.0
_PASSING_STATUS = (408, 425, 429)


def list_models(models: Models) -> list[dict[str, Any]]:
    """One row a model: `present`, and `where` its folder is, or why it cannot be used."""
    return [_row(model) for model in models.models.values()]


def check_present(models: Models, names: Iterable[str]) -> None:
    """Raises ModelUnavailable for the first that is missing, ConfigError for an unknown name."""
    for name in dict.fromkeys(names):
        models.get(name).locate()


def pull(
    models: Models, names: Sequence[str], report: Callable[[str], None], pause_s: float = 1.0
) -> list[dict[str, Any]]:
    """Fetch models and check them; what is here already is left alone. One row a model.

    `report` is given lines for people. What passes by itself is tried again after `pause_s`,
    doubling. A model that fails does not keep the others from being fetched.
    Raises ConfigError for an unknown name, ModelUnavailable with the reason of every failure.
    """
    if not names:
        raise ConfigError(f"name the models to fetch: there are {', '.join(models.models)}")
    wanted = [models.get(name) for name in dict.fromkeys(names)]
    failures = []
    for model in wanted:
        try:
            _pull(model, report, pause_s)
        except ModelUnavailable as error:
            report(f"{model.name}: failed")
            failures.append(str(error))
    if failures:
        raise ModelUnavailable("\n".join(failures))
    return [_row(model) for model in wanted]


def _row(model: Model) -> dict[str, Any]:
    try:
        present, where = True, str(model.locate())
    except ModelUnavailable as error:
        present, where = False, str(error)
    return {
        "name": model.name,
        "role": model.role,
        "hub": model.hub or model.url,
        "revision": model.revision,
        "licence": model.licence,
        "size_mb": model.size_mb,
        "dtype": model.dtype,
        "gated": model.gated,
        "present": present,
        "where": where,
        "identity": model.identity,
    }


def _pull(model: Model, report: Callable[[str], None], pause_s: float) -> None:
    if model.path is not None:
        report(f"{model.name}: is used from {model.locate()}, there is nothing to fetch")
        return
    try:
        report(f"{model.name}: is here already, in {model.locate()}")
        return
    except ModelUnavailable:
        pass
    size = f"{model.size_mb} MB " if model.size_mb else ""
    report(f"{model.name}: fetching {size}from {model.hub or model.url}, licence {model.licence}")
    if model.hub is not None:
        _pull_snapshot(model, report, pause_s)
    else:
        _pull_files(model, pause_s)
    folder = model.locate()
    report(f"{model.name}: complete, in {folder}")
    if model.unpinned:
        report(
            f"{model.name}: is not pinned; to get the same scores from the same weights later, add "
            f"`{model.name}: {{revision: {folder.name}}}` to your models file"
        )


def _failed(model: Model, reason: str, remedy: str) -> ModelUnavailable:
    return ModelUnavailable(f"the model {model.name!r} could not be fetched: {reason}: {remedy}")


def _unreachable(model: Model, reason: str) -> ModelUnavailable:
    return _failed(
        model, reason,
        "fetch it where there is a network and copy its folder here, named as `path` in a models "
        f"file, or run a profile that does without it (`--config {model.profile_without}`)",
    )  # fmt: skip


def retrying(is_passing: Callable[[BaseException], bool], pause_s: float) -> Any:
    import tenacity

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_passing),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=pause_s, max=60),
        reraise=True,
    )


# --- from the Hugging Face hub ---------------------------------------------------------------------


def _pull_snapshot(model: Model, report: Callable[[str], None], pause_s: float) -> None:
    import httpx2
    from huggingface_hub import HfApi, snapshot_download

    assert model.hub is not None
    revision = model.revision or "main"
    options: dict[str, Any] = {} if sys.stderr.isatty() else {"tqdm_class": _lines(report)}
    again = retrying(is_passing_at_hub, pause_s)
    try:
        # Asked first because it fails at once: without a network snapshot_download tries for long.
        again(HfApi().model_info, model.hub, revision=revision, timeout=30.0)
        # What has a wrong checksum would be taken for fetched.
        _remove_wrong_files(model)
        again(
            snapshot_download,
            model.hub,
            revision=revision,
            allow_patterns=model.patterns(),
            **options,
        )
    except (OSError, httpx2.HTTPError) as error:
        raise _explain_hub(model, error) from error
    if wrong := _remove_wrong_files(model):
        raise _failed(
            model, f"{', '.join(wrong)} from {model.hub} has not the SHA-256 of the registry",
            "it was removed; correct the registry if the new file is meant",
        )  # fmt: skip


def _remove_wrong_files(model: Model) -> list[str]:
    """Drop files of the cached snapshot whose checksum is not the registry's; their names."""
    from huggingface_hub import try_to_load_from_cache

    assert model.hub is not None
    wrong = []
    for name, digest in model.files.items():
        cached = try_to_load_from_cache(model.hub, name, revision=model.revision or "main")
        if digest is None or not isinstance(cached, str) or sha256(Path(cached)) == digest:
            continue
        blob = Path(cached).resolve()
        Path(cached).unlink()
        blob.unlink(missing_ok=True)
        wrong.append(name)
    return wrong


def is_passing_at_hub(error: BaseException) -> bool:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        return _is_passing_status(error.response.status_code)
    cut_off = isinstance(error, OSError) and "Consistency check failed" in str(error)
    return cut_off or isinstance(error, httpx2.TransportError)


def _explain_hub(model: Model, error: Exception) -> ModelUnavailable:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    place = f"{constants.ENDPOINT}/{model.hub}"
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    if isinstance(cause, OfflineModeIsEnabled):
        return _unreachable(model, "HF_HUB_OFFLINE forbids it")
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if isinstance(cause, GatedRepoError) or (model.gated and status in (401, 403)):
        return _failed(
            model, f"{model.hub} is gated",
            f"accept its licence at {place}, and set HF_TOKEN to a token of that account",
        )  # fmt: skip
    if isinstance(cause, RevisionNotFoundError):
        return _failed(model, f"{place} has no commit {model.revision}", "correct its revision")
    if isinstance(cause, RepositoryNotFoundError) or status in (401, 403):
        return _failed(
            model, f"{place} is not there, or not for you",
            "correct `hub`, or set HF_TOKEN to a token of an account that may read it",
        )  # fmt: skip
    if status is not None:
        return _failed(model, f"{place} answers with status {status}", "try again later")
    if isinstance(cause, OSError) and not isinstance(cause, ConnectionError):
        return _failed(model, str(cause), "pull it again, what is complete is kept")
    return _unreachable(model, f"{constants.ENDPOINT} cannot be reached ({cause})")


def _lines(report: Callable[[str], None]) -> type:
    """A progress bar for where there is no terminal: an occasional line."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    last = time.monotonic()

    def line(text: str) -> None:
        nonlocal last
        now = time.monotonic()
        if text.strip() and now - last >= LINE_EVERY_S:
            last = now
            report(text.strip())

    class Lines(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(
                *args, **{**options, "ascii": True, "ncols": 80, "file": io.StringIO()}
            )

        @staticmethod
        def status_printer(file: Any) -> Callable[[str], None]:
            return line

    return Lines


# --- from a url -----------------------------------------------------------------------------------


def _pull_files(model: Model, pause_s: float) -> None:
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    if constants.is_offline_mode():
        raise _unreachable(model, "HF_HUB_OFFLINE forbids it")
    assert model.url is not None
    folder = model.own_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / ".lock"), _client() as client:
            for name, digest in model.files.items():
                url = model.url + quote(name) if model.url.endswith("/") else model.url
                retrying(_is_passing_at_url, pause_s)(
                    _download, client, url, folder / name, str(digest)
                )
    except _WrongChecksum as error:
        raise _failed(
            model, str(error), "it was removed; the registry wants another file"
        ) from error
    except httpx2.HTTPStatusError as error:
        status = error.response.status_code
        raise _failed(
            model,
            f"{model.url} answers with status {status}",
            "correct its url, or try again later",
        ) from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise _unreachable(model, f"{model.url} cannot be reached ({error})") from error
    except OSError as error:
        raise _failed(model, str(error), "pull it again, what is complete is kept") from error


class _WrongChecksum(Exception):
    """What came is not what the registry names; `resumed` where an old part may be to blame."""

    def __init__(self, message: str, resumed: bool) -> None:
        super().__init__(message)
        self.resumed = resumed


def _client() -> httpx2.Client:
    import httpx2

    def refuse_plain(request: httpx2.Request) -> None:
        if not is_trusted_url(str(request.url)):
            raise httpx2.UnsupportedProtocol(f"refused to go on to {request.url}: not https")

    return httpx2.Client(
        follow_redirects=True, timeout=30.0, event_hooks={"request": [refuse_plain]}
    )


def _download(client: httpx2.Client, url: str, target: Path, digest: str) -> None:
    """Fetch one file beside its place, check it, and put it there. Goes on where it was cut off."""
    if target.is_file() and sha256(target) == digest:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    start = part.stat().st_size if part.exists() else 0
    # Unpacked on the way, the bytes could not be counted or taken up again.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == 416:
            # The part is as long as the file, or longer: the checksum below says which.
            response.read()
        else:
            response.raise_for_status()
            resumed = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
            start = start if response.status_code == 206 and resumed else 0
            with part.open("ab" if start else "wb") as opened:
                for chunk in response.iter_raw():
                    opened.write(chunk)
    if (found := sha256(part)) != digest:
        part.unlink()
        raise _WrongChecksum(f"{url} has the SHA-256 {found}, not {digest}", resumed=start > 0)
    part.replace(target)


def _is_passing_at_url(error: BaseException) -> bool:
    import httpx2

    if isinstance(error, httpx2.HTTPStatusError):
        return _is_passing_status(error.response.status_code)
    if isinstance(error, _WrongChecksum):
        return error.resumed
    refused = isinstance(error, httpx2.UnsupportedProtocol)
    return isinstance(error, httpx2.TransportError) and not refused


def _is_passing_status(status: int) -> bool:
    return status >= 500 or status in _PASSING_STATUS
