"""Agents over ssh on every host of a launch: they check it first, and clear it afterwards."""
