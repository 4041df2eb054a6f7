"""`--prompt-lookup` and `--draft`: speculation, and a summary of its outcome."""

from __future__ import annotations  # modules that import torch are named in type hints only

from dataclasses import dataclass
from typing import TYPE_CHECKING

from surfw.cli.addresses import Mistake, is_here, is_path, read_address, read_source
from surfw.cli.status import percent, rate
from surfw.config import count, display_url, is_server_url
from surfw.errors import ConfigurationError, UnknownModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from surfw.manifest import Manifest
    from surfw.models.client import WeightClient
    from surfw.models.speculation import SpeculationFacts
    from surfw.models.streaming import StreamingModel
    from surfw.settings import Settings

_OWN_FORM = "self:"
"""The prefix of a draft that is a form of the model's own weights: `self:int4`."""


@dataclass(frozen=True)
class Guessing:
    """The options `--prompt-lookup` and `--draft`.

    Raises:
        Mistake: both are given, or the draft is empty or an unknown form of the model.
    """

    prompt_lookup: int | None
    draft: str | None

    def __post_init__(self) -> None:
        if self.prompt_lookup is not None and self.draft is not None:
            raise Mistake("--draft does not go with --prompt-lookup; give one of them")
        if self.draft == "":
            raise Mistake("--draft is empty, expected self:int8, self:int4, a model's name, or a source")
        draft = self.draft or ""
        if draft.startswith(_OWN_FORM):
            from surfw.codec import PACKED_CODECS

            if draft not in (forms := [_OWN_FORM + one for one in PACKED_CODECS]):
                raise Mistake(f"--draft is {draft!r}, expected {' or '.join(forms)}, a model's name, or a source")

    def refuse(self, what: str) -> None:
        """Refuse both options together with `what`.

        Raises:
            Mistake: one of them is given.
        """
        for name, value in (("--prompt-lookup", self.prompt_lookup), ("--draft", self.draft)):
            if value is not None:
                raise Mistake(f"{name} does not go with {what}")

    def check(self, client: WeightClient, manifest: Manifest, settings: Settings) -> None:
        """Check, without importing torch, that the draft exists and can guess for the model.

        A draft with a source of its own is checked here if that is a server or a local store; others when they open.

        Raises:
            SurfwError: it does not exist, or cannot guess for the model.
        """
        if self.draft is None:
            return
        from surfw.codec import for_run
        from surfw.models.read_ahead import expect_vocabularies, vocabulary_size

        if self.draft.startswith(_OWN_FORM):
            own = for_run(manifest, self.draft.removeprefix(_OWN_FORM), where=client.url)
            client.run(lambda source: source.expect_there(manifest, own))
            return
        draft = _find_draft(self.draft, client, settings)
        sizes = vocabulary_size(manifest), None if draft is None else vocabulary_size(draft)
        if draft is not None and sizes[0] is not None and sizes[1] is not None:
            expect_vocabularies(manifest.name, sizes[0], draft.name, sizes[1])

    def begin(
        self, streaming: StreamingModel, client: WeightClient, settings: Settings, on_phase: Callable[[str], None]
    ) -> None:
        """Set up speculation for a model, if one of the options is given; `on_phase` is called with each slow phase.

        Raises:
            SurfwError: the draft cannot be opened, or there is no memory for it.
        """
        if self.prompt_lookup is not None:
            streaming.speculate(prompt_lookup=self.prompt_lookup)
        if self.draft is None:
            return
        on_phase("opening the draft")
        if self.draft.startswith(_OWN_FORM) or _is_name(self.draft, client):
            streaming.speculate(draft=self.draft)
        else:
            streaming.speculate(draft_source=_read_draft(self.draft, settings))


def _find_draft(draft: str, client: WeightClient, settings: Settings) -> Manifest | None:
    """Return the manifest of a draft; None if it has a source that cannot be opened without torch.

    Raises:
        SurfwError: there is no such model.
    """
    import asyncio

    from surfw.cli.sources import find_manifest
    from surfw.models.client import WeightClient
    from surfw.storage import open_backend
    from surfw.storage.origins import is_local_url
    from surfw.storage.store import is_checkpoint

    if _is_name(draft, client):
        try:
            return find_manifest(client, draft)
        except UnknownModelError as exc:
            if is_here(draft):
                raise ConfigurationError(f"--draft: {exc}; for the folder of that name here, write ./{draft}") from exc
            raise
    url = _read_draft(draft, settings)
    is_store = is_local_url(url) and not asyncio.run(is_checkpoint(open_backend(url)))
    if not is_store and not is_server_url(url):
        return None
    with WeightClient(url) as other:
        if len(names := other.models()) > 1:
            raise ConfigurationError(
                f"--draft: {display_url(url)} holds {len(names)} models; a draft is the only model of its source, or "
                "one of the model's own source, named by its name alone"
            )
        return find_manifest(other, None)


def _read_draft(address: str, settings: Settings) -> str:
    """Return the source of a draft that has a source of its own."""
    return read_source(address, seconds=settings.connect_timeout, tls=settings.tls)


def _is_name(word: str, client: WeightClient) -> bool:
    """Whether a word is a model's name in the source, rather than another source.

    A word that may be both is a name if the source has it. A folder is written as a path: it has a slash.
    """
    kind = read_address(word).kind
    if is_path(word) or kind in {"server", "web", "storage"}:
        return False
    if "/" not in word or any(word in {one, one.rpartition("/")[2]} for one in client.models()):
        return True
    return not (is_here(word) or kind == "hub")


def guessed(facts: SpeculationFacts | None) -> list[str]:
    """Summarise the outcome of speculation."""
    if facts is None:
        return []
    what = "prompt lookup" if facts["kind"] == "prompt_lookup" else f"the draft {facts['draft']}"
    if not facts["guessed_tokens"]:
        return [f"{what} guessed nothing"]
    share = percent(facts["acceptance"] or 0.0)
    guesses = count(facts["guessed_tokens"], "guess", "guesses")
    said = f"{share} of {guesses} of {what} {'was' if facts['guessed_tokens'] == 1 else 'were'} right"
    with_seconds, without = facts["seconds_per_token_with"], facts["seconds_per_token_without"]
    if with_seconds and without:
        said += f" ({rate(1 / with_seconds)} tok/s with them, {rate(1 / without)} without)"
    return [said, "guessing was switched off, as it did not pay"] if facts["switched_off"] else [said]
