"""How good is a model? Held-out loss and filled blanks, beside what counting words achieves."""

from gmask.evaluation.verb import run as run
