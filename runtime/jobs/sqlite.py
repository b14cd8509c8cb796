"""Jobs of one server: a SQLite file, held exclusively as long as the process lives.

Each change is one transaction with synchronous=FULL: what a method promises survives a crash of the node. Progress is
in memory only. The whole request, pictures and all, is kept until the job ends; what `get` and `page` give is brief.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from runtime.errors import StartupError
from runtime.jobs.ids import is_id, sort_key
from runtime.jobs.record import (
    MAX_ATTEMPTS,
    Job,
    JobProgress,
    JobRequest,
    Outcome,
    brief,
    cancelled,
    progress_of,
    server_died,
)
from runtime.jobs.store import Duplicate, Lifetimes, Unavailable
from runtime.outputs import Results, overdue, plain

FILE = "jobs.sqlite3"
LOCK_SECONDS = 1.0  # that a file's former process may take to end
LAYOUT = 1  # of the tables, in user_version

TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, place TEXT NOT NULL, api TEXT NOT NULL, key TEXT NOT NULL, fingerprint TEXT NOT NULL,
    brief BLOB NOT NULL, whole BLOB, attempts INTEGER NOT NULL DEFAULT 0, started REAL,
    outcome BLOB, ended REAL, available INTEGER NOT NULL DEFAULT 1
);
CREATE UNIQUE INDEX IF NOT EXISTS by_key ON jobs (key) WHERE key <> '';
CREATE INDEX IF NOT EXISTS by_place ON jobs (place);
CREATE INDEX IF NOT EXISTS by_end ON jobs (ended);
CREATE TABLE IF NOT EXISTS gone (id TEXT PRIMARY KEY, since REAL NOT NULL);
"""
COLUMNS = "brief, attempts, started, outcome, ended, available"


class SqliteJobs:
    """See `runtime.jobs.store.JobStore`."""

    def __init__(
        self, folder: Path, results: Results, lifetimes: Lifetimes, on_close: Callable[[], None] = lambda: None
    ) -> None:
        """Raises StartupError, one line, for a file that another process has, that is none of ours or is damaged."""
        self._path, self._results, self._lifetimes, self._on_close = folder / FILE, results, lifetimes, on_close
        self._lock = threading.RLock()
        self._mine: set[str] = set()
        self._began: set[str] = set()  # of them, those that this process started
        self._cancelled: set[str] = set()
        self._progress: dict[str, JobProgress] = {}
        try:
            self._db = sqlite3.connect(self._path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise StartupError(self._line(error)) from error
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        try:
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")  # before WAL: no shared memory, which volumes may lack
            self._db.execute("PRAGMA auto_vacuum=INCREMENTAL")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA journal_size_limit=67108864")
            self._db.execute("BEGIN EXCLUSIVE")
            found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            layout = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(f"it is damaged ({found})")
            if layout not in (0, LAYOUT):
                raise sqlite3.DatabaseError(f"it was written by another version (layout {layout})")
            if layout == 0:  # a start writes nothing into a database that is there: its disk may be full
                for statement in filter(str.strip, TABLES.split(";")):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={LAYOUT}")
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            raise StartupError(self._line(error)) from error

    def create(self, request: JobRequest) -> None:
        short = brief(request)
        whole = None if short is request else request.to_json()
        row = (request.id, sort_key(request.id), request.api, request.key, request.fingerprint, short.to_json(), whole)
        with self._lock:
            with self._changing() as db:
                found = self._by_key(request.key)
                if found:
                    raise Duplicate(*found)
                db.execute(
                    "INSERT INTO jobs (id, place, api, key, fingerprint, brief, whole) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    row,
                )
            self._mine.add(request.id)

    def find(self, key: str) -> tuple[str, str] | None:
        with self._reading():
            return self._by_key(key)

    def get(self, job_id: str) -> Job | None:
        with self._reading() as db:
            row = db.execute(f"SELECT {COLUMNS} FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return self._job(row) if row else None

    def gone(self, job_id: str) -> bool:
        with self._reading() as db:
            row = db.execute("SELECT since FROM gone WHERE id = ?", (job_id,)).fetchone()
        return bool(row) and time.time() - row[0] <= self._lifetimes.record

    def page(self, apis: tuple[str, ...], after: str | None, limit: int, newest_first: bool) -> tuple[list[Job], bool]:
        if after is not None and not is_id(after):
            return [], False
        where = f"api IN ({', '.join('?' * len(apis))})"
        values: list[Any] = [*apis]
        if after is not None:
            where += f" AND place {'<' if newest_first else '>'} ?"
            values.append(sort_key(after))
        order = "DESC" if newest_first else "ASC"
        with self._reading() as db:
            rows = db.execute(
                f"SELECT {COLUMNS} FROM jobs WHERE {where} ORDER BY place {order} LIMIT ?", (*values, limit + 1)
            ).fetchall()
        return [self._job(row) for row in rows[:limit]], len(rows) > limit

    def take(self) -> list[JobRequest]:
        taken = []
        with self._lock:
            with self._changing() as db:
                rows = db.execute("SELECT id, attempts FROM jobs WHERE outcome IS NULL ORDER BY place").fetchall()
                for job_id, attempts in rows:
                    if job_id in self._mine:
                        continue
                    if attempts >= MAX_ATTEMPTS:
                        self._end(job_id, server_died())
                        continue
                    (text,) = db.execute("SELECT coalesce(whole, brief) FROM jobs WHERE id = ?", (job_id,)).fetchone()
                    taken.append(JobRequest.from_json(text))
            self._mine.update(request.id for request in taken)
        return taken

    def start(self, job_id: str) -> bool:
        with self._lock:
            if job_id not in self._mine:
                return False
            with self._changing() as db:
                done = db.execute(
                    "UPDATE jobs SET attempts = attempts + 1, started = ? WHERE id = ? AND outcome IS NULL",
                    (time.time(), job_id),
                )
            if done.rowcount:
                self._began.add(job_id)
                self._progress[job_id] = JobProgress("in_progress")
            return done.rowcount == 1

    def beat(self, progress: Mapping[str, JobProgress]) -> dict[str, str]:
        with self._lock:
            self._progress.update({job_id: told for job_id, told in progress.items() if job_id in self._mine})
            return dict.fromkeys(self._cancelled & self._mine, "cancelled")

    def finish(self, job_id: str, outcome: Outcome) -> bool:
        with self._lock:
            with self._changing():
                kept = self._end(job_id, outcome)
            self._forget(job_id)
        return kept

    def cancel(self, job_id: str) -> None:
        with self._lock:
            if job_id in self._mine:
                self._cancelled.add(job_id)
                return
            with self._changing():
                self._end(job_id, cancelled())

    def delete(self, job_id: str) -> None:
        with self._changing() as db:
            if db.execute("DELETE FROM jobs WHERE id = ? AND outcome IS NOT NULL", (job_id,)).rowcount:
                self._results.drop(job_id)

    def sweep(self) -> None:
        now = time.time()
        with self._reading() as db:
            running = {row[0] for row in db.execute("SELECT id FROM jobs WHERE outcome IS NULL").fetchall()}
        late = [job_id for job_id in overdue(self._results.held(), self._lifetimes) if job_id not in running]
        for job_id in late:  # before anything is written: the disk may be full
            self._results.drop(job_id)
        with self._changing() as db:
            db.executemany("UPDATE jobs SET available = 0 WHERE id = ?", [(job_id,) for job_id in late])
            ended = (now - self._lifetimes.record,)
            old = [row[0] for row in db.execute("SELECT id FROM jobs WHERE ended < ?", ended).fetchall()]
            for job_id in old:
                db.execute("INSERT OR REPLACE INTO gone (id, since) VALUES (?, ?)", (job_id, now))
                db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
            db.execute("DELETE FROM gone WHERE since < ?", ended)
        for job_id in old:
            self._results.drop(job_id)
        with self._lock, self._plainly():
            self._db.executescript("PRAGMA incremental_vacuum")  # `execute` takes one step of it, a page

    def release(self) -> None:
        """A run that a clean stop interrupts is not counted: the server did not die of it."""
        with self._lock:
            with self._changing() as db:
                for job_id in self._began & self._mine:
                    db.execute("UPDATE jobs SET attempts = attempts - 1 WHERE id = ? AND outcome IS NULL", (job_id,))
            self._forget(*self._mine)

    def close(self) -> None:
        with self._lock:
            self._db.close()
        self._on_close()

    def _end(self, job_id: str, outcome: Outcome) -> bool:
        done = self._db.execute(
            "UPDATE jobs SET outcome = ?, ended = ?, whole = NULL WHERE id = ? AND outcome IS NULL",
            (outcome.to_json(), time.time(), job_id),
        )
        return done.rowcount == 1

    def _forget(self, *job_ids: str) -> None:
        """Only after the commit: a job that could not be ended is this process's still."""
        for known in (self._mine, self._began, self._cancelled):
            known.difference_update(job_ids)
        for job_id in job_ids:
            self._progress.pop(job_id, None)

    def _by_key(self, key: str) -> tuple[str, str] | None:
        if not key:
            return None
        row = self._db.execute("SELECT id, fingerprint FROM jobs WHERE key = ?", (key,)).fetchone()
        return (row[0], row[1]) if row else None

    def _job(self, row: tuple[Any, ...]) -> Job:
        request, attempts, started, ended_as, ended, available = row
        told = JobRequest.from_json(request)
        outcome = Outcome.from_json(ended_as) if ended_as is not None else None
        fresh = ended is None or time.time() - ended <= self._lifetimes.result
        progress = progress_of(outcome) if outcome else self._progress.get(told.id, JobProgress())
        return Job(told, attempts, started, progress, outcome, bool(available) and fresh)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._plainly():
            yield self._db

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """One transaction; nothing of it is kept where the block raises."""
        with self._lock, self._plainly():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    @contextlib.contextmanager
    def _plainly(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise Unavailable(self._reason(error)) from error

    def _line(self, error: sqlite3.Error) -> str:
        return f"DATA_DIR: {self._reason(error)}"

    def _reason(self, error: sqlite3.Error) -> str:
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        if code == sqlite3.SQLITE_IOERR and not all(_writable(path) for path in (self._path, self._path.parent)):
            code = sqlite3.SQLITE_CANTOPEN  # what it tells of a folder that is not writable depends on the folder
        told = {
            sqlite3.SQLITE_BUSY: "another process has it; every server needs a DATA_DIR of its own, or OUTPUT_URI",
            sqlite3.SQLITE_LOCKED: "another process has it; every server needs a DATA_DIR of its own, or OUTPUT_URI",
            sqlite3.SQLITE_FULL: "the disk is full",
            sqlite3.SQLITE_READONLY: "this file may not be written",
            sqlite3.SQLITE_CANTOPEN: "this user may not write here",
            sqlite3.SQLITE_CORRUPT: "it is damaged; move it away to start without its jobs",
            sqlite3.SQLITE_NOTADB: "it is damaged, or no file of jobs; move it away to start without its jobs",
        }.get(code)
        return f"{self._path}: {told or (str(error).splitlines() or [type(error).__name__])[0]}"


def _writable(path: Path) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def open_folder(folder: Path) -> None:
    """Make DATA_DIR. Raises StartupError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(f"DATA_DIR: {folder}: {plain(error)}") from error
