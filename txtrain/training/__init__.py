"""A run: the Lightning module and data module, the loop's limits and signals. What is measured is monitor/."""
