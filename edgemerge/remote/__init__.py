"""Files on other machines: addresses, connections, ranges of bytes, and what stands for them here."""
