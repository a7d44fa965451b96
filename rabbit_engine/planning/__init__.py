"""Decides, before memory is allocated, where each weight is kept: budgets, placement, the probe and the forecast."""
