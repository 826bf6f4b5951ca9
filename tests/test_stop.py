import random

import pytest

from mlx_openelm.generation.stop import StopStrings


def streamed(pieces, stops):
    """What is passed on of each piece, and at the end."""
    watch = StopStrings(stops)
    return [*(watch.push(piece) for piece in pieces), watch.finish()], watch.found


@pytest.mark.parametrize(
    ("pieces", "stops", "passed_on", "found"),
    [
        (["one", " two"], [], ["one", " two", ""], False),
        (["one", " two"], [""], ["one", " two", ""], False),  # an empty stop string is none
        (["a stop b"], ["stop"], ["a ", ""], True),
        (["st", "op"], ["stop"], ["", "", ""], True),
        (["x st", "op y", "z"], ["stop"], ["x ", "", "", ""], True),
        (["st", "ay"], ["stop"], ["", "stay", ""], False),
        (["a st"], ["stop"], ["a ", "st"], False),  # held back to the end
        (["aab"], ["ab"], ["a", ""], True),
        (["aa", "b"], ["aab"], ["", "", ""], True),
        (["aaa", "b"], ["aab"], ["a", "", ""], True),
        (["x two one"], ["one", "two"], ["x ", ""], True),  # the one that begins first counts
        (["ab"], ["abc", "b"], ["a", ""], True),
        (["s"], ["s"], ["", ""], True),
        (["st", "st", "op"], ["stop"], ["", "st", "", ""], True),
        (["ab"], ["bcd", "abc"], ["", "ab"], False),  # the longest beginning is held back
    ],
)
def test_text_is_passed_on_as_soon_as_no_stop_string_can_begin_in_it(pieces, stops, passed_on, found):
    assert streamed(pieces, stops) == (passed_on, found)


def test_a_stream_gives_what_searching_the_whole_text_gives():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices("ab", k=rng.randrange(12)))
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(3))]
        pieces = list(text)
        passed_on, found = streamed(pieces, stops)
        ends = {stop: text.find(stop) + len(stop) for stop in stops if stop in text}
        if not ends:
            assert (passed_on, found) == (passed_on, False)
            assert "".join(passed_on) == text
        else:  # the first to be whole ends the text; of several that end there, the longest
            end = min(ends.values())
            first = max(len(stop) for stop, other in ends.items() if other == end)
            assert ("".join(passed_on), found) == (text[: end - first], True)


def test_pieces_of_several_characters_end_before_a_stop_string():
    rng = random.Random(1)
    for _ in range(3000):
        text = "".join(rng.choices("ab", k=rng.randrange(12)))
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(3))]
        pieces, start = [], 0
        while start < len(text):
            step = rng.randrange(1, 4)
            pieces.append(text[start : start + step])
            start += step
        passed_on, found = streamed(pieces, stops)
        out = "".join(passed_on)
        assert found == any(stop in text for stop in stops)
        assert any(text.startswith(stop, len(out)) for stop in stops) if found else out == text
