"""Tasks, with their records, samples and metrics: what training and evaluation share."""
