"""How good a model is, and how much it differs from another one."""
