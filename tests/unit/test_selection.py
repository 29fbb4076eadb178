"""Which paths a glob picks, for `--exclude` and `--include`."""

from __future__ import annotations

import pytest

from outlast.backup.selection import matcher
from outlast.errors import InvalidInput


@pytest.mark.parametrize(
    ("glob", "path", "fits"),
    [
        ("*.tmp", b"a.tmp", True),
        ("*.tmp", b"deep/er/a.tmp", True),
        ("*.tmp", b"a.tmp/inside", True),
        ("*.tmp", b"a.tmpx", False),
        ("logs", b"logs", True),
        ("logs", b"logs/today", True),
        ("logs", b"run/logs/today", True),
        ("logs", b"catalogs", False),
        ("logs/", b"logs/today", True),
        ("/logs", b"logs/today", True),
        ("/logs", b"run/logs", False),
        ("a/*.pt", b"a/b.pt", True),
        ("a/*.pt", b"a/b/c.pt", False),
        ("a/*.pt", b"x/a/b.pt", False),
        ("a/**", b"a/b/c.pt", True),
        ("**/c.pt", b"c.pt", True),
        ("**/c.pt", b"a/b/c.pt", True),
        ("a/**/c.pt", b"a/c.pt", True),
        ("a/**/c.pt", b"a/x/y/c.pt", True),
        ("a/**/c.pt", b"a/xc.pt", False),
        ("model-?.bin", b"model-1.bin", True),
        ("model-?.bin", b"model-12.bin", False),
        ("model-?.bin", b"model-/.bin", False),
        ("model-[0-3].bin", b"model-2.bin", True),
        ("model-[0-3].bin", b"model-4.bin", False),
        ("model-[!0-3].bin", b"model-4.bin", True),
        ("model-[!0-3].bin", b"model-2.bin", False),
        ("caf\u00e9*", "caf\u00e9.txt".encode(), True),
        ("caf?", "caf\u00e9".encode(), True),
        ("caf??", "caf\u00e9".encode(), False),
        ("caf[\u00e8-\u00ea]", "caf\u00e9".encode(), True),
        ("a[!b]c", b"a/c", False),
        ("a[\\]c", b"a\\c", True),
        ("odd?", b"odd\xff", True),
        ("odd*", b"odd\nname", True),
        ("odd*", b"odd\xff", True),
        ("\udcff*", b"\xffname", True),
        ("a+b.(c)", b"a+b.(c)", True),
        ("a+b.(c)", b"aab.(c)", False),
    ],
)
def test_a_glob_picks_what_gitignore_users_expect(glob: str, path: bytes, fits: bool) -> None:
    assert matcher([glob])(path) is fits


def test_one_fitting_glob_is_enough_and_none_fits_nothing() -> None:
    several = matcher(["*.pt", "data/**"])
    assert several(b"x.pt") and several(b"data/x") and not several(b"x.bin")
    assert not matcher([])(b"x")


@pytest.mark.parametrize("glob", ["", "/", "//"])
def test_a_glob_that_names_nothing_is_an_error(glob: str) -> None:
    with pytest.raises(InvalidInput, match="matches nothing"):
        matcher([glob])


def test_an_unclosed_bracket_stands_for_itself() -> None:
    assert matcher(["a[1"])(b"a[1") and not matcher(["a[1"])(b"a1")


@pytest.mark.parametrize("glob", ["[z-a]x", "[]", "[!]", "[]-a]x", "[a&&b]", "[[:alpha:]]"])
def test_no_glob_ends_in_a_traceback(glob: str) -> None:
    """A class that means nothing is either taken literally or refused in our words."""
    try:
        matcher([glob])(b"x")
    except InvalidInput as exc:
        assert glob in exc.message
