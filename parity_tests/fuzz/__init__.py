"""Mutated files against every reader: each ends in our error or in a right result, soon and in little memory.

python -m parity_tests.fuzz                       # every reader, 200 cases each
python -m parity_tests.fuzz gguf --cases 5000     # one reader
python -m parity_tests.fuzz gguf --first 17 --cases 1   # the case that a test has named
"""
