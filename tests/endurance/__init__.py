"""Checks of a real server that take too long for every run of the tests: `make endurance`."""
