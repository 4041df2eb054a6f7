"""The `surfw` command: one file per command. It parses, wires objects together and renders; it has no logic of its own.

Commands import what they need when they run, so that `surfw --help` imports neither torch nor transformers.
"""
