"""The two architectures of the family, each read from top to bottom, and the token layout that they share."""
