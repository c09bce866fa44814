"""What others' errors say, as a part of a sentence of ours."""

import pytest

from srft_prep.errors import in_one_line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("a\n  b\tc "), "a b c"),
        (OSError(), "OSError"),
        (ValueError("\n"), "ValueError"),
        ("text\nof a server", "text of a server"),
    ],
)
def test_an_error_is_one_line_and_never_empty(error: object, words: str) -> None:
    assert in_one_line(error) == words


def test_a_long_error_ends_where_it_is_cut() -> None:
    assert in_one_line(ValueError("word " * 100), limit=9) == "word word"
