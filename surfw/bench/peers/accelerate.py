"""transformers with accelerate's disk offload: layers on disk, everything else in memory."""

from typing import Any

from surfw.bench.comparison import Comparison, Measurement


def run(work: Comparison) -> Measurement:
    """Measure a generation."""
    import torch
    from transformers import AutoConfig

    from surfw.bench.peers.generation import measure_generation, model_class

    config = AutoConfig.from_pretrained(work.model_dir)
    cls = model_class(config)
    with torch.device("meta"):
        places = place_modules(cls(config))
    model = cls.from_pretrained(work.model_dir, dtype="auto", device_map=places, offload_folder=work.folder)
    return measure_generation(model.generate, work)


def place_modules(model: Any) -> dict[str, str]:
    """A device map: `disk` for every executed layer, `cpu` for everything else."""
    from surfw.skeleton.units import find_units

    layers = {unit.path for unit in find_units(model) if unit.kind == "layer"}
    places: dict[str, str] = {}

    def place(module: Any, path: str) -> None:
        if path in layers:
            places[path] = "disk"
        elif path and not any(layer.startswith(f"{path}.") for layer in layers):
            places[path] = "cpu"
        else:
            own = [name for name, _ in module.named_parameters(recurse=False)]
            own += [name for name, _ in module.named_buffers(recurse=False)]
            places.update(dict.fromkeys((f"{path}.{name}".lstrip(".") for name in own), "cpu"))
            for name, child in module.named_children():
                place(child, f"{path}.{name}".lstrip("."))

    place(model, "")
    return places
