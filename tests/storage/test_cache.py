"""The cache: all or nothing, resumed after a kill, filled once by many, and cleaned."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.errors import StartupError
from runtime.storage import cache_writer, staged_file
from runtime.storage.cache_writer import CacheWriter
from runtime.storage.copies import DAY, complete, newest
from runtime.storage.fetch import fetch
from runtime.storage.registry import open_source, resolve
from tests.storage.conftest import MIB, WAIT_SECONDS, content, ended, needed
from tests.storage.servers import Fault, proxy_to

LARGE = 52 * MIB  # about, of `large`
SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def journalled(root: Path) -> int:
    lines = [line for path in root.glob("staging/*.journal/*") for line in path.read_text().splitlines() if line]
    return sum(json.loads(line)[2] for line in lines)


def test_a_second_start_fetches_no_weights(uri, root, options, proxy, model):
    chosen = options(AWS_S3_ENDPOINT=proxy.url)
    folder = resolve(uri, chosen)
    assert content(folder) == needed(model) and (folder / "COMPLETE").exists()
    proxy.reset()
    assert resolve(uri, chosen) == folder
    assert proxy.count(".safetensors") == 0
    assert [path.name for path in (root / "staging").iterdir()] == []


def weights(folder: Path) -> dict[str, bytes]:
    names = [path for path in folder.glob("*/*.safetensors") if "-of-" in path.name]
    return {path.name: path.read_bytes() for path in names}


def test_after_a_kill_only_what_is_missing_is_fetched(large, root, bucket, fill, s3, proxy):
    proxy.faults = [Fault("hold", "00004-of-00004", times=9)]
    first = fill(large, AWS_S3_ENDPOINT=proxy.url)
    wait_for(lambda: journalled(root) >= 20 * MIB)
    first.kill()
    first.communicate()
    kept = journalled(root)
    assert not list((root / "models").iterdir())
    with proxy_to(s3.endpoint) as second:  # the first still holds what it has for the dead
        folder = ended(fill(large, AWS_S3_ENDPOINT=second.url))
        expected = weights(bucket / "large")
        assert second.count(".safetensors") <= LARGE + MIB - kept + 100_000
        assert second.count(".safetensors") < sum(map(len, expected.values()))
    assert weights(folder) == expected
    assert not list((root / "staging").iterdir())


def test_chunks_are_kept_though_none_comes_after_them(large, root, options, monkeypatch):
    """Eight ranges side by side on a slow network all end at once, then nothing ends for seconds."""
    monkeypatch.setattr(cache_writer, "SYNC_SECONDS", 0.05)
    with contextlib.closing(open_source(large, options())) as source, CacheWriter(root, source) as writer:
        spans = writer.missing()[:3]
        fetch(source, spans, [memoryview(bytearray(16 * MIB)) for _ in spans], writer.write)
        wait_for(lambda: journalled(root) == sum(span.length for span in spans))


def test_what_the_disk_refuses_while_nothing_comes_ends_the_download(large, root, options, monkeypatch):
    """Network volumes tell of a full disk when they flush."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_writer, "SYNC_SECONDS", 0.05)
    with contextlib.closing(open_source(large, options())) as source, CacheWriter(root, source) as writer:
        monkeypatch.setattr(staged_file, "_flush", full)
        span = writer.missing()[0]
        with contextlib.suppress(StartupError):  # the thread may have met it already
            writer.write(span, memoryview(bytearray(span.length)))
        wait_for(lambda: not writer._syncing.is_alive())
        with pytest.raises(StartupError, match="the disk is full"):
            writer.write(span, memoryview(bytearray(span.length)))
        with pytest.raises(StartupError, match="the disk is full"):
            writer.finish()
    assert not journalled(root) and not list((root / "models").iterdir())


def test_four_processes_fill_one_folder(large, fill, proxy, bucket):
    processes = [fill(large, AWS_S3_ENDPOINT=proxy.url) for _ in range(4)]
    folders = {ended(process) for process in processes}
    (folder,) = folders
    expected = weights(bucket / "large")
    assert weights(folder) == expected
    for shard, data in expected.items():
        assert len(data) <= proxy.count(shard) < 1.5 * len(data)


def test_a_killed_leader_is_followed_by_a_waiter(uri, root, fill, proxy, model):
    proxy.faults = [Fault("hold", SHARDS[0], times=2)]
    leader = fill(uri, AWS_S3_ENDPOINT=proxy.url)
    wait_for(lambda: list(root.glob("staging/*.lease")))
    waiter = fill(uri, AWS_S3_ENDPOINT=proxy.url)
    wait_for(lambda: journalled(root) or waiter.poll() is not None)
    assert waiter.poll() is None
    leader.kill()
    proxy.release.set()
    assert content(ended(waiter)) == needed(model)


def test_a_stale_lease_of_another_host_is_taken_over(uri, root, options, monkeypatch):
    with contextlib.closing(open_source(uri, options())) as source:
        with CacheWriter(root, source) as first:
            assert first.leads
            with CacheWriter(root, source) as second:
                assert not second.leads
        (lease,) = [first.lease.path]
        lease.write_text(json.dumps(["elsewhere", "boot", 1, "1", "x"]))
        with CacheWriter(root, source) as fresh:
            assert not fresh.leads
        os.utime(lease, (0, 0))
        with CacheWriter(root, source) as late:
            assert late.leads
        assert not lease.exists()


def test_two_writers_without_a_lease_do_no_harm(uri, root, options, model):
    """The lease is only there to save work: both write everything, both finish."""
    with contextlib.closing(open_source(uri, options())) as source:
        with CacheWriter(root, source) as first:
            first.lease.path.unlink()
            with CacheWriter(root, source) as second:
                assert first.leads and second.leads
                errors: list[BaseException] = []

                def work(writer: CacheWriter) -> None:
                    try:
                        buffers = [memoryview(bytearray(16 * MIB)) for _ in range(2)]
                        fetch(source, writer.missing(), buffers, writer.write)
                        assert content(writer.finish()) == needed(model)
                    except BaseException as error:
                        errors.append(error)

                threads = [threading.Thread(target=work, args=(writer,)) for writer in (first, second)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert not errors
        assert complete(root, source.uri, source.revision)


def test_a_tee_reads_back_what_is_there(uri, root, options, model):
    with contextlib.closing(open_source(uri, options())) as source:
        with CacheWriter(root, source) as writer:
            spans = writer.missing()
            fetch(source, spans[:3], [memoryview(bytearray(16 * MIB))], writer.write)
        with CacheWriter(root, source) as writer:
            assert len(writer.missing()) == len(spans) - 3 and writer.has(spans[0])
            buffer = bytearray(spans[0].length)
            writer.read(spans[0], memoryview(buffer))
            expected = (model / spans[0].file.path).read_bytes()
            assert bytes(buffer) == expected[spans[0].start : spans[0].start + spans[0].length]
            with pytest.raises(ValueError, match="were not written"):
                writer.finish()


def test_a_changed_source_is_refreshed_and_shares_what_stayed(uri, root, bucket, options, proxy, model):
    chosen = options(AWS_S3_ENDPOINT=proxy.url)
    old = resolve(uri, chosen)
    (bucket / "m/vae/config.json").write_text('{"changed": true}')
    proxy.reset()
    new = resolve(uri, chosen)
    assert new != old and old.is_dir()  # somebody may still read it
    assert content(new) == {**needed(model), "vae/config.json": b'{"changed": true}'}
    assert proxy.count(".safetensors") == 0  # linked from the copy of before
    assert newest(root, uri) == new


def test_what_nobody_uses_is_removed(uri, root, bucket, options):
    old = resolve(uri, options())
    other = root / "models" / ("0" * 16 + "-x")
    other.mkdir()
    stale = root / "staging" / f"{old.name.partition('-')[0]}-0000000000000000"
    elsewhere = root / "staging" / ("1" * 16 + "-0000000000000000")
    for folder in (stale, elsewhere):
        folder.mkdir()
        os.utime(folder, (0, time.time() - 3600))
    os.utime(old / "COMPLETE", (0, time.time() - 2 * DAY))
    (bucket / "m/vae/config.json").write_text("{ }")
    new = resolve(uri, options())
    assert not old.exists() and new.is_dir() and other.is_dir()
    assert not stale.exists() and elsewhere.exists()
    os.utime(elsewhere, (0, time.time() - 2 * DAY))
    resolve(uri, options())
    assert not elsewhere.exists()


@pytest.mark.parametrize("harm", ["no marker", "a file is gone", "a file is short", "marker is no JSON"])
def test_a_copy_that_is_not_whole_is_not_used(harm, uri, options, model):
    folder = resolve(uri, options())
    target = folder / "transformer" / SHARDS[0]
    if harm == "no marker":
        (folder / "COMPLETE").unlink()
    elif harm == "a file is gone":
        target.unlink()
    elif harm == "a file is short":
        os.truncate(target, 1000)
    else:
        (folder / "COMPLETE").write_text("{")
    assert resolve(uri, options()) == folder
    assert content(folder) == needed(model)


def test_a_journal_that_is_cut_off_counts_for_nothing(uri, root, options, model):
    with contextlib.closing(open_source(uri, options())) as source, CacheWriter(root, source) as writer:
        spans = writer.missing()
        fetch(source, spans, [memoryview(bytearray(16 * MIB))], writer.write)
    (journal,) = root.glob("staging/*.journal/*")
    journal.write_text(journal.read_text()[:-5] + '\n["../x", 0, 10]\n["model_index.json", 7, 1]\n[1]\nnull\n"')
    with contextlib.closing(open_source(uri, options())) as source, CacheWriter(root, source) as writer:
        assert [span.file.path for span in writer.missing()] == [spans[-1].file.path]
    assert content(resolve(uri, options())) == needed(model)
