"""The stores that the settings ask for."""

from __future__ import annotations

import re
import secrets
import shutil
import socket
import tempfile
from pathlib import Path

from runtime.errors import StartupError, shown
from runtime.jobs.bucket import PATIENCE, Bucket, probe
from runtime.jobs.s3 import S3Jobs
from runtime.jobs.sqlite import SqliteJobs, open_folder
from runtime.jobs.store import JobStore, Lifetimes, ResultStore, Unavailable
from runtime.outputs import FolderResults, S3Results, overdue
from runtime.storage.options import StorageOptions
from runtime.storage.s3 import S3Source


def open_stores(
    data_dir: str | None,
    output_uri: str | None,
    options: StorageOptions,
    lifetimes: Lifetimes,
    lease_seconds: float,
) -> tuple[JobStore, ResultStore]:
    """Jobs and results below OUTPUT_URI where it is set, else in DATA_DIR, else in a temporary folder that `close` of
    the job store removes. That `close` ends both.

    Raises StartupError, one line, for what cannot be reached, written or shared.
    """
    if output_uri:
        return _open_bucket(output_uri, options, lifetimes, lease_seconds)
    if data_dir:
        folder = Path(data_dir).absolute()
        open_folder(folder)
        return _open_folder(folder, lifetimes, temporary=False)
    try:
        folder = Path(tempfile.mkdtemp(prefix="diffusion-runtime-jobs-"))
    except OSError as error:
        raise StartupError(f"no temporary folder for jobs ({error.strerror}); set DATA_DIR") from error
    try:
        return _open_folder(folder, lifetimes, temporary=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _open_folder(folder: Path, lifetimes: Lifetimes, temporary: bool) -> tuple[JobStore, ResultStore]:
    try:
        results = FolderResults(folder / "results")
        for job_id in overdue(results.held(), lifetimes):  # first: they may fill the disk that the jobs need
            results.drop(job_id)
    except Unavailable as error:
        raise StartupError(f"DATA_DIR: {error}") from error

    def on_close() -> None:
        results.close()
        if temporary:
            shutil.rmtree(folder, ignore_errors=True)

    return SqliteJobs(folder, results, lifetimes, on_close), results


def _open_bucket(
    uri: str, options: StorageOptions, lifetimes: Lifetimes, lease_seconds: float
) -> tuple[JobStore, ResultStore]:
    if not uri.startswith("s3://"):
        raise StartupError(f"OUTPUT_URI {shown(uri.partition('?')[0], 200)}: is no s3://bucket/prefix")
    owner = f"{re.sub('[^A-Za-z0-9-]', '-', socket.gethostname())[:60]}-{secrets.token_hex(8)}"
    # A heartbeat that hangs must fail while there is time for another; a large upload may take longer.
    patient = min(max(lease_seconds / 3, 3.0), 15.0)
    jobs = Bucket(S3Source(uri, options, "OUTPUT_URI", read_seconds=patient), PATIENCE)
    results = S3Results(Bucket(S3Source(uri, options, "OUTPUT_URI")))
    try:
        probe(jobs, owner)
        return S3Jobs(jobs, results, lifetimes, lease_seconds, owner), results
    except BaseException as error:
        jobs.close()
        results.close()
        if isinstance(error, Unavailable):
            raise StartupError(f"OUTPUT_URI: {error}") from None
        raise
