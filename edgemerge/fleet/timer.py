"""Units of systemd for a device that updates itself: a service that runs once, and its timer."""

from __future__ import annotations

import os
import shlex
import sys

from edgemerge.fleet.site_file import Site
from edgemerge.runtime.serve.systemd import escape, quote

__all__ = ["make_units"]

SERVICE = """\
# /etc/systemd/system/edgemerge-update.service
[Unit]
Description=edgemerge, update of the model of {device}
Wants=network-online.target
After=network-online.target

[Service]
Type=oneshot
# The colon: a dollar sign is a dollar sign.
ExecStart=:{command}
# Beside the model that serves: it takes what others leave. A stop loses nothing, the next start goes on.
Nice=10
CPUWeight=20
IOSchedulingClass=idle
TimeoutStartSec=infinity
Environment=PYTHONUNBUFFERED=1
NoNewPrivileges=yes
LockPersonality=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
ProtectSystem=strict
PrivateTmp=yes
CacheDirectory=edgemerge
Environment=XDG_CACHE_HOME=%C/edgemerge
ReadWritePaths={folders}
"""
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
#   mkdir -p {folders}
#   systemctl daemon-reload
#   systemctl enable --now edgemerge-update.timer
"""


def make_units(site: Site) -> str:
    """Write both units, each with the name of its file, and what to do with them.

    Parameters
    ----------
    site : Site
        Of the device.
    """
    # A virtual environment is known by the path of its python: links are not followed.
    command = [sys.executable, "-P", "-m", "edgemerge", "update", str(site.path)]
    folders = [site.folder] + ([] if site.reports is None else [site.reports])
    service = SERVICE.format(
        device=escape(site.device),
        command=" ".join(map(quote, command)),
        folders=" ".join(quote(os.path.abspath(folder)) for folder in folders),
    )
    last = LAST.format(folders=" ".join(shlex.quote(os.path.abspath(one)) for one in folders))
    return f"{service}\n{TIMER}\n{last}"
