"""Tokens and bytes are read as they are commonly written, and shown with their unit."""

import pytest

from vllm_tokenselect.tools.plan.units import parse_bytes, parse_tokens, show_bytes, show_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("128K", 131072), ("1M", 1 << 20), ("0.5M", 1 << 19), ("131072", 131072), (" 2k ", 2048)],
)
def test_tokens_come_with_a_unit_of_1024_or_none(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "K", "0", "-1", "128KB", "1.5", "0.3K", "1e6"])
def test_what_is_no_number_of_tokens_is_refused(text):
    with pytest.raises(ValueError, match="no number of tokens"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("141GB", 141 * 10**9), ("80GiB", 80 << 30), ("512 MiB", 512 << 20), ("1.5gb", 1_500_000_000)],
)
def test_bytes_come_with_a_unit(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["80", "GB", "0GB", "80TB", "80G"])
def test_a_size_without_a_unit_is_refused(text):
    with pytest.raises(ValueError, match="no size of a memory"):
        parse_bytes(text)


def test_sizes_are_shown_in_the_largest_unit_of_which_there_is_one():
    sizes = (0, 1023, 1024, 1536 << 10, 250 << 30, -(3 << 30))
    shown = ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "250 GiB", "-3.0 GiB"]
    assert [show_bytes(size) for size in sizes] == shown


def test_tokens_are_shown_as_they_can_be_typed():
    for tokens in (1 << 20, 131072, 1_000_000, 7):
        assert parse_tokens(show_tokens(tokens).replace(",", "")) == tokens
