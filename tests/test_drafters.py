import pytest

from mlx_openelm import SamplingConfig
from mlx_openelm.errors import PromptError
from mlx_openelm.generation.drafters import PromptLookup

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4, 1]
SAMPLINGS = {
    "greedy": SamplingConfig(),
    "penalty": SamplingConfig(repetition_penalty=1.3, repetition_context=10),
    "sampling": SamplingConfig(temperature=0.9, top_k=50, top_p=0.95, seed=3),
    "everything": SamplingConfig(temperature=1.2, min_p=0.01, repetition_penalty=1.2, seed=4),
}


class TestPromptLookup:
    def drafts(self, text, count=5):
        found = PromptLookup().draft(text, count, None)
        return None if found is None else found.tolist()

    def test_what_followed_the_same_words_last(self):
        assert self.drafts([1, 2, 3, 9, 9, 1, 2, 3, 7, 8, 5, 6, 1, 2, 3], 3) == [7, 8, 5]

    def test_longer_agreement_comes_first(self):
        assert self.drafts([1, 2, 3, 7, 5, 2, 3, 8, 4, 1, 2, 3], 1) == [7]

    def test_a_text_that_turns_goes_on_turning(self):
        assert self.drafts([5, 1, 2, 3, 1, 2, 3]) == [1, 2, 3, 1, 2]
        assert self.drafts([7, 7, 7, 7], 3) == [7, 7, 7]

    def test_nothing_is_drafted_where_nothing_was_the_same(self):
        assert self.drafts([1, 2, 3, 4, 5]) is None
        assert self.drafts([1]) is None

    def test_places_are_found_as_the_text_grows(self):
        drafter = PromptLookup()
        text = [1, 2, 3]
        assert drafter.draft(text, 2, None) is None
        text += [4, 1, 2]
        assert drafter.draft(text, 2, None).tolist() == [3, 4]
        text += [9, 1, 2]
        assert drafter.draft(text, 2, None).tolist() == [9, 1]


@pytest.mark.parametrize("count", [0, 65])
def test_draft_tokens_have_a_limit(count):
    with pytest.raises(PromptError, match="1 to 64"):
        PromptLookup(count)
