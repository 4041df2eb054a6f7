"""surfw itself."""

from surfw.bench.comparison import Comparison, Measurement


def run(work: Comparison) -> Measurement:
    """Measure it."""
    from surfw.bench.peers.generation import measure_generation
    from surfw.config import is_server_url
    from surfw.models.streaming import StreamingModel
    from surfw.settings import Settings

    assert work.source is not None, "bench_infer names it"
    settings = Settings.load()
    connection = {"token": settings.token, "ssl": settings.tls_for(work.source)} if is_server_url(work.source) else {}
    with StreamingModel.open(
        work.source,
        work.model,
        memory_budget=work.memory_budget,
        codec=work.codec,
        policy=work.policy,
        **connection,  # type: ignore[arg-type]  # of its two types
    ) as model:
        return measure_generation(
            model.generate, work, fetched_bytes=lambda: model.statistics()["cache"]["fetched_bytes"]
        )
