"""Model archives: written deterministically, read with suspicion."""
