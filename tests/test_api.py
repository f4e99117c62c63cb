"""The public API: every documented name can be imported."""

import vlmprune_jax as vp


def test_every_public_name_loads():
    assert all(getattr(vp, name) is not None for name in vp.__all__)
    assert vp._HOMES.keys() <= {*vp.__all__}
