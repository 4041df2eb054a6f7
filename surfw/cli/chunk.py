"""`surfw chunk`: chunk a checkpoint into a store.

Its hidden options (`--list`, `--remove`, `--prune`, `--verify`) run the commands of `store`; scripts use them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surfw.cli import completion, options
from surfw.cli.addresses import Mistake
from surfw.config import display_url
from surfw.settings import Settings

if TYPE_CHECKING:
    from surfw.chunking import Outcome, PreparedModel
    from surfw.encryption import EncryptionKey
    from surfw.manifest import Manifest
    from surfw.models.planned import PlannedModel
    from surfw.models.quality import Quality
    from surfw.signing import SigningKey
    from surfw.storage import StorageBackend
    from surfw.storage.origins import PlacedOptions

EXAMPLES = """\b
Examples:
  surfw chunk org/model
  surfw chunk ./my-model --name mine --dtype bfloat16
  surfw chunk ./my-model --dry-run
  surfw chunk ./my-adapter --base mine
  surfw chunk ./step-1000 --config-from ./my-model
  surfw chunk s3://bucket/my-model --in-place
  surfw chunk ./my-model --encrypt ./model.key
  surfw chunk ./my-model --sign ./maker.pem
  surfw chunk my-model --from ./store --store s3://bucket/store
"""

_TASKS = {"list": "list", "show": "show", "rm": "rm", "remove": "rm", "prune": "prune", "verify": "verify"}
"""Words that users may type after `chunk`, and the commands they probably meant."""


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """The parsed options of `chunk`."""

    model: str
    name: str | None
    revision: str | None
    variant: str | None
    dtype: str | None
    dequantize: str | None
    config_from: str | None
    codecs: tuple[str, ...]
    only_experts: bool
    encrypt: str | None
    key: "EncryptionKey | None"
    signer: "SigningKey | None"
    dry_run: bool
    in_place: bool


@options.with_settings("store", "storage_options", "on_missing", "verify_key")
def chunk(
    *,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A hub id (org/name), a local directory or GGUF file, or a storage URL."),
    ] = None,
    configuration: options.Configuration,
    name: Annotated[
        str | None, typer.Option(help="The model's name in the store. [default: the hub id, or the directory's name]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch, tag or commit of the hub repository.")] = None,
    variant: Annotated[
        str | None, typer.Option(help="The variant of the weight files, such as fp16 for model.fp16.safetensors.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Convert the weights to this dtype, such as bfloat16. [default: unchanged]",
            rich_help_panel=options.FORM,
            autocompletion=completion.dtypes,
        ),
    ] = None,
    dequantize: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Dequantise the weights (compressed-tensors, fp8, mxfp4) to this dtype.",
            autocompletion=completion.dtypes,
        ),
    ] = None,
    config_from: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="The folder of config.json and the tokenizer, if MODEL has only torch.distributed.checkpoint weights.",
        ),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="The forms to store, separated by commas: none, lossless, int8, int4; int8 and int4 are not exact. "
            "[default: none, plus lossless where it is at least 10 % smaller]",
            rich_help_panel=options.FORM,
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="Which matrices to quantise for int8 and int4: all, or experts (of a mixture). [default: all]",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="SOURCE", help="Copy MODEL from this store or server, where it is already chunked."
        ),
    ] = None,
    encrypt: Annotated[
        str | None,
        typer.Option(
            metavar="KEYFILE",
            help="Encrypt the weights with the key in this file; only clients that run the model need it.",
        ),
    ] = None,
    sign: Annotated[
        str | None,
        typer.Option(metavar="KEYFILE", help="Sign the model with the private key in this file (Ed25519, in PEM)."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Chunk MODEL as a LoRA adapter over this model in the store.",
            autocompletion=completion.models_in_store,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the layers, and compare the forms; write nothing.")
    ] = False,
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="Copy no weights: chunks are byte ranges of the checkpoint's own files."),
    ] = False,
    listing: Annotated[bool, typer.Option("--list", hidden=True)] = False,
    remove: Annotated[str | None, typer.Option(metavar="NAME", hidden=True)] = None,
    prune: Annotated[bool, typer.Option("--prune", hidden=True)] = False,
    verify: Annotated[bool, typer.Option("--verify", hidden=True)] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Split a checkpoint into chunks by layer, and store them.

    An interrupted run leaves nothing visible; repeat the command to resume it.
    """
    settings = configuration.settings
    tasks = {"--list": listing, "--remove": remove is not None, "--prune": prune, "--verify": verify}
    chunking = {
        "--name": name is not None, "--revision": revision is not None, "--dtype": dtype is not None,
        "--variant": variant is not None, "--dequantize": dequantize is not None, "--codec": codec is not None,
        "--config-from": config_from is not None, "--quantize": quantize is not None, "--base": base is not None,
        "--from": source is not None, "--in-place": in_place, "--encrypt": encrypt is not None,
        "--sign": sign is not None,
        "--verify-key": configuration.origins["verify_key"].kind == "argument",
        "--on-missing": configuration.origins["on_missing"].kind == "argument",
    }  # fmt: skip
    if task := _only_task(tasks, model=model, dry_run=dry_run, chunking=chunking):
        _do(task, settings, model=model, remove=remove, dry_run=dry_run, json=json, quiet=quiet)
        return
    if not model:
        raise typer.BadParameter(
            "name a checkpoint to chunk: a hub id such as org/name, a directory, or a storage URL", param_hint="MODEL"
        )
    if source is not None:
        for option in (
            "--revision", "--variant", "--dtype", "--dequantize", "--config-from", "--base", "--in-place",
            "--on-missing",
        ):  # fmt: skip
            _refuse_with("--from", option, chunking, "checkpoints")
        from surfw.cli import render
        from surfw.cli.copy import Copy, copy_model

        codecs = None if codec is None else _read_codecs(codec)
        wanted_copy = Copy(
            model=model, source=source, name=name, codecs=codecs,
            only_experts=_read_quantize(quantize, codecs or ()), encrypt=encrypt, key=_read_key(encrypt),
            signer=_read_signer(sign), dry_run=dry_run,
        )  # fmt: skip
        with render.busy(f"reading {display_url(source)}", quiet=json or quiet) as step:
            copy_model(wanted_copy, configuration, step, json=json, quiet=quiet)
        return
    _refuse_without_from(chunking)
    if model in _TASKS and not Path(model).is_dir():
        raise Mistake(
            f"{model} is no checkpoint here; did you mean 'surfw {_TASKS[model]}'? For a directory write ./{model}"
        )
    if base is not None:
        for option in (
            "--dtype", "--dequantize", "--config-from", "--quantize", "--in-place", "--on-missing", "--encrypt",
        ):  # fmt: skip
            _refuse_with("--base", option, chunking, "whole models")
        _chunk_adapter(
            settings, model=model, base=base, name=name, revision=revision, codec=codec, sign=sign, dry_run=dry_run,
            json=json, quiet=quiet,
        )  # fmt: skip
        return
    options.check_option("dtype", dtype)
    _check_dequantize(dequantize, chunking)
    if in_place:
        _refuse_in_place({"--codec": codec, "--encrypt": encrypt, "--sign": sign})
    codecs = ("none",) if in_place else _read_codecs(codec)
    wanted = _Wanted(
        model=model, name=name, revision=revision, variant=variant, dtype=dtype, dequantize=dequantize,
        config_from=config_from, encrypt=encrypt, key=_read_key(encrypt), signer=_read_signer(sign), codecs=codecs,
        only_experts=_read_quantize(quantize, codecs), dry_run=dry_run, in_place=in_place,
    )  # fmt: skip
    with _busy(model, quiet=json or quiet) as step:  # shown before the slow imports
        _chunk(wanted, settings, step, json=json, quiet=quiet)


def _do(
    task: str, settings: Settings, *, model: str | None, remove: str | None, dry_run: bool, json: bool, quiet: bool
) -> None:
    """Run the command behind a hidden option."""
    from surfw.cli import housekeeping

    match task:
        case "--list":
            housekeeping.list_models(settings, json=json, quiet=quiet)
        case "--remove":
            housekeeping.remove_model(settings, remove or "", json=json, quiet=quiet)
        case "--prune":
            housekeeping.prune(settings, dry_run=dry_run, json=json, quiet=quiet)
        case "--verify":
            housekeeping.verify(settings, model, json=json, quiet=quiet)


def _only_task(
    tasks: Mapping[str, bool], *, model: str | None, dry_run: bool, chunking: Mapping[str, bool]
) -> str | None:
    """Return the hidden option that was given; None if the command is to chunk.

    Raises:
        BadParameter: options conflict.
    """
    given = [option for option, is_given in tasks.items() if is_given]
    if not given:
        return None
    task = given[0]
    if len(given) > 1:
        raise typer.BadParameter(f"does not go with {task}; give one of them", param_hint=given[1])
    if model is not None and task != "--verify":
        raise typer.BadParameter(f"does not go with {task}; give one of them", param_hint="MODEL")
    if dry_run and task != "--prune":
        raise typer.BadParameter(f"does not go with {task}; give one of them", param_hint="--dry-run")
    for option, is_given in chunking.items():
        if is_given:
            raise typer.BadParameter(
                f"does not go with {task}, as it is for chunking; give one of them", param_hint=option
            )
    return task


def _read_codecs(names: str | None) -> tuple[str, ...]:
    """Parse `--codec`.

    Raises:
        BadParameter: it is not a valid list of codecs.
    """
    from surfw.codec import DEFAULT_CODECS, check_codecs
    from surfw.errors import ConfigurationError

    try:
        return DEFAULT_CODECS if names is None else check_codecs([one.strip() for one in names.split(",")])
    except ConfigurationError as exc:
        raise typer.BadParameter(str(exc), param_hint="--codec") from exc


def _read_quantize(what: str | None, codecs: Sequence[str]) -> bool:
    """Parse `--quantize`: whether only experts are quantised.

    Raises:
        BadParameter: the value is unknown, or no codec quantises.
    """
    from surfw.codec import PACKED_CODECS

    if what is None:
        return False
    if what not in {"all", "experts"}:
        raise typer.BadParameter(f"{what!a:.80} is not known, expected all or experts", param_hint="--quantize")
    if not set(codecs).intersection(PACKED_CODECS):
        raise typer.BadParameter(
            "says what int8 and int4 take; name one of them with --codec, or leave this out", param_hint="--quantize"
        )
    return what == "experts"


def _read_key(file: str | None) -> "EncryptionKey | None":
    if file is None:
        return None
    from surfw.encryption import read_key

    return read_key(file)


def _read_signer(file: str | None) -> "SigningKey | None":
    if file is None:
        return None
    from surfw.signing import read_signing_key

    return read_signing_key(file)


def _check_dequantize(dtype: str | None, given: Mapping[str, bool]) -> None:
    """Refuse an unknown dtype, and options that conflict with `--dequantize`."""
    from surfw.config import check_dtype
    from surfw.errors import ConfigurationError

    for other in ("--dtype", "--in-place") if dtype is not None else ():
        _refuse_with("--dequantize", other, given, "weights that are not quantised")
    try:
        check_dtype(dtype or "bfloat16")
    except ConfigurationError as exc:
        raise typer.BadParameter(str(exc), param_hint="--dequantize") from exc


def _refuse_in_place(given: Mapping[str, str | None]) -> None:
    """Refuse options that apply to stored weights; `--in-place` stores none."""
    for option, value in given.items():
        if value is not None:
            raise typer.BadParameter(
                "does not go with --in-place, which stores no weights; give one of them", param_hint=option
            )


def _refuse_without_from(given: Mapping[str, bool]) -> None:
    if given["--verify-key"]:
        raise typer.BadParameter(
            "is for models that are in chunks, and signed, which --from copies; a checkpoint has no signature",
            param_hint="--verify-key",
        )


def _refuse_with(option: str, other: str, given: Mapping[str, bool], what: str) -> None:
    """Refuse the option `other` if it was given; it conflicts with `option`."""
    if given[other]:
        raise typer.BadParameter(f"does not go with {option}, as it is for {what}; give one of them", param_hint=other)


def _chunk_adapter(
    settings: Settings,
    *,
    model: str,
    base: str,
    name: str | None,
    revision: str | None,
    codec: str | None,
    sign: str | None,
    dry_run: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Chunk a LoRA adapter over a model of the store, or show what would be written."""
    from surfw.cli.chunk_adapter import WantedAdapter, chunk_adapter

    wanted = WantedAdapter(
        model=model, base=base, name=name, revision=revision, codecs=_read_adapter_codecs(codec),
        signer=_read_signer(sign), dry_run=dry_run,
    )  # fmt: skip
    with _busy(model, quiet=json or quiet) as step:
        chunk_adapter(wanted, settings, step, json=json, quiet=quiet)


def _read_adapter_codecs(names: str | None) -> tuple[str, ...]:
    """Parse `--codec` for an adapter, whose small matrices are never quantised.

    Raises:
        BadParameter: it is not a valid list of codecs, or names one that quantises.
    """
    from surfw.codec import PACKED_CODECS

    codecs = _read_codecs(names)
    if set(codecs).intersection(PACKED_CODECS):
        raise typer.BadParameter("adapters are not quantised; expected none, lossless, or both", param_hint="--codec")
    return codecs


def _chunk(wanted: _Wanted, settings: Settings, step: Callable[[str], None], *, json: bool, quiet: bool) -> None:
    """Chunk a checkpoint, or show what would be written; `step` shows the current step."""
    import asyncio

    from surfw.checkpoint.reader import folder_name
    from surfw.chunking import prepare_model
    from surfw.chunking.in_place import check_reach
    from surfw.chunking.write import check_target
    from surfw.cli import chunk_view, render
    from surfw.cli.addresses import is_here
    from surfw.manifest import check_model_name
    from surfw.storage import Store, open_backend
    from surfw.storage.origins import PlacedOptions

    model = wanted.model
    placed = PlacedOptions.of_chunking(model, settings.store, settings.storage_options)
    backend = open_backend(settings.store, settings.storage_options)
    if not wanted.dry_run:
        backend.check_rights()
    name = wanted.name or (folder_name(Path(model)) if is_here(model) else None)
    if name is None:
        asyncio.run(Store(backend).check_place())  # checked before the slow work, as in the other branch
    else:
        asyncio.run(check_target(backend, check_model_name(name), wanted.codecs))
    if wanted.in_place:
        check_reach(model, backend)
    with prepare_model(
        model,
        name=wanted.name,
        revision=wanted.revision,
        variant=wanted.variant,
        config_from=wanted.config_from,
        dtype=wanted.dtype,
        dequantize=wanted.dequantize,
        on_missing=settings.on_missing,
        show_progress=not (json or quiet) and render.err.is_terminal,
        storage_options=placed.for_url(model),
        on_step=step,
    ) as opened:
        from surfw.models.planned import PlannedModel  # torch is imported by now

        prepared = opened.only_experts() if wanted.only_experts else opened
        planned = PlannedModel(prepared)
        facts = chunk_view.plan_facts(planned, wanted.codecs)
        step("")
        if wanted.dry_run:
            if name is None:  # the name was unknown until now
                asyncio.run(check_target(backend, prepared.name, wanted.codecs))
            _show_plan(planned, facts, backend, wanted, step, json=json)
            return
        manifest, outcomes = _write(prepared, backend, wanted, placed, quiet=json or quiet)
        try:
            quality = _measure_quality(prepared, manifest, wanted, settings, placed, step)
        except KeyboardInterrupt as exc:
            raise KeyboardInterrupt(f"{manifest.name} is stored; only measuring its quality ended early") from exc
        chunk_view.show_result(
            facts, manifest, outcomes, display_url(settings.store), is_in_place=wanted.in_place, quality=quality,
            json=json,
        )  # fmt: skip


def _show_plan(
    planned: "PlannedModel",
    facts: Mapping[str, Any],
    backend: "StorageBackend",
    wanted: _Wanted,
    step: Callable[[str], None],
    *,
    json: bool,
) -> None:
    """Show what would be written, and compare all forms; with `--in-place`, refuse weights that must be copied."""
    import asyncio

    from surfw.chunking.in_place import build_manifest
    from surfw.cli import chunk_view
    from surfw.codec import CODECS

    if wanted.in_place:
        asyncio.run(build_manifest(planned.prepared))  # refuses weights that are used in another form than stored
    step("trying how well the weights compress, and how fast they are read")
    forms = planned.compare(("none",) if wanted.in_place else CODECS, store=None if wanted.in_place else backend)
    step("")
    chunk_view.show_plan(planned, facts, forms, wanted.codecs, json=json)


def _write(
    prepared: "PreparedModel", backend: "StorageBackend", wanted: _Wanted, placed: "PlacedOptions", *, quiet: bool
) -> "tuple[Manifest, Counter[Outcome]]":
    """Write a model; return its manifest and the number of chunks per outcome, which is empty with `--in-place`."""
    import asyncio

    from surfw.chunking import write_model
    from surfw.chunking.in_place import write_in_place
    from surfw.cli import render

    outcomes: Counter[Outcome] = Counter()
    with render.byte_bar("chunking", prepared.plan.payload_bytes, quiet=quiet) as update:

        def progress(size: int, chunk: str) -> None:
            update(advance=size, description=chunk)

        if wanted.in_place:
            writing = write_in_place(prepared, backend, origin_options=placed, progress=progress)
        else:
            writing = write_model(
                prepared,
                backend,
                codecs=wanted.codecs,
                key=wanted.key,
                signer=wanted.signer,
                progress=progress,
                on_outcome=lambda _, outcome: outcomes.update([outcome]),
            )
        try:
            return asyncio.run(writing), outcomes
        except KeyboardInterrupt as exc:
            raise KeyboardInterrupt("the same command goes on where it stopped") from exc


def _measure_quality(
    prepared: "PreparedModel",
    manifest: "Manifest",
    wanted: _Wanted,
    settings: Settings,
    placed: "PlacedOptions",
    step: Callable[[str], None],
) -> "dict[str, Quality]":
    """Measure the quantised forms against the exact weights in the store, or in the checkpoint if none are stored."""
    from surfw.cli import chunk_quality
    from surfw.codec import has_exact_forms, stored_packed_codecs

    url, missing = prepared.checkpoint.url, settings.on_missing
    written: chunk_quality.Place = (
        settings.store,
        {
            "model": manifest.name,
            "storage_options": placed.for_url(settings.store),
            "on_missing": missing,
            "encryption_key_file": wanted.encrypt,
        },
    )
    reference = written
    if not has_exact_forms(manifest):
        reference = (url, {"dtype": wanted.dtype, "storage_options": placed.for_url(url), "on_missing": missing})
    codecs = stored_packed_codecs(manifest)
    if reference is not written and (wanted.dequantize is not None or Path(url).suffix.lower() == ".gguf"):
        return {}  # there are no dense weights to compare with
    return chunk_quality.measure(manifest, codecs, reference=reference, written=written, step=step)


def _busy(model: str, *, quiet: bool) -> AbstractContextManager[Callable[[str], None]]:
    """Show progress until the first byte is written; while the hub is asked, its library shows its own."""
    from surfw.cli import render
    from surfw.cli.addresses import is_here, is_path

    if is_here(model) or is_path(model) or "://" in model:
        return render.busy(f"reading {display_url(model)}", quiet=quiet)
    if not quiet and render.err.is_terminal:
        render.err.print(f"surfw: asking the hub for {model}", style="dim", soft_wrap=True)
    return render.busy("", quiet=quiet)
