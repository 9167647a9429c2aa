"""Verbs of the command line that `cli` registers, and the options they take."""
