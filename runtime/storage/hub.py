"""Models of the Hugging Face Hub: hf://owner/model, with @revision, or :revision as KServe writes it.

huggingface_hub lists; the bytes come by ranges from the address that the Hub redirects to, so that they are fetched,
resumed, verified and cached as those of S3, with the same bound on memory (its own downloader has none of 8 GiB).
"""

from __future__ import annotations

import re
import ssl
from functools import cached_property
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx
from huggingface_hub import HfApi, close_session, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub import errors as hub_errors

from runtime.errors import StartupError, shown
from runtime.storage.fetch import read_whole, retried
from runtime.storage.options import StorageOptions
from runtime.storage.ranges import RETRIED, Ranges, Refused
from runtime.storage.source import RemoteFile, Transient, select

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REDIRECTS = 5
DEFAULT_ENDPOINT = "https://huggingface.co"
LIST_SECONDS = 30.0


class HubSource:
    """A model of the Hub at one commit. See `runtime.storage.source.Source`."""

    def __init__(self, uri: str, options: StorageOptions) -> None:
        """Reaches nothing yet. Raises StartupError for a name that can be none."""
        self._repository, self._wanted = parse(uri)
        self.uri = printable(self._repository, self._wanted)
        self._endpoint = (options.hf_endpoint or DEFAULT_ENDPOINT).rstrip("/")
        self._token = options.hf_token
        self._ranges = Ranges()
        self._addresses: dict[str, str] = {}  # path -> where the Hub's redirects ended; signed, valid for an hour

    def files(self) -> tuple[RemoteFile, ...]:
        return self._files

    @cached_property
    def revision(self) -> str:
        """The commit."""
        return self._listed[0]

    def read(self, file: RemoteFile, start: int, into: memoryview) -> None:
        known = self._addresses.get(file.path)
        if known is not None:
            try:
                return self._ranges.read(known, start, into)
            except Refused:  # it has expired: ask the Hub again
                self._addresses.pop(file.path, None)
            except ssl.SSLError as exc:
                raise self._untrusted(exc) from exc
        url = hf_hub_url(self._repository, file.path, revision=self.revision, endpoint=self._endpoint)
        for _ in range(REDIRECTS):
            # The token is for the Hub alone, not for the store that it redirects to.
            own = urlsplit(url).netloc == urlsplit(self._endpoint).netloc
            headers = {"Authorization": f"Bearer {self._token}"} if own and self._token else {}
            try:
                self._ranges.read(url, start, into, headers)
            except Refused as refused:
                if refused.location is None or not 300 <= refused.status < 400:
                    raise StartupError(f"{self.uri}/{file.path}: {self._advice(refused.status)}") from None
                url = urljoin(url, refused.location)
            except ssl.SSLError as exc:
                raise self._untrusted(exc) from exc
            else:
                if not own:
                    self._addresses[file.path] = url
                return
        raise StartupError(f"{self.uri}/{file.path}: the Hub redirects without end")

    def close(self) -> None:
        self._ranges.close()
        close_session()

    @cached_property
    def _files(self) -> tuple[RemoteFile, ...]:
        return select(self.uri, self._listed[1], lambda file: read_whole(self, file))

    @cached_property
    def _listed(self) -> tuple[str, list[RemoteFile]]:
        """The commit and all its files."""
        found: list[tuple[str, list[RemoteFile]]] = []
        retried(self.uri, lambda: found.append(self._list()))
        return found[-1]

    def _list(self) -> tuple[str, list[RemoteFile]]:
        api = HfApi(endpoint=self._endpoint, token=self._token or False)
        try:
            info = api.model_info(self._repository, revision=self._wanted, files_metadata=True, timeout=LIST_SECONDS)
        except hub_errors.GatedRepoError as exc:
            raise StartupError(f"{self.uri}: access must be granted on its page first, and HF_TOKEN set") from exc
        except hub_errors.RevisionNotFoundError as exc:
            raise StartupError(f"{self.uri}: there is no such revision") from exc
        except hub_errors.RepositoryNotFoundError as exc:
            raise StartupError(f"{self.uri}: {self._advice(404)}") from exc
        except hub_errors.HfHubHTTPError as exc:
            status = exc.response.status_code
            if status in RETRIED:
                raise Transient(f"{self._endpoint} answered {status}") from exc
            raise StartupError(f"{self.uri}: {self._advice(status)}") from exc
        except hub_errors.OfflineModeIsEnabled as exc:
            raise StartupError(_offline(self.uri)) from exc
        except httpx.HTTPError as exc:
            if isinstance(exc.__context__, ssl.SSLError) or "CERTIFICATE_VERIFY" in str(exc):
                raise self._untrusted(exc) from exc
            raise Transient(f"{self._endpoint} cannot be reached ({type(exc).__name__}); check HF_ENDPOINT") from exc
        files = [
            RemoteFile(
                entry.rfilename,
                entry.size or 0,
                (entry.lfs.sha256 if entry.lfs else entry.blob_id) or str(info.sha),
                entry.lfs.sha256 if entry.lfs else None,
            )
            for entry in info.siblings or ()
        ]
        return str(info.sha), files

    def _advice(self, status: int) -> str:
        if status in (401, 403):
            return "access denied; set HF_TOKEN to a token that may read it"
        if status == 404:
            return f"{self._endpoint} has no such model, or HF_TOKEN may not see it"
        return f"{self._endpoint} answered {status}"

    def _untrusted(self, error: Exception) -> StartupError:
        return StartupError(f"{self.uri}: the certificate of {self._endpoint} is not trusted ({str(error)[:200]})")


def open_source(uri: str, options: StorageOptions) -> HubSource | Path:
    """The model at an hf:// URI, or its folder where the Hub's own cache holds this commit already.

    Offline, what is cached is taken at its last known commit. Raises StartupError.
    """
    repository, revision = parse(uri)
    if options.offline:
        return _cached(repository, revision, options)
    source = HubSource(uri, options)
    try:
        folder = _snapshot(repository, source)
    except StartupError:
        source.close()
        raise
    if folder is None:
        return source
    source.close()
    return folder


def parse(uri: str) -> tuple[str, str | None]:
    """Repository and revision of hf://owner/model@revision; the revision is None for the default branch."""
    name = uri.partition("://")[2].rstrip("/")
    mark = "@" if "@" in name else ":"
    repository, _, revision = name.partition(mark)
    if not NAME.fullmatch(repository) or not revision.isprintable() or bool(revision) != (mark in name):
        raise StartupError(f"MODEL_ID {shown(uri, 400)}: is no hf://owner/model or hf://owner/model@revision")
    return repository, revision or None


def printable(repository: str, revision: str | None) -> str:
    return f"hf://{repository}" + (f"@{revision}" if revision else "")


def _cached(repository: str, revision: str | None, options: StorageOptions) -> Path:
    """A copy that is here: in the Hub's own cache, or in ours."""
    from runtime.storage.copies import cache_folder, newest

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (hub_errors.LocalEntryNotFoundError, OSError, ValueError):
        folder = newest(cache_folder(options), printable(repository, revision))
    if folder is None:
        raise StartupError(_offline(printable(repository, revision)))
    return folder


def _snapshot(repository: str, source: HubSource) -> Path | None:
    """The folder of the source's commit in the Hub's own cache, where everything needed is in it."""
    index = try_to_load_from_cache(repository, "model_index.json", revision=source.revision)
    folder = Path(index).parent if isinstance(index, str) else None
    return folder if folder is not None and all(_has(folder, file) for file in source.files()) else None


def _offline(uri: str) -> str:
    return f"{uri}: HF_HUB_OFFLINE is set and no copy is cached; unset it, or name a folder or an s3:// model"


def _has(folder: Path, file: RemoteFile) -> bool:
    path = folder / file.path
    return path.is_file() and path.stat().st_size == file.size
