"""Regular expressions from files: equal to Python's on what is supported, and never slow."""

import re

import pytest
from hypothesis import given, settings, strategies as st

from mlx_openelm.conversion.adapters.patterns import Pattern
from mlx_openelm.errors import AdapterError


def accepts(pattern, text):
    return Pattern(f"({pattern})$").matches(text)


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"q_proj", r"layers\.0\.attn\.qkv_proj", r".*\.0\..*", r"(?:layers\.[0-3]|x)\..*_proj", r".*proj_[12]$"),
        *(r"^layers\.\d+\.ffn\.(proj_1|proj_2)", r"layers\.(1?\d|2[0-7])\..+", r".*[^.]+", r"\w+(\.\w+){3}", r".{3,}?"),
        *(r"(?P<n>\d)", r"a||b", r"()", r"x{2}y{0,1}", r"[\]\-a]+", r"a{,3}", r"layers\.{1}0", r"$", r"(^|a)*b?"),
    ],
)
def test_patterns_that_people_write_match_as_in_python(pattern):
    texts = ("", "a", "b", "aab", "xxy", "q_proj", "layers.0.attn.qkv_proj", "layers.17.ffn.proj_2", "5", "]-a", "aaa")
    for text in texts:
        assert accepts(pattern, text) == bool(re.fullmatch(pattern, text)), text


_ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", "^", "$", ""])
_PATTERNS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(_PATTERNS, st.text("ab.", max_size=6))
def test_random_patterns_match_as_in_python(pattern, text):
    assert accepts(pattern, text) == bool(re.fullmatch(pattern, text))


@pytest.mark.parametrize(
    "pattern",
    [
        "(([a-z0-9._])+)+!",
        "(.*)*(.*)*!",
        "(a|a)*" * 100 + "!",
        "((((.{1,1000}){1,1000}){1,1000})){1,1000}!",
        ".*" * 490,
    ],
)
def test_patterns_on_which_backtracking_never_ends_are_decided(pattern):
    text = "layers.12.attn." + "a" * 60
    assert accepts(pattern, text) == (pattern[-1] != "!")


def test_a_path_may_end_with_a_pattern_after_a_dot():
    path = "transformer.layers.1.attn.qkv_proj"
    for pattern in ("qkv_proj", r"attn\.qkv_proj", r"layers\.1\..*", re.escape(path), "proj", r"ttn\.qkv_proj", "attn"):
        assert Pattern(pattern).matches_path(path) == bool(re.match(rf"(.*\.)?({pattern})$", path))


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "(",
            ")",
            "a)",
            "(a",
            "[",
            "[a",
            "*",
            "a**",
            "a*+",
            r"\1",
            r"(?=a)",
            "(?i)a",
            "(?<!a)b",
            r"\b",
            "\\",
            "[z-a]",
        ),
        *("a" * 1001, "(" * 30 + ")" * 30, "a{2,1}", "a{5000}", "{3}", "(?P<n>a)(?P=n)"),
    ],
)
def test_other_patterns_are_one_line(pattern):
    with pytest.raises(AdapterError, match="unsupported regular expression") as raised:
        Pattern(pattern)
    assert len(str(raised.value)) < 200
