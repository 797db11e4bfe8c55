"""A systemd unit for `edgemerge serve`: locked in, restarted on failure, the key not in its text.

Made for systemd 245 (2020) and later; settings an older one does not know are ignored by it.
"""

from __future__ import annotations

import grp
import ipaddress
import os
import pwd
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from edgemerge.errors import OutputError, RecipeError
from edgemerge.provenance.signature import signature_path
from edgemerge.runtime.llama import Lora
from edgemerge.runtime.serve.key import check_characters

__all__ = ["Service", "make_unit", "write_unit"]

NAME = "edgemerge.service"
KEY_NAME = "edgemerge.env"
KEY_VARIABLE = "EDGEMERGE_API_KEY"
SYSTEM_FOLDER = Path("/etc/systemd/system")

# Beside the models' budget the interpreter, the web server and pages of the files in use need room:
# the kernel counts them all, and ends the server where they do not fit.
_HEADROOM_SHARE, _HEADROOM_BYTES = 0.25, 256 << 20
_STOP_MARGIN = 15  # seconds beyond the server's own grace, before systemd kills it

# Settings that any service manager can apply, also a user's: they are seccomp filters and limits.
_FENCE = """\
UMask=0077
LimitCORE=0
NoNewPrivileges=yes
LockPersonality=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~@privileged"""

# Those that need root's manager. A user's cannot drop capabilities (the service would not start),
# and mounts only where the kernel lets anyone make user namespaces, which Ubuntu forbids.
# ProcSubset=pid is not among them: memory left is read from /proc/meminfo.
_SYSTEM_FENCE = """\
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RemoveIPC=yes
KeyringMode=private"""

# ctypes' callbacks need no page that is writable and executable (libffi has trampolines in its file);
# CUDA compiles into such pages.
_NO_GPU = "MemoryDenyWriteExecute=yes"
_NO_GPU_SYSTEM = "PrivateDevices=yes"
# Names of /proc/devices where there is one: NVIDIA's desktop driver, Jetson's, and DRM for Vulkan.
_GPU_SYSTEM = """\
DevicePolicy=closed
DeviceAllow=char-nvidia* rw
DeviceAllow=char-nvhost* rw
DeviceAllow=char-nvgpu* rw
DeviceAllow=char-drm rw
DeviceAllow=/dev/nvmap rw
DeviceAllow=/dev/kfd rw"""
_GPU_GROUPS = ("video", "render")
_TEMPORARY = (Path("/tmp"), Path("/var/tmp"))  # PrivateTmp hides what others put there


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What the unit starts.

    Attributes
    ----------
    models : mapping of str to Path
        Files by the name that clients use.
    host, port : str, int
        Address to listen on.
    grace : float
        Seconds that running requests have at a stop.
    memory : int, optional
        Budget in bytes.
    loras : sequence of Lora
        Adapters to add.
    public_key : Path, optional
        Key with which every model must be signed.
    gpu : bool
        Whether layers go to a GPU, whose devices are then open to the service.
    api_key : str, optional
        Kept in a file of its own that only its owner may read.
    options : sequence of str
        Other arguments of `edgemerge serve`, as they are.
    """

    models: Mapping[str, Path]
    host: str
    port: int
    grace: float
    memory: int | None = None
    loras: Sequence[Lora] = ()
    public_key: Path | None = None
    gpu: bool = False
    api_key: str | None = field(default=None, repr=False)
    options: Sequence[str] = ()

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name
            return False

    def command(self) -> list[str]:
        """Arguments of the process, with absolute paths."""
        # A virtual environment is known by the path of its python: links are not followed. -P keeps a
        # folder named edgemerge in the working directory from being taken for the package.
        command = [sys.executable, "-P", "-m", "edgemerge", "serve"]
        command += ["--host", self.host, "--port", str(self.port), "--grace", f"{self.grace:g}"]
        if self.memory is not None:
            command += ["--memory", str(self.memory)]
        for lora in self.loras:
            command += ["--lora", f"{lora.path.absolute()}={lora.scale}"]
        if self.public_key is not None:
            command += ["--require-signature", str(self.public_key.absolute())]
        models = [f"{name}={path.absolute()}" for name, path in self.models.items()]
        return [*command, *self.options, "--", *models]

    def files(self) -> list[Path]:
        """Name what the service reads: models, adapters, the interpreter and the package."""
        own = [Path(sys.executable), Path(sys.prefix), Path(__file__)]
        given = [*self.models.values(), *(lora.path for lora in self.loras)]
        if self.public_key is not None:
            given += [self.public_key, *map(signature_path, given)]
        return [*given, *own]


def write_unit(service: Service, *, directory: Path | None = None, force: bool = False) -> str:
    """Write the unit, and the key's file beside it, and tell what was written and what to do next.

    As root it is a service of the system, else one of the user.

    Parameters
    ----------
    service : Service
        What to start.
    directory : Path, optional
        Where to write; by default where systemd looks.
    force : bool
        Replace a unit that is there.

    Returns
    -------
    str
        Lines for the reader.

    Raises
    ------
    RecipeError
        The port is 0, or the key has characters that no HTTP header may have.
    OutputError
        There is a unit already, the folder cannot be written, or a system's service could not
        read a file: it is closed to all but root, or temporary.
    """
    _check(service)
    is_system = os.geteuid() == 0
    folder = directory or (SYSTEM_FOLDER if is_system else _user_folder())
    user = _choose_user(service.files()) if is_system else None
    unit, key = folder / NAME, folder / KEY_NAME
    taken = [path for path in (unit, key) if os.path.lexists(path)]
    if taken and not force:
        raise OutputError("exists already; give --force to replace it", path=taken[0])
    text = make_unit(
        service, system=is_system, user=user, key_file=key if service.api_key else None
    )
    if service.api_key is not None:
        _publish(key, f"{KEY_VARIABLE}={_quote_value(service.api_key)}\n", 0o600)
    _publish(unit, text, 0o644)
    if service.api_key is None:
        key.unlink(missing_ok=True)  # the secret of the unit that was replaced
    return "\n".join(_report(service, unit, key, text, is_system, user))


def _check(service: Service) -> None:
    if service.port == 0:
        raise RecipeError("a service needs a port of its own; give one with --port", field="port")
    if service.api_key is not None:
        check_characters(service.api_key)


def make_unit(
    service: Service, *, system: bool, user: str | None = None, key_file: Path | None = None
) -> str:
    """Make the unit's text.

    Parameters
    ----------
    service : Service
        What to start.
    system : bool
        Whether it is for the system's service manager, else for a user's.
    user : str, optional
        Account of a system's service; by default one that exists only while it runs.
    key_file : Path, optional
        File that holds the key as an environment variable.
    """
    return "\n".join(_unit_lines(service, system, user, key_file)) + "\n"


def _unit_lines(
    service: Service, system: bool, user: str | None, key_file: Path | None
) -> Iterator[str]:
    yield "# Written by edgemerge serve --install; run that again with --force to change it."
    yield "[Unit]"
    yield f"Description=edgemerge, models over HTTP: {_escape(', '.join(service.models))}"
    if system and not service.is_local:
        yield "Wants=network-online.target\nAfter=network-online.target"
    if system:
        folders = dict.fromkeys(path.absolute().parent for path in service.models.values())
        yield f"RequiresMountsFor={' '.join(_quote(str(folder)) for folder in folders)}"
    yield "\n[Service]\nType=exec"
    # The colon: a dollar sign is a dollar sign.
    yield f"ExecStart=:{' '.join(_quote(word) for word in service.command())}"
    if key_file is not None:
        yield f"EnvironmentFile={_escape(str(key_file.absolute()))}"
    yield "Environment=PYTHONUNBUFFERED=1"
    # 2: the command line is wrong, which another try does not change
    yield "Restart=on-failure\nRestartSec=5\nRestartPreventExitStatus=2"
    yield f"TimeoutStopSec={service.grace + _STOP_MARGIN:g}"
    if service.memory is not None:
        room = max(int(service.memory * _HEADROOM_SHARE), _HEADROOM_BYTES)
        yield f"MemoryMax={service.memory + room}"
    yield f"\n{_FENCE}"
    if not service.gpu:
        yield _NO_GPU
    if system:
        yield from _system_lines(service, user)
    yield "\n[Install]"
    yield f"WantedBy={'multi-user' if system else 'default'}.target"


def _system_lines(service: Service, user: str | None) -> Iterator[str]:
    yield "DynamicUser=yes" if user is None else f"User={user}"
    yield _SYSTEM_FENCE
    yield _GPU_SYSTEM if service.gpu else _NO_GPU_SYSTEM
    if service.gpu and (groups := [name for name in _GPU_GROUPS if _has_group(name)]):
        yield f"SupplementaryGroups={' '.join(groups)}"
    # What compiles and caches (CUDA does) has a place, in a file system that is else read-only.
    yield "CacheDirectory=edgemerge"
    yield "Environment=XDG_CACHE_HOME=%C/edgemerge CUDA_CACHE_PATH=%C/edgemerge"
    if service.port < 1024:
        capability = "CAP_NET_BIND_SERVICE"
        yield f"CapabilityBoundingSet={capability}\nAmbientCapabilities={capability}"
    else:
        yield "CapabilityBoundingSet="
        if not service.gpu:  # a private user namespace hides the groups that GPU devices ask for
            yield "PrivateUsers=yes"
    if service.is_local:
        yield "IPAddressDeny=any\nIPAddressAllow=localhost"


def _report(
    service: Service, unit: Path, key: Path, text: str, is_system: bool, user: str | None
) -> Iterator[str]:
    yield f"wrote {unit}:\n\n{text}"
    if service.api_key is not None:
        yield f"The API key is in {key}, which only its owner may read."
    if user is not None:
        yield f"It runs as {user}, since its files are closed to other users."
    systemctl = "systemctl" if is_system else "systemctl --user"
    yield "To start it now and at every boot:"
    yield f"  {systemctl} daemon-reload"
    yield f"  {systemctl} enable --now {unit.stem}"
    if not is_system:
        yield "To keep it running while you are logged out:"
        yield "  loginctl enable-linger"


def _escape(text: str) -> str:
    """Text without what systemd replaces: %-specifiers, and line ends."""
    return "".join(c if c.isprintable() else " " for c in text).replace("%", "%%")


def _quote(word: str) -> str:
    """Quote a word of a command line or a list, as systemd.syntax(7) and systemd.service(5) say."""
    word = word.replace("%", "%%")
    if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\x{ord(m[0]):02x}", escaped) + '"'


def _quote_value(value: str) -> str:
    """Quote a value of an environment file."""
    return '"' + re.sub(r'(["\\`$])', r"\\\1", value) + '"'


def _has_group(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _user_folder() -> Path:
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "systemd" / "user"


def _choose_user(files: Sequence[Path]) -> str | None:
    """Account that can read the files: one made for the service (None), else who called sudo."""
    for path, folder in product(files, _TEMPORARY):
        if path.absolute().is_relative_to(folder):
            raise OutputError(
                f"a service cannot look into {folder}; move it to a lasting place, such as /srv",
                path=path.absolute(),
            )
    blocked = _find_blocked(files, None)
    if blocked is None:
        return None
    caller = os.environ.get("SUDO_USER")
    if caller not in (None, "root") and _find_blocked(files, pwd.getpwnam(caller)) is None:
        return caller
    path, place = blocked
    raise OutputError(
        f"the service cannot read it, since {place} is closed to other users; move it to where "
        "all can read, such as /srv or /opt",
        path=path.absolute(),
    )


def _find_blocked(
    files: Sequence[Path], person: pwd.struct_passwd | None
) -> tuple[Path, Path] | None:
    """Find a file that a person, or somebody of no group, cannot read, and what is in the way."""
    for path in files:
        real = path.resolve()
        for place in (real, *real.parents):
            wanted = 4 if place == real else 1  # read it; pass through the folders above it
            if not _mode_bits(place.stat(), person) & wanted:
                return path, place
    return None


def _mode_bits(status: os.stat_result, person: pwd.struct_passwd | None) -> int:
    """Read (4), write (2) and search (1) permission that a person, or any other, has."""
    if person is not None and status.st_uid == person.pw_uid:
        return status.st_mode >> 6
    if person is not None and status.st_gid in os.getgrouplist(person.pw_name, person.pw_gid):
        return status.st_mode >> 3
    return status.st_mode


def _publish(path: Path, text: str, mode: int) -> None:
    """Write a file beside its name and give it that name when it is whole."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(part, flags, mode), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OutputError(f"cannot be written ({error.strerror})", path=path) from error
