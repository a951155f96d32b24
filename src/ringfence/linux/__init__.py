"""Thin typed wrappers of the kernel's interfaces. Each module names the manual page or header it follows."""
