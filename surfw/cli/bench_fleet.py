"""`surfw bench fleet`: simulate a fleet of clients and servers before it exists."""

from typing import TYPE_CHECKING, Annotated

import typer

from surfw.cli import options
from surfw.cli.kept import keeps_results
from surfw.config import CachePolicy

if TYPE_CHECKING:
    from surfw.bench.result import Result

EXAMPLES = """\b
Examples:
  surfw bench fleet --clients 1000 --servers 4 --redis 16GB --model-bytes 16GB --layers 32
  surfw bench fleet --clients 10000 --servers 8 --memory-budget 1GB --policy lru --json
  surfw bench fleet --measure
"""

_RATE = "Bytes per second"


@keeps_results
def fleet(
    *,
    clients: Annotated[int, typer.Option(min=1, max=100_000, help="How many run the model.")] = 100,
    servers: Annotated[int, typer.Option(min=1, max=1000, help="How many serve it; clients are spread evenly.")] = 2,
    model_bytes: Annotated[str, typer.Option(metavar="SIZE", help="Of the model.")] = "2.2GB",
    layers: Annotated[int, typer.Option(min=1, max=1000, help="Into how many chunks it is cut.")] = 24,
    passes: Annotated[int, typer.Option(min=1, max=1000, help="How often each client goes through it.")] = 2,
    arrivals: Annotated[float, typer.Option(min=0, help="Seconds within which clients start, at random.")] = 60.0,
    memory_budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What each client's weights may take. [default: nothing is kept]"),
    ] = None,
    compute: Annotated[float, typer.Option(min=0, help="Seconds that a client computes with each chunk.")] = 0.0,
    cache: Annotated[str, typer.Option(metavar="SIZE", help="Of each server's cache.")] = "1GB",
    policy: Annotated[CachePolicy, typer.Option(help="What the caches keep.")] = "schedule",
    redis: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of a Redis that the servers share. [default: there is none]")
    ] = None,
    link: Annotated[str, typer.Option(metavar="RATE", help=f"{_RATE} of each server to its clients.")] = "1.25GB",
    client_link: Annotated[str, typer.Option(metavar="RATE", help=f"{_RATE} of each client.")] = "125MB",
    storage_link: Annotated[
        str, typer.Option(metavar="RATE", help=f"{_RATE} that each server reads of the storage.")
    ] = "900MB",
    storage_latency: Annotated[
        float, typer.Option(min=0, help="Seconds until the first byte of the storage comes.")
    ] = 0.03,
    redis_link: Annotated[str, typer.Option(metavar="RATE", help=f"{_RATE} of the Redis.")] = "1GB",
    storage_price: Annotated[float, typer.Option(min=0, help="For a GB that is read of the storage.")] = 0.09,
    server_price: Annotated[float, typer.Option(min=0, help="For an hour of a server.")] = 0.40,
    redis_price: Annotated[float, typer.Option(min=0, help="For an hour of a GB of Redis.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Of what is random; the same one gives the same figures.")] = 0,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run a small fleet on this machine instead, beside its simulation.")
    ] = False,
    json: options.Json = False,  # noqa: ARG001 - read by `keeps_results`
    quiet: options.Quiet = False,
) -> "Result":
    """A fleet before it is there: what its caches hit, what is read of the storage, how long clients wait, its cost.

    Time and bytes are simulated (needs simpy); the cache policies, and the plans of what clients keep, are surfw's own.
    The rates that it starts from are yours: 'surfw bench storage', 'wire' and 'clients' measure them. With --measure, 2
    servers and 16 clients run for a minute, and the baseline is what they did.
    """
    sizes = {"--model-bytes": model_bytes, "--cache": cache, "--memory-budget": memory_budget, "--redis": redis}
    rates = {
        "--link": link, "--client-link": client_link, "--storage-link": storage_link, "--redis-link": redis_link,
    }  # fmt: skip
    for option, size in (sizes | rates).items():
        options.check_size(option, size)
    from surfw.bench.fleet import Fleet, bench_fleet
    from surfw.bench.fleet_measured import bench_measured
    from surfw.cli import render
    from surfw.config import parse_size

    wanted = Fleet(
        clients=clients,
        servers=servers,
        model_bytes=parse_size(model_bytes),
        chunks=layers,
        passes=passes,
        arrivals=arrivals,
        budget_bytes=None if memory_budget is None else parse_size(memory_budget),
        compute_seconds=compute,
        cache_bytes=parse_size(cache),
        policy=policy,
        redis_bytes=0 if redis is None else parse_size(redis),
        link=parse_size(link),
        client_link=parse_size(client_link),
        storage_link=parse_size(storage_link),
        storage_seconds=storage_latency,
        redis_link=parse_size(redis_link),
        storage_price=storage_price,
        server_price=server_price,
        redis_price=redis_price,
        seed=seed,
    )
    if not quiet:
        render.err.print("surfw: measuring for a minute" if measure else "surfw: simulating", soft_wrap=True)
    return bench_measured() if measure else bench_fleet(wanted)
