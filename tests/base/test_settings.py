"""What users write: settings with bounds and choices, names of chips, and code whose errors are theirs."""

import functools
import runpy
from dataclasses import dataclass

import pytest
from refusal import refused

import vlmprune_jax as vp
from vlmprune_jax.base.checks import blaming, line_of_users, one_of
from vlmprune_jax.base.chips import CHIPS, peak_flops, slice_of
from vlmprune_jax.base.errors import UserError
from vlmprune_jax.base.settings import check_settings, override, setting
from vlmprune_jax.core.recovery.losses import losses


@dataclass(frozen=True)
class Toy:
    """Some settings."""

    name: str = setting("a", "Which.", choices=("a", "b"))
    where: str = setting("any", "One of a mapping, or any.", choices=lambda: losses)
    share: float | None = setting(0.5, "How much.", above=0, most=1)
    sizes: tuple[int, ...] = setting((), "How large.", least=2)
    parts: dict = setting({}, "By name.", below=9)

    def __post_init__(self) -> None:
        check_settings("toy", self)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "c"}, "toy.name 'c' is not one of a, b"),
        ({"share": 0.0}, "toy.share=0.0 must be above 0 and at most 1"),
        ({"share": 1.5}, "toy.share=1.5 must be above 0 and at most 1"),
        ({"share": float("nan")}, "toy.share=nan must be above 0 and at most 1"),
        ({"sizes": (2, 1)}, "toy.sizes=(2, 1) must be at least 2"),
        ({"parts": {"x": 9}}, "toy.parts={'x': 9} must be below 9"),
        ({"parts": {"x": float("inf")}}, "must be below 9"),
    ],
)
def test_what_is_declared_is_checked(values, message):
    with pytest.raises(UserError) as error:
        Toy(**values)
    assert message in str(error.value)
    assert Toy(share=None, sizes=(2,), parts={"x": 8, "text": "y"}).share is None


def test_choices_elsewhere_are_looked_up_when_a_command_starts():
    check_settings("toy", Toy(where="kl"), elsewhere=True)
    check_settings("toy", Toy(), elsewhere=True)
    check_settings("toy", Toy(where="nothing"))
    refused("toy.where 'kll' .*did you mean 'kl'", check_settings, "toy", Toy(where="kll"), elsewhere=True)
    for text in ("a\0b", "\ud800"):
        refused("where='.*' contains a NUL character or half of a surrogate", override, Toy(), {"where": text})


def test_a_chip_of_tpu7x_is_two_devices():
    chip, devices = slice_of("tpu7x:2x2x2")
    assert (devices, chip.slices[1]) == (16, "2x2x2")
    assert chip.seconds(2307e12, 0, 0)["compute"] == 2  # a chip's second of arithmetic on one of its halves
    assert peak_flops("TPU7x") == 2307e12 / 2
    assert slice_of("v5p:2x2x2") == (CHIPS["v5p"], 8)
    assert slice_of("v5e:8x8:2") == (CHIPS["v5e"], 128)  # two slices
    refused(r"unknown TPU \(known: v5e, v5p, v6e, tpu7x\): use for example v5e:8x8", slice_of, "v7x:2x2x1")
    long = "v5e:" + "x".join(["9999"] * 5000)  # its product has no float
    for name in ("tpu7x:8", long, "v5e:8x\N{ARABIC-INDIC DIGIT EIGHT}", long[:15] + "9" * 99):
        assert len(refused("is not GENERATION:SIZES", slice_of, name)) < 250


@pytest.fixture
def wrong(tmp_path):
    (tmp_path / "mine.py").write_text("def wrong(x):\n    return x[0]\n")
    return runpy.run_path(str(tmp_path / "mine.py"))["wrong"]


def test_users_are_told_their_line(wrong, tmp_path):
    """Errors of our own stay as they are, and lines of libraries and of scripts are not the user's."""
    for function in (wrong, functools.partial(wrong)):
        with pytest.raises(UserError) as told, blaming("criterion 'mine'", one_of, function):
            function(None)
        assert str(told.value).startswith(f"criterion 'mine' failed at {tmp_path}/mine.py:2 with TypeError: 'NoneType'")
    with (
        pytest.raises(UserError, match=r"mine failed at .*test_settings.py:\d+ with ZeroDivisionError.*: correct it"),
        blaming("mine", wrong),
    ):
        1 // len([])
    with pytest.raises(ZeroDivisionError), blaming("criterion 'l1'", one_of):
        1 // len([])
    with pytest.raises(UserError, match=r"^kind 'a' is not one of b"), blaming("mine", wrong):
        one_of("kind", "a", ("b",))
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
