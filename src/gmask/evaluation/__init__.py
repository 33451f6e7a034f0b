"""How good is a model? Held-out loss and filled blanks, beside what counting words achieves."""

from gmask.evaluation.infilling import evaluate_infilling as evaluate_infilling
from gmask.evaluation.verb import run as run
