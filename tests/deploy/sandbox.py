"""Becomes a container: own mounts, network and process ids, a read-only root, an arbitrary user id with group 0.

    unshare --mount --net --pid --fork python sandbox.py SPEC.json

Writes "made" when the namespaces are ready, waits for a line on stdin (JSON: more variables), and becomes the
command: process 1 of the container. Needs root.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

SYSTEM = ("usr", "bin", "sbin", "lib", "lib64", "etc")
DEVICES = ("null", "zero", "full", "random", "urandom")
SET_FLAGS, UP = 0x8914, 0x1


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def bind(source: Path, target: Path, readonly: bool = True) -> None:
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount("--bind", source, target)
    if readonly:
        mount("-o", "remount,bind,ro", target)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    root = Path(spec["root"])
    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "tmpfs", root)
    for name in SYSTEM:
        path = Path("/", name)
        if path.is_symlink():
            (root / name).symlink_to(path.readlink())
        elif path.is_dir():
            bind(path, root / name)
    (root / "proc").mkdir()
    mount("-t", "proc", "proc", root / "proc")
    for device in DEVICES:
        bind(Path("/dev", device), root / "dev" / device, readonly=False)
    for source, target, readonly in spec["mounts"]:
        bind(Path(source), root / target.lstrip("/"), readonly)
    mount("-o", "remount,ro", root)
    with socket.socket() as control:
        fcntl.ioctl(control, SET_FLAGS, struct.pack("16sh", b"lo", UP))
    os.chroot(root)
    os.chdir(spec["workdir"])
    print("made", flush=True)
    environment = {**spec["env"], **json.loads(sys.stdin.readline())}
    privileges = ["--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
    command = ["setpriv", f"--reuid={spec['uid']}", "--regid=0", *privileges, "--", *spec["command"]]
    with Path("/dev/null").open() as nothing:
        os.dup2(nothing.fileno(), 0)
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    main()
