"""What stands far away when pictures are fetched by URL: a DNS server, TLS servers, an authority; on real sockets."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Behave = Callable[[ssl.SSLSocket], None]


def head(status: str, *lines: str) -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", *lines, "", "")).encode()


def answer(body: bytes, status: str = "200 OK", *lines: str) -> Behave:
    return lambda sock: sock.sendall(head(status, f"Content-Length: {len(body)}", *lines) + body)


@dataclass
class Authority:
    """A certificate authority whose root lies at `path`; `context` trusts it and nothing else."""

    folder: Path

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Test authority")])
        self.path = self.folder / "authority.pem"
        root = self._certificate(self._name, self._key.public_key(), x509.BasicConstraints(ca=True, path_length=0))
        self.path.write_bytes(root.public_bytes(serialization.Encoding.PEM))

    @property
    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.path))

    def issue(self, *names: str) -> ssl.SSLContext:
        """A server's context with a certificate for `names`."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        entries: list[x509.GeneralName] = []
        for name in names:
            try:
                entries.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                entries.append(x509.DNSName(name))
        certificate = self._certificate(subject, key.public_key(), x509.SubjectAlternativeName(entries))
        path = self.folder / f"{names[0].replace('*', 'any')}.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    def _certificate(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, extension: x509.ExtensionType
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )


@dataclass
class Host:
    """A TLS server: `connections` counts who came, `asked` holds (name in SNI, request's head) of those that spoke."""

    port: int
    connections: int = 0
    asked: list[tuple[str | None, bytes]] = field(default_factory=list)


@contextlib.contextmanager
def tls_host(context: ssl.SSLContext, behave: Behave, address: str = "127.0.0.1", port: int = 0) -> Iterator[Host]:
    """`behave` gets each connection once its request's head has come; then it is closed."""
    listener = socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    host = Host(listener.getsockname()[1])
    names: dict[int, str | None] = {}
    context.sni_callback = lambda sock, name, _: names.__setitem__(id(sock), name)  # type: ignore[assignment]
    over, threads = threading.Event(), []

    def serve(raw: socket.socket) -> None:
        raw.settimeout(60)
        with contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True) as sock:
            got = b""
            while b"\r\n\r\n" not in got:
                if not (part := sock.recv(65536)):
                    return
                got += part
            host.asked.append((names.get(id(sock)), got))
            behave(sock)

    def accept() -> None:
        while not over.is_set():
            try:
                raw, _ = listener.accept()
            except OSError:
                return
            if over.is_set():
                raw.close()
                return
            host.connections += 1
            threads.append(threading.Thread(target=serve, args=(raw,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield host
    finally:
        over.set()
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        accepting.join()
        listener.close()
        for thread in threads:
            thread.join()


@dataclass
class Names:
    """A DNS server: the n-th question for the addresses of any name gets the n-th of `answers`, then the last."""

    address: tuple[str, int]
    answers: list[list[str]]
    questions: list[str] = field(default_factory=list)


@contextlib.contextmanager
def dns_server(*answers: list[str], address: str = "127.0.0.1", port: int = 0) -> Iterator[Names]:
    """Speaks UDP, with a time to live of 0. IPv6 addresses are told to those who ask for AAAA."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((address, port))
        names = Names(sock.getsockname(), list(answers))

        def serve() -> None:
            while True:
                packet, client = sock.recvfrom(4096)
                if len(packet) < 12:
                    return
                end = packet.index(b"\0", 12) + 5
                kind = int.from_bytes(packet[end - 4 : end - 2], "big")
                if kind == 1:
                    names.questions.append(name_of(packet))
                which = names.answers[min(max(len(names.questions), 1), len(names.answers)) - 1]
                packed = [ipaddress.ip_address(a).packed for a in which]
                wanted = [p for p in packed if len(p) == {1: 4, 28: 16}.get(kind)]
                records = b"".join(struct.pack(">HHHIH", 0xC00C, kind, 1, 0, len(p)) + p for p in wanted)
                header = packet[:2] + struct.pack(">HHHHH", 0x8180, 1, len(wanted), 0, 0)
                sock.sendto(header + packet[12:end] + records, client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield names
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
                last.sendto(b"", names.address)
            thread.join()


def name_of(packet: bytes) -> str:
    labels, at = [], 12
    while packet[at]:
        labels.append(packet[at + 1 : at + 1 + packet[at]].decode())
        at += 1 + packet[at]
    return ".".join(labels)


def ask(server: tuple[str, int], name: str) -> list[str]:
    """The IPv4 addresses that a DNS server tells, without any cache in between."""
    question = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0\0\1\0\1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(60)
        sock.sendto(struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + question, server)
        packet, _ = sock.recvfrom(4096)
    at, found = 12 + len(question), []
    for _ in range(int.from_bytes(packet[6:8], "big")):
        length = int.from_bytes(packet[at + 10 : at + 12], "big")
        found.append(str(ipaddress.ip_address(packet[at + 12 : at + 12 + length])))
        at += 12 + length
    return found
