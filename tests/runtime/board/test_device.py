"""Readers of the board, on files as boards lay them out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edgemerge.machine.process import read_process
from edgemerge.runtime.board import device
from edgemerge.runtime.board.storage import find_disk, measure_storage
from tests.runtime.board import boards
from tests.runtime.board.boards import GIB, lay_out, meminfo


@pytest.fixture
def use_cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let this process have the first so many logical cores."""

    def use(n: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(n)))

    return use


def test_raspberry_pi_5(tmp_path: Path) -> None:
    board = device.read_board(boards.raspberry_pi_5(tmp_path))
    assert (board.name, board.soc) == ("Raspberry Pi 5 Model B Rev 1.0", "bcm2712")
    assert (board.processor, board.cores, board.threads) == ("Cortex-A76", 4, 4)
    assert board.cpu_features == ("asimd", "asimdhp", "asimddp")
    assert (board.max_frequency_hz, board.keeps_clock_low) == (2_400_000_000, False)
    assert board.accelerators == ("VideoCore graphics",)
    assert (board.memory.total, board.memory.available) == (8 * GIB, 7 * GIB)
    assert not board.virtual


def test_raspberry_pi_4(tmp_path: Path) -> None:
    board = device.read_board(boards.raspberry_pi_4(tmp_path))
    assert (board.processor, board.cpu_features) == ("Cortex-A72", ("asimd",))
    assert board.keeps_clock_low


def test_jetson(tmp_path: Path) -> None:
    board = device.read_board(boards.jetson_orin_nano(tmp_path))
    assert (board.processor, board.soc, board.cores) == ("Cortex-A78AE", "tegra234", 6)
    assert board.accelerators == ("NVIDIA graphics of the Jetson",)


def test_laptop(tmp_path: Path) -> None:
    board = device.read_board(boards.laptop(tmp_path))
    assert (board.name, board.soc) == ("LENOVO ThinkPad X1", None)
    assert board.processor == "12th Gen Intel(R) Core(TM) i7-1265U"
    assert (board.cores, board.threads) == (6, 8)
    assert not board.keeps_clock_low  # the powersave of Intel's driver follows the load
    assert board.accelerators == ("NVIDIA RTX A500",)


def test_a_machine_that_tells_nothing(tmp_path: Path, use_cores: Callable[[int], None]) -> None:
    use_cores(3)
    board = device.read_board(tmp_path)
    assert (board.name, board.soc, board.max_frequency_hz) == (None, None, None)
    assert (board.cores, board.threads, board.accelerators) == (3, 3, ())
    assert device.read_memory(tmp_path) == device.Memory(0, 0, 0, 0)
    assert device.read_swaps(tmp_path) == ()
    assert device.read_temperature(tmp_path) is None
    assert device.read_throttling(tmp_path) is None
    assert device.default_threads(tmp_path) == 3


def test_this_machine() -> None:
    assert device.read_board().cores >= device.default_threads() >= 1
    memory = device.read_memory()
    assert 0 < memory.available <= memory.total


# -- threads ---------------------------------------------------------------------------------------


def test_one_thread_per_core_within_the_affinity(
    tmp_path: Path, use_cores: Callable[[int], None]
) -> None:
    lay_out(tmp_path, boards.cores({0: (0, 0), 1: (0, 0), 2: (0, 1), 3: (1, 1)}))
    for n, threads in ((1, 1), (2, 1), (3, 2), (4, 3)):
        use_cores(n)
        assert device.default_threads(tmp_path) == threads


def test_slow_cores_of_intel_are_left_out_and_of_arm_are_not(
    tmp_path: Path, use_cores: Callable[[int], None]
) -> None:
    use_cores(8)
    assert device.default_threads(boards.laptop(tmp_path / "laptop")) == 2
    use_cores(6)
    assert device.default_threads(boards.jetson_orin_nano(tmp_path / "jetson")) == 6


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "3:cpuacct,cpu:/docker/x\n1:name=systemd:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
    ],
)
def test_a_quota_of_processor_time_limits_threads(
    tmp_path: Path, use_cores: Callable[[int], None], files: dict[str, str], threads: int
) -> None:
    use_cores(4)
    assert device.default_threads(lay_out(tmp_path, files)) == threads


# -- memory ----------------------------------------------------------------------------------------


def test_memory_of_the_machine(tmp_path: Path) -> None:
    lay_out(tmp_path, meminfo(8 * GIB, 7 * GIB, GIB))
    assert device.read_memory(tmp_path) == device.Memory(8 * GIB, 7 * GIB, GIB, GIB)


@pytest.mark.parametrize(
    ("cgroup", "folder", "names"),
    [
        ("0::/app.slice/run.scope\n", "app.slice", ("memory.max", "memory.current", "")),
        (
            "4:memory:/docker/0a1b\n",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ),
    ],
    ids=["version 2, of the group above", "version 1, in a container"],
)
def test_memory_of_a_control_group(
    tmp_path: Path, cgroup: str, folder: str, names: tuple[str, str, str]
) -> None:
    limit, current, total = names
    files = {
        "proc/self/cgroup": cgroup,
        f"sys/fs/cgroup/{folder}/{limit}": f"{2 * GIB}\n",
        f"sys/fs/cgroup/{folder}/{current}": f"{GIB}\n",
        f"sys/fs/cgroup/{folder}/memory.stat": f"{total}active_file {GIB // 4}\n"
        f"{total}inactive_file {GIB // 4}\n{total}rss 5\n",
    }
    lay_out(tmp_path, meminfo(8 * GIB, 7 * GIB) | files)
    found = device.read_memory(tmp_path)
    assert found == device.Memory(2 * GIB, 3 * GIB // 2, 0, 0, limited=True)


def test_a_full_group_around_a_smaller_limit(tmp_path: Path) -> None:
    """Fault: a slice of 4 GiB with 100 MiB left was not looked at, as the unit in it may have 2 GiB."""
    files = {
        "proc/self/cgroup": "0::/a.slice/b.scope\n",
        "sys/fs/cgroup/a.slice/b.scope/memory.max": f"{2 * GIB}\n",
        "sys/fs/cgroup/a.slice/b.scope/memory.current": f"{GIB // 2}\n",
        "sys/fs/cgroup/a.slice/memory.max": f"{4 * GIB}\n",
        "sys/fs/cgroup/a.slice/memory.current": f"{4 * GIB - (100 << 20)}\n",
    }
    lay_out(tmp_path, meminfo(8 * GIB, 7 * GIB) | files)
    assert device.read_memory(tmp_path) == device.Memory(2 * GIB, 100 << 20, 0, 0, limited=True)


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096), str(8 * GIB)])
def test_no_limit_of_a_control_group(tmp_path: Path, limit: str) -> None:
    group = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{limit}\n"}
    lay_out(tmp_path, meminfo(8 * GIB, 7 * GIB) | group)
    assert device.read_memory(tmp_path) == device.Memory(8 * GIB, 7 * GIB, 0, 0)


def test_swap_by_what_it_lies_on(tmp_path: Path) -> None:
    pi, jetson = boards.raspberry_pi_5(tmp_path / "pi"), boards.jetson_orin_nano(tmp_path / "jet")
    assert device.read_swaps(pi) == (device.Swap("/var/swap", 524272 * 1024, "SD card"),)
    assert device.read_swaps(jetson) == (device.Swap("/dev/zram0", 635604 * 1024, "zram"),)


def test_memory_of_a_process() -> None:
    ours = read_process()
    assert 10 << 20 < ours.rss <= ours.peak < 1 << 40
    assert 0 < ours.file <= ours.rss


# -- heat ------------------------------------------------------------------------------------------


def test_temperature_of_the_processor_only(tmp_path: Path) -> None:
    assert device.read_temperature(boards.raspberry_pi_5(tmp_path / "pi")) == 62.35
    assert device.read_temperature(boards.jetson_orin_nano(tmp_path / "jetson")) == 51.0
    assert device.read_temperature(boards.laptop(tmp_path / "laptop")) == 71.0


@pytest.mark.parametrize(
    ("word", "now", "since_boot"),
    [
        ("0", (), ()),
        ("50005\n", ("under-voltage", "throttled"), ("under-voltage", "throttled")),
        ("80008", ("soft temperature limit",), ("soft temperature limit",)),
        ("20000", (), ("clock capped",)),
    ],
)
def test_throttling_of_a_raspberry_pi_in_sysfs(
    tmp_path: Path, word: str, now: tuple[str, ...], since_boot: tuple[str, ...]
) -> None:
    found = device.read_throttling(boards.raspberry_pi_5(tmp_path, word))
    assert found == device.Throttling(now, since_boot)
    assert found.active == bool(now)


def test_throttling_of_a_raspberry_pi_by_vcgencmd(tmp_path: Path) -> None:
    found = device.read_throttling(boards.raspberry_pi_4(tmp_path, 0x10001))
    assert found == device.Throttling(("under-voltage",), ("under-voltage",))


def test_throttling_of_a_raspberry_pi_by_hwmon(tmp_path: Path) -> None:
    chip = "sys/class/hwmon/hwmon2"
    lay_out(tmp_path, {f"{chip}/name": "rpi_volt\n", f"{chip}/in0_lcrit_alarm": "1\n"})
    assert device.read_throttling(tmp_path) == device.Throttling(("under-voltage",), ())


def test_throttling_of_a_jetson(tmp_path: Path) -> None:
    root = boards.jetson_orin_nano(tmp_path)
    limited, counted = "clock limited to 0.7 of 1.5 GHz", "instantaneous over-current (7 times)"
    assert device.read_throttling(root) == device.Throttling((limited,), (counted,))
    lay_out(root, {"sys/class/thermal/cooling_device0/cur_state": "1\n"})
    found = device.read_throttling(root)
    assert found is not None
    assert found.reasons == ("slowed against heat", limited)


def test_throttling_of_a_laptop(tmp_path: Path) -> None:
    found = device.read_throttling(boards.laptop(tmp_path))
    assert found == device.Throttling(("slowed against heat",), ("too hot (12 times)",))


def test_nonsense_in_files_is_nothing_told(tmp_path: Path) -> None:
    files = {
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
        "sys/class/thermal/thermal_zone0/temp": "warm",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "zz",
        "proc/meminfo": "MemTotal\nMemAvailable: x kB\n",
        "proc/swaps": "Filename\n/swap\n/swap file lots\n",
        "proc/self/mountinfo": "garbage\n1 2 3\n",
        "proc/self/cgroup": "0::/../..\n",
        "proc/cpuinfo": "\xff\n:::\n",
    }
    lay_out(tmp_path, files)
    assert device.read_temperature(tmp_path) is None
    assert device.read_throttling(tmp_path) is None
    assert device.read_swaps(tmp_path) == ()
    assert device.read_memory(tmp_path).total == 0
    assert find_disk("/swap", tmp_path) is None
    device.read_board(tmp_path)


# -- storage ---------------------------------------------------------------------------------------


def test_disks_by_the_deepest_mount(tmp_path: Path) -> None:
    lines = [
        "25 1 179:2 / / rw - ext4 /dev/mmcblk0p2 rw",
        "26 25 259:1 / /srv/my\\040models rw shared:5 - ext4 /dev/nvme0n1p1 rw",
        "27 25 8:17 / /media/usb rw - vfat /dev/sdb1 rw",
        "28 25 0:40 / /tmp rw - tmpfs tmpfs rw",
        "29 25 0:50 / /overlay rw - overlay overlay rw",
        "30 25 0:60 / /btrfs rw - btrfs /dev/sda2 rw",
        "31 25 8:33 / /card rw - ext4 /dev/mmcblk1p1 rw",
    ]
    files = {
        "proc/self/mountinfo": "\n".join(lines),
        "sys/class/block/sdb/queue/rotational": "1\n",
        "sys/class/block/sda/queue/rotational": "0\n",
        "sys/class/block/mmcblk1/device/type": "MMC\n",
    }
    lay_out(tmp_path, files)
    kinds = {
        "/home/pi": "SD card",
        "/srv/my models/a.gguf": "NVMe SSD",
        "/srv/my models too": "SD card",
        "/media/usb": "hard disk",
        "/tmp/x": "memory",
        "/overlay": "overlay",
        "/btrfs/x": "SSD or USB stick",
        "/card": "eMMC",
    }
    found = {path: find_disk(path, tmp_path) for path in kinds}
    assert {path: disk.kind for path, disk in found.items() if disk is not None} == kinds


def test_a_disk_by_its_number_where_the_mount_names_no_device(tmp_path: Path) -> None:
    """An early /dev/root, as kernels without an initial file system have it."""
    disk = tmp_path / "sys/devices/mmcblk0/mmcblk0p2"
    disk.mkdir(parents=True)
    lay_out(tmp_path, {"proc/self/mountinfo": "25 1 179:2 / / rw - ext4 /dev/root rw\n"})
    (tmp_path / "sys/dev/block").mkdir(parents=True)
    (tmp_path / "sys/dev/block/179:2").symlink_to(disk)
    found = find_disk("/home", tmp_path)
    assert found is not None
    assert (found.name, found.kind) == ("mmcblk0p2", "SD card")


def test_a_disk_where_a_container_hides_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path, {"proc/self/mountinfo": "25 1 254:0 / / rw - overlay overlay rw\n"})
    stat = os.stat

    def refuse(path: Path, **options: bool) -> os.stat_result:
        if "sys/dev/block" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refuse)
    found = find_disk("/models", tmp_path)
    assert found is not None
    assert found.kind == "overlay"


def test_speed_of_storage_leaves_nothing_behind(tmp_path: Path) -> None:
    found = measure_storage(tmp_path)
    if found.problem is None:
        assert found.read_rate is not None
        assert found.write_rate is not None
        assert min(found.read_rate, found.write_rate) > 1e5
    assert list(tmp_path.iterdir()) == []


def test_storage_that_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = measure_storage(tmp_path / "gone")
    assert (gone.problem, gone.read_rate) == ("No such file or directory", None)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1 << 20}))
    full = measure_storage(tmp_path)
    assert (full.problem, full.write_rate) == ("too little room to measure", None)
