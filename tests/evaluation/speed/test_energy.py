"""Energy counters: RAPL's that start again at 0, those that may not be read, and NVML's."""

import ctypes

import pytest

from vlmprune_jax.evaluation.speed import energy
from vlmprune_jax.evaluation.speed.energy import EnergyMeter, find_counters


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """Two packages and the memory of one, as Linux lists them, and zones that other zones contain."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(energy, "NVML", "libnothing.so")
    zones = {"intel-rapl": None, "intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram",
             "intel-rapl:1": "package-1", "intel-rapl:2": "psys", "intel-rapl-mmio:0": "package-0"}  # fmt: skip
    for zone, name in zones.items():
        (tmp_path / zone).mkdir()
        if name:
            (tmp_path / zone / "name").write_text(f"{name}\n")
            (tmp_path / zone / "max_energy_range_uj").write_text("1000000000\n")
            (tmp_path / zone / "energy_uj").write_text("999000000\n")
    return tmp_path


def test_rapl(powercap):
    (powercap / "intel-rapl:1/energy_uj").unlink()  # as one that only root reads
    with EnergyMeter() as meter:
        assert meter.counters == "RAPL package-0, RAPL dram"
        (powercap / "intel-rapl:0/energy_uj").write_text("2000000\n")  # it started again at 0
        (powercap / "intel-rapl:0:1/energy_uj").write_text("999500000\n")
    assert meter.joules == pytest.approx(3.5)


def test_long_measurements_are_read_in_between(powercap, monkeypatch):
    """A counter that comes round twice in one measurement is seen both times."""
    monkeypatch.setattr(energy, "SECONDS", 0.001)
    values = iter([0.0, 90.0, 10.0, 95.0])
    last = 5.0
    monkeypatch.setattr(energy, "_rapl", lambda: [energy.Counter("c", lambda: next(values, last), wraps=100.0)])
    with EnergyMeter() as meter:
        while meter._last != [last]:
            pass
    assert meter.joules == pytest.approx(205.0)


def test_a_counter_that_fails_gives_no_number(powercap):
    with EnergyMeter() as meter:
        (powercap / "intel-rapl:0/energy_uj").unlink()
    assert (meter.joules, meter.counters) == (None, "")


def test_machines_without_counters(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    monkeypatch.setattr(energy, "NVML", "libnothing.so")
    assert find_counters() == []
    with EnergyMeter() as meter:
        pass
    assert (meter.joules, meter.counters) == (None, "")


def test_nvml(tmp_path, monkeypatch):
    """Two GPUs, of which the second is too old to count."""

    class Library:
        def nvmlInit_v2(self):
            return 0

        def nvmlDeviceGetCount_v2(self, count):
            count._obj.value = 2
            return 0

        def nvmlDeviceGetHandleByIndex_v2(self, number, device):
            device._obj.value = number + 1
            return 0

        def nvmlDeviceGetTotalEnergyConsumption(self, device, value):
            value._obj.value = 4500
            return 0 if device.value == 1 else 3

    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    (counter,) = find_counters()
    assert (counter.name, counter.read()) == ("NVML GPU 0", 4.5)
