"""The `surfw` command. It parses, wires objects together and renders; it has no logic of its own.

- `main` and `app`: the process, the commands, the exit codes. `signals`: how a command is interrupted. `streams`:
  stdout and stderr. `options`: what all commands share. `render`: consoles, tables, JSON. `full_screen`: a view that
  fills the terminal.
- One file per command: `chunk`, `serve`, `infer`, `chat`, `stats`, `config`, `bench`; `store` has the small commands
  that maintain a store, and `housekeeping` does their work. `sources` chooses the source for `infer`. A `…_view` shows
  a typed result to people.
- `addresses`: interprets addresses for all commands. `completion`: shell completion. `wording`: the library's messages,
  with options instead of arguments.

To add a command, write a function in a file of its own, with the options for its settings (`options.with_settings`),
and register it in `app`. It imports what it needs when it runs, so that `surfw --help` imports neither torch,
transformers nor rich.
"""
