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
    clients: Annotated[int, typer.Option(min=1, max=100_000, help="The number of clients that run the model.")] = 100,
    servers: Annotated[
        int, typer.Option(min=1, max=1000, help="The number of servers; clients are spread evenly.")
    ] = 2,
    model_bytes: Annotated[str, typer.Option(metavar="SIZE", help="The size of the model.")] = "2.2GB",
    layers: Annotated[int, typer.Option(min=1, max=1000, help="The number of chunks in the model.")] = 24,
    passes: Annotated[int, typer.Option(min=1, max=1000, help="The number of passes of each client.")] = 2,
    arrivals: Annotated[
        float, typer.Option(min=0, help="Start the clients at random within this many seconds.")
    ] = 60.0,
    memory_budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Each client's memory budget for weights. [default: keep nothing]"),
    ] = None,
    compute: Annotated[float, typer.Option(min=0, help="Seconds that a client computes for each chunk.")] = 0.0,
    cache: Annotated[str, typer.Option(metavar="SIZE", help="The size of each server's cache.")] = "1GB",
    policy: Annotated[CachePolicy, typer.Option(help="The cache policy.")] = "schedule",
    redis: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The size of a Redis shared by the servers. [default: none]")
    ] = None,
    link: Annotated[str, typer.Option(metavar="RATE", help=f"{_RATE} from each server to its clients.")] = "1.25GB",
    client_link: Annotated[str, typer.Option(metavar="RATE", help=f"{_RATE} of each client's link.")] = "125MB",
    storage_link: Annotated[
        str, typer.Option(metavar="RATE", help=f"{_RATE} from the storage to each server.")
    ] = "900MB",
    storage_latency: Annotated[
        float, typer.Option(min=0, help="Seconds to the first byte of a read from the storage.")
    ] = 0.03,
    redis_link: Annotated[str, typer.Option(metavar="RATE", help=f"{_RATE} of the Redis.")] = "1GB",
    storage_price: Annotated[float, typer.Option(min=0, help="USD per GB read from the storage.")] = 0.09,
    server_price: Annotated[float, typer.Option(min=0, help="USD per hour of a server.")] = 0.40,
    redis_price: Annotated[float, typer.Option(min=0, help="USD per hour of a GB of Redis.")] = 0.02,
    seed: Annotated[int, typer.Option(help="The random seed; the same seed gives the same figures.")] = 0,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Run a small fleet on this machine instead, and compare it with its simulation."
        ),
    ] = False,
    json: options.Json = False,  # noqa: ARG001 - read by `keeps_results`
    quiet: options.Quiet = False,
) -> "Result":
    """Simulate a fleet of clients and servers before it exists.

    The result is cache hits, reads from the storage, how long clients wait, and the cost. Time and bytes are simulated
    (needs simpy); the cache policies, and the plans of what clients keep, are surfw's own. You supply the rates:
    'surfw bench storage', 'wire' and 'clients' measure them. With --measure, 2 servers and 16 clients run for a minute,
    and what they did is the baseline.
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
