"""Programs and people reach a model: by HTTP, on one machine or many."""
