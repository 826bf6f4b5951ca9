"""Stop strings: text is held back as long as it could be the beginning of one."""

from collections.abc import Iterable


class StopStrings:
    """Cuts a stream of text before the first stop string in it.

    Attributes:
        found: whether a stop string was found; nothing that follows is passed on.
    """

    def __init__(self, stop: Iterable[str]):
        self._stops = [text for text in stop if text]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that certainly comes before any stop string, after one more piece of the stream."""
        if self.found:
            return ""
        self._held += text
        starts = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if starts:
            self.found = True
            return self._held[: min(starts)]
        num_certain = len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[:num_certain], self._held[num_certain:]
        return certain

    def finish(self) -> str:
        """What was held back, at the end of the stream."""
        return "" if self.found else self._held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
