"""How good a model is: at tasks with their own metrics, and at filling blanks of held-out texts."""
