"""The command line of a run: settings declared as dataclasses, their flags and their checks."""
