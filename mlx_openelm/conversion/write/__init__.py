"""Writers for model folders and their model cards."""
