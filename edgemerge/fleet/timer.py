"""Units of systemd for a device that updates itself: a service that runs once, and its timer."""

from __future__ import annotations

import os
import pwd
import shlex
import sys
from contextlib import suppress

from edgemerge.errors import RecipeError
from edgemerge.fleet.site_file import Site
from edgemerge.runtime.serve.systemd import escape, fill_unit, gpu_groups, quote

__all__ = ["make_units"]

# Not the server's, which an account that exists only while that runs may own.
CACHE = "edgemerge-update"
# llama.cpp puts layers on a GPU where there is one.
FACTS = ("update", "system", "account", "remote", "high-port", "gpu")

TIMER = """\
# /etc/systemd/system/edgemerge-update.timer
[Unit]
Description=edgemerge, every night, and after a start of the machine

[Timer]
OnCalendar=*-*-* 02:00
# Not all devices of a fleet at once.
RandomizedDelaySec=2h
# An update that a power cut ended goes on.
OnBootSec=5min
Persistent=yes

[Install]
WantedBy=timers.target
"""
LAST = """\
# Write both files, then:
{steps}#   systemctl daemon-reload
#   systemctl enable --now edgemerge-update.timer
"""


def make_units(site: Site) -> str:
    """Write both units, each with the name of its file, and what to do with them.

    Parameters
    ----------
    site : Site
        Of the device.

    Raises
    ------
    RecipeError
        The service would be root's, or have another home folder than `~` of SITE.yml stands for.
    """
    # A virtual environment is known by the path of its python: links are not followed.
    command = [sys.executable, "-P", "-m", "edgemerge", "update", str(site.path)]
    folders = [site.folder] + ([] if site.reports is None else [site.reports])
    paths = [os.path.abspath(folder) for folder in folders]
    user, groups = _choose_user(site), gpu_groups()
    _check_user(site, user)
    values = {
        "names": escape(site.device),
        "command": " ".join(map(quote, command)),
        "folders": " ".join(map(quote, paths)),
        "user": user,
        "groups": groups,
        "cache": CACHE,
    }
    service = fill_unit(values, [*FACTS, *(["groups"] if groups else [])])
    missing = " ".join(shlex.quote(path) for path in paths if not os.path.isdir(path))
    steps = f"#   install -d -o {user} {missing}\n" if missing else ""
    return f"{service}\n{TIMER}\n{LAST.format(steps=steps)}"


def _choose_user(site: Site) -> str:
    """Name who owns the device's folder; before it is made, who asks, also by sudo."""
    try:
        number = site.folder.stat().st_uid
    except OSError:
        number = os.geteuid()
        if number == 0 and (caller := os.environ.get("SUDO_USER")):
            return escape(caller)
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _check_user(site: Site, user: str) -> None:
    """Refuse root, which reads files of strangers, and without capabilities no folder that is closed to it.

    So is a home folder that is not the user's: what `~` stands for was taken from who asks.
    """
    if user == "root":
        folder = shlex.quote(os.path.abspath(site.folder))
        gives = "chown -R" if site.folder.is_dir() else "install -d -o"
        raise RecipeError(
            "the service would be root's, who must not read files of strangers; give its folder to another "
            f"account with {gives} USER {folder}, and print this again",
            path=site.path,
            field="folder",
        )
    if site.home is not None and _home_of(user) != os.path.realpath(site.home):
        raise RecipeError(
            f"~ is {str(site.home)!r} here, and another folder for {user}, whose service it is; print this "
            f"as {user}, or write whole paths",
            path=site.path,
        )


def _home_of(user: str) -> str | None:
    """Return the home folder of an account, None where it has none."""
    with suppress(KeyError):
        return os.path.realpath(pwd.getpwnam(user).pw_dir)
    return None
