"""How much memory is free: of devices that say so, else of the machine, or of the container it is cut to."""

import types

import jax

from vlmprune_jax.core.mesh import machine


def test_free_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    assert 2**20 < machine.free_memory() * len(jax.local_devices()) <= 2**50
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert machine._of_container() == 2**62
    (tmp_path / "memory.max").write_text(f"{100 + 8000 * len(jax.local_devices())}\n")
    assert machine.free_memory() == 8000
    devices = [types.SimpleNamespace(memory_stats=lambda u=u: {"bytes_limit": 90, "bytes_in_use": u}) for u in (30, 50)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert machine.free_memory() == 40
