"""Parts of ``wire_bytes.py``."""
