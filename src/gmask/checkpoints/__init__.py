"""Published weights: which there are, how they lie on a disk, and how they become others."""
