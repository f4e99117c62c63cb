"""Settings: bounds and choices are checked, also those that another module names."""

from dataclasses import dataclass

import pytest

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
    with pytest.raises(UserError, match=r"toy.where 'kll' is not one of any, ce, .*; did you mean 'kl'"):
        check_settings("toy", Toy(where="kll"), elsewhere=True)


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_texts_that_no_path_can_have(text):
    with pytest.raises(UserError, match=r"config.where='.*' contains a NUL character or half of a surrogate pair"):
        override(Toy(), {"where": text})
