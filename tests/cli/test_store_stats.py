"""`stats --store`: models, sizes, forms, and shared chunks."""

import json
from pathlib import Path

from tests.cli.run import surfw
from tests.stores import make_store


def test_a_store_is_summed_up(tmp_path: Path) -> None:
    make_store(tmp_path / "store", "org/first", (5000, 6000))
    make_store(tmp_path / "store", "second", (5000, 7000))
    facts = json.loads(surfw(tmp_path, "stats", "--store", str(tmp_path / "store"), "--json").stdout)
    models = {one["name"]: one for one in facts["models"]}
    assert {name: one["payload_bytes"] for name, one in models.items()} == {"org/first": 11000, "second": 12000}
    assert models["second"]["form_bytes"] == {"none": 12000}
    assert facts["shared_bytes"] == sum(one["stored_bytes"] for one in models.values()) - facts["stored_bytes"] > 0
    shown = surfw(tmp_path, "stats", "--store", str(tmp_path / "store")).stdout
    assert "none 12.0 kB" in shown
    assert "less than without sharing" in shown


def test_one_thing_at_a_time(tmp_path: Path) -> None:
    for options in (("--store", "x", "--watch"), ("h:1", "--store", "x"), ("--store", "x", "--run", "y")):
        done = surfw(tmp_path, "stats", *options)
        assert done.returncode == 2
        assert "does not go with" in done.stderr
