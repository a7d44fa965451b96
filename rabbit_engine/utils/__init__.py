"""The machine, sizes and names as text, and small shared tools."""
