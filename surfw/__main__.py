"""`python -m surfw` is the `surfw` command."""

from surfw.cli.main import main

main()
