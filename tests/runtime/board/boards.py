"""Files of /proc and /sys as boards lay them out, for readers that take a root."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

GIB = 1 << 30

PMIC = """\
 3V7_WL_SW_A current(0)=0.10000000A
   3V3_SYS_A current(1)=0.20000000A
  VDD_CORE_A current(7)=2.00000000A
 3V7_WL_SW_V volt(8)=3.70000000V
   3V3_SYS_V volt(9)=3.30000000V
  VDD_CORE_V volt(15)=0.80000000V
     EXT5V_V volt(24)=5.15000000V
      BATT_V volt(25)=0.00000000V
"""
PMIC_WATTS = 0.1 * 3.7 + 0.2 * 3.3 + 2.0 * 0.8


def lay_out(root: Path, files: Mapping[str, str]) -> Path:
    """Write files under a root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def add_tool(root: Path, name: str, answers: Mapping[str, str]) -> None:
    """Put a program into usr/bin that answers its first argument, and fails for any other."""
    cases = "".join(f"{key}) cat <<'END'\n{text}\nEND\n;;\n" for key, text in answers.items())
    lay_out(root, {f"usr/bin/{name}": f'#!/bin/sh\ncase "$1" in\n{cases}*) exit 1;;\nesac\n'})
    (root / "usr/bin" / name).chmod(0o755)


def cores(pairs: Mapping[int, tuple[int, int]]) -> dict[str, str]:
    """Topology of logical cores: number -> (package, core)."""
    files = {"sys/devices/system/cpu/online": f"0-{len(pairs) - 1}\n"}
    for cpu, (package, core) in pairs.items():
        folder = f"sys/devices/system/cpu/cpu{cpu}/topology"
        files |= {f"{folder}/physical_package_id": f"{package}\n", f"{folder}/core_id": f"{core}\n"}
    return files


def clocks(n: int, limit: int, highest: int, governor: str, driver: str) -> dict[str, str]:
    """Clocks of logical cores, in kilohertz."""
    files: dict[str, Any] = {}
    for cpu in range(n):
        folder = f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        files |= {
            f"{folder}/scaling_max_freq": f"{limit}\n",
            f"{folder}/cpuinfo_max_freq": f"{highest}\n",
            f"{folder}/scaling_governor": f"{governor}\n",
            f"{folder}/scaling_driver": f"{driver}\n",
        }
    return files


def meminfo(total: int, available: int, swap: int = 0) -> dict[str, str]:
    """Bytes as /proc/meminfo writes them."""
    return {
        "proc/meminfo": f"MemTotal:  {total // 1024:10} kB\nMemFree:  {available // 2048:10} kB\n"
        f"MemAvailable: {available // 1024:10} kB\n"
        f"SwapTotal: {swap // 1024:10} kB\nSwapFree: {swap // 1024:10} kB\n"
    }


def raspberry_pi_5(root: Path, throttled: str = "0") -> Path:
    """8 GB, an SD card with a swap file on it, firmware in sysfs, vcgencmd."""
    files = {
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0",
        "proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 108.00\n"
        "Features\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp asimdrdm lrcpc asimddp\n"
        "CPU implementer\t: 0x41\nCPU part\t: 0xd0b\n",
        "proc/swaps": "Filename Type Size Used Priority\n/var/swap file 524272 0 -2\n",
        "proc/self/mountinfo": "25 1 179:2 / / rw shared:1 - ext4 /dev/mmcblk0p2 rw\n"
        "30 25 0:24 / /run rw - tmpfs tmpfs rw\n",
        "sys/class/block/mmcblk0/device/type": "SD\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "62350\n",
        "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
        "sys/class/thermal/cooling_device0/cur_state": "2\n",
        "sys/class/hwmon/hwmon0/name": "rp1_adc\n",
        "sys/class/hwmon/hwmon0/temp1_input": "90000\n",
        "sys/class/drm/card0/device/uevent": "DRIVER=v3d\n",
        "sys/devices/platform/soc@107c000000/soc@107c000000:firmware/get_throttled": throttled,
        **meminfo(8 * GIB, 7 * GIB, 512 << 20),
        **cores({cpu: (0, cpu) for cpu in range(4)}),
        **clocks(4, 2400000, 2400000, "ondemand", "cpufreq-dt"),
    }
    add_tool(root, "vcgencmd", {"pmic_read_adc": PMIC, "get_throttled": "throttled=0xf000f"})
    return lay_out(root, files)


def raspberry_pi_4(root: Path, throttled: int = 0) -> Path:
    """4 GB, no sysfs of the firmware: only vcgencmd, which knows no PMIC."""
    add_tool(root, "vcgencmd", {"get_throttled": f"throttled={throttled:#x}"})
    files = {
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        "proc/device-tree/compatible": "raspberrypi,4-model-b\0brcm,bcm2711\0",
        "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"
        "CPU implementer\t: 0x41\nCPU part\t: 0xd08\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "84000\n",
        **meminfo(4 * GIB, 3 * GIB),
        **cores({cpu: (0, cpu) for cpu in range(4)}),
        **clocks(4, 1800000, 1800000, "powersave", "cpufreq-dt"),
    }
    return lay_out(root, files)


def jetson_orin_nano(root: Path) -> Path:
    """8 GB, in a power mode that limits the clocks; zram; one sensor without power."""
    ina = "sys/class/hwmon/hwmon1"
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0"
        "nvidia,tegra234\0",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\n"
        "Features\t: fp asimd asimdhp asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n",
        "proc/swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 635604 0 5\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48500\n",
        "sys/class/thermal/thermal_zone1/type": "cv0-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "-256000\n",
        "sys/class/thermal/thermal_zone2/type": "tj-thermal\n",
        "sys/class/thermal/thermal_zone2/temp": "51000\n",
        "sys/class/thermal/thermal_zone3/type": "PMIC-Die\n",
        "sys/class/thermal/thermal_zone3/temp": "100000\n",
        "sys/class/thermal/cooling_device0/type": "cpu-throttle-alert\n",
        "sys/class/thermal/cooling_device0/cur_state": "0\n",
        "sys/class/hwmon/hwmon3/name": "soctherm_oc\n",
        "sys/class/hwmon/hwmon3/oc1_event_cnt": "0\n",
        "sys/class/hwmon/hwmon3/oc2_event_cnt": "0\n",
        "sys/class/hwmon/hwmon3/oc3_event_cnt": "7\n",
        f"{ina}/name": "ina3221\n",
        f"{ina}/in7_label": "sum of shunt voltages\n",
        **rail(ina, 1, "VDD_IN", 5000, 1200),
        **rail(ina, 2, "VDD_CPU_GPU_CV", 5000, 400),
        **rail(ina, 3, "VDD_SOC", 5000, 300),
        **meminfo(8 * GIB, 6 * GIB, 4 * GIB),
        **cores({cpu: (0, cpu) for cpu in range(6)}),
        **clocks(6, 729600, 1510400, "schedutil", "tegra194"),
    }
    return lay_out(root, files)


def rail(chip: str, channel: int, label: str, millivolts: int, milliamperes: int) -> dict[str, str]:
    """One channel of an INA3221."""
    return {
        f"{chip}/in{channel}_label": f"{label}\n",
        f"{chip}/in{channel}_input": f"{millivolts}\n",
        f"{chip}/curr{channel}_input": f"{milliamperes}\n",
    }


def laptop(root: Path, energy: int = 1_000_000) -> Path:
    """Intel: two fast cores of two threads, four slow ones; RAPL; an NVMe disk."""
    rapl = "sys/class/powercap/intel-rapl:0"
    files = {
        "sys/class/dmi/id/sys_vendor": "LENOVO\n",
        "sys/class/dmi/id/product_name": "ThinkPad X1\n",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: 12th Gen Intel(R) Core(TM) i7-1265U\n"
        "flags\t\t: fpu sse ssse3 fma avx f16c avx2 avx_vnni\n",
        "sys/devices/cpu_core/cpus": "0-3\n",
        "sys/devices/cpu_atom/cpus": "4-7\n",
        "sys/class/hwmon/hwmon0/name": "coretemp\n",
        "sys/class/hwmon/hwmon0/temp1_input": "71000\n",
        "sys/class/hwmon/hwmon0/temp2_input": "69000\n",
        "sys/class/hwmon/hwmon1/name": "nvme\n",
        "sys/class/hwmon/hwmon1/temp1_input": "95000\n",
        "sys/class/thermal/cooling_device0/type": "Processor\n",
        "sys/class/thermal/cooling_device0/cur_state": "3\n",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "4\n",
        "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": "12\n",
        f"{rapl}/name": "package-0\n",
        f"{rapl}/energy_uj": f"{energy}\n",
        f"{rapl}/max_energy_range_uj": "262143328850\n",
        f"{rapl}:0/name": "core\n",
        f"{rapl}:0/energy_uj": "5\n",
        "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t\t NVIDIA RTX A500\n",
        **meminfo(16 * GIB, 12 * GIB, 2 * GIB),
        **cores(
            {0: (0, 0), 1: (0, 0), 2: (0, 4), 3: (0, 4), **{c: (0, 4 + c) for c in range(4, 8)}}
        ),
        **clocks(8, 4800000, 4800000, "powersave", "intel_pstate"),
    }
    return lay_out(root, files)
