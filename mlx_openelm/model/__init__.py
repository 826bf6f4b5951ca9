"""The network as the paper describes it, and adapters on it."""
