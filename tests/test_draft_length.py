import numpy as np

from mlx_openelm import SamplingConfig
from mlx_openelm.generation.draft_length import DraftLengthController

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4, 1]
SAMPLINGS = {
    "greedy": SamplingConfig(),
    "penalty": SamplingConfig(repetition_penalty=1.3, repetition_context=10),
    "sampling": SamplingConfig(temperature=0.9, top_k=50, top_p=0.95, seed=3),
    "everything": SamplingConfig(temperature=1.2, min_p=0.01, repetition_penalty=1.2, seed=4),
}


class TestDraftLengthController:
    def paced(self, agreement, seconds, rounds=300):
        """How many tokens a second a drafter of this agreement brings, against none; by a clock of our own."""
        rng = np.random.default_rng(0)
        controller = DraftLengthController(8)
        tokens = time = 0
        lengths = []
        while tokens < rounds:
            length = controller.next_length()
            if length == 0:
                backoff = controller.next_backoff()
                controller.record_seconds(0, seconds(0))
                tokens, time = tokens + backoff, time + backoff * seconds(0)
            else:
                right = [*(rng.random(length) < agreement), False].index(False)
                controller.record_acceptance(length, right)
                controller.record_seconds(length, seconds(length))
                tokens, time = tokens + right + 1, time + seconds(length)
            lengths.append(length)
        return tokens / time * seconds(0), lengths

    def test_good_drafts_are_made_in_long_rows_and_bad_ones_hardly(self):
        cheap = lambda length: 1 + 0.1 * length  # noqa: E731
        speed, lengths = self.paced(0.95, cheap)
        assert speed > 2.5
        assert max(lengths[-20:]) >= 6
        speed, lengths = self.paced(0.5, cheap)
        assert speed > 1.3
        assert max(lengths[-20:]) <= 4
        speed, _ = self.paced(0.0, cheap)
        assert speed > 0.95

    def test_expensive_drafts_are_left_alone(self):
        speed, lengths = self.paced(0.6, lambda length: 1 + length)
        assert speed > 0.9
        assert np.mean(lengths) < 1
