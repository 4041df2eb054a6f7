"""`python -m surfw.chunking.child`: makes a private store for a checkpoint that is served in place.

A process of its own, for servers, whose own never loads torch. It reads a JSON object from its standard input (`place`,
`options`), so that no secret stands in the list of processes, and writes one: `store`, or `error` and `text`.
"""

import asyncio
import json
import logging
import sys
import warnings

from surfw.chunking.in_place import publish_place
from surfw.errors import SurfwError


def main() -> None:
    """Do it."""
    logging.basicConfig(format="%(levelname)s %(message)s")
    warnings.simplefilter("ignore")
    asked = json.load(sys.stdin)
    try:
        store = asyncio.run(publish_place(asked["place"], asked["options"]))
        answer = {"store": str(store)}
    except SurfwError as exc:
        answer = {"error": type(exc).__name__, "text": str(exc)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # whoever waits for this was interrupted as well
        sys.exit(130)
