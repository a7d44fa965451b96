"""Layers that run elsewhere: on another device of this machine, or on another machine."""
