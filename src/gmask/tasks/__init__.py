"""What training and evaluation share: tasks, their samples and metrics, recipes, and the texts that these name."""
