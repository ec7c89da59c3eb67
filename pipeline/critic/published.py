"""The sheets of VideoPhy-2 on the hub, each pinned by its checksum."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from winnow.operators.errors import StorageError
from winnow.operators.models import sha256


@dataclass(frozen=True, slots=True)
class PublishedTable:
    repository: str
    file: str
    revision: str
    sha256: str


# The checksums, and the revision of the test set, are those that a public project (PAVG critic, 2026)
# recorded when it froze these files. The revision of the training set is not known: it is `main`, and
# the checksum says whether it is still the same file.
PUBLISHED = {
    "videophy2:test": PublishedTable(
        "videophysics/videophy2_test", "videophy2_test.csv",
        "90b81ffa54f565d9e40e83b7a2c247ba1dccfa2b",
        "85a6690b9508b7e69c592f3cbcbc4113efd3a573eb5ec69d6ae030a8ffb8a4e7",
    ),
    "videophy2:train": PublishedTable(
        "videophysics/videophy2_train", "videophy2_training.csv", "main",
        "076a03584da28a0622aa9f3bdad71f52c3d8afef2025d34f7ecd9e4ef081a42c",
    ),
}  # fmt: skip


def fetch_table(table: PublishedTable, fetch: bool) -> Path:
    """The sheet, from the hub or its cache, and from there only without leave to `fetch`.

    Raises StorageError where it cannot be had, or is another file than the pinned one.
    """
    import httpx2
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from winnow.pipeline.models import is_passing_at_hub, retrying

    place = f"{constants.ENDPOINT}/datasets/{table.repository}"
    remedy = f"download {table.file} from {place} where there is a network, and give its path"

    def download() -> Path:
        return Path(
            hf_hub_download(
                table.repository, table.file, repo_type="dataset", revision=table.revision,
                local_files_only=not fetch,
            )
        )  # fmt: skip

    try:
        path: Path = retrying(is_passing_at_hub, 1.0)(download) if fetch else download()
    except LocalEntryNotFoundError as error:
        raise StorageError(
            f"{table.file} is not on this machine and cannot be had: {remedy}"
        ) from error
    except (OSError, httpx2.HTTPError) as error:
        raise StorageError(f"{table.file} could not be fetched: {error}: {remedy}") from error
    if (found := sha256(path)) != table.sha256:
        # What has a wrong checksum would be taken for fetched the next time.
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise StorageError(
            f"{place}: {table.file} has the SHA-256 {found}, not {table.sha256}: it was removed. Try "
            f"again; if the data set has changed, download it and give its path"
        )
    return path
