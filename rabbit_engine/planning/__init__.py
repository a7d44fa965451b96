"""Decides, before memory is claimed, what stays where: budgets, placement, the probe and the forecast."""
