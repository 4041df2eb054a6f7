"""The `surfw` command. It parses, wires objects together and renders; it has no logic of its own.

- `main` and `app`: the process, the commands, the exit codes. `signals` and `streams`: what a command is ended by, and
  what it prints to. `options`: what all commands share. `render`: consoles, tables, JSON. `full_screen`: a view that
  has the terminal to itself.
- One file per command: `chunk`, `serve`, `infer`, `chat`, `stats`, `config`, `bench`; `store` has the small ones that
  keep a store in order, and `housekeeping` does their work. Beside `infer` is its choice of `sources`. A `…_view` shows
  a typed result to people.
- `addresses`: what an address means, for all commands. `completion`: what shells offer on Tab. `wording`: errors of the
  library in options' words.

A new command is a function in a file of its own, with the options of its settings (`options.with_settings`), that `app`
registers. It imports what it needs when it runs, so that `surfw --help` imports neither torch, transformers nor rich.
"""
