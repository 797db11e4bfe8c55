"""SFTP servers on this machine, each in a process of its own: OpenSSH's, and one that passwords open."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import paramiko

USER, PASSWORD = "nurse", "p/w:s3cret"


@dataclass
class SftpServer:
    """A server of all files of this machine."""

    port: int
    process: subprocess.Popen[bytes]

    def at(self, path: Path, login: str = "") -> str:
        return f"sftp://{login}127.0.0.1:{self.port}{path}"


@contextmanager
def serve_sftp(home: Path, command: list[str] | None = None) -> Iterator[SftpServer]:
    """Serve until the end of the block whoever has the key in a home; it knows the host.

    Parameters
    ----------
    home : Path
        Gets the folder `.ssh`.
    command : list of str, optional
        Of the server, to which are added its port and a folder with the keys of host and user.
    """
    folder = home / ".ssh"
    folder.mkdir(parents=True, exist_ok=True)
    host, user = (paramiko.ECDSAKey.generate() for _ in range(2))
    host.write_private_key_file(str(folder / "host"))
    user.write_private_key_file(str(folder / "id_ecdsa"))
    public = f"{user.get_name()} {user.get_base64()}\n"
    (folder / "authorized_keys").write_text(public)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = f"[127.0.0.1]:{port} {host.get_name()} {host.get_base64()}\n"
    (folder / "known_hosts").write_text(known)
    command = command or [sys.executable, "-m", "tests.support.sftp_server"]
    log = (folder / "log").open("wb")
    process = subprocess.Popen([*command, str(port), str(folder)], stdout=log, stderr=log)
    try:
        _wait_for(port, process)
        yield SftpServer(port, process)
    finally:
        process.kill()
        process.wait()
        log.close()


def openssh(home: Path) -> list[str] | None:
    """Return a command that starts OpenSSH's server as `serve_sftp` wants; None where there is none."""
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if sshd is None:
        return None
    with suppress(OSError):
        Path("/run/sshd").mkdir(exist_ok=True)  # which it wants of root
    script = home / "sshd.sh"
    script.write_text(
        f'exec {sshd} -D -e -f /dev/null -p "$1" -h "$2/host" -o AuthorizedKeysFile="$2/authorized_keys" '
        "-o StrictModes=no -o PidFile=none -o UsePAM=no -o PermitRootLogin=yes -o ListenAddress=127.0.0.1 "
        '-o Subsystem="sftp internal-sftp"\n'
    )
    return ["sh", str(script)]


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError("no server came up")


# -- in the process --------------------------------------------------------------------------------


class _Door(paramiko.ServerInterface):  # type: ignore[misc]
    def __init__(self, key: str) -> None:
        self.key = key

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED

    def check_auth_password(self, username: str, password: str) -> int:
        is_right = (username, password) == (USER, PASSWORD)
        return paramiko.AUTH_SUCCESSFUL if is_right else paramiko.AUTH_FAILED

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        is_right = key.get_base64() == self.key
        return paramiko.AUTH_SUCCESSFUL if is_right else paramiko.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "password,publickey"


class _Files(paramiko.SFTPServerInterface):  # type: ignore[misc]
    def stat(self, path: str) -> paramiko.SFTPAttributes | int:
        try:
            return paramiko.SFTPAttributes.from_stat(os.stat(path))
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno or 0)

    lstat = stat

    def open(self, path: str, flags: int, attr: object) -> paramiko.SFTPHandle | int:
        try:
            handle = paramiko.SFTPHandle(flags)
            handle.readfile = open(path, "rb")  # noqa: SIM115
            assert stat.S_ISREG(os.fstat(handle.readfile.fileno()).st_mode)
            return handle
        except OSError as error:
            return paramiko.SFTPServer.convert_errno(error.errno or 0)


def _serve(port: int, folder: Path) -> None:
    host = paramiko.ECDSAKey.from_private_key_file(str(folder / "host"))
    key = (folder / "authorized_keys").read_text().split()[1]
    with socket.create_server(("127.0.0.1", port)) as server:
        while True:
            Thread(target=_talk, args=(server.accept()[0], host, key), daemon=True).start()


def _talk(connection: socket.socket, host: paramiko.PKey, key: str) -> None:
    transport = paramiko.Transport(connection)
    transport.add_server_key(host)
    transport.set_subsystem_handler("sftp", paramiko.SFTPServer, _Files)
    with suppress(paramiko.SSHException, EOFError, OSError):
        transport.start_server(server=_Door(key))
        transport.join()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), Path(sys.argv[2]))
