"""Pre-training and fine-tuning: one step, one loop."""
