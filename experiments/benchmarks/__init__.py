"""Measurements of the engine. No tests: each prints a table and can write it as JSON.

Run one with ``python -m experiments.benchmarks.NAME [--json PATH]``; its docstring says what is measured, how, and what
counts.
"""
