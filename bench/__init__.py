"""Measures the server beside references, in one run on one machine: `python -m bench --help`.

Absolute figures belong to the machine; only the ratios mean something elsewhere.
"""
