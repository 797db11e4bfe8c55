"""SFTP as fsspec speaks it: to hosts that are known, as whom ssh would log in, many questions at a time."""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from contextlib import suppress
from typing import Any

import paramiko
from fsspec.implementations.sftp import SFTPFileSystem
from paramiko.sftp import CMD_READ, CMD_STATUS, int64

from edgemerge.remote.failures import Refusal
from edgemerge.remote.stores.address import StoreAddress

__all__ = ["Sftp", "open_sftp"]

TIMEOUT = 30.0  # seconds without a byte
QUESTION = 1 << 15  # bytes that one question may ask for
logging.getLogger("paramiko").addHandler(logging.NullHandler())  # else it writes on the terminal
HOSTS = ("~/.ssh/known_hosts", "/etc/ssh/ssh_known_hosts")
CONFIG = "~/.ssh/config"


def open_sftp(address: StoreAddress) -> Sftp:
    """Connect to a host.

    Raises
    ------
    Refusal
        Its key is not known, it refuses the login, or a file of the user's ssh cannot be used.
    OSError, EOFError, SSHException
        It cannot be reached.
    """
    user, password = address.login or (None, None)
    known = _read_config(address.host)
    settings: dict[str, Any] = {
        "hostname": known["hostname"],
        "port": address.port or int(known["port"]),
        "username": user or known.get("user"),
        "password": password,
        # As ssh does, it goes without those that are not there.
        "key_filename": list(filter(os.path.exists, known.get("identityfile", []))),
        "timeout": TIMEOUT,
        "banner_timeout": TIMEOUT,
        "auth_timeout": TIMEOUT,
    }
    command = _proxy_command(known, settings["port"])
    return Sftp(address.host, skip_instance_cache=True, settings=settings, command=command)


class Sftp(SFTPFileSystem):  # type: ignore[misc]
    """fsspec's file system, which itself trusts any host."""

    def _connect(self) -> None:
        settings = self.ssh_kwargs["settings"]
        host = settings["hostname"]
        self.client = paramiko.SSHClient()
        for path in HOSTS:
            self._load_hosts(path)
        self.client.set_missing_host_key_policy(_RefuseUnknown())
        try:
            self.client.connect(**settings, sock=_start_proxy(self.ssh_kwargs["command"]))
            self.ftp = self.client.open_sftp()
            self.ftp.get_channel().settimeout(TIMEOUT)
        except BaseException as error:
            self.cut()
            if (reason := _describe(error, host)) is None:
                raise
            raise Refusal(reason) from None

    def _load_hosts(self, path: str) -> None:
        try:
            self.client.load_system_host_keys(os.path.expanduser(path))
        except OSError:
            pass  # what is in it is not known
        except ValueError as error:
            raise Refusal(_unreadable(path, error)) from None

    def _open(self, path: str, mode: str = "rb", **settings: object) -> _Pipeline:
        return _Pipeline(self.ftp.open(path, mode))

    def cut(self) -> None:
        """Close the connection; a read that waits in another thread ends at once."""
        self.client.close()


class _Pipeline:
    """A file that is read where it was asked for, in order.

    paramiko's own `prefetch` and `readv` ask from another thread, and keep what came twice. So this does as
    they do with the client's two functions for answers that come later.
    """

    def __init__(self, file: paramiko.SFTPFile) -> None:
        self._file, self._client = file, file.sftp
        self._asked: deque[tuple[int, int, int]] = deque()  # number of a question, and its range
        self._answers: dict[int, bytes | Exception] = {}
        self._rest = memoryview(b"")  # of the last answer

    def ask(self, start: int, stop: int) -> None:
        """Ask for bytes [start, stop), which come after all that was asked for before."""
        for first in range(start, stop, QUESTION):
            self._asked.append(self._ask(first, min(stop, first + QUESTION)))

    def _ask(self, start: int, stop: int) -> tuple[int, int, int]:
        handle = self._file.handle
        number = self._client._async_request(self, CMD_READ, handle, int64(start), stop - start)
        return number, start, stop

    def readinto(self, view: memoryview) -> int:
        """Read some of what was asked for; 0 where the file ended."""
        if not self._rest:
            number, start, stop = self._asked.popleft()
            while number not in self._answers:
                self._client._read_response()
            answer = self._answers.pop(number)
            if isinstance(answer, EOFError):
                return 0
            if isinstance(answer, Exception):
                raise answer
            if answer and start + len(answer) < stop:  # a server may send less
                self._asked.appendleft(self._ask(start + len(answer), stop))
            self._rest = memoryview(answer)
        n_read = min(len(view), len(self._rest))
        view[:n_read], self._rest = self._rest[:n_read], self._rest[n_read:]
        return n_read

    def _async_response(self, kind: int, message: paramiko.Message, number: int) -> None:
        """Take an answer; called by the client, from whoever reads one."""
        if kind != CMD_STATUS:
            self._answers[number] = message.get_string()
            return
        try:
            self._client._convert_status(message)
            self._answers[number] = b""
        except Exception as error:
            self._answers[number] = error

    def close(self) -> None:
        self._file.close()


class _Proxy(paramiko.ProxyCommand):  # type: ignore[misc]
    """paramiko's, which leaves its process behind."""

    def close(self) -> None:
        self.process.kill()
        with suppress(OSError, ValueError):  # a thread may still read from it
            self.process.communicate()


class _RefuseUnknown(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]
    def missing_host_key(self, client: object, hostname: str, key: paramiko.PKey) -> None:
        raise Refusal(
            f"is on a host whose key is not in ~/.ssh/known_hosts ({key.get_name()} "
            f"{key.fingerprint}); compare it, and log in once with ssh"
        )


def _describe(error: BaseException, host: str) -> str | None:
    """Say what is wrong where another try would not help."""
    match error:
        case paramiko.BadHostKeyException():
            return (
                f"is on a host whose key is another than ~/.ssh/known_hosts has for {host}; ask who runs "
                "it before you connect"
            )
        case paramiko.PasswordRequiredException():
            return "needs a key with a passphrase; add it to the agent with ssh-add"
        case paramiko.AuthenticationException():
            return (
                "refuses the login; see that ssh to it works, with the same user and key, or give "
                "sftp://USER:PASSWORD@HOST/"
            )
        case paramiko.SSHException() if "No authentication methods" in str(error):
            return "wants a login; add a key to the agent, or give sftp://USER:PASSWORD@HOST/"
        case OSError() if error.filename is not None:  # of a key; the network has no files
            return _unreadable(error.filename, error)
        case UnicodeDecodeError():
            return (
                f"cannot be reached, as what the host says, or a key in ~/.ssh or of {CONFIG}, is no text; "
                "see that ssh to it works"
            )
    return None


def _read_config(host: str) -> paramiko.SSHConfigDict:
    """Return what the user's configuration says of a host; name and port are in it."""
    try:
        known = paramiko.SSHConfig.from_path(os.path.expanduser(CONFIG)).lookup(host)
    except OSError:
        known = paramiko.SSHConfigDict(hostname=host)
    except (paramiko.ConfigParseError, ValueError) as error:
        raise Refusal(_unreadable(CONFIG, error)) from None
    port = known.setdefault("port", "22")
    if not re.fullmatch(r"\d{1,5}", port, re.ASCII):
        raise Refusal(f"cannot be reached, as {CONFIG} states the port {port!r}; mend it")
    return known


def _proxy_command(known: paramiko.SSHConfigDict, port: int) -> str | None:
    """Return the command that ssh would start to reach a host."""
    command: str | None = known.get("proxycommand")
    if command is None and (jump := known.get("proxyjump")) not in (None, "none"):
        command = f"ssh -W {known['hostname']}:{port} {jump}"
    return None if command == "none" else command


def _start_proxy(command: str | None) -> _Proxy | None:
    if command is None:
        return None
    try:
        return _Proxy(command)
    except (OSError, ValueError) as error:
        raise Refusal(
            f"cannot be reached, as the proxy of {CONFIG} cannot be started ({error}); see to "
            "ProxyCommand or ProxyJump there"
        ) from None


def _unreadable(path: str, error: Exception) -> str:
    reason = (error.strerror if isinstance(error, OSError) else None) or error
    return f"cannot be reached, as {path} cannot be read ({reason}); mend it"
