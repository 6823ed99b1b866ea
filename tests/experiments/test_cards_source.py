from functools import lru_cache

from medrobust_lib.experiments import show_source


@lru_cache(maxsize=2)
def doubled(number):
    """Twice a number.

    It stays in the library's own words.
    """
    # Why it is so.
    return 2 * number


def test_a_body_is_shown_without_docstring_and_decorators():
    shown = show_source(doubled)
    assert shown == "def doubled(number):\n    # Why it is so.\n    return 2 * number"
    assert repr(shown) == shown
    assert shown._repr_markdown_().startswith("```python\ndef doubled")
