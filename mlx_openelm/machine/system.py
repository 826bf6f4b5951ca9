"""What the operating system says, without MLX: `doctor` works where MLX cannot be loaded."""

import os


def physical_memory_bytes() -> int:
    """Memory of the machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
