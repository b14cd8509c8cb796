"""The disks that a cache lies on: full, small, read-only, not ours; and a gigabyte in bounded memory."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from runtime.errors import StartupError
from runtime.storage import copies
from runtime.storage.cache import cached
from runtime.storage.cache_writer import CacheWriter
from runtime.storage.registry import open_source, resolve
from tests.storage.conftest import MIB, WAIT_SECONDS, ended, told, write_model
from tests.storage.servers import Fault, proxy_to, rclone

# --- disks


def test_free_space_is_checked_before_the_first_byte(large, fill, tmp_path):
    room = tmp_path / "room"
    room.mkdir()
    process = fill(large, *on_tmpfs(room, 30), CACHE_DIR=str(room))
    line = told(process)
    assert re.search(r"needs 0\.\d[1-9] GiB more and 0\.\d\d GiB are free", line) and str(room) in line


def test_a_disk_that_fills_up_ends_with_a_line(large, fill, tmp_path, proxy):
    """Somebody else takes the room while it downloads."""
    room = tmp_path / "room"
    room.mkdir()
    proxy.faults = [Fault("hold", "-of-00004", times=9)]
    eaten = tmp_path / "eaten"
    # Once something is written, the free space was looked at.
    eater = (
        f"(for i in $(seq 2000); do ls -d {room}/staging/*/transformer && break; sleep 0.05; done;"
        f" head -c 50000000 /dev/zero > {room}/eaten; : > {eaten}) > {tmp_path}/eater 2>&1 &"
    )
    process = fill(large, *on_tmpfs(room, 60, eater), CACHE_DIR=str(room), AWS_S3_ENDPOINT=proxy.url)
    deadline = time.monotonic() + WAIT_SECONDS
    while not eaten.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    proxy.release.set()
    assert "the disk is full" in told(process)


def on_tmpfs(room: Path, mebibytes: int, also: str = "") -> list[str]:
    """A prefix of a command: in a mount namespace of its own, where `room` is a small disk."""
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(room)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this machine does not let the tests mount a small disk")
    script = f'mount -t tmpfs -o size={mebibytes}m none {room}; {also} exec "$@"'
    return ["unshare", "-rm", "sh", "-c", script, "sh"]


def test_a_file_that_may_not_be_that_large(uri, root, options):
    """The limit on the size of a file stands for whatever the system refuses in the middle."""
    with contextlib.closing(open_source(uri, options())) as source:
        source.files()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 * MIB, before[1]))
        try:
            with pytest.raises(StartupError, match="a file of this size is not allowed") as raised:
                cached(source, options())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(raised.value) and str(root) in str(raised.value)


def test_a_folder_that_may_not_be_written(uri, options, tmp_path):
    room = tmp_path / "room"
    room.mkdir(mode=0o555)
    with contextlib.closing(open_source(uri, options())) as source, contextlib.ExitStack() as stack:
        source.files()
        if os.geteuid() == 0:  # who may write everywhere
            for folder in tmp_path, *tmp_path.parents[:2]:
                folder.chmod(0o711)
            os.seteuid(65534)
            stack.callback(os.seteuid, 0)
        with pytest.raises(StartupError) as raised:
            CacheWriter(room, source).__enter__()
    assert "may not write here" in str(raised.value) and str(room) in str(raised.value)


def test_a_read_only_volume_serves_what_it_holds(uri, fill, options, tmp_path, bucket):
    room = tmp_path / "room"
    room.mkdir()
    on_tmpfs(room, 1)  # skips where mounting is not allowed
    folder = resolve(uri, options(CACHE_DIR=str(room)))
    script = f'mount --bind {room} {room} && mount -o remount,bind,ro {room} && exec "$@"'
    read_only = ["unshare", "-rm", "sh", "-c", script, "sh"]
    assert ended(fill(uri, *read_only, CACHE_DIR=str(room))) == folder
    (bucket / "m/vae/config.json").write_text("{  }")
    assert "the volume is read-only" in told(fill(uri, *read_only, CACHE_DIR=str(room)))


def test_without_cache_dir_a_folder_of_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setattr(copies.tempfile, "gettempdir", lambda: str(tmp_path))
    from runtime.storage.options import StorageOptions

    folder = copies.cache_folder(StorageOptions())
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to("/")
    with pytest.raises(StartupError, match="belongs to somebody else"):
        copies.cache_folder(StorageOptions())


# --- size


def test_a_gigabyte_in_bounded_memory(fill, tmp_path):
    """Four shards of 256 MiB, one file under four names."""
    folder = write_model(tmp_path / "s3/b/m", shards=4, shard_bytes=MIB)
    first, *others = sorted((folder / "transformer").glob("*-of-*.safetensors"))
    block = random.Random(1).randbytes(8 * MIB)
    with first.open("wb") as file:
        for i in range(32):
            file.write(i.to_bytes(8, "big") + block[8:])
    for other in others:
        other.unlink()
        os.link(first, other)
    with rclone(tmp_path / "s3") as store, proxy_to(store.endpoint) as proxy:
        process = fill("s3://b/m", AWS_S3_ENDPOINT=proxy.url)
        out, err = process.communicate(timeout=2 * WAIT_SECONDS)
        assert process.returncode == 0, err
        copy, peak = Path(out.splitlines()[0]), int(out.splitlines()[1])
        sizes = [path.stat().st_size for path in copy.rglob("*.safetensors")]
        assert sum(sizes) > 2**30
        assert peak < 400 * MIB  # of which 128 are buffers and 50 the interpreter with boto3
        assert proxy.count(".safetensors") == sum(sizes)
    for shard in (first, *others):
        subprocess.run(["cmp", str(shard), str(copy / "transformer" / shard.name)], check=True)
    shutil.rmtree(copy)
    shutil.rmtree(folder)
