"""How good a model is, and how far from another one."""
