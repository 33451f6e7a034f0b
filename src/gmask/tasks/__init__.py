"""What training and evaluation share: tasks, their records, samples and metrics."""
