"""How ``--routing`` is written, and what is said of a wrong spelling."""

import pytest

from fiddler.errors import ConfigError
from offload.routing_law import Law, parse_law


@pytest.mark.parametrize(
    ("text", "law"),
    [
        ("model", None),
        ("uniform", Law()),
        ("zipf:1.2", Law(skew=1.2)),
        ("zipf:0", Law()),
        ("sticky:0.8", Law(stay=0.8)),
        ("sticky:1", Law(stay=1.0)),
        ("drift:500", Law(skew=1.2, drift=500)),
    ],
)
def test_forms(text: str, law: Law | None) -> None:
    assert parse_law(text) == law


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("unifrom", "'uniform'"),
        ("uniform:3", "'uniform'"),
        ("Model", "'model'"),
        ("zip", "'zipf:S'"),
        ("zipff:1.2", "'zipf:1.2'"),
        ("zipf", "'zipf:S'"),
        ("zipf:", "'zipf:S'"),
        ("zipf:-1", "'zipf:S'"),
        ("zipf:nan", "'zipf:S'"),
        ("zipf:inf", "'zipf:S'"),
        ("stiky:0.5", "'sticky:0.5'"),
        ("sticky:1.5", "'sticky:P'"),
        ("sticky:x", "'sticky:P'"),
        ("drift:0", "'drift:N'"),
        ("drift:1.5", "'drift:N'"),
    ],
)
def test_a_wrong_spelling_gets_the_nearest_form(text: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_law(text)
    assert repr(text) in caught.value.message
    assert nearest in caught.value.message
    assert "\n" not in caught.value.message
    assert "sticky:P" in caught.value.hint


def test_what_is_near_nothing_still_gets_the_list() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_law("xyz")
    assert caught.value.message == "unknown routing 'xyz'"
    assert "zipf:S" in caught.value.hint
