"""The command line: parses and delegates.

Everything heavy is imported inside the commands, so that ``--help`` answers at once and bad input is
reported before a model is loaded.
"""
