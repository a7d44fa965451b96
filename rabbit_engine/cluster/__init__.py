"""Machines that Ray joins: connecting to them, what each has, and the stages of a model on them. It loads no model itself."""
