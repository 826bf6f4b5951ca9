"""The network as described in the paper, and adapters for it."""
