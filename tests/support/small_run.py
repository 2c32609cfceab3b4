"""Of run files for tests: a model that takes no time."""

TASK = """
[task]
layers = 1
width = 16
heads = 2
context = 16
batch = 2
held_out_bytes = 1024
"""
