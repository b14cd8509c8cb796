"""Pictures by URL with the defaults as they are: in a network of its own where a public address is this machine, libc's
resolver asks our DNS server, and nothing of `fetch_picture` is replaced but the authority.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--mount")
INSIDE = """
import asyncio, json, sys
from pathlib import Path
from runtime.errors import InvalidRequest
from runtime.urls import fetch_picture
from tests.server.far_hosts import Authority, answer, dns_server, tls_host

authority = Authority(Path(sys.argv[1]))
PUBLIC, PRIVATE, METADATA = "8.20.30.40", "10.20.30.40", "169.254.169.254"

def fetch(name):
    try:
        found = asyncio.run(fetch_picture(f"https://{name}/cat.png", "image_url", ("*.example.com",), 10**6, 60.0,
                                          trust=authority.context))
        return found.decode()
    except InvalidRequest as error:
        return f"refused: {error}"

context = authority.issue("*.example.com")
said = {}
with (
    tls_host(context, answer(b"public"), PUBLIC, 443) as public,
    tls_host(context, answer(b"private"), PRIVATE, 443) as private,
    tls_host(context, answer(b"metadata"), METADATA, 443) as metadata,
    tls_host(context, answer(b"loopback"), "127.0.0.1", 443) as loopback,
):
    for name, answers in {
        "public": [[PUBLIC]], "private": [[PRIVATE]], "metadata": [[METADATA]], "loopback": [["127.0.0.1"]],
        "mixed": [[PUBLIC, PRIVATE]], "mapped": [["::ffff:10.20.30.40"]], "nat64": [["64:ff9b::a14:1e28"]],
        "rebinding": [[PUBLIC], ["127.0.0.1"]], "back": [["127.0.0.1"], [PUBLIC]],
    }.items():
        with dns_server(*answers, address="127.0.0.1", port=53) as names:
            first = fetch(f"{name}.example.com")
            said[name] = [first, list(names.questions), fetch(f"{name}.example.com")]
    counts = [public.connections, private.connections, metadata.connections, loopback.connections]
print(json.dumps({"said": said, "counts": counts}))
"""


def can_unshare() -> bool:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return False
    return not subprocess.run([*UNSHARE, "ip", "link", "set", "lo", "up"], capture_output=True).returncode


@pytest.mark.skipif(not can_unshare(), reason="needs unshare and ip, for a network of its own")
def test_the_defaults_against_the_systems_resolver(tmp_path: Path) -> None:
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:30 attempts:1\n")
    (tmp_path / "nsswitch.conf").write_text("hosts: files dns\n")
    (tmp_path / "inside.py").write_text(INSIDE)
    addresses = ("8.20.30.40", "10.20.30.40", "169.254.169.254")
    steps = [
        "ip link set lo up",
        *(f"ip addr add {address}/32 dev lo" for address in addresses),
        *(f"[ ! -e /etc/{n} ] || mount --bind {tmp_path}/{n} /etc/{n}" for n in ("resolv.conf", "nsswitch.conf")),
        f"exec {sys.executable} {tmp_path}/inside.py {tmp_path}",
    ]
    done = subprocess.run(
        [*UNSHARE, "sh", "-ec", "\n".join(steps)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    said = told["said"]
    assert said["public"] == ["public", ["public.example.com"], "public"]
    for name in ("private", "metadata", "loopback", "mixed", "mapped", "nat64"):
        assert all(text.startswith("refused: ") for text in (said[name][0], said[name][2])), said[name]
        assert "its host must have public addresses only" in said[name][0]
    first, questions, second = said["rebinding"]
    assert first == "public" and questions == ["rebinding.example.com"] and second.startswith("refused: ")
    first, questions, second = said["back"]
    assert first.startswith("refused: ") and len(questions) == 1 and second == "public"
    assert told["counts"] == [4, 0, 0, 0], "nobody but the public address was ever connected to"
