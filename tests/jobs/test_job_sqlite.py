"""The SQLite file: one process at a time, and disks that are damaged, full or not ours."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from runtime.errors import StartupError
from runtime.jobs.ids import new_id
from runtime.jobs.open import open_stores
from runtime.jobs.store import Unavailable
from runtime.storage.options import StorageOptions
from tests.conftest import ROOT
from tests.jobs.conftest import LEASE, LIFETIMES
from tests.jobs.test_job_stores import outcome, request


def refused(data_dir: Path) -> str:
    with pytest.raises(StartupError) as raised:
        open_stores(str(data_dir), None, StorageOptions(), LIFETIMES, LEASE)
    line = str(raised.value)
    assert line.startswith("DATA_DIR: ") and str(data_dir) in line and "\n" not in line
    return line


def test_one_process_at_a_time(server, tmp_path):
    first = server(DATA_DIR=str(tmp_path))
    assert first.told() == "ready"
    second = server(DATA_DIR=str(tmp_path))
    out, err = second.process.communicate(timeout=60)
    assert (second.process.returncode, out) == (1, "")
    assert err == (
        f"diffusion-runtime: DATA_DIR: {tmp_path}/jobs.sqlite3: another process has it; "
        "every server needs a DATA_DIR of its own, or OUTPUT_URI\n"
    )
    assert refused(tmp_path)
    assert first.ask("create", "still works")
    first.kill()
    third = server(DATA_DIR=str(tmp_path))
    assert third.told() == "ready" and len(third.ask("take")) == 1


def test_killed_in_the_middle(server, tmp_path):
    """Whatever was told to be kept is there, however often it is killed while it writes."""
    kept: list[str] = []
    for _ in range(5):
        running = server(DATA_DIR=str(tmp_path))
        assert running.told() == "ready"
        assert set(running.ask("take")) == set(kept)
        for i in range(400):
            running.tell("create", str(i))
        kept += [running.told() for _ in range(10)]
        running.kill()
        kept += [line.strip().strip('"') for line in running.process.stdout if line.endswith("\n")]
        jobs, _ = open_stores(str(tmp_path), None, StorageOptions(), LIFETIMES, LEASE)
        there = {request.id for request in jobs.take()}
        jobs.close()
        assert there >= set(kept)
        kept = sorted(there)  # one more may have been kept and not told


def test_attempts_outlive_a_kill(server, tmp_path):
    running = server(DATA_DIR=str(tmp_path))
    running.told()
    job = running.ask("create", "a cat")
    assert running.ask("start", job)
    running.kill()
    running = server(DATA_DIR=str(tmp_path))
    running.told()
    assert running.ask("take") == [job] and running.ask("start", job)
    running.kill()
    running = server(DATA_DIR=str(tmp_path))
    running.told()
    assert running.ask("take") == []


def test_nothing_is_left_of_a_temporary_one(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    jobs, results = open_stores(None, None, StorageOptions(), LIFETIMES, LEASE)
    (folder,) = tmp_path.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    jobs.create(job := request())
    results.put(f"{job.id}/0-0.png", b"x", "image/png", {})
    jobs.close()
    assert list(tmp_path.iterdir()) == []


# --- damage


def filled(folder: Path, count: int = 50, length: int = 5000) -> None:
    jobs, _ = open_stores(str(folder), None, StorageOptions(), LIFETIMES, LEASE)
    for _ in range(count):
        jobs.create(request(prompt="x" * length))
    jobs.close()


def test_a_damaged_file(tmp_path):
    filled(tmp_path)
    file = tmp_path / "jobs.sqlite3"
    content = bytearray(file.read_bytes())
    content[4096 * 3 : 4096 * 20] = b"\xff" * 4096 * 17
    file.write_bytes(content)
    assert "damaged" in refused(tmp_path)
    file.write_bytes(b"this is no database, whatever its name says" * 100)
    assert "damaged" in refused(tmp_path)


def test_damage_while_it_is_open(tmp_path):
    filled(tmp_path, 100, 60_000)  # more than SQLite remembers
    jobs, _ = open_stores(str(tmp_path), None, StorageOptions(), LIFETIMES, LEASE)
    with (tmp_path / "jobs.sqlite3").open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 4096 * 1000)
    with pytest.raises(Unavailable) as raised:
        jobs.page(("images",), None, 100, True)
    assert "damaged" in str(raised.value) and "\n" not in str(raised.value)
    jobs.close()


def test_a_file_of_another_version(tmp_path):
    filled(tmp_path)
    database = sqlite3.connect(tmp_path / "jobs.sqlite3")
    database.execute("PRAGMA user_version=99")
    database.close()
    assert "another version (layout 99)" in refused(tmp_path)


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file")
    refused(tmp_path / "file" / "below")
    (tmp_path / "taken" / "jobs.sqlite3").mkdir(parents=True)
    refused(tmp_path / "taken")


def test_a_folder_that_may_not_be_written(tmp_path):
    room, user = tmp_path / "room", os.geteuid()
    filled(tmp_path / "written")
    room.mkdir(mode=0o555)
    if user == 0:  # who may write everywhere
        for folder in tmp_path, *tmp_path.parents[:2]:
            folder.chmod(0o711)
        os.seteuid(65534)
    try:
        assert "may not write" in refused(room)
        assert "may not" in refused(tmp_path / "written")
    finally:
        os.seteuid(user)


def on_tmpfs(room: Path, mebibytes: int) -> list[str]:
    """A prefix of a command: in a mount namespace of its own, where `room` is a small disk."""
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(room)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this machine does not let the tests mount a small disk")
    script = f'mount -t tmpfs -o size={mebibytes}m none {room}; exec "$@"'
    return ["unshare", "-rm", "sh", "-c", script, "sh"]


def test_a_full_disk(server, tmp_path):
    """What does not fit is refused with a reason, nothing half-written stays, and what was kept goes on."""
    running = server(before=on_tmpfs(tmp_path, 2), DATA_DIR=str(tmp_path))
    assert running.told() == "ready"
    first = running.ask("create", "fits")
    assert "the disk is full" in running.ask("put", f"{first}/0-0.png", 10_000_000)["unavailable"]
    assert running.ask("put", f"{first}/0-1.png", 100_000) is None  # what the first one took is free again
    told = [running.ask("create", "x" * 50_000) for _ in range(100)]
    kept = [job for job in told if isinstance(job, str)]
    failed = [job["unavailable"] for job in told if not isinstance(job, str)]
    assert kept and failed and all("the disk is full" in line for line in failed)
    assert running.ask("take") == []


def test_a_disk_that_is_full_from_the_start(server, tmp_path):
    before = on_tmpfs(tmp_path, 1)
    before[4] = before[4].replace("exec", f"head -c 1048576 /dev/zero > {tmp_path}/eaten; exec")
    running = server(before=before, DATA_DIR=str(tmp_path))
    out, err = running.process.communicate(timeout=60)
    assert (running.process.returncode, out) == (1, "")
    assert "the disk is full" in err and err.count("\n") == 1


def test_a_disk_that_expired_results_have_filled(server, tmp_path):
    """The start makes room before it needs any: else no start would ever do."""
    before = on_tmpfs(tmp_path, 2)
    old = tmp_path / "results" / new_id("images")
    code = f"from tests.jobs.test_job_sqlite import open_and_close; open_and_close({str(tmp_path)!r})"
    write = f'{sys.executable} -c "{code}"'
    fill = f"{write}; mkdir {old}; head -c 4000000 /dev/zero > {old}/0-0.png; touch -d '2 days ago' {old}/0-0.png"
    before[4] = before[4].replace("exec", f"cd {ROOT} && {fill}; exec")
    running = server(before=before, DATA_DIR=str(tmp_path))
    assert running.told() == "ready"
    assert isinstance(running.ask("create", "fits"), str)


def open_and_close(folder):
    open_stores(folder, None, StorageOptions(), LIFETIMES, LEASE)[0].close()


def test_folders_that_are_not_ours(tmp_path):
    """A volume's own, or an operator's: they stay, and nothing ends of them."""
    jobs, _ = open_stores(str(tmp_path), None, StorageOptions(), LIFETIMES, LEASE)
    foreign = [tmp_path / "results" / name for name in (".snapshot", "lost+found", "my notes")]
    for folder in foreign:
        folder.mkdir()
        (folder / "x").write_bytes(b"x")
        os.utime(folder / "x", (0, 0))
    jobs.sweep()
    jobs.close()
    open_and_close(str(tmp_path))
    assert all((folder / "x").exists() for folder in foreign)


def test_room_is_given_back(tmp_path):
    """Pictures of a job that has ended take no room."""
    jobs, _ = open_stores(str(tmp_path), None, StorageOptions(), LIFETIMES, LEASE)
    for _ in range(5):
        jobs.create(job := request(prompt="p" * 5_000_000))
        jobs.finish(job.id, outcome(job.id))
    jobs.sweep()
    jobs.close()
    assert (tmp_path / "jobs.sqlite3").stat().st_size < 1_000_000
