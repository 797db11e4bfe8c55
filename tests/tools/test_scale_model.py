"""The model of costs: its arithmetic, and that it reads what benchmarks have measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tools import scale_model
from tools.scale_model import Merge, Method, Rates, Registry

METHOD = Method(2.0, slope=5.0, expert=0.5, memory=60.0, memory_worker=3.0, memory_expert=10.0)
MERGE = Merge("", billions=8.0, n_experts=4, n_nodes=2, type_in="BF16", largest=0.5)
RATES = Rates(node_link=100, server_link=1000, disk=500, hash=1000, cores=4)
PAGE = """
| experts | 2 | 0.7 | 1.0 | 80 | 0.9 | 1.4 | 300 |
| experts | 4 | 0.8 | 1.2 | 100 | 1.4 | 2.2 | 300 |
| CPU s against parameters, line | 0.24 + 4.85 per billion parameters | 0.22 + 7.16 per billion parameters |
| threads | 1 | 5.3 | 5.2 | 65 | 7.5 | 7.4 | 491 |
| threads | 2 | 3.3 | 5.6 | 80 | 4.7 | 8.2 | 496 |
| CPU s against experts, line | 0.78 + 0.16 per expert of 160M | 0.57 + 0.40 per expert of 160M |
"""


def test_cpu_time_is_a_line_in_parameters_experts_and_processes() -> None:
    assert METHOD.cpu(10.0, 2) == 2 + 50
    assert METHOD.cpu(10.0, 4, n_processes=3) == 6 + 10 * (5 + 2 * 0.5)


def test_memory_grows_with_experts_and_workers() -> None:
    assert METHOD.peak(8, n_workers=1) == 60 + 3 + 80
    assert METHOD.peak(8, n_workers=4) == 60 + 12 + 320


def test_bytes_of_a_merge() -> None:
    assert MERGE.bytes_in == 5 * 16_000  # MB: a base and four experts of two bytes a weight
    assert MERGE.bytes_out == pytest.approx(8_000 * 4.85 / 8)
    assert replace(MERGE, passes=3).bytes_in == 3 * MERGE.bytes_in


def test_the_slowest_part_sets_the_time() -> None:
    parts = scale_model.merge_seconds(MERGE, METHOD, RATES)
    assert parts["the server's link"] == pytest.approx(84.85)
    assert parts["the server's disk"] == pytest.approx(169.7)
    assert parts["the nodes' links"] == pytest.approx(84_850 / 2 / 100)
    assert parts["the nodes' cores"] == pytest.approx((4 + 8 * 6) / 8)
    assert parts["alone"] == pytest.approx(4.85)
    total, slowest = scale_model.merge_total(parts)
    assert slowest == "the nodes' links"
    assert total == pytest.approx(424.25 + 4.85)
    more = scale_model.merge_seconds(replace(MERGE, n_nodes=16), METHOD, RATES)
    assert scale_model.merge_total(more)[1] == "the server's disk"


def test_what_breaks_first_breaks_at_its_bound() -> None:
    rates = replace(RATES, uplink=10, night=1, storage=100, node_memory=10**6)
    job = Registry("", n_sites=100, delta=90.0, billions=0.001)
    parts = scale_model.registry_parts(job, METHOD, 0.5, rates)
    assert parts["uplink"] == (9000 / 10 / 3600, "15 min")
    assert parts["kept for 30 days"][1] == "0.3 TB"
    name, n_sites = scale_model.first_to_break(parts, job.n_sites)
    assert (name, n_sites) == ("uplink", 400)
    at_bound = scale_model.registry_parts(replace(job, n_sites=n_sites), METHOD, 0.5, rates)
    assert at_bound[name][0] == pytest.approx(1.0)


def test_adapters_are_added_to_one_model() -> None:
    job = Registry("", n_sites=1000, delta=84.0, billions=7.0, widest=16384)
    parts = scale_model.registry_parts(job, METHOD, 0.25, replace(RATES, night=1, node_memory=8))
    base = 2 + 7 * (5 - 2 * 0.5)  # a model without experts
    assert parts["merge"][0] == pytest.approx((base + 1000 * 7 * 0.25) / 4 / 3600)
    mib = 60 + 4 * (3 + 1000 * 1.0)  # 16 rows of 16384 float32 are one MiB
    assert parts["memory"][0] == pytest.approx(mib * 2**20 / 8e9)


def test_an_adapter_has_two_thin_matrices_for_each() -> None:
    assert scale_model.lora_size(16, ((4096, 4096), (1024, 4096)), 2) == pytest.approx(
        2e-6 * 2 * 16 * (8192 + 5120)
    )


def test_figures_come_from_the_page_of_benchmarks() -> None:
    found = scale_model.read_method(PAGE)
    assert (found.start, found.slope) == (0.24, 4.85)
    assert found.expert == pytest.approx(1.0)
    assert found.memory_expert == 5.0  # 20 MiB for two experts and two workers
    assert (found.memory, found.memory_worker) == pytest.approx((50.0, 5.0))
    assert found.peak(2, n_workers=2) == pytest.approx(80.0)
    assert found.peak(4, n_workers=2) == pytest.approx(100.0)


def test_the_line_of_adapters_is_read() -> None:
    page = "| CPU s of a conversion | 1.0 | 0.80 + 0.31 per adapter and billion parameters |"
    assert scale_model.read_adapter(page) == 0.31


def test_a_page_without_them_is_refused() -> None:
    with pytest.raises(SystemExit, match="run make bench ARGS=workers"):
        scale_model.read_adapter("")
    with pytest.raises(SystemExit, match="run make bench ARGS=scaling"):
        scale_model.read_method("")


@pytest.mark.parametrize(
    ("value", "text"), [(0.4, "0.4 s"), (12, "12 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_times_in_words(value: float, text: str) -> None:
    assert scale_model.seconds(value) == text


def test_rates_are_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    scale_model.main([])
    usual = capsys.readouterr().out
    assert usual == scale_model.report()
    scale_model.main(["--node-link", "1250", "--cores", "64"])
    assert capsys.readouterr().out != usual
