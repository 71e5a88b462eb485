"""Section Telemetry: probes, the inventory, and reports on the wire."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support import (
    ROOT,
    ScriptedServer,
    free_port,
    process_exists,
    wait_for,
    wait_in_shell,
)

import moltis

RUNTIMES = moltis.RUNTIMES  # all of them

MEMINFO = """\
MemTotal:        3884360 kB
MemFree:          211184 kB
MemAvailable:    2913884 kB
Buffers:          174712 kB
Cached:          2473304 kB
"""

MACOS_SYSCTL = """\
hw.memsize: 17179869184
kern.boottime: { sec = 1762675200, usec = 181265 } Sun Nov  9 09:00:00 2025
"""

MACOS_VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                4518.
Pages active:                            194947.
Pages inactive:                          191193.
Pages speculative:                         3014.
Pages throttled:                              0.
Pages wired down:                        159117.
Pages purgeable:                            630.
"Translation faults":                 574921966.
Pages copy-on-write:                   38671927.
File-backed pages:                       141843.
Anonymous pages:                         247311.
Pages stored in compressor:             1022243.
Pages occupied by compressor:            454496.
"""

RUNTIME_ANSWERS = {
    "python3": "echo 'Python 3.11.2'",
    "node": "echo v20.11.1",
    "ruby": "echo 'ruby 3.1.2p20 (2022-04-12 revision 4491bb740a) [aarch64-linux]'",
    "go": "[ $1 = version ] && echo 'go version go1.22.1 linux/arm64'",
    "rustc": "echo 'rustc 1.77.0-nightly (ef71f1047 2024-01-21)'",
    "java": """\
echo 'Picked up JAVA_TOOL_OPTIONS: -Xmx1.5g' >&2
echo 'openjdk version "21" 2023-09-19' >&2""",
}

RUST_PAYLOAD = {
    "nodeId": "n1",
    "mem": {"total": 16 << 30, "available": 8 << 30},
    "cpuCount": 8,
    "cpuUsage": 12.5,
    "uptime": 3600,
    "services": [],
    "disk": {"total": None, "available": None},
    "runtimes": ["python3", "node"],
}


@pytest.fixture
def programs(tmp_path):
    """A function that puts shell scripts where the machine's programs are found."""
    directory = tmp_path / "bin"
    directory.mkdir()

    def add(name, script):
        new = tmp_path / name
        new.write_text(f"#!/bin/sh\n{script}\n")
        new.chmod(0o755)
        return new.replace(directory / name)  # at once: it may be started right now

    # None of the machine's own programs, which stand in the usual places.
    for runtime in moltis.RUNTIMES:
        add(runtime, "exit 1")
    for name in ("nvidia-smi", "sysctl", "vm_stat", "ps"):
        add(name, "exit 1")
    add.directory = directory
    return add


@pytest.fixture(scope="module", autouse=True)
def all_runtimes(one_runtime):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moltis, "RUNTIMES", RUNTIMES)
        yield


@pytest.fixture
def environ(programs, home):
    """The environment of the node's user; no Ollama answers at its OLLAMA_HOST."""
    return {
        "PATH": f"{programs.directory}:/usr/bin:/bin",
        "HOME": str(home),
        "OLLAMA_HOST": f"127.0.0.1:{free_port()}",
    }


@pytest.fixture
def inventory(environ):
    """A function that makes an Inventory, closed at the end of the test."""
    made = []

    def make(**options):
        made.append(moltis.Inventory(environ, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def known(inventory):
    """Return the equipment once all programs were asked, of which java is the last."""
    return wait_for(
        lambda: "java" in inventory.equipment.runtime_versions and inventory.equipment
    )


def answer(text, status=0):
    return f"cat <<'END'\n{text}END\nexit {status}"


def linux(root, cpu="cpu  100 0 50 800 50 0 0 0 0 0", meminfo=MEMINFO):
    """Write the files of a Linux under `root`."""
    proc = root / "proc"
    proc.mkdir(exist_ok=True)
    (proc / "meminfo").write_text(meminfo)
    (proc / "uptime").write_text("93784.21 361210.98\n")
    (proc / "stat").write_text(f"{cpu}\ncpu0 1 2 3 4 5 6 7 8 9 10\nintr 12 34\n")
    return root


class TestLinux:
    def test_this_machine_tells_all_that_proc_has(self):
        if not sys.platform.startswith("linux"):
            pytest.skip("no /proc here")
        vitals = moltis.ProcProbe().read()
        assert 0 < vitals.mem_available <= vitals.mem_total
        assert vitals.uptime_secs > 0
        assert 0 <= vitals.cpu_times.busy <= vitals.cpu_times.total

    def test_a_recorded_raspberry_pi_is_read_in_bytes_seconds_and_degrees(
        self, tmp_path
    ):
        zone = linux(tmp_path) / "sys/class/thermal/thermal_zone0"
        zone.mkdir(parents=True)
        (zone / "type").write_text("cpu-thermal\n")
        (zone / "temp").write_text("48312\n")
        assert moltis.ProcProbe(tmp_path).read() == moltis.Vitals(
            mem_total=3884360 * 1024,
            mem_available=2913884 * 1024,
            uptime_secs=93784.21,
            cpu_times=moltis.CpuTimes(busy=150, total=1000),
            temperature=48.312,
        )

    def test_a_thermometer_that_is_not_the_cpus_is_not_read(self, tmp_path):
        zone = linux(tmp_path) / "sys/class/thermal/thermal_zone0"
        zone.mkdir(parents=True)
        (zone / "type").write_text("battery\n")
        (zone / "temp").write_text("21000\n")
        assert moltis.ProcProbe(tmp_path).read().temperature is None

    def test_a_thermometer_that_cannot_be_read_any_more_is_left_out(self, tmp_path):
        zone = linux(tmp_path) / "sys/class/thermal/thermal_zone0"
        zone.mkdir(parents=True)
        (zone / "type").write_text("cpu-thermal\n")
        assert moltis.ProcProbe(tmp_path).read().temperature is None

    def test_a_sys_for_root_alone_costs_the_temperature_only(
        self, tmp_path, monkeypatch
    ):
        """As some hardened distributions have it."""
        linux(tmp_path)

        def refuse(*_):
            raise PermissionError

        with monkeypatch.context() as patch:
            patch.setattr(moltis.Path, "glob", refuse)
            vitals = moltis.ProcProbe(tmp_path).read()
        assert vitals.temperature is None
        assert vitals.mem_total

    def test_an_old_kernel_without_memavailable_has_what_it_could_free(self, tmp_path):
        meminfo = (
            "MemTotal: 1027128 kB\nMemFree: 51234 kB\nBuffers: 90000 kB\n"
            "Cached: 600000 kB\nSwapCached: 7 kB\nSReclaimable: 50000 kB\n"
        )
        linux(tmp_path, meminfo=meminfo)
        assert moltis.ProcProbe(tmp_path).read().mem_available == 791234 * 1024

    @pytest.mark.parametrize(
        ("readings", "expected"),
        [
            (["-273200", "51000"], 51.0),
            (["-650788984"], None),
            (["43"], 43.0),
            (["", "-5500"], -5.5),
            (["no data", "200000"], None),
        ],
    )
    def test_the_temperature_is_the_first_plausible_one(
        self, tmp_path, readings, expected
    ):
        for number, reading in enumerate(readings):
            zone = linux(tmp_path) / f"sys/class/thermal/thermal_zone{number}"
            zone.mkdir(parents=True)
            (zone / "type").write_text("cpu-thermal\n")
            (zone / "temp").write_text(f"{reading}\n")
        assert moltis.ProcProbe(tmp_path).read().temperature == expected

    @pytest.mark.parametrize("stat", ["", "cpu", "cpu  1 2 3", "intr 1 2 3 4 5 6"])
    def test_a_stat_file_without_cpu_times_is_no_reading(self, tmp_path, stat):
        linux(tmp_path, cpu=stat)
        assert moltis.ProcProbe(tmp_path).read().cpu_times is None

    @pytest.mark.parametrize(
        "stat", [f"cpu {'9 ' * 5000}", f"cpu 1 2 3 4 {'9' * 5000}"]
    )
    def test_numbers_without_end_spare_the_rest_of_the_reading(self, tmp_path, stat):
        linux(tmp_path, cpu=stat, meminfo=f"{MEMINFO}Odd: {'9' * 5000} kB\n")
        vitals = moltis.ProcProbe(tmp_path).read()
        assert vitals.mem_total == 3884360 * 1024
        assert vitals.uptime_secs == 93784.21


MIB = 1 << 20
HOST = "MemTotal: 24641536 kB\nMemFree: 900000 kB\nMemAvailable: 20971520 kB\n"
HOST_BYTES = 24641536 * 1024
V1_UNLIMITED = "9223372036854771712\n"

# What `find /proc /sys -type f` had of it, on machines of each kind: file, content.
MACHINES = {
    "Pi Zero": (
        {
            "proc/meminfo": "MemTotal:         440052 kB\nMemFree:           71764 kB\n"
            "MemAvailable:     280312 kB\nBuffers:           28464 kB\n",
            "proc/stat": "cpu  36241 0 25518 2154610 8112 0 1423 0 0 0\n",
            "proc/uptime": "22254.32 21546.10\n",
            "proc/self/cgroup": "0::/user.slice/user-1000.slice/user@1000.service\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "36318\n",
        },
        (440052 * 1024, 280312 * 1024, None, 36.318),
    ),
    "Pi 5": (
        {
            "proc/meminfo": "MemTotal:        8256176 kB\nMemFree:         5733136 kB\n"
            "MemAvailable:    7293568 kB\n",
            "proc/stat": "cpu  102412 311 60411 9012345 5120 0 2210 0 0 0\n",
            "proc/uptime": "22990.11 90123.45\n",
            "proc/self/cgroup": "0::/user.slice/user-1000.slice/session-3.scope\n",
            "sys/fs/cgroup/user.slice/memory.max": "max\n",
            "sys/fs/cgroup/user.slice/memory.current": "1207959552\n",
            "sys/fs/cgroup/user.slice/cpu.max": "max 100000\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone0/temp": "52350\n",
        },
        (8256176 * 1024, 7293568 * 1024, None, 52.35),
    ),
    "LXC": (  # lxcfs shows the limit in meminfo as well
        {
            "proc/meminfo": "MemTotal:        2097152 kB\nMemFree:         1853020 kB\n"
            "MemAvailable:    1934440 kB\n",
            "proc/stat": "cpu  18410 0 9120 880120 0 0 0 0 0 0\n",
            "proc/uptime": "9121.00 8801.00\n",
            "proc/self/cgroup": "0::/.lxc\n",
            "sys/fs/cgroup/memory.max": "2147483648\n",
            "sys/fs/cgroup/memory.current": "249987072\n",
            "sys/fs/cgroup/memory.stat": "anon 41943040\ninactive_file 93361792\n",
            "sys/fs/cgroup/cpu.max": "200000 100000\n",
        },
        (2048 * MIB, 1934440 * 1024, 2.0, None),
    ),
    "container, cgroup v2": (  # docker run --memory 300m --cpus 1.5
        {
            "proc/meminfo": HOST,
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": "314572800\n",
            "sys/fs/cgroup/memory.current": "104857600\n",
            "sys/fs/cgroup/memory.stat": "file 31457280\ninactive_file 20971520\n",
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
        },
        (300 * MIB, 220 * MIB, 1.5, None),
    ),
    "service in a slice with a limit, cgroup v2": (
        {
            "proc/meminfo": HOST,
            "proc/self/cgroup": "0::/a.slice/b.service\n",
            "sys/fs/cgroup/a.slice/memory.max": "314572800\n",
            "sys/fs/cgroup/a.slice/memory.current": "209715200\n",
            "sys/fs/cgroup/a.slice/cpu.max": "50000 100000\n",
            "sys/fs/cgroup/a.slice/b.service/memory.max": "1073741824\n",
            "sys/fs/cgroup/a.slice/b.service/memory.current": "104857600\n",
            "sys/fs/cgroup/a.slice/b.service/cpu.max": "max 100000\n",
        },
        (300 * MIB, 100 * MIB, 0.5, None),
    ),
    "container, cgroup v1": (  # its path is the one outside
        {
            "proc/meminfo": HOST,
            "proc/self/cgroup": "9:memory:/docker/5f0c\n4:cpu,cpuacct:/docker/5f0c\n"
            "1:name=systemd:/docker/5f0c\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "314572800\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "104857600\n",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 20971520\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        (300 * MIB, 220 * MIB, 1.5, None),
    ),
    "no limit, cgroup v1": (
        {
            "proc/meminfo": HOST,
            "proc/self/cgroup": "9:memory:/user.slice\n4:cpu:/\n0::/user.slice\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_UNLIMITED,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "20104857600\n",
            "sys/fs/cgroup/memory/user.slice/memory.limit_in_bytes": V1_UNLIMITED,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        (HOST_BYTES, 20971520 * 1024, None, None),
    ),
    "WSL 2": (
        {
            "proc/meminfo": "MemTotal:        8029044 kB\nMemFree:         6623456 kB\n"
            "MemAvailable:    7164324 kB\n",
            "proc/stat": "cpu  1201 12 2210 402110 310 0 95 0 0 0\n",
            "proc/uptime": "1017.44 8042.20\n",
            "proc/self/cgroup": "0::/\n",
        },
        (8029044 * 1024, 7164324 * 1024, None, None),
    ),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_a_recorded_machine_is_read(tmp_path, machine):
    files, (total, available, cpus, temperature) = MACHINES[machine]
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    vitals = moltis.ProcProbe(tmp_path).read()
    assert (vitals.mem_total, vitals.mem_available) == (total, available)
    assert vitals.cpu_limit == cpus
    assert vitals.temperature == temperature
    report = moltis.Telemetry.from_payload(
        moltis.TelemetrySource(
            lambda: vitals, SimpleNamespace(equipment=moltis.Equipment())
        )
        .read()
        .to_payload("n")
    )
    assert report.mem_available <= report.mem_total == total


HOSTS = {
    # what it is: (files, system, virtual)
    "a Raspberry Pi": (
        {
            "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12"\n',
            "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd evtstrm\n",
        },
        ("Debian GNU/Linux 12", "no"),
    ),
    "a cloud machine": (
        {
            "etc/os-release": "PRETTY_NAME='Ubuntu 24.04.1 LTS'\n",
            "proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu vme hypervisor lahf_lm\n",
            "sys/class/dmi/id/sys_vendor": "QEMU\n",
        },
        ("Ubuntu 24.04.1 LTS", "QEMU"),
    ),
    "a guest without a name of its maker": (
        {"proc/cpuinfo": "flags : hypervisor\n", "etc/os-release": "ID=x\n"},
        ("", "virtual machine"),
    ),
    "a container on a cloud machine": (
        {
            ".dockerenv": "",
            "etc/os-release": "PRETTY_NAME=Alpine\n",
            "proc/cpuinfo": "flags : hypervisor\n",
        },
        ("Alpine", "container"),
    ),
    "Windows' Linux": (
        {
            "proc/version": "Linux version 5.15.1-microsoft-standard-WSL2 (gcc)\n",
            "proc/cpuinfo": "flags : hypervisor\n",
        },
        ("", "WSL"),
    ),
    "a Mac": (
        {
            moltis.MACOS_VERSION: "<dict><key>ProductName</key>\n\t"
            "<string>macOS</string><key>ProductVersion</key>\n\t"
            "<string>14.6.1</string></dict>",
        },
        ("macOS 14.6.1", ""),
    ),
    "an unknown system": ({}, ("", "")),
}


@pytest.mark.parametrize("machine", HOSTS)
def test_a_machine_tells_its_system_and_whether_it_is_virtual(tmp_path, machine):
    files, expected = HOSTS[machine]
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    host = moltis.read_host(tmp_path)
    assert (host.system, host.virtual) == expected
    assert host.hostname
    assert host.user


def test_what_cannot_be_looked_at_is_missing(tmp_path):
    """As /sys of a hardened system; a name that is too long is refused to root, too."""
    root = tmp_path / ("a" * 300)
    assert moltis.ProcProbe(root).read() == moltis.Vitals()
    assert moltis.read_host(root).virtual == ""


def test_a_quota_of_cores_counts_up_and_never_beyond_those_of_the_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4), raising=False)
    counts = [moltis.usable_cpus(limit) for limit in (None, 0.2, 1.5, 64.0)]
    assert counts == [4, 1, 2, 4]


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("ext4", (100 * 4096, 50 * 4096)),
        ("composefs", (900 * 4096, 300 * 4096)),  # an image: full and read-only
        ("rootfs", (900 * 4096, 300 * 4096)),  # has no blocks at all
    ],
)
def test_the_disk_is_the_one_that_fills(monkeypatch, root, expected):
    kinds = {"ext4": (100, 50, 0), "composefs": (2048, 0, 1), "rootfs": (0, 0, 0)}

    def statvfs(path):
        blocks, free, flags = kinds[root] if path == "/" else (900, 300, 0)
        return SimpleNamespace(
            f_blocks=blocks, f_bavail=free, f_frsize=4096, f_flag=flags * os.ST_RDONLY
        )

    monkeypatch.setattr(os, "statvfs", statvfs)
    assert moltis._read_disk() == expected


class TestCpuUsage:
    def test_it_is_the_share_of_ticks_between_two_readings(self):
        earlier = moltis.CpuTimes(busy=100, total=1000)
        assert moltis.CpuTimes(busy=150, total=1200).usage_since(earlier) == 25.0

    def test_waiting_time_that_goes_back_does_not_push_it_over_100(self):
        """Linux lets the count of ticks spent waiting for I/O go back."""
        earlier = moltis.CpuTimes(busy=100, total=1000)
        assert moltis.CpuTimes(busy=1150, total=2000).usage_since(earlier) == 100.0

    def test_over_too_few_ticks_there_is_none(self):
        earlier = moltis.CpuTimes(busy=100, total=1000)
        assert moltis.CpuTimes(busy=101, total=1001).usage_since(earlier) is None


class TestMacos:
    def probe(self, environ, now=1762675200.0):
        programs = moltis.ShortPrograms(environ)
        return moltis.MacProbe(programs, clock=lambda: now)

    def test_a_recorded_mac_is_read(self, programs, environ, monkeypatch):
        programs("sysctl", answer(MACOS_SYSCTL))
        programs("vm_stat", answer(MACOS_VM_STAT))
        programs("ps", answer("  0.0\n 12.5\n100.3\n  7.2\n"))
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
        assert self.probe(environ, now=1762675200.0 + 500).read() == moltis.Vitals(
            mem_total=17179869184,
            mem_available=(4518 + 191193 + 3014) * 16384,
            uptime_secs=500.0,
            cpu_usage=15.0,
        )

    def test_a_recorded_intel_mac_has_smaller_pages(self, programs, environ):
        programs("sysctl", answer(MACOS_SYSCTL.replace("17179869184", "8589934592")))
        programs(
            "vm_stat",
            answer(
                "Mach Virtual Memory Statistics: (page size of 4096 bytes)\n"
                "Pages free:                               91284.\n"
                "Pages active:                            702113.\n"
                "Pages inactive:                          678901.\n"
                "Pages speculative:                        23012.\n"
            ),
        )
        vitals = self.probe(environ).read()
        assert vitals.mem_total == 8 << 30
        assert vitals.mem_available == (91284 + 678901 + 23012) * 4096

    def test_a_mac_without_vm_stat_and_ps_tells_the_rest(self, programs, environ):
        programs("sysctl", answer(MACOS_SYSCTL))
        assert self.probe(environ).read() == moltis.Vitals(
            mem_total=17179869184, uptime_secs=0.0
        )

    def test_a_sysctl_that_hangs_is_given_up(self, programs, environ, monkeypatch):
        monkeypatch.setattr(moltis, "SYSCTL_TIMEOUT", 0.2)
        programs("sysctl", "exec sleep 120")
        assert self.probe(environ).read() == moltis.Vitals()


class TestChoiceOfProbe:
    def test_proc_comes_first(self, tmp_path, environ):
        probe = moltis.choose_probe(environ, linux(tmp_path))
        assert probe().mem_total == 3884360 * 1024

    def test_sysctl_serves_where_there_is_no_proc(self, tmp_path, programs, environ):
        programs("sysctl", answer(MACOS_SYSCTL))
        probe = moltis.choose_probe(environ, tmp_path)
        assert probe().mem_total == 17179869184

    def test_psutil_serves_where_there_is_neither(self, tmp_path, environ, monkeypatch):
        (tmp_path / "psutil.py").write_text(
            "import collections\n"
            "Memory = collections.namedtuple('Memory', 'total available')\n"
            "Times = collections.namedtuple('Times', 'user system idle')\n"
            "def virtual_memory(): return Memory(4000, 1000)\n"
            "def cpu_times(): return Times(1.0, 2.0, 7.0)\n"
            "def boot_time(): return 0.0\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "psutil", raising=False)
        vitals = moltis.choose_probe(environ, tmp_path)()
        monkeypatch.delitem(sys.modules, "psutil")
        assert (vitals.mem_total, vitals.mem_available) == (4000, 1000)
        assert vitals.cpu_times == moltis.CpuTimes(busy=300, total=1000)

    def test_psutil_is_found_by_a_program_that_was_started_without_site(self):
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import moltis; "
            "moltis.read_psutil(); import os, site; "
            "there = filter(os.path.isdir, site.getsitepackages()); "
            "sys.exit(not set(there) <= set(sys.path))"
        )
        command = [sys.executable, "-IS", "-c", code, str(ROOT)]
        subprocess.run(command, check=True)

    def test_a_machine_that_tells_nothing_has_empty_vitals(
        self, tmp_path, environ, monkeypatch
    ):
        monkeypatch.setitem(sys.modules, "psutil", None)  # cannot be imported
        assert moltis.choose_probe(environ, tmp_path)() == moltis.Vitals()


class TestRuntimes:
    def test_each_is_listed_with_its_version(self, programs, inventory):
        for name, script in RUNTIME_ANSWERS.items():
            programs(name, script)
        equipment = known(inventory())
        assert equipment.runtimes == tuple(RUNTIME_ANSWERS)
        assert equipment.runtime_versions == {
            "python3": "3.11.2",
            "node": "20.11.1",
            "ruby": "3.1.2p20",
            "go": "1.22.1",
            "rustc": "1.77.0-nightly",
            "java": "21",
        }

    def test_one_that_fails_is_none(self, programs, inventory):
        """As rustup's `rustc` does without a toolchain."""
        programs("java", RUNTIME_ANSWERS["java"])
        programs("ruby", "echo 'ruby 9.9.9'; exit 1")
        equipment = known(inventory())
        assert equipment.runtimes == ("java",)
        assert list(equipment.runtime_versions) == ["java"]

    def test_to_ask_for_a_version_leaves_nothing_behind(
        self, tmp_path, programs, inventory, home, environ
    ):
        """Version managers set up their directory before they know that they fail."""
        environ["TMPDIR"] = str(tmp_path / "tmp")
        (tmp_path / "tmp").mkdir()
        (home / ".pyenv").mkdir()
        (home / ".pyenv/version").write_text("3.12.1")
        programs("rustc", 'mkdir -p "$HOME/.rustup/tmp"; exit 1')
        programs("python3", 'echo "Python $(cat "$HOME/.pyenv/version")"')
        programs("java", f'touch "$HOME/.java"; {RUNTIME_ANSWERS["java"]}')
        one = inventory()
        equipment = known(one)
        one.close()
        assert equipment.runtimes == ("python3", "java")
        assert equipment.runtime_versions["python3"] == "3.12.1"
        assert os.listdir(home) == [".pyenv"]
        assert os.listdir(tmp_path / "tmp") == []

    def test_names_are_known_before_versions(self, tmp_path, programs, inventory):
        """A report at connect shall not wait for a slow `java -version`."""
        go_on = tmp_path / "go-on"
        programs("node", f"{wait_in_shell(go_on)}; echo v1.2.3")
        programs("java", RUNTIME_ANSWERS["java"])
        one = inventory()
        wait_for(lambda: one.equipment.runtimes)
        assert one.equipment.runtime_versions == {}
        go_on.touch()
        assert known(one).runtime_versions["node"] == "1.2.3"

    def test_one_that_hangs_is_ended_with_its_children_and_spares_the_others(
        self, tmp_path, programs, inventory, monkeypatch
    ):
        monkeypatch.setattr(moltis, "VERSION_TIMEOUT", 5.0)
        pids = tmp_path / "pids"
        programs("node", f"sleep 120 & echo $! $$ >{pids}; wait")
        programs("java", RUNTIME_ANSWERS["java"])
        assert list(known(inventory()).runtime_versions) == ["java"]
        for pid in pids.read_text().split():
            wait_for(lambda pid=pid: not process_exists(int(pid)))

    def test_one_that_prints_without_end_is_ended(self, programs, inventory):
        programs("node", "exec yes v1.2.3 v1.2.3 v1.2.3 v1.2.3")
        programs("java", RUNTIME_ANSWERS["java"])
        assert list(known(inventory()).runtime_versions) == ["java"]

    def test_one_that_drips_is_ended_too(self, programs, inventory, monkeypatch):
        monkeypatch.setattr(moltis, "VERSION_TIMEOUT", 5.0)
        programs("node", "for _ in $(seq 6000); do echo v1; sleep 0.01; done")
        programs("java", RUNTIME_ANSWERS["java"])
        assert list(known(inventory()).runtime_versions) == ["java"]

    def test_one_that_cannot_be_started_is_no_error(self, programs, inventory, caplog):
        programs("node", "").write_bytes(b"\x7fELF nonsense")
        programs("java", RUNTIME_ANSWERS["java"])
        known(inventory())
        assert caplog.records == []

    def test_close_ends_one_that_hangs(self, tmp_path, programs, inventory):
        pid = tmp_path / "pid"
        programs("python3", f"echo $$ >{pid}; exec sleep 120")
        one = inventory()
        wait_for(lambda: pid.exists() and pid.read_text())
        one.close()
        assert not process_exists(int(pid.read_text()))
        assert one.equipment.runtime_versions == {}

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    def test_one_that_even_sigkill_does_not_end_is_not_started_again(
        self, programs, environ, monkeypatch, caplog
    ):
        """A program that waits for a broken GPU driver: one of them is enough."""

        def wait_in_vain(process, timeout=None):
            raise subprocess.TimeoutExpired(process.args, timeout)

        path = str(programs("node", "exec sleep 120"))
        short = moltis.ShortPrograms(environ)
        with monkeypatch.context() as patch:
            patch.setattr(subprocess.Popen, "wait", wait_in_vain)
            patch.setattr(os, "killpg", lambda *_: None)
            result = short.ask(path, timeout=0.1)
            assert (result.status, result.survivor > 0) == (124, True)
            programs("node", "echo v1.2.3")
            assert short.ask(path, timeout=60.0) == moltis.ProgramResult(124)
        os.kill(result.survivor, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(result.survivor, 0)
        assert short.ask(path, timeout=60.0).text == "v1.2.3"
        assert "cannot kill" in caplog.text

    def test_they_get_no_secret_of_ours(self, tmp_path, programs, environ, inventory):
        environ.update(
            MOLTIS_DEVICE_TOKEN="mdt_secret", OPENAI_API_KEY="sk-1", KEPT="kept"
        )
        seen = tmp_path / "env"
        programs("java", f"env >{seen}\n{RUNTIME_ANSWERS['java']}")
        known(inventory())
        text = seen.read_text()
        assert "KEPT=kept" in text
        assert "MOLTIS_" not in text
        assert "sk-1" not in text

    def test_changes_are_noticed_and_announced(self, programs, inventory):
        programs("java", RUNTIME_ANSWERS["java"])
        changes = []
        one = inventory(interval=0.01, on_change=lambda: changes.append("change"))
        wait_for(lambda: len(changes) == 2)  # first the names, then the versions
        programs("java", "echo 'openjdk version \"22.0.1\"'")
        wait_for(lambda: one.equipment.runtime_versions == {"java": "22.0.1"})
        wait_for(lambda: len(changes) > 2)

    def test_a_callback_that_fails_is_logged_and_not_the_end(
        self, programs, inventory, caplog
    ):
        programs("java", RUNTIME_ANSWERS["java"])

        def fail():
            raise ZeroDivisionError

        known(inventory(on_change=fail))
        assert "ZeroDivisionError" in caplog.text

    def test_what_only_offers_to_install_the_runtime_on_a_mac_is_none(self):
        assert moltis._is_macos_stub("/usr/bin/java", "darwin")
        assert not moltis._is_macos_stub("/opt/homebrew/bin/java", "darwin")
        assert not moltis._is_macos_stub("/usr/bin/java", "linux")


class TestGpus:
    def test_nvidia_smi_tells_names_and_memory(self, programs, inventory):
        programs("java", RUNTIME_ANSWERS["java"])
        programs(
            "nvidia-smi",
            """[ "$1" = --query-gpu=name,memory.total ] || exit 2
            [ "$2" = --format=csv,noheader,nounits ] || exit 2
            echo 'NVIDIA GeForce RTX 4090, 24564'
            echo 'NVIDIA GB10, [N/A]'""",
        )
        assert known(inventory()).gpus == (
            moltis.Gpu("NVIDIA GeForce RTX 4090", 24564 * 1024 * 1024),
            moltis.Gpu("NVIDIA GB10"),
        )

    def test_a_worn_gpu_is_listed_and_a_warning_is_none(self, programs, inventory):
        programs("java", RUNTIME_ANSWERS["java"])
        programs(
            "nvidia-smi",
            "echo 'NVIDIA L4, 23034'; echo 'warning: infoROM is corrupted, gpu 0'; "
            f"echo 'Odd, {'9' * 5000}'; exit 14",
        )
        assert known(inventory()).gpus == (moltis.Gpu("NVIDIA L4", 23034 << 20),)

    def test_a_driver_that_does_not_answer_means_none(self, programs, inventory):
        programs("java", RUNTIME_ANSWERS["java"])
        programs(
            "nvidia-smi",
            "echo 'NVIDIA-SMI has failed because it could not talk, sorry'; exit 9",
        )
        assert known(inventory()).gpus == ()


TAGS = b'{"models":[{"name":"llama3.2:3b","size":2019393189},{"name":"qwen3:8b"}]}'


class TestProviders:
    def find(self, host):
        return moltis.find_ollama({"OLLAMA_HOST": host}, moltis.Cancellation())

    def test_ollamas_models_come_from_its_api(self):
        chunks = [TAGS[i : i + 1] for i in range(len(TAGS))]
        with ScriptedServer(lambda request: (200, {}, chunks)) as server:
            found = self.find(f"127.0.0.1:{server.port}")
            assert found == moltis.Provider("ollama", ("llama3.2:3b", "qwen3:8b"))
            (method, path, headers, _) = server.requests[0]
        assert (method, path) == ("GET", "/api/tags")
        assert headers["Host"] == f"127.0.0.1:{server.port}"

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"<html>",
            b"[1, 2]",
            b"7",
            b"{}",
            b'{"models":null}x',
            b'{"models":{"a":1}}',
            b"[" * 100_000,
            TAGS[:-1],
        ],
        ids=lambda body: body[:20].decode(),
    )
    def test_another_answer_is_no_ollama(self, body):
        with ScriptedServer(lambda request: (200, {}, [body])) as server:
            assert self.find(server.url) is None

    def test_an_entry_without_a_name_is_no_model(self):
        models = b'{"models":["a",{},{"name":7},{"name":"m"}]}'
        with ScriptedServer(lambda request: (200, {}, [models])) as server:
            assert self.find(server.url) == moltis.Provider("ollama", ("m",))

    def test_an_error_is_no_ollama(self):
        with ScriptedServer(lambda request: (404, {}, [TAGS])) as server:
            assert self.find(server.url) is None

    def test_an_answer_that_is_too_long_is_no_ollama(self):
        chunks = [b" " * moltis.MAX_MODEL_REPLY, TAGS]
        with ScriptedServer(lambda request: (200, {}, chunks)) as server:
            assert self.find(server.url) is None

    def test_a_closed_port_is_no_ollama(self):
        assert self.find(f"127.0.0.1:{free_port()}") is None

    @pytest.mark.parametrize("host", ["no such name", "bücher\u2028", "x" * 300])
    def test_a_host_that_cannot_be_is_no_ollama(self, host):
        assert self.find(host) is None

    def test_a_server_that_never_answers_is_given_up(self, monkeypatch):
        monkeypatch.setattr(moltis, "CONNECT_TIMEOUT", 0.3)
        with socket.create_server(("127.0.0.1", 0)) as server:
            assert self.find(f"127.0.0.1:{server.getsockname()[1]}") is None

    def test_close_does_not_wait_for_a_server_that_never_answers(
        self, environ, inventory, monkeypatch
    ):
        monkeypatch.setattr(moltis, "CONNECT_TIMEOUT", 1000.0)
        with socket.create_server(("127.0.0.1", 0)) as server:
            environ["OLLAMA_HOST"] = f"127.0.0.1:{server.getsockname()[1]}"
            one = inventory()
            with server.accept()[0]:
                one.close()

    def test_ollama_behind_tls_is_found(self, tmp_path, monkeypatch):
        if shutil.which("openssl") is None:
            pytest.skip("no openssl to make a certificate with")
        pem = tmp_path / "server.pem"
        command = (
            "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost"
            " -addext subjectAltName=DNS:localhost -keyout server.pem -out server.crt"
        )
        subprocess.run(command.split(), check=True, cwd=tmp_path, capture_output=True)
        with open(pem, "a") as file:
            file.write((tmp_path / "server.crt").read_text())
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        with ScriptedServer(lambda request: (200, {}, [TAGS])) as server:
            server._server.socket = context.wrap_socket(
                server._server.socket, server_side=True
            )
            found = self.find(f"https://localhost:{server.port}")
        assert found == moltis.Provider("ollama", ("llama3.2:3b", "qwen3:8b"))

    def test_an_api_key_is_reported_as_present_and_never_shown(
        self, programs, environ, inventory
    ):
        programs("java", RUNTIME_ANSWERS["java"])
        environ.update(ANTHROPIC_API_KEY="sk-ant-1", XAI_API_KEY="xai-1")
        environ.update(GROQ_API_KEY="", UNKNOWN_API_KEY="u-1")
        with ScriptedServer(lambda request: (200, {}, [TAGS])) as server:
            environ["OLLAMA_HOST"] = server.url
            providers = known(inventory()).providers
        assert [p.to_json() for p in providers] == [
            {"provider": "ollama", "models": ["llama3.2:3b", "qwen3:8b"]},
            {"provider": "anthropic", "models": []},
            {"provider": "xai", "models": []},
        ]

    def test_every_provider_of_the_design_is_known(self):
        names = "openai anthropic google gemini mistral groq together openrouter"
        environ = {f"{n.upper()}_API_KEY": "x" for n in names.split()}
        environ.update(DEEPSEEK_API_KEY="x", XAI_API_KEY="x")
        found = [p.provider for p in moltis.providers_with_keys(environ)]
        assert found == [*names.split(), "deepseek", "xai"]


class TestFindBinary:
    def test_the_users_path_comes_first(self, programs, environ):
        path = programs("sh", "")
        assert moltis.find_binary("sh", environ) == str(path)

    def test_the_users_usual_places_are_searched_too(self, home, environ):
        """A service is started with a bare PATH."""
        path = home / ".cargo/bin/mytool"
        path.parent.mkdir(parents=True)
        path.write_text("#!/bin/sh\n")
        environ = moltis.command_environment(environ)
        assert moltis.find_binary("mytool", environ) is None
        path.chmod(0o755)
        assert moltis.find_binary("mytool", environ) == str(path)

    def test_what_is_not_there_is_none(self, environ):
        assert moltis.find_binary("no-such-program", environ) is None

    def test_the_working_directory_is_never_searched(
        self, tmp_path, programs, environ, monkeypatch
    ):
        programs("mytool", "")
        monkeypatch.chdir(programs.directory)
        environ["PATH"] = f":.:{os.curdir}:../bin"
        assert moltis.find_binary("mytool", environ) is None

    @pytest.mark.parametrize(
        "name", ["", "/bin/sh", "../sh", "a\0b", "sh\n", "x" * 256]
    )
    def test_what_is_no_plain_name_is_refused(self, name):
        with pytest.raises(moltis.RpcError) as caught:
            moltis.find_binary(name, {})
        assert caught.value.code == "INVALID_REQUEST"


class TestReports:
    def source(self, tmp_path, inventory):
        probe = moltis.ProcProbe(tmp_path).read
        return moltis.TelemetrySource(probe, inventory)

    def test_cpu_usage_is_that_since_the_report_before(self, tmp_path, inventory):
        linux(tmp_path, cpu="cpu  100 0 0 900 0 0 0 0 0 0")
        source = self.source(tmp_path, inventory())
        assert source.read().cpu_usage is None
        linux(tmp_path, cpu="cpu  150 0 0 1050 0 0 0 0 0 0")
        assert source.read().cpu_usage == 25.0
        linux(tmp_path, cpu="cpu  151 0 0 1050 0 0 0 0 0 0")
        assert source.read().cpu_usage == 25.0  # too soon for another
        linux(tmp_path, cpu="cpu  250 0 0 1050 0 0 0 0 0 0")
        assert source.read().cpu_usage == 100.0

    def test_counters_that_go_back_spoil_no_later_reading(self, tmp_path, inventory):
        """As in a container that is restarted."""
        linux(tmp_path, cpu="cpu  900 0 0 100 0 0 0 0 0 0")
        source = self.source(tmp_path, inventory())
        linux(tmp_path, cpu="cpu  10 0 0 3090 0 0 0 0 0 0")
        assert source.read().cpu_usage is None
        linux(tmp_path, cpu="cpu  10 0 0 3190 0 0 0 0 0 0")
        assert source.read().cpu_usage == 0.0

    def test_a_system_that_reckons_the_usage_itself_is_believed(self, inventory):
        source = moltis.TelemetrySource(
            lambda: moltis.Vitals(cpu_usage=12.345), inventory()
        )
        assert source.read().cpu_usage == 12.3

    def test_a_system_that_tells_nothing_has_a_report_nonetheless(self, inventory):
        source = moltis.TelemetrySource(moltis.Vitals, inventory())
        payload = source.read().to_payload("n1")
        assert payload["nodeId"] == "n1"
        assert payload["mem"] == {}
        assert payload["disk"]["available"] <= payload["disk"]["total"]

    def test_the_payload_has_the_shape_of_the_design(
        self, tmp_path, programs, environ, inventory
    ):
        environ["OPENAI_API_KEY"] = "sk-1"
        programs("java", RUNTIME_ANSWERS["java"])
        programs("nvidia-smi", "echo 'NVIDIA L4, 23034'")
        one = inventory()
        known(one)
        payload = self.source(linux(tmp_path), one).read().to_payload("n1")
        load = payload.pop("load")
        assert len(load) == 3
        assert payload.pop("cpuCount") == moltis.usable_cpus(None)
        assert all(isinstance(v, int) for v in payload.pop("disk").values())
        host = vars(moltis.read_host())
        assert {k: v for k, v in host.items() if v} == {
            name: payload.pop(name) for name in host if name in payload
        }
        assert payload == {
            "nodeId": "n1",
            "mem": {"total": 3884360 * 1024, "available": 2913884 * 1024},
            "uptime": 93784,
            "services": [],
            "runtimes": ["java"],
            "runtimeVersions": {"java": "21"},
            "gpus": [{"name": "NVIDIA L4", "memTotal": 23034 * 1024 * 1024}],
            "providers": [{"provider": "openai", "models": []}],
        }

    def test_what_is_sent_is_what_is_received(self):
        telemetry = moltis.Telemetry(
            mem_total=4,
            mem_available=3,
            cpu_count=2,
            cpu_usage=1.5,
            uptime_secs=60,
            disk_total=10,
            disk_available=5,
            load=(0.1, 0.2, 0.3),
            temperature=-3.5,
            services=("nginx",),
            runtimes=("node",),
            runtime_versions={"node": "20.1.0"},
            gpus=(moltis.Gpu("A100", 1), moltis.Gpu("B200")),
            providers=(moltis.Provider("ollama", ("a", "b")),),
            hostname="attic",
            system="Debian GNU/Linux 12 (bookworm)",
            user="pi",
            virtual="no",
        )
        text = moltis.to_json(telemetry.to_payload("n1"))
        assert moltis.Telemetry.from_payload(moltis.from_json(text)) == telemetry

    def test_a_rust_nodes_report_is_understood(self):
        telemetry = moltis.Telemetry.from_payload(RUST_PAYLOAD)
        assert telemetry.providers is None
        assert telemetry.to_columns(stale=False) == {
            "memTotal": 16 << 30,
            "memAvailable": 8 << 30,
            "cpuCount": 8,
            "cpuUsage": 12.5,
            "uptimeSecs": 3600,
            "services": [],
            "runtimes": ["python3", "node"],
            "runtimeVersions": {},
            "gpus": [],
            "stale": False,
        }

    def test_unknown_and_absent_fields_do_no_harm(self):
        telemetry = moltis.Telemetry.from_payload({"nodeId": "n1", "fans": [1]})
        assert telemetry == moltis.Telemetry()

    @pytest.mark.parametrize(
        "fields",
        [
            {"mem": 7},
            {"mem": {"total": "16 GB"}},
            {"mem": {"total": -1}},
            {"mem": {"available": 2**63}},
            {"mem": {"total": 16 << 30, "available": 18446744073709551000 * 1024}},
            {"mem": {"total": 16 << 30, "available": 17 << 30}},
            {"cpuCount": True},
            {"cpuUsage": "12"},
            {"cpuUsage": float("inf")},
            {"cpuUsage": float("nan")},
            {"cpuUsage": 250},
            {"uptime": 10**400},
            {"disk": []},
            {"load": 1.0},
            {"load": ["1"]},
            {"load": [None]},
            {"temperature": {}},
            {"temperature": -273.2},
            {"services": "nginx"},
            {"runtimes": [7]},
            {"runtimeVersions": ["3.11"]},
            {"runtimeVersions": {"node": 20}},
            {"gpus": ["A100"]},
            {"gpus": [{}]},
            {"gpus": [{"name": "A100", "memTotal": "80 GB"}]},
            {"providers": {"openai": []}},
            {"providers": [{"models": []}]},
            {"providers": [{"provider": "openai", "models": [{}]}]},
        ],
        ids=str,
    )
    def test_a_field_that_makes_no_sense_is_missing_and_spares_the_others(self, fields):
        whole = moltis.Telemetry.from_payload(RUST_PAYLOAD)
        telemetry = moltis.Telemetry.from_payload({**RUST_PAYLOAD, **fields})
        (name,) = fields
        touched = {"uptime": "uptime_secs", "mem": "mem_", "disk": "disk_"}.get(name)
        for field in whole._names:
            wire = moltis.camel_case(field)
            if wire == name or (touched and field.startswith(touched)):
                assert getattr(telemetry, field) in (None, (), {}, 16 << 30)
            else:
                assert getattr(telemetry, field) == getattr(whole, field)

    @pytest.mark.parametrize(
        "claims",
        [
            {"mem_available": 2**64 * 1024, "mem_total": 1 << 30},
            {"uptime_secs": float(2**64)},
            {"disk_available": 2, "disk_total": 1},
            {"cpu_usage": float("nan"), "load": [float("inf")]},
        ],
        ids=str,
    )
    def test_what_the_sender_cannot_believe_is_missing_and_spares_the_rest(
        self, claims
    ):
        telemetry = moltis.Telemetry.checked({"cpu_count": 4, **claims})
        assert telemetry.cpu_count == 4
        for name in ("mem_available", "uptime_secs", "disk_available", "cpu_usage"):
            assert getattr(telemetry, name) is None

    def test_lists_and_names_of_a_report_are_bounded(self):
        telemetry = moltis.Telemetry.from_payload(
            {
                "runtimes": ["x" * 1000] * 1000,
                "runtimeVersions": {str(n): "1" for n in range(1000)},
                "load": [1] * 1000,
                "providers": [{"provider": "p", "models": ["m"] * 1000}] * 1000,
            }
        )
        assert len(telemetry.runtimes) == moltis.MAX_LISTED
        assert len(telemetry.runtimes[0]) == moltis.MAX_LABEL
        assert len(telemetry.runtime_versions) == moltis.MAX_LISTED
        assert len(telemetry.load) == 3
        assert len(telemetry.providers) == moltis.MAX_REPORTED_PROVIDERS
        assert len(telemetry.providers[0].models) == moltis.MAX_LISTED

    def test_no_name_of_a_report_can_steer_a_terminal_or_break_its_encoding(self):
        telemetry = moltis.Telemetry.from_payload(
            {"runtimes": ["no\x1b[31mde\n", "a\ud800b", "Größe 5"]}
        )
        assert telemetry.runtimes == ("no[31mde", "ab", "Größe 5")

    def test_usage_beyond_the_scale_is_put_on_it(self):
        """A Rust node's float may be 100.00001."""
        assert moltis.Telemetry.from_payload({"cpuUsage": 100.00001}).cpu_usage == 100.0
        assert moltis.Telemetry.from_payload({"cpuUsage": -0.1}).cpu_usage == 0.0
