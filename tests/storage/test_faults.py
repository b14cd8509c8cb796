"""What goes wrong on the way: it is tried again, or it ends with one line that names the object. And many threads."""

from __future__ import annotations

import mmap
import queue
import shutil
import threading
from contextlib import closing
from pathlib import Path

import pytest

from runtime.errors import StartupError
from runtime.storage import fetch as fetch_module
from runtime.storage import ranges
from runtime.storage.fetch import Meter, Progress, Span, fetch, read_whole, spans_of
from runtime.storage.registry import open_source, resolve
from runtime.storage.source import CHUNK, Changed, RemoteFile, Transient
from tests.storage.conftest import MIB, NEEDED, content, needed
from tests.storage.servers import SECRET, Fault

SHARD = "diffusion_pytorch_model-00001-of-00002.safetensors"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(fetch_module, "LONGEST_WAIT", 0.02)


@pytest.fixture
def uri(model, bucket) -> str:
    shutil.copytree(model, bucket / "m")
    return f"s3://{bucket.name}/m"


@pytest.fixture
def through(options, proxy):
    return options(AWS_S3_ENDPOINT=proxy.url)


TRANSIENT = {
    "reset": Fault("reset", SHARD, times=3, after=MIB),
    "reset at once": Fault("reset", SHARD, times=3, after=1),
    "truncated": Fault("truncate", SHARD, times=3, after=MIB),
    "503": Fault("answer", SHARD, times=4),
    "500": Fault("answer", SHARD, times=2, status=500, body=b""),
    "503 of the listing": Fault("answer", "listing", times=3),
    "503 of an index": Fault("answer", "index.json", times=2),
    "a wrong byte in a small file": Fault("corrupt", "vae/diffusion", after=5000),
    "a hiccup of everything": Fault("answer", "", times=6),
}


@pytest.mark.parametrize("name", TRANSIENT)
def test_what_passes_is_tried_again(name, uri, model, through, proxy, caplog):
    fault = TRANSIENT[name]
    proxy.faults = [Fault(**{key: getattr(fault, key) for key in Fault.__dataclass_fields__})]
    found = content(resolve(uri, through))
    assert found == needed(model)
    assert proxy.faults[0].times == 0
    assert "trying again" in caplog.text and SECRET not in caplog.text and "X-Amz" not in caplog.text


PERMANENT = {
    "always reset": (Fault("reset", SHARD, times=999), "gave up after 8 attempts"),
    "always truncated": (Fault("truncate", SHARD, times=999), "the answer ended after"),
    "always 503": (Fault("answer", SHARD, times=999), "status 503 SlowDown"),
    "gone": (Fault("answer", SHARD, times=999, status=404, body=b"<Error><Code>NoSuchKey</Code></Error>"), "no such"),
    "denied": (Fault("answer", SHARD, times=999, status=403, body=b""), "access denied"),
    "always a wrong byte": (Fault("corrupt", "vae/diffusion", times=999, after=50_000), "wrong checksum"),
    "a wrong byte in a large file": (Fault("corrupt", SHARD, times=999), "wrong checksum after the download"),
}


@pytest.mark.parametrize("name", PERMANENT)
def test_what_does_not_pass_ends_with_one_line(name, uri, model, through, proxy, tmp_path):
    fault, said = PERMANENT[name]
    proxy.faults = [fault]
    with pytest.raises(StartupError) as raised:
        resolve(uri, through)
    text = str(raised.value)
    assert "\n" not in text and said in text and uri in text and SECRET not in text and "X-Amz" not in text
    assert fault.path.removesuffix(".safetensors") in text
    assert not list((tmp_path / "cache/models").iterdir())  # nothing is there that could be trusted
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("fetch", "cache-lease"))]
    proxy.faults = []
    assert content(resolve(uri, through)) == needed(model)


def test_a_store_that_stops_sending(uri, model, through, proxy, monkeypatch):
    monkeypatch.setattr(ranges, "TIMEOUT", 1.0)  # no less: a busy machine may keep a sound store silent
    proxy.faults = [Fault("hold", SHARD)]
    assert content(resolve(uri, through)) == needed(model)
    assert proxy.faults[0].times == 0


def replace_with(path: Path, data: bytes) -> None:
    """As a store does it: at once."""
    part = path.parents[2] / "part"
    part.write_bytes(data)
    part.rename(path)


def test_an_object_that_is_replaced_while_it_is_read(uri, bucket, through):
    target = bucket / "m/transformer" / SHARD
    with closing(open_source(uri, through)) as source:
        (file,) = (file for file in source.files() if file.path.endswith(SHARD))
        replace_with(target, b"x" * file.size)
        with pytest.raises(Changed, match="was replaced meanwhile"):
            source.read(file, 0, memoryview(bytearray(100)))


def test_after_a_replaced_object_the_new_one_is_taken(uri, bucket, options, proxy, model):
    """412 of one chunk: the listing is made again, and what it now says is fetched."""
    target = bucket / "m/transformer" / SHARD
    changed = bytes(reversed(target.read_bytes()))
    one_by_one = options(AWS_S3_ENDPOINT=proxy.url, DOWNLOAD_THREADS="1")  # nothing is read beside the held chunk
    proxy.faults = [Fault("hold", SHARD)]

    def replace() -> None:
        if proxy.holding.wait(60):
            replace_with(target, changed)
            proxy.release.set()

    thread = threading.Thread(target=replace)
    thread.start()
    folder = resolve(uri, one_by_one)
    thread.join()
    assert proxy.holding.is_set()
    assert content(folder) == {**needed(model), f"transformer/{SHARD}": changed}


# --- fetch itself, on a source in memory


class Memory:
    uri, revision = "memory://m", "1"

    def __init__(self, size: int = 100) -> None:
        self.data = bytes(range(256)) * (size // 256 + 1)
        self.file = RemoteFile("a/b", size, "1")
        self.failures = 0
        self.reads: list[int] = []

    def files(self) -> tuple[RemoteFile, ...]:
        return (self.file,)

    def read(self, file: RemoteFile, start: int, into: memoryview) -> None:
        self.reads.append(start)
        if self.failures:
            self.failures -= 1
            raise Transient("a hiccup")
        into[:] = self.data[start : start + len(into)]

    def close(self) -> None:
        pass


def buffers(count: int, size: int) -> list[memoryview]:
    return [memoryview(bytearray(size)) for _ in range(count)]


def test_every_byte_once_and_in_its_place():
    source, target, spans, retried = Memory(10_007), bytearray(10_007), [], []
    source.failures = 5

    def sink(span: Span, view: memoryview) -> None:
        assert threading.current_thread() is not threading.main_thread() and len(view) == span.length
        target[span.start : span.start + span.length] = view
        spans.append(span)

    fetch(source, spans_of(source.file, 100), buffers(3, 100), sink, on_retry=lambda: retried.append(1))
    assert bytes(target) == source.data[:10_007]
    assert sorted(span.start for span in spans) == list(range(0, 10_007, 100)) and len(retried) == 5


def test_the_sink_and_its_buffer_are_one_at_a_time():
    source, at_work = Memory(5000), set()

    def sink(span: Span, view: memoryview) -> None:
        assert id(view.obj) not in at_work
        at_work.add(id(view.obj))
        assert bytes(view) == source.data[span.start : span.start + span.length]
        at_work.discard(id(view.obj))

    fetch(source, spans_of(source.file, 64), buffers(4, 64), sink)


def test_the_first_error_ends_all():
    source = Memory(100_000)

    def sink(span: Span, view: memoryview) -> None:
        if span.start == 500:
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fetch(source, spans_of(source.file, 100), buffers(4, 100), sink)
    assert len(source.reads) < 1000
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fetch")]


def test_attempts_are_bounded():
    source = Memory()
    source.failures = 99
    with pytest.raises(StartupError, match="memory://m/a/b: a hiccup; gave up after 3 attempts"):
        fetch(source, spans_of(source.file), buffers(1, 100), lambda span, view: None, attempts=3)
    assert len(source.reads) == 3


def test_a_buffer_must_hold_a_span():
    source = Memory(200)
    with pytest.raises(ValueError, match="100 bytes for a span of 200"):
        fetch(source, spans_of(source.file), buffers(1, 100), lambda span, view: None)


def test_spans():
    file = RemoteFile("a", 2 * CHUNK + 1, "")
    assert [(s.start, s.length) for s in spans_of(file)] == [(0, CHUNK), (CHUNK, CHUNK), (2 * CHUNK, 1)]
    assert list(spans_of(RemoteFile("a", 0, ""))) == []


def test_chunks_are_checked_against_the_manifest():
    import hashlib
    from dataclasses import replace

    source = Memory(CHUNK + 10)
    digests = [hashlib.sha256(source.data[s : min(s + CHUNK, CHUNK + 10)]).hexdigest() for s in (0, CHUNK)]
    room = [memoryview(mmap.mmap(-1, CHUNK))]
    good = replace(source.file, sha256="0" * 64, chunks=tuple(digests))
    fetch(source, spans_of(good), room, lambda span, view: None)
    bad = replace(good, chunks=(digests[0], digests[0]))
    with pytest.raises(StartupError, match=f"wrong checksum of bytes {CHUNK} to"):
        fetch(source, spans_of(bad), room, lambda span, view: None, attempts=2)
    with pytest.raises(StartupError, match="wrong checksum"):
        read_whole(Memory(10), RemoteFile("x", 10, "", sha256="0" * 64))


def test_progress_is_told_and_logged(caplog, monkeypatch):
    monkeypatch.setattr(fetch_module, "REPORT_SECONDS", 0.001)
    monkeypatch.setattr(fetch_module, "LOG_SECONDS", 0.0)
    heard: queue.Queue[Progress] = queue.Queue()
    with (
        caplog.at_level("INFO", logger="diffusion_runtime"),
        Meter("s3://b/m", 3 * 2**30, 2**30, heard.put) as meter,
    ):
        first = heard.get(timeout=60)  # nothing has come yet
        assert (first.done_bytes, first.rate, first.seconds_left) == (2**30, 0, None)
        meter.add(2**30, "vae")
        while (told := heard.get(timeout=60)).done_bytes == 2**30:
            pass
        meter.retry()
        end = meter.end()
        count = heard.qsize()
    assert (told.done_bytes, told.total_bytes, told.component) == (2 * 2**30, 3 * 2**30, "vae")
    assert told.rate > 0 and told.seconds_left is not None
    assert str(told).startswith("vae: 2.00 of 3.00 GiB, ")
    assert end.retries == 1 and heard.qsize() == count
    fields = [record.fields for record in caplog.records]
    assert fields[-2]["bytes"] == 2 * 2**30 and "mib_per_s" in fields[-2] and "seconds_left" in fields[-2]
    assert caplog.messages[-1] == "downloaded s3://b/m" and fields[-1]["retries"] == 1
    assert len(NEEDED) == 12
