"""Memory that a model takes, before anything of it is loaded."""
