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
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from edgemerge.errors import OutputError, RecipeError
from edgemerge.formats.files import real_path
from edgemerge.output.file import write_file
from edgemerge.plain_text import plain
from edgemerge.provenance.signature import signature_path
from edgemerge.runtime.llama import Lora
from edgemerge.runtime.rpc.addresses import split
from edgemerge.runtime.serve.key import check_characters

__all__ = ["Service", "escape", "fill_unit", "gpu_groups", "make_unit", "quote", "write_unit"]

NAME = "edgemerge.service"
KEY_NAME = "edgemerge.env"
KEY_VARIABLE = "EDGEMERGE_API_KEY"
SYSTEM_FOLDER = Path("/etc/systemd/system")

# Beside the models' budget the interpreter, the web server and pages of the files in use need room:
# the kernel counts them all, and ends the server where they do not fit.
_HEADROOM, _HEADROOM_BYTES = 0.25, 256 << 20
_STOP_MARGIN = 15  # seconds after the server's own grace, before systemd kills it

_TEMPLATE = Path(__file__).with_name("edgemerge.service.in")
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
    rpc : sequence of str
        `ADDRESS:PORT` of rpc workers.
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
    rpc: Sequence[str] = ()
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
        if self.rpc:
            command += ["--rpc", ",".join(self.rpc)]
        if self.far_workers():
            command.append("--i-trust-this-network")  # it was given when the unit was made
        if self.public_key is not None:
            command += ["--require-signature", str(self.public_key.absolute())]
        # "=" in a file's own name would end a name before it
        models = [
            f"{path.absolute()}" if name == path.stem else f"{name}={path.absolute()}"
            for name, path in self.models.items()
        ]
        return [*command, *self.options, "--", *models]

    def far_workers(self) -> list[str]:
        """Addresses of the rpc workers that are other machines."""
        hosts = [split(address)[0] for address in self.rpc]
        return [host for host in hosts if not ipaddress.ip_address(host).is_loopback]

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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", path=unit) from error
    if service.api_key is not None:
        secret = f"{KEY_VARIABLE}={_quote_value(service.api_key)}\n"
        write_file(key, secret.encode(), is_private=True)
    write_file(unit, text.encode("utf-8", "surrogateescape"))
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
    room = max(int((service.memory or 0) * _HEADROOM), _HEADROOM_BYTES)
    groups = gpu_groups()
    folders = dict.fromkeys(path.absolute().parent for path in service.models.values())
    values = {
        "names": escape(", ".join(service.models)),
        "folders": " ".join(quote(str(folder)) for folder in folders),
        "command": " ".join(quote(word) for word in service.command()),
        "key_file": "" if key_file is None else escape(str(key_file.absolute())),
        "stop": f"{service.grace + _STOP_MARGIN:g}",
        "room": str((service.memory or 0) + room),
        "user": user or "",
        "groups": groups,
        "peers": " ".join(["localhost", *service.far_workers()]),
        "cache": "edgemerge",
    }
    return fill_unit(
        values,
        {
            "serve",
            "system" if system else "user",
            "local" if service.is_local else "remote",
            "gpu" if service.gpu else "no-gpu",
            "dynamic" if user is None else "account",
            "low-port" if service.port < 1024 else "high-port",
            *(["key"] if key_file is not None else []),
            *(["memory"] if service.memory is not None else []),
            *(["groups"] if groups else []),
        },
    )


def fill_unit(values: Mapping[str, str], facts: Collection[str]) -> str:
    """Fill the template of units, which says itself how it is read."""
    lines = []
    for line in _TEMPLATE.read_text(encoding="utf-8").splitlines():
        if line.startswith("{"):
            wanted, _, line = line[1:].partition("}")
            if not set(wanted.split()) <= set(facts):
                continue
            line = line.removeprefix(" ")
        if not line.startswith("##"):
            lines.append(re.sub("@([a-z_]+)@", lambda found: values[found[1]], line))
    return "\n".join(lines) + "\n"


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


def escape(text: str) -> str:
    """Text without what systemd replaces: %-specifiers, and line ends."""
    return plain(text).replace("%", "%%")


def quote(word: str) -> str:
    """Quote a word of a command line or a list, as systemd.syntax(7) and systemd.service(5) say."""
    word = word.replace("%", "%%")
    if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII):
        return word
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\x{ord(m[0]):02x}", escaped) + '"'


def _quote_value(value: str) -> str:
    """Quote a value of an environment file."""
    return '"' + re.sub(r'(["\\`$])', r"\\\1", value) + '"'


def gpu_groups() -> str:
    """Name the groups of this machine whose members may use a GPU."""
    return " ".join(filter(_has_group, _GPU_GROUPS))


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
        real = real_path(path)
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
