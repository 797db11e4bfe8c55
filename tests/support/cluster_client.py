"""A process that merges on a cluster; its settings may be other than the program's, to test edges.

`python -m tests.support.cluster_client '[[ORDER, ...], {PATCH: VALUE}]'` prints a JSON object for each order.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import edgemerge.cluster.connection
import edgemerge.merging.cluster
import edgemerge.merging.inputs
import edgemerge.merging.kit
from edgemerge import make_recipe, merge
from edgemerge.errors import EdgemergeError
from edgemerge.output.shared import Mark

cluster: Any = edgemerge.merging.cluster
find_software, mark_inputs = cluster.find_software, cluster.mark_inputs


def hide_files(files: Any) -> dict[Path, Mark]:
    """Mark files with tokens that are not in them, as if workers saw other files."""
    return {file.path: Mark(file.path.absolute(), file.n_bytes, b"?" * 16) for file in files}


def patch(what: dict[str, Any]) -> None:
    edgemerge.cluster.connection.PATIENCE = what.get("patience", 60.0)
    edgemerge.cluster.connection.CONNECT_SECONDS = what.get("connect_seconds", 10.0)
    if "pause" in what:  # after each result, to leave time for what a test does meanwhile
        write = cluster.ClusterExecutor._run

        def run_slowly(self: Any, function: Any, calls: Any, on_result: Any) -> None:
            def take(*result: Any) -> None:
                on_result(*result)
                with Path(what["log"]).open("a") as log:
                    log.write("one more\n")
                time.sleep(what["pause"])

            write(self, function, calls, take)

        cluster.ClusterExecutor._run = run_slowly
    if "piece_elements" in what:
        cluster.PIECE_ELEMENTS = what["piece_elements"]
    if "piece_bytes" in what:
        cluster.PIECE_BYTES = what["piece_bytes"]
    if "hides" in what:
        cluster.mark_files = hide_files
    if "software" in what:
        cluster.find_software = lambda: find_software() | what["software"]
    if "swaps" in what:  # a file, after this process has opened it

        def swap(*arguments: Any) -> Any:
            marks = mark_inputs(*arguments)
            for path, other in what["swaps"].items():
                os.replace(other, path) if other else os.unlink(path)
            return marks

        cluster.mark_inputs = swap


def run(order: dict[str, Any]) -> dict[str, Any]:
    recipe = make_recipe(order["method"], [(m, None) for m in order["models"]], **order["recipe"])
    if order["output"].endswith("/"):
        from dataclasses import replace

        recipe = replace(recipe, out_format="hf")
    try:
        report = merge(recipe, order["output"], cluster=order.get("cluster"), force=True)
    except EdgemergeError as error:
        notes = getattr(error, "__notes__", [])
        return {"error": str(error), "kind": type(error).__name__, "notes": notes}
    return {
        "sha256": report.sha256,
        "notes": list(report.notes),
        "resumed": report.resumed_tensors,
        "read": report.read_bytes,
        "written": report.written_bytes,
    }


if __name__ == "__main__":
    orders, patches = json.loads(sys.argv[1])
    patch(patches)
    for one in orders:
        print(json.dumps(run(one)), flush=True)
