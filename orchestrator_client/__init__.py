"""Everything we know of the other side of the wire; it knows nothing of the daemon."""
