"""Implementations of gathering patches and of packed attention, each for the devices that it is best on."""
