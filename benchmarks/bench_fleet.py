"""A round of a fleet, from a publisher to three devices behind thin links, and a bad delta that none takes.

    sudo benchmarks/bench_fleet.py [--pair small] [--limit 150] [--keep FOLDER]

Each device is a network namespace whose link `tc` bounds; the publisher is a fourth one with a web server.
A device has a base, a running `edgemerge serve` and a SITE.yml. First the publisher offers the deltas of two
experts, and every device updates. Then it offers a next version of the first expert that has gone wrong: its
change is the good one's with the sign turned. The devices drop reports into a folder, which `edgemerge fleet
status` reads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_delta import Pair, make_pair
from bench_quality135 import ADAPTERS
from charts import COLOURS, INK, new_figure, save
from fleet_network import Host, can_make_hosts, hosts
from measure import EDGEMERGE, FIGURES, ROOT, finish, run, table
from quality_scores import MEDICAL, SETS, make

sys.path.insert(0, str(ROOT))
from tests.support.fixtures import unpacked

LINKS = {"ward": 10_000, "clinic": 4_000, "boat": 1_000}  # kbit/s
PUBLISHER = "publisher"
PORT, SERVE_PORT = 8000, 8080
BITS = "1"
HEADER = ["device", "link", "came over it", "whole experts", "first round", "disease", "substance"]
HEADER += ["general", "the bad delta", "came over it"]
PICTURE = FIGURES / "fleet.png"
STARTED = 60.0  # seconds that a server may take to answer
SITE = """\
device: {device}
registry: {{address: "http://{registry}:{port}", trust: root.json}}
base: {{path: base.gguf}}
experts: [{{name: disease}}, {{name: substance}}]
merge: {{method: covariance, type: Q8_0, memory: 384MiB}}
questions: {questions}
promote:
  margin: {{general: 12}}
  better: [disease, substance]
  watch: 5
serve: {{address: "http://127.0.0.1:{serve_port}", key: key}}
reports: {reports}
"""


@dataclass(frozen=True)
class Device:
    """A host with its folder."""

    name: str
    host: Host
    folder: Path

    def update(self) -> dict[str, Any]:
        """Update it; return its report, and what came over its link and how long it took."""
        before, began = self.host.received(), time.monotonic()
        words: list[str | Path] = [*EDGEMERGE, "update", self.folder / "SITE.yml", "--json"]
        found = run(self.host.command(words)).output
        report: dict[str, Any] = json.loads(found[found.index("{") :])
        seconds = time.monotonic() - began
        return {"report": report, "bytes": self.host.received() - before, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder of both adapters")
    parser.add_argument("--pair", default="smollm2", choices=("small", "smollm2"))
    parser.add_argument("--limit", type=int, default=150, help="questions of each set")
    options = parser.parse_args()
    if not can_make_hosts():
        raise SystemExit("network namespaces need root, and ip and tc of iproute2")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        work = Path(name)
        pair = make_pair(options.pair, options.adapters, work)
        registry = Registry(work, pair)
        (work / "reports").mkdir()
        made = stack.enter_context(hosts({PUBLISHER: None, **LINKS}))
        stack.enter_context(web_server(made[PUBLISHER], registry.folder))
        questions = write_questions(work, options.limit)
        devices = [
            make_device(made[device], device, registry, questions, made[PUBLISHER].address)
            for device in LINKS
        ]
        for device in devices:
            stack.enter_context(model_server(device))
        rounds = [one_round(devices)]
        registry.spoil()
        rounds.append(one_round(devices))
        shown = run([*EDGEMERGE, "fleet", "status", str(work / "reports")]).output
        base_scores = score(pair.base, questions)
        whole = sum(path.stat().st_size for path in pair.experts.values())
    rows = [
        {"device": device.name, "kbit": LINKS[device.name], "rounds": [one[i] for one in rounds]}
        for i, device in enumerate(devices)
    ]
    good, bad = (percents(one[0]["report"]["tried"]) for one in rounds)
    draw(rows, whole, {"base": base_scores, "first round": good, "with the bad delta": bad})
    print(shown, file=sys.stderr)
    rendered = table(HEADER, [cells(row, whole) for row in rows])
    finish("fleet", rendered, rows, pair=options.pair, whole_bytes=whole)


class Registry:
    """The publisher's folder, with the keys beside it."""

    def __init__(self, work: Path, pair: Pair) -> None:
        self.folder, self._work, self._pair = work / "registry", work, pair
        for key in ("root", PUBLISHER):
            self._run("keygen", work / key)
        self._run("publish", self.folder, "--init", "--root-key", work / "root.pem", *self._key())
        for domain in MEDICAL:
            self._publish(domain, "1", pair.experts[domain])

    @property
    def trust(self) -> Path:
        """The root, which devices get by hand."""
        return self.folder / "metadata" / "1.root.json"

    def spoil(self) -> None:
        """Publish a next version of the first expert that learned the wrong way round."""
        base, expert = self._pair.base, self._pair.experts[MEDICAL[0]]
        spoilt = self._work / "spoilt.gguf"
        make(["-m", "task_arithmetic", "--base", str(base), f"{expert}=-1"], "F16", spoilt)
        self._publish(MEDICAL[0], "2", spoilt)

    def _publish(self, domain: str, version: str, expert: Path) -> None:
        delta = self._work / f"{domain}-{version}.delta.gguf"
        self._run("delta", self._pair.base, expert, "-o", delta, "--bits", BITS)
        words: list[str | Path] = [
            "--name",
            domain,
            "--version",
            version,
            "--base",
            self._pair.base,
        ]
        self._run("publish", self.folder, delta, *words, *self._key())

    def _key(self) -> list[str | Path]:
        return ["--key", self._work / f"{PUBLISHER}.pem"]

    def _run(self, *words: str | Path) -> None:
        run([*EDGEMERGE, *words])


@contextlib.contextmanager
def web_server(host: Host, folder: Path) -> Iterator[None]:
    """Let a host serve a folder over HTTP."""
    words = [sys.executable, "-m", "http.server", str(PORT), "--bind", host.address]
    with started(host.command([*words, "--directory", folder]), folder.parent / "web.log"):
        time.sleep(1)
        yield


@contextlib.contextmanager
def model_server(device: Device) -> Iterator[None]:
    """Let a device serve its models, as it does all the time."""
    words: list[str | Path] = [
        *EDGEMERGE,
        "serve",
        device.folder / "base.gguf",
        "--site",
        device.folder,
    ]
    words += ["--port", str(SERVE_PORT), "--api-key-file", device.folder / "key"]
    with started(device.host.command(words), device.folder / "serve.log"):
        health = f"http://127.0.0.1:{SERVE_PORT}/health"
        end = time.monotonic() + STARTED
        while time.monotonic() < end:
            ask = device.host.command(["curl", "--silent", "--fail", health])
            if subprocess.run(ask, capture_output=True, check=False).returncode == 0:
                yield
                return
            time.sleep(0.5)
        raise SystemExit(
            f"the server does not answer:\n{(device.folder / 'serve.log').read_text()}"
        )


@contextlib.contextmanager
def started(command: Sequence[str], log: Path) -> Iterator[None]:
    """Run a program meanwhile."""
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as child:
        try:
            yield
        finally:
            child.terminate()
            child.wait()


def write_questions(work: Path, limit: int) -> dict[str, Path]:
    """Write the first questions of each set."""
    found = {}
    for name in SETS:
        lines = (unpacked("models") / "eval" / f"{name}.jsonl").read_text().splitlines()
        found[name] = work / f"{name}.jsonl"
        found[name].write_text("\n".join(lines[:limit]) + "\n")
    return found


def make_device(
    host: Host, name: str, registry: Registry, questions: Mapping[str, Path], address: str
) -> Device:
    """Write what a device has before its first update."""
    folder = registry.folder.parent / name
    folder.mkdir()
    (folder / "base.gguf").hardlink_to(registry.folder.parent / "base.gguf")
    (folder / "root.json").write_bytes(registry.trust.read_bytes())
    (folder / "key").write_text(f"key-of-{name}\n")
    (folder / "key").chmod(0o600)
    (folder / "SITE.yml").write_text(
        SITE.format(
            device=name,
            registry=address,
            port=PORT,
            questions=json.dumps({key: str(path) for key, path in questions.items()}),
            serve_port=SERVE_PORT,
            reports=folder.parent / "reports",
        )
    )
    return Device(name, host, folder)


def one_round(devices: Sequence[Device]) -> list[dict[str, Any]]:
    """Update all devices at the same time."""
    with ThreadPoolExecutor(len(devices)) as pool:
        found = list(pool.map(Device.update, devices))
    for device, one in zip(devices, found, strict=True):
        report = one["report"]
        print(f"{device.name}: {report['outcome']}: {report['reason']}", file=sys.stderr)
    return found


def score(model: Path, questions: Mapping[str, Path]) -> dict[str, float]:
    """Ask a model all questions; return the percent of right answers to each set."""
    words = [word for name, path in questions.items() for word in ("--task", f"{name}={path}")]
    found = run([*EDGEMERGE, "eval", str(model), *words, "--json"]).output
    results = json.loads(found[found.index("{") :])["results"]
    return {one["task"]: 100 * one["acc"] for one in results}


def percents(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the percent of right answers to each set, from a model's record."""
    return {name: 100 * one["right"] / one["n"] for name, one in record["scores"].items()}


def cells(row: Mapping[str, Any], whole: int) -> list[str]:
    """Write the row of a device."""
    first, second = row["rounds"]
    known = percents(first["report"]["tried"])
    return [
        row["device"],
        f"{row['kbit'] / 1000:g} Mbit/s",
        f"{first['bytes'] / 2**20:.1f} MiB, {first['seconds']:.0f} s in all",
        f"{whole / 2**20:.0f} MiB, {8 * whole / row['kbit'] / 1000:.0f} s",
        first["report"]["outcome"],
        *(f"{known[name]:.1f} %" for name in SETS),
        second["report"]["outcome"],
        f"{second['bytes'] / 2**20:.1f} MiB",
    ]


def draw(
    rows: Sequence[Mapping[str, Any]], whole: int, scores: Mapping[str, Mapping[str, float]]
) -> None:
    """Draw what came over each link, and what three models know."""
    figure, axes = new_figure((9, 2.8), 1, 2)
    sent, known = axes[0]
    names = [f"{row['device']}\n{row['kbit'] / 1000:g} Mbit/s" for row in rows]
    series = {
        "two deltas": [row["rounds"][0]["bytes"] / 2**20 for row in rows],
        "two experts, whole": [whole / 2**20] * len(rows),
    }
    draw_groups(sent, names, series, COLOURS[:2], "MiB over the link")
    answers = {name: [scores[model][name] for model in scores] for name in MEDICAL}
    draw_groups(known, list(scores), answers, COLOURS[2:], "right answers, %")
    figure.get_layout_engine().set(rect=(0, 0.1, 1, 0.9))  # the legends stand below
    save(figure, PICTURE)


def draw_groups(
    panel: Any,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    colours: Sequence[str],
    title: str,
) -> None:
    """Draw two bars for each label, and beside each its figure."""
    for i, ((name, values), colour) in enumerate(zip(series.items(), colours, strict=True)):
        places = [at + (i - 0.5) * 0.4 for at in range(len(labels))]
        bars = panel.barh(places, values, 0.36, color=colour, label=name)
        panel.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=8)
    panel.set_yticks(range(len(labels)), labels, color=INK)
    panel.set_title(title)
    panel.invert_yaxis()
    panel.margins(x=0.2)
    panel.grid(axis="y", visible=False)
    panel.spines["left"].set_visible(False)
    panel.tick_params(axis="y", length=0)
    legend = panel.legend(
        loc="upper left", bbox_to_anchor=(0, -0.1), ncols=2, frameon=False, borderaxespad=0
    )
    legend.set_in_layout(False)


if __name__ == "__main__":
    main()
