"""Models to measure, this project's and the originals', behind one call: the project's own convention."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowcore.conditioning import Conditioning, cat
from flowcore.models import find_architecture
from flowcore.ops import Runtime, run_checkpointed
from flowcore.weights.checkpoint import load_model, save_model
from tests.bench import originals
from tests.bench.cases import CHECKPOINTED, Case
from tests.bench.originals import Call
from tests.bench.references import REFERENCES


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A way to build and call a model, and to write and load its weights."""

    build: Callable[[], nn.Module]
    call: Call
    save: Callable[[nn.Module, Path], None]
    load: Callable[[Path], object]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a forward is given, in the project's convention."""

    latents: Tensor
    sigma: Tensor
    conditioning: Conditioning

    def doubled(self) -> Conditioning:
        """The conditions for guidance: with the text, then with zeros in its place."""
        context = self.conditioning.context
        assert context is not None
        return cat([self.conditioning, replace(self.conditioning, context=torch.zeros_like(context))])


def config_of(case: Case) -> Any:  # noqa: ANN401 - each architecture has its own
    """The configuration of a case's model."""
    return replace(find_architecture(case.arch).presets[case.preset], **case.overrides)


def inputs_of(case: Case, device: str) -> Inputs:
    """Random inputs of a case."""
    architecture, config = find_architecture(case.arch), config_of(case)
    torch.manual_seed(0)
    text = architecture.text_shape(config)
    pooled = torch.randn(case.batch, text.pooled) if text.pooled else None
    if text.width == 1:  # token ids of a model that brings its own text encoder
        context = torch.randint(256, (case.batch, case.text, 1))
    else:
        context = torch.randn(case.batch, case.text, text.width or 0)
    if len(case.shape) == 2:
        channels = architecture.latent_channels(config)
        extras = architecture.size_extras(config, 8 * case.shape[1], 8 * case.shape[0])
    else:  # a sequence of tokens at any positions
        channels, axes = config.in_channels, len(config.axes_dim)
        extras = {
            "img_ids": torch.randint(1024, (case.batch, *case.shape, axes)),
            "txt_ids": torch.randint(1024, (case.batch, case.text, axes)),
        }
    conditioning = Conditioning(context=context, pooled=pooled, extras=extras).expand(case.batch)
    dtype = getattr(torch, case.dtype)
    return Inputs(
        latents=torch.randn(case.batch, channels, *case.shape).to(device, dtype),
        sigma=torch.linspace(0.9, 0.1, case.batch, device=device),
        conditioning=replace(
            conditioning.to(device, dtype), extras={name: part.to(device) for name, part in extras.items()}
        ),
    )


def own_subject(case: Case, device: str) -> Subject:
    """This project's model of a case."""
    architecture, config = find_architecture(case.arch), config_of(case)
    dtype = getattr(torch, case.dtype)
    runtime = Runtime(run_block=run_checkpointed) if case.what == CHECKPOINTED else Runtime()

    def call(module: nn.Module, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        options: dict[str, Any] = {"runtime": runtime}
        if module.training and case.arch != "exo":
            options["generator"] = torch.Generator().manual_seed(0)  # of dropout
        return architecture.velocity(module.forward, latents, sigma, conditioning, **options)

    def save(module: nn.Module, path: Path) -> None:
        save_model(path, module.state_dict(), architecture=case.arch, config=config)

    return Subject(
        build=lambda: architecture.model(config, device=device, dtype=dtype),
        call=call,
        save=save,
        load=lambda path: load_model(path, device=device, dtype=dtype),
    )


def reference_subject(case: Case, device: str, name: str, folder: Path) -> Subject:
    """The original's model of a case, from its checkout."""
    from safetensors.torch import load_file, save_file

    make, call = getattr(originals, REFERENCES[name].adapter)(folder)
    config, dtype = config_of(case), getattr(torch, case.dtype)

    def build() -> nn.Module:
        module: nn.Module = make(config)
        return module.to(device, dtype)

    def load(path: Path) -> object:
        module = build()
        module.load_state_dict(load_file(path, device=device))
        return module.eval()

    return Subject(
        build=build,
        call=call,
        save=lambda module, path: save_file(
            {key: value.clone() for key, value in module.state_dict().items()}, path
        ),
        load=load,
    )
