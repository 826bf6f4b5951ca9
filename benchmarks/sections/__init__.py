"""The sections of `docs/benchmarks.md`, by theme; each is a function of a stored result."""
