"""Energy counters: RAPL's that start again at 0, those that may not be read, and NVML's."""

import sys
from types import SimpleNamespace

import pytest

from vlmprune_jax.run.evaluation.speed import energy
from vlmprune_jax.run.evaluation.speed.energy import EnergyMeter, find_counters


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """Two packages and the memory of one, as Linux lists them, and zones that other zones contain."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
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
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_counters() == []
    with EnergyMeter() as meter:
        pass
    assert (meter.joules, meter.counters) == (None, "")


def test_nvml(tmp_path, monkeypatch):
    """Two GPUs, of which the second is too old to count."""

    class NVMLError(Exception):
        pass

    def millijoules(device):
        if device == "GPU 1":
            raise NVMLError("Not Supported")
        return 4500

    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda number: f"GPU {number}",
        nvmlDeviceGetTotalEnergyConsumption=millijoules,
    )
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "pynvml", library)
    (counter,) = find_counters()
    assert (counter.name, counter.read()) == ("NVML GPU 0", 4.5)


def test_a_gpu_without_driver(tmp_path, monkeypatch):
    def fail():
        raise error("Driver Not Loaded")

    error = type("NVMLError", (Exception,), {})
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=error, nvmlInit=fail))
    assert find_counters() == []
