import re
from typing import Literal

import pytest

from lit_did.arguments import check_choice, check_integer, check_range


@pytest.mark.parametrize(
    ("value", "least", "error", "message"),
    [
        (True, 1, TypeError, "Expected `n` to be an integer of at least 1, but got True."),
        ("8", 1, TypeError, "Expected `n` to be an integer of at least 1, but got '8'."),
        (1.0, 1, TypeError, "Expected `n` to be an integer of at least 1, but got 1.0."),
        (0, 1, ValueError, "Expected `n` to be an integer of at least 1, but got 0."),
        (None, None, TypeError, "Expected `n` to be an integer, but got None."),
    ],
)
def test_check_integer(value, least, error, message):
    with pytest.raises(error) as raised:
        check_integer("n", value, least)
    assert str(raised.value) == message
    check_integer("n", 1, 1)
    check_integer("n", -1)


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("(0, 1)", (1e-9, 0.95), (0, 1, -1.0, float("nan"))),
        ("[0, 1)", (0, 0.0, 0.5), (1, 1.0, -1e-9)),
        ("(0, 1]", (1, 1.0), (0, 1.5)),
        ("[0, inf)", (0, 1e308), (float("inf"), -1)),
    ],
)
def test_check_range(interval, inside, outside):
    for value in inside:
        check_range("share", value, interval)
    for value in outside:
        with pytest.raises(ValueError, match=re.escape(f"Expected `share` to be in {interval}, but got {value!r}.")):
            check_range("share", value, interval)
    for value in ("0.5", True, None):
        with pytest.raises(TypeError, match="Expected `share` to be an int or a float, but got "):
            check_range("share", value, interval)


@pytest.mark.parametrize(
    ("choices", "allowed", "refused"),
    [
        (Literal["a", "b"], ("a", "b"), {"c": ValueError, 1: TypeError, None: TypeError}),
        (Literal["a", None], ("a", None), {"c": ValueError, False: TypeError}),
        (Literal["a", 1], ("a", 1), {2: ValueError, True: TypeError, None: TypeError}),
        (Literal["a", True], ("a", True), {False: ValueError, 1: TypeError}),
    ],
)
def test_check_choice(choices, allowed, refused):
    for value in allowed:
        check_choice("mode", value, choices)
    listed = ", ".join(map(repr, allowed))
    for value, error in refused.items():
        with pytest.raises(error) as raised:
            check_choice("mode", value, choices)
        assert str(raised.value) == f"Expected `mode` to be one of {listed}, but got {value!r}."
    with pytest.raises(TypeError, match=r"to be one of .*, but got \['a'\]"):
        check_choice("mode", ["a"], choices)
