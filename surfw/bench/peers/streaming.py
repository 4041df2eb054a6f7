"""surfw itself, opened as `surfw infer` does."""

from surfw.bench.comparison import Comparison, Measurement


def run(work: Comparison) -> Measurement:
    """Measure a generation."""
    from surfw.config import is_server_url, parse_size
    from surfw.models.read_ahead import ReadAheadClient
    from surfw.settings import Settings

    assert work.source is not None, "bench_infer names it"
    settings = Settings.load()
    connection = {"token": settings.token, "ssl": settings.tls_for(work.source)} if is_server_url(work.source) else {}
    with ReadAheadClient(
        work.source,
        work.model,
        memory_bytes=0,
        codec=work.codec,
        budget_bytes=None if work.memory_budget is None else parse_size(work.memory_budget),
        **connection,  # type: ignore[arg-type]  # its values have two types
    ) as client:
        client.begin(on_cpu=True)
        from surfw.bench.peers.generation import measure_generation
        from surfw.models.streaming import StreamingModel

        with StreamingModel.open(
            client, work.model, memory_budget=work.memory_budget, codec=work.codec, policy=work.policy
        ) as model:
            return measure_generation(
                model.generate, work, fetched_bytes=lambda: model.statistics()["cache"]["fetched_bytes"]
            )
