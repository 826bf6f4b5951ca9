"""How many tokens to draft: the number that gives the most tokens per second, as measured while generating."""

from collections import deque

FIRST_BACKOFF = 4  # tokens decoded without drafts, before the first attempt and after one that did not pay off
_LONGEST_BACKOFF = 64
_DECAY = 0.9  # weight of earlier passes in the acceptance rate, per pass
_TIMES_KEPT = 5  # passes of each length
_FIRST_LENGTH = 2
_HIGHEST_ACCEPTANCE = 0.99


class DraftLengthController:
    """Chooses the number of draft tokens from their acceptance rate and the time of a pass.

    With acceptance rate a, a pass over n draft tokens yields 1 + a + ... + a^n tokens (Leviathan et al.,
    arXiv:2211.17192, equation 1). The controller picks the n with the most tokens per second. While that is 0, it
    backs off: it decodes 4, 8, ... up to 64 tokens without drafts between attempts with a single draft token. It
    affects the speed, never the text.
    """

    def __init__(self, max_draft: int):
        self.max_draft = max_draft
        self.start()

    def start(self) -> None:
        """Forget what was measured; the next text may be different."""
        self._accepted = 1.0  # decaying counts of accepted tokens and of first rejections
        self._rejected = 1.0
        self._seconds: dict[int, deque[float]] = {}  # of the last passes, by number of draft tokens
        self._backoff = FIRST_BACKOFF
        self._backed_off = False

    @property
    def acceptance(self) -> float:
        """Estimated probability that a draft token is accepted if those before it are."""
        return self._accepted / (self._accepted + self._rejected)

    def record_acceptance(self, drafted: int, accepted: int) -> None:
        """Take in the outcome of a pass; draft tokens after the first rejected one say nothing."""
        self._accepted = self._accepted * _DECAY + accepted
        self._rejected = self._rejected * _DECAY + (accepted < drafted)

    def record_seconds(self, drafted: int, seconds: float) -> None:
        """Take in the time of a pass with `drafted` draft tokens, or of a plain one with 0."""
        self._seconds.setdefault(drafted, deque(maxlen=_TIMES_KEPT)).append(seconds)

    def next_length(self) -> int:
        """How many tokens to draft now; 0 means to decode `next_backoff` tokens without drafts."""
        if 0 not in self._seconds:
            return 0
        if len(self._seconds) == 1:
            return min(_FIRST_LENGTH, self.max_draft)
        best = max(range(self.max_draft + 1), key=self._tokens_per_second)
        if best:
            self._backoff = FIRST_BACKOFF
        elif self._backed_off:  # try again, as cheaply as possible
            best = 1
        self._backed_off = False
        return best

    def next_backoff(self) -> int:
        """How many tokens to decode without drafts: twice as many each time that drafts did not pay off."""
        backoff = self._backoff
        if len(self._seconds) > 1:
            self._backoff = min(2 * backoff, _LONGEST_BACKOFF)
            self._backed_off = True
        return backoff

    def _tokens_per_second(self, length: int) -> float:
        acceptance = min(self.acceptance, _HIGHEST_ACCEPTANCE)
        tokens = (1 - acceptance ** (length + 1)) / (1 - acceptance)
        return tokens / self._pass_seconds(length)

    def _pass_seconds(self, length: int) -> float:
        """The fastest recent pass of this length; for a length never tried, extrapolated from the others."""
        if length in self._seconds:
            return min(self._seconds[length])
        plain = min(self._seconds[0])
        per_token = min((min(times) - plain) / tried for tried, times in self._seconds.items() if tried)
        return plain + length * max(per_token, 0.0)
