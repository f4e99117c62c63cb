"""Whose error it is: of this package, or of a file of the user's."""

import functools
import runpy

import pytest

import vlmprune_jax as vp
from vlmprune_jax.base.checks import blaming, line_of_users, one_of
from vlmprune_jax.base.errors import UserError

SOURCE = "def wrong(x):\n    return x[0]\n"


@pytest.fixture
def wrong(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    return runpy.run_path(str(tmp_path / "mine.py"))["wrong"]


def test_users_are_told_their_line(wrong, tmp_path):
    for function in (wrong, functools.partial(wrong)):
        with pytest.raises(UserError) as told, blaming("criterion 'mine'", one_of, function):
            function(None)
        assert str(told.value).startswith(f"criterion 'mine' failed at {tmp_path}/mine.py:2 with TypeError: 'NoneType'")
    with (
        pytest.raises(UserError, match=r"mine failed at .*test_checks.py:\d+ with ZeroDivisionError.*: correct it"),
        blaming("mine", wrong),
    ):
        1 // len([])


def test_errors_of_our_own_stay(wrong):
    with pytest.raises(ZeroDivisionError), blaming("criterion 'l1'", one_of):
        1 // len([])
    with pytest.raises(UserError, match=r"^kind 'a' is not one of b"), blaming("mine", wrong):
        one_of("kind", "a", ("b",))


def test_lines_of_libraries_and_of_scripts_are_not_the_users(wrong, tmp_path):
    with pytest.raises(TypeError) as error:
        wrong(None)
    assert line_of_users(error.value, [tmp_path]).partition(":")[0] == __file__
    assert line_of_users(error.value) == f"{tmp_path}/mine.py:2"
    assert line_of_users(error.value.with_traceback(None)) == ""


@pytest.mark.parametrize("name", ["criteria", "families", "formats", "metrics", "stages"])
def test_registries_take_objects_of_their_class(name):
    registry = getattr(vp, name)
    known = dict(registry)
    for wrong in (3, None, type(next(iter(known.values())))):
        with pytest.raises(UserError, match=rf"vp\.{name}\['mine'\]: must be a vp\.\w+, got "):
            registry["mine"] = wrong
    registry["mine"] = next(iter(known.values()))
    assert dict(registry) == {**known, "mine": registry.pop("mine")}
