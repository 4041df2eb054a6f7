"""`surfw bench`: measure against a baseline in the same run."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surfw.cli import bench_fleet, options
from surfw.cli.kept import keeps_results
from surfw.config import CachePolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from surfw.bench.result import Result, Row

CODEC_EXAMPLES = """\b
Examples:
  surfw bench codec --save codec.json
  surfw bench codec --compare codec.json --report codec.html
"""

ALL_EXAMPLES = """\b
Examples:
  surfw bench all --save before.json
  surfw bench all --compare before.json --report bench.html
"""

INFER_EXAMPLES = """\b
Examples:
  surfw bench infer ./my-model --against resident,accelerate
  surfw bench infer ./my-model --cap 1.2GB --against accelerate,int4,llama.cpp-q4_0
  surfw bench infer ./my-model --cap 1.2GB --gguf my-model.gguf --airllm-dir ./copy --json
"""

CACHE_EXAMPLES = """\b
Examples:
  surfw bench cache
  surfw bench cache --clients 4 --share 0.25 --json
  surfw bench cache --trace recorded.jsonl
"""

CLIENTS_EXAMPLES = """\b
Examples:
  surfw bench clients
  surfw bench clients ./store --clients 32 --idle 1000 --seconds 600
  surfw bench clients s3://bucket/store --clients 1 --cache 200MB --direct --json
"""

QUALITY_EXAMPLES = """\b
Examples:
  surfw bench quality
  surfw bench quality my-model --codec int4 --text my-text.txt
  surfw bench quality ./my-checkpoint --json
"""

DEVICE_EXAMPLES = """\b
Examples:
  surfw bench device --folder /dev/shm --lines figures.jsonl --json
  surfw bench device --folder /dev/shm --parts streamed,packed
"""

_CONNECTION = ("token_file", *options.TLS_SETTINGS)
"""Settings for connecting to servers; the measured processes get them in environment variables."""

_FOLDER = typer.Option(
    "--dir", metavar="DIR", help="Write to this folder, and clean up afterwards. [default: the temporary folder]"
)

app = typer.Typer(
    cls=options.Group,
    help="Measure surfw against a baseline in the same run.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)


@app.command("wire", cls=options.Command, epilog="Example:  surfw bench wire --rounds 7 --json")
@keeps_results
def wire(
    rounds: Annotated[
        int,
        typer.Option(
            min=1,
            help="The number of rounds, each with new processes and five turns per side; medians are shown.",
        ),
    ] = 7,
    json: options.Json = False,  # noqa: ARG001 - read by `keeps_results`
    quiet: options.Quiet = False,
) -> "Result":
    """Measure server-to-client throughput against a raw TCP socket.

    Both move the same bytes, from the server's cache into the client's memory.
    """
    _say("measuring", quiet=quiet)
    from surfw.bench.wire import bench_wire

    return bench_wire(rounds=rounds)


@app.command("codec", cls=options.Command, epilog=CODEC_EXAMPLES)
@keeps_results
def codec(
    rounds: Annotated[
        int, typer.Option(min=1, help="The number of rounds, alternating with the baseline; medians are shown.")
    ] = 15,
    json: options.Json = False,  # noqa: ARG001 - read by `keeps_results`
    quiet: options.Quiet = False,
) -> "Result":
    """Measure the lossless codec against Blosc's own functions. Both encode and decode the same frames."""
    _say("measuring", quiet=quiet)
    from surfw.bench.codec import bench_codec

    return bench_codec(rounds=rounds)


@app.command("all", cls=options.Command, epilog=ALL_EXAMPLES)
@keeps_results
def everything(
    rounds: Annotated[int, typer.Option(min=1, help="The number of rounds of each benchmark; medians are shown.")] = 7,
    json: options.Json = False,  # noqa: ARG001 - read by `keeps_results`
    quiet: options.Quiet = False,
) -> "list[Result]":
    """Run all benchmarks that need no model, no storage and no GPU.

    These are wire, codec, cache, flood, and start with the demo model.
    """
    from surfw.bench.cache import bench_cache
    from surfw.bench.codec import bench_codec
    from surfw.bench.flood import bench_flood
    from surfw.bench.start import bench_start as measure_start
    from surfw.bench.wire import bench_wire
    from surfw.checkpoint import demo_checkpoint

    ways: dict[str, Callable[[], Result]] = {
        "wire": partial(bench_wire, rounds=rounds),
        "codec": partial(bench_codec, rounds=rounds),
        "cache": bench_cache,
        "flood": bench_flood,
        "start": partial(measure_start, str(demo_checkpoint()), codecs=("auto",), rounds=min(rounds, 3)),
    }
    found = []
    for place, (name, measure) in enumerate(ways.items(), 1):
        _say(f"{place} of {len(ways)}: {name}", quiet=quiet)
        found.append(measure())
    return found


@app.command("flood", cls=options.Command, epilog="Example:  surfw bench flood --seconds 3 --json")
@keeps_results
def flood(
    seconds: Annotated[float, typer.Option(min=0.1, help="The length of each measurement in seconds.")] = 3.0,
    json: options.Json = False,  # noqa: ARG001 - read by `keeps_results`
    quiet: options.Quiet = False,
) -> "Result":
    """Measure a server while clients flood it in a dozen ways.

    The result is the rate of a well-behaved client, and how long a new client waits.
    """
    _say("measuring", quiet=quiet)
    from surfw.bench.flood import bench_flood

    return bench_flood(seconds=seconds)


@app.command("clients", cls=options.Command, epilog=CLIENTS_EXAMPLES)
@options.with_settings("storage_options")
@keeps_results
def clients(
    *,
    place: Annotated[
        str | None,
        typer.Argument(metavar="STORE", help="A store: a folder or a storage URL. [default: a generated one]"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name. [default: the only one]")] = None,
    configuration: options.Configuration,
    number: Annotated[
        int, typer.Option("--clients", min=1, max=1000, help="The number of clients that read at the same time.")
    ] = 8,
    idle: Annotated[
        int, typer.Option(min=0, max=100_000, help="The number of further clients that connect and do nothing.")
    ] = 0,
    cache: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The size of the server's cache. [default: the model fits]")
    ] = None,
    policy: Annotated[CachePolicy, typer.Option(help="The cache policy.")] = "schedule",
    direct: Annotated[
        bool, typer.Option("--direct", help="Also measure clients that read the storage without a server.")
    ] = False,
    rounds: Annotated[
        int, typer.Option(min=1, help="The number of rounds, alternating with the baseline; medians are shown.")
    ] = 3,
    seconds: Annotated[
        float, typer.Option(min=0, help="Keep reading for this many seconds after the last round.")
    ] = 0.0,
    json: options.Json = False,  # noqa: ARG001 - read by `keeps_results`
    quiet: options.Quiet = False,
) -> "Result":
    """Measure many clients of one server against raw TCP connections.

    Each client is a process; the baseline is as many connections that move the same bytes. Each round starts servers
    with empty caches. The result is the total rate of the clients, how evenly they share it, how often the storage is
    read, cache hits, and the server's memory.
    """
    options.check_size("--cache", cache)
    from surfw.cli.addresses import read_address
    from surfw.config import parse_size

    _say("measuring", quiet=quiet)
    from surfw.bench.clients import ClientsWork, bench_clients

    work = ClientsWork(
        store=None if place is None else read_address(place).url,
        model=model,
        options=configuration.settings.storage_options,
        clients=number,
        idle=idle,
        cache_bytes=None if cache is None else parse_size(cache),
        policy=policy,
        rounds=rounds,
        seconds=seconds,
        direct=direct,
    )
    return bench_clients(work, on_progress=partial(_say, quiet=quiet))


@app.command("cache", cls=options.Command, epilog=CACHE_EXAMPLES)
@keeps_results
def cache(
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The reads of a server's clients, recorded by 'surfw serve --record'. [default: simulated]",
        ),
    ] = None,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="The size of the cache, as a share of what is read.")
    ] = 0.5,
    clients: Annotated[
        int | None, typer.Option(min=1, max=100, help="The number of clients that read the same model. [default: 10]")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, max=1000, help="The number of layers of the model. [default: 22]")
    ] = None,
    passes: Annotated[
        int | None, typer.Option(min=1, max=1000, help="The number of passes of each client. [default: 6]")
    ] = None,
    json: options.Json = False,  # noqa: ARG001 - read by `keeps_results`
    quiet: options.Quiet = False,
) -> "Result":
    """Simulate a server's cache, whose clients announce what they read.

    The result is its hit rate, against that of LRU; the ceiling is the optimum, which knows the whole future. Nothing
    is read: the policies run on four fixed arrangements of clients, or on a recording of a server's clients.
    """
    from surfw.bench.cache import bench_cache, bench_recorded

    made_up = {"clients": clients, "layers": layers, "passes": passes}
    given = {name: number for name, number in made_up.items() if number is not None}
    if trace is not None and given:
        raise typer.BadParameter("does not go with --trace; give one of them", param_hint=f"--{next(iter(given))}")
    _say("simulating", quiet=quiet)
    return bench_recorded(trace, cache_share=share) if trace else bench_cache(**given, cache_share=share)


app.command("fleet", cls=options.Command, epilog=bench_fleet.EXAMPLES)(bench_fleet.fleet)


@app.command("chunk", cls=options.Command, epilog="Example:  surfw bench chunk ./my-model --rounds 3")
@keeps_results
def chunk(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id or a local directory.")],
    folder: Annotated[str | None, _FOLDER] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="The number of rounds, alternating with the baseline; medians are shown.")
    ] = 3,
    json: options.Json = False,  # noqa: ARG001 - read by `keeps_results`
    quiet: options.Quiet = False,
) -> "Result":
    """Measure chunking a checkpoint against 'cp' of the same bytes. Both are synced to disk."""
    _say("measuring", quiet=quiet)
    from surfw.bench.chunk import bench_chunk

    return bench_chunk(model, folder=folder, rounds=rounds)


@app.command(
    "storage",
    cls=options.Command,
    epilog="Example:  surfw bench storage s3://bucket/models --storage-option region=eu-central-1",
)
@options.with_settings("storage_options")
@keeps_results
def bench_storage(
    *,
    url: Annotated[str, typer.Argument(metavar="URL", help="A store on S3, or on another network storage.")],
    model: Annotated[str | None, typer.Option(help="The model's name. [default: the only one]")] = None,
    configuration: options.Configuration,
    rounds: Annotated[
        int, typer.Option(min=1, help="The number of rounds, alternating with the baselines; medians are shown.")
    ] = 5,
    json: options.Json = False,  # noqa: ARG001 - read by `keeps_results`
    quiet: options.Quiet = False,
) -> "Result":
    """Measure reading a model from a network storage.

    The baselines are plain parallel range reads, and Run:ai Model Streamer if it is installed.
    """
    from surfw.cli.addresses import read_address

    _say("measuring", quiet=quiet)
    from surfw.bench.storage import bench_storage as measure

    return measure(read_address(url).url, model=model, options=configuration.settings.storage_options, rounds=rounds)


@app.command("infer", cls=options.Command, epilog=INFER_EXAMPLES)
@options.with_settings(*_CONNECTION)
def bench_infer(
    *,
    model_dir: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="A checkpoint in a local directory.")],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="The peers, separated by commas: resident, accelerate, airllm, llama.cpp, llama.cpp-q8_0, "
            "llama.cpp-q4_0, lru, and the codecs none, lossless, int8, int4. [default: all that can run, except "
            "quantised ones]",
        ),
    ] = None,
    gguf: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="The same model for llama.cpp. [default: converted from the checkpoint, if it is a LLaMA]",
        ),
    ] = None,
    airllm_dir: Annotated[
        str | None, typer.Option(metavar="COPY", help="A copy of the checkpoint for AirLLM, which writes into it.")
    ] = None,
    cap: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="The memory limit of each process, page cache included, such as 1.2GB; needs root."
        ),
    ] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="The memory budget for surfw's weights. [default: surfw's own choice]"),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="A store to use and keep; the model is chunked into it if it is missing. [default: a temporary one]",
        ),
    ] = None,
    folder: Annotated[str | None, _FOLDER] = None,
    source: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The source for surfw, instead of a local store, such as a server."),
    ] = None,
    configuration: options.Configuration,
    bandwidth: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bytes per second of the source's link, such as 119MB. [default: measured]"),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="The number of tokens in the prompt.")] = 16,
    new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "--new-tokens", min=2, help="The number of tokens to generate.")
    ] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="The number of runs of each, in turn; medians are shown.")] = 3,
    patience: Annotated[float, typer.Option(min=1, help="The time limit of each run in seconds.")] = 1800,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure token generation against other ways to run the model.

    All run the same model on this machine, each in its own process.
    """
    for option, size in (("--memory-budget", memory_budget), ("--cap", cap)):
        options.check_size(option, size)
    names = None if against is None else [name.strip() for name in against.split(",")]
    _check_against(names or ())  # before torch is imported
    from surfw.bench.comparison import Comparison
    from surfw.bench.infer import bench_infer as measure
    from surfw.cli import bench_view, render
    from surfw.cli.addresses import read_source
    from surfw.config import DEFAULT_CONNECT_SECONDS, parse_size

    if source is not None:
        tls = configuration.settings.tls
        source = read_source(source, seconds=DEFAULT_CONNECT_SECONDS, tls=tls)
    options.tls_for(configuration, source or "a local store")
    options.hand_on(configuration, _CONNECTION)
    comparison = Comparison(
        model_dir=model_dir,
        against=names,
        gguf=gguf,
        airllm_dir=airllm_dir,
        cap_bytes=None if cap is None else parse_size(cap),
        memory_budget=memory_budget,
        store=store,
        folder=folder,
        source=source,
        bandwidth_bytes=None if bandwidth is None else parse_size(bandwidth),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        patience_seconds=patience,
    )
    found = measure(comparison, on_progress=partial(_say, quiet=quiet))
    render.show(found, bench_view.show_comparison, json=json)
    if found.rows[0].failed:
        raise typer.Exit(1)  # surfw itself did not run


def _check_against(names: "Sequence[str]") -> None:
    """Check the names of `--against`.

    Raises:
        BadParameter: a name is unknown.
    """
    from surfw.bench.comparison import check_peers
    from surfw.errors import ConfigurationError

    try:
        check_peers(names)
    except ConfigurationError as exc:
        raise typer.BadParameter(str(exc), param_hint="--against") from exc


@app.command("quality", cls=options.Command, epilog=QUALITY_EXAMPLES)
@options.with_settings("store", "storage_options", "memory_budget")
def quality(
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="The model's name in the store, or a checkpoint in a local directory. [default: the demo model]",
        ),
    ] = None,
    configuration: options.Configuration,
    codec: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="The codecs, separated by commas: int8, int4. [default: all available]"),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A text in paragraphs. [default: plain English that comes with surfw]"),
    ] = None,
    folder: Annotated[str | None, _FOLDER] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure how int8 and int4 change a model's answers.

    The baseline is the same model unquantised, with llama.cpp for comparison. For a checkpoint, the forms are made for
    the measurement. Models that generate are measured by the perplexity of a text and by the distribution of the next
    token, others by their embeddings.
    """
    from dataclasses import replace

    from surfw.checkpoint import demo_checkpoint
    from surfw.cli.addresses import is_here, is_path
    from surfw.cli.sources import DEMO

    _say("importing torch", quiet=quiet)
    from surfw.bench.quality import QualityWork, bench_quality
    from surfw.cli import bench_view, render

    settings = configuration.settings
    work = QualityWork(
        model=model,
        codecs=None if codec is None else [name.strip() for name in codec.split(",")],
        text=text,
        memory_budget=settings.memory_budget,
        folder=folder,
    )
    if model is None or model == DEMO:
        work = replace(work, checkpoint=str(demo_checkpoint()), model=DEMO)
    elif is_path(model) or is_here(model):
        work = replace(work, checkpoint=model, model=None)
    else:
        work = replace(work, source=settings.store, storage_options=settings.storage_options)
    found = bench_quality(work, on_progress=partial(_say, quiet=quiet))
    render.show(found, bench_view.show_quality, json=json)


@app.command(
    "start",
    cls=options.Command,
    epilog="Example:  surfw bench start 10.0.0.5:8765 --download http://10.0.0.5:8000/my-model",
)
@options.with_settings(*_CONNECTION)
@keeps_results
def bench_start(
    *,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A server (host:port), a folder, or a storage URL.")],
    model: Annotated[str | None, typer.Option(help="The model's name. [default: the only one]")] = None,
    download: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The checkpoint's own files, to download and load with transformers. "
            "[default: SOURCE, loaded in place, if it is a checkpoint's folder]",
        ),
    ] = None,
    codec: Annotated[
        str, typer.Option(metavar="NAMES", help="The codecs, separated by commas: auto, none, lossless, int8, int4.")
    ] = "auto,none,lossless",
    configuration: options.Configuration,
    rounds: Annotated[int, typer.Option(min=1, help="The number of starts of each, in turn; medians are shown.")] = 3,
    json: options.Json = False,  # noqa: ARG001 - read by `keeps_results`
    quiet: options.Quiet = False,
) -> "Result":
    """Measure the time from starting 'surfw infer' to its first token.

    The baseline is transformers, which needs all weights first.
    """
    from surfw.bench.start import bench_start as measure
    from surfw.cli.addresses import read_address

    options.tls_for(configuration, read_address(source).as_server)
    options.hand_on(configuration, _CONNECTION)
    codecs = [name.strip() for name in codec.split(",")]
    say = partial(_say, quiet=quiet)
    return measure(source, model=model, download=download, codecs=codecs, rounds=rounds, on_progress=say)


@app.command(
    "device",
    cls=options.Command,
    epilog=DEVICE_EXAMPLES,
)
@keeps_results
def device(
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="The device: cuda, cuda:1, or simulated.")
    ] = "cuda",
    shape: Annotated[str, typer.Option(help="The size of a LLaMA with random weights: tiny, 1b or 8b.")] = "8b",
    parts: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="The parts to run, separated by commas: streamed, accelerate, half, accelerate-half, whole, packed, "
            "diffusers, server, disk, 70b. [default: all; disk with --disk]",
        ),
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="The folder for the checkpoint, best in memory. [default: the temporary folder]"
        ),
    ] = None,
    disk: Annotated[
        str | None, typer.Option(metavar="DIR", help="A folder on a disk to measure as well. [default: none]")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Start no part after this many seconds.")] = 480.0,
    lines: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write each figure to this file as it comes, as JSON lines.")
    ] = None,
    json: options.Json = False,  # noqa: ARG001 - read by `keeps_results`
    quiet: options.Quiet = False,
) -> "Result":
    """Measure streaming to a GPU.

    The baselines are the rate of copies, the resident model, accelerate and diffusers.
    """
    from contextlib import ExitStack
    from dataclasses import asdict
    from json import dumps

    from surfw.bench.device import bench_device
    from surfw.errors import ConfigurationError

    with ExitStack() as last:
        try:
            file = None if lines is None else last.enter_context(Path(lines).open("w", encoding="utf-8"))
        except OSError as exc:
            raise ConfigurationError(f"{lines} (--lines) cannot be written: {exc.strerror}; name another file") from exc

        def on_row(row: "Row") -> None:
            if file is not None:
                file.write(dumps({name: value for name, value in asdict(row).items() if value is not None}) + "\n")
                file.flush()
            _say(f"{row.name}: {row.value:.4g} {row.unit}", quiet=quiet)

        return bench_device(
            device, shape=shape, parts=None if parts is None else [name.strip() for name in parts.split(",")],
            folder=folder, disk=disk, seconds=seconds, on_row=on_row, on_progress=partial(_say, quiet=quiet),
        )  # fmt: skip


def _say(text: str, *, quiet: bool) -> None:
    """Print the current step. A spinner would take time from the measurement."""
    from surfw.cli import render

    if not quiet:
        render.err.print(f"surfw: {text}", soft_wrap=True)
