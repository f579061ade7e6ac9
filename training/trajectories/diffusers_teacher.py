"""FLUX pipelines of diffusers as teachers: FLUX.1, FLUX.2 and its smaller models."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowcore.devices import find_device, find_dtype
from flowcore.errors import CheckpointError, ConfigError
from flowcore.hub import PREFIX, download, looks_like_address
from flowcore.vae.latent_spec import LATENT_SPECS, LatentSpec, scaled_spec, spec_from_statistics
from training.data.trajectories import draw_start
from training.encoders import file_identity
from training.trajectories.teachers import Request

FLUX1, FLUX2, KLEIN = "FluxPipeline", "Flux2Pipeline", "Flux2KleinPipeline"
TEXT_TOKENS = 512
_SIDE = 1024
_SETTINGS = ("*.json",)
_WEIGHTS = ("*/*.safetensors", "*/*.txt", "*/*.model", "*/*.jinja")
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


def is_pipeline(source: str) -> bool:
    """Whether a source is a pipeline's folder, or an address of one on the hub."""
    return source.startswith(PREFIX) or (Path(source).expanduser() / "model_index.json").is_file()


class DiffusersTeacher:
    """A pipeline of a folder, or of the hub (`hub:OWNER/NAME`)."""

    def __init__(self, source: str, request: Request, *, with_weights: bool = True) -> None:
        """Reads the settings, and the weights, without which only `flops` works.

        Raises: CheckpointError, ConfigError if the pipeline or an option cannot be used.
        """
        self.request, self.source = request, source
        self.folder = _locate(source, with_weights=with_weights)
        self.kind = str(_settings(self.folder / "model_index.json").get("_class_name"))
        if self.kind not in (FLUX1, FLUX2, KLEIN):
            raise ConfigError(
                f"--teacher {source} must be a {FLUX1}, {FLUX2} or {KLEIN}, got a {self.kind}; name another"
            )
        if request.negative:
            raise ConfigError(f"--negative must be left out for a {self.kind}, got {request.negative!r}")
        self.network = _settings(self.folder / "transformer" / "config.json")
        self.space = _space(self.kind, self.network, _settings(self.folder / "vae" / "config.json"))
        self.size = (request.width or _SIDE, request.height or _SIDE)
        unit = self.space.downscale * (2 if self.kind == FLUX1 else 1)
        for name, side in zip(("width", "height"), self.size, strict=True):
            if side < unit or side % unit:
                raise ConfigError(f"--{name} must be a multiple of {unit} for {source}, got {side}")
        self.pipeline: Any = self._load() if with_weights else None

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """As `Maker`."""
        scheduler = _settings(self.folder / "scheduler" / "scheduler_config.json")
        return {
            "teacher": self.source,
            "revision": file_identity(str(self.folder / "transformer")),
            "vae": f"{self.source}/vae",
            "steps": self.request.steps,
            "guidance": self.request.guidance,
            "negative": "",
            "schedule": {
                key: value for key, value in sorted(scheduler.items()) if key != "_diffusers_version"
            },
        }

    def _load(self) -> Any:  # noqa: ANN401 - one of three classes without types
        """The pipeline with its weights. Raises: CheckpointError if they cannot be used."""
        device = find_device(self.request.device)
        dtype = find_dtype(self.request.dtype, device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of a name that older versions know alone
                pipeline = getattr(diffusers, self.kind).from_pretrained(
                    str(self.folder), torch_dtype=dtype, local_files_only=True
                )
        except _UNREADABLE as err:
            raise CheckpointError(f"--teacher {self.source} must load as a {self.kind}, got {err}") from err
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def flops(self, steps: int | None = None) -> float:
        """As `Maker`; counted on the meta device, without weights."""
        pair = 2 if self.kind == KLEIN and self._is_guided() else 1
        return network_flops(self.kind, self.network, self._grid()) * (steps or self.request.steps) * pair

    @torch.inference_mode()
    def latents(self, captions: Sequence[str], seeds: Sequence[int], steps: int | None = None) -> Tensor:
        """As `Teacher`."""
        self._run(captions, seeds, "latent", steps)
        rows, columns = self._grid()
        if self.kind == FLUX1:
            packed = "b (h w) (c p q) -> b c (h p) (w q)"
            return rearrange(self._last, packed, h=rows // 2, w=columns // 2, p=2, q=2).float().cpu()
        return rearrange(self._last, "b (h w) c -> b c h w", h=rows, w=columns).float().cpu()

    @torch.inference_mode()
    def pictures(
        self, captions: Sequence[str], seeds: Sequence[int], numbers: Sequence[int], steps: int | None = None
    ) -> Tensor:
        """As `Maker`."""
        del numbers
        images: Tensor = self._run(captions, seeds, "pt", steps)
        return images.float().mul(2).sub(1)

    def _run(self, captions: Sequence[str], seeds: Sequence[int], kind: str, steps: int | None) -> Any:  # noqa: ANN401 - by kind
        """The pipeline's result; the latents of its last step are kept."""
        noise = torch.stack([draw_start(seed, (self.space.channels, *self._grid())) for seed in seeds])
        if self.kind == FLUX1:
            noise = rearrange(noise, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)

        def keep(
            _pipeline: object, _step: int, _time: object, states: dict[str, Tensor]
        ) -> dict[str, Tensor]:
            self._last = states["latents"]
            return {}

        guidance = {} if self.request.guidance is None else {"guidance_scale": self.request.guidance}
        return self.pipeline(
            prompt=list(captions),
            width=self.size[0],
            height=self.size[1],
            num_inference_steps=steps or self.request.steps,
            latents=noise,
            output_type=kind,
            callback_on_step_end=keep,
            **guidance,
        ).images

    def _grid(self) -> tuple[int, int]:
        return self.size[1] // self.space.downscale, self.size[0] // self.space.downscale

    def _is_guided(self) -> bool:
        index = _settings(self.folder / "model_index.json")
        is_wanted = self.request.guidance is None or self.request.guidance > 1
        return is_wanted and not index.get("is_distilled", False)


def network_flops(kind: str, settings: Mapping[str, Any], grid: tuple[int, int]) -> float:
    """Operations of one evaluation of a FLUX transformer on a latent grid, with text of 512 tokens."""
    name = "FluxTransformer2DModel" if kind == FLUX1 else "Flux2Transformer2DModel"
    with torch.device("meta"), torch.no_grad():
        network = getattr(diffusers, name).from_config(dict(settings))
        tokens = grid[0] * grid[1] // (4 if kind == FLUX1 else 1)
        axes = 3 if kind == FLUX1 else 4
        inputs = {
            "hidden_states": torch.empty(1, tokens, network.config.in_channels),
            "encoder_hidden_states": torch.empty(1, TEXT_TOKENS, network.config.joint_attention_dim),
            "timestep": torch.empty(1),
            "img_ids": torch.empty(tokens, axes),
            "txt_ids": torch.empty(TEXT_TOKENS, axes),
            "guidance": torch.empty(1) if network.config.guidance_embeds else None,
        }
        if kind == FLUX1:
            inputs["pooled_projections"] = torch.empty(1, network.config.pooled_projection_dim)
        with FlopCounterMode(display=False) as counter:
            network(**inputs)
    return float(counter.get_total_flops())


def _space(kind: str, network: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentSpec:
    """The latents of a pipeline: FLUX.1's are scaled, FLUX.2's are normalised by its autoencoder."""
    downscale = 2 ** (len(vae["block_out_channels"]) - 1)
    channels = int(network["in_channels"])
    if kind == FLUX1:
        spec = scaled_spec(
            "custom",
            channels=channels // 4,
            scale=float(vae["scaling_factor"]),
            shift=float(vae.get("shift_factor") or 0.0),
            downscale=downscale,
        )
        return spec_from_statistics(spec.mean, spec.std, downscale=downscale)
    known = LATENT_SPECS["flux2"]
    if (channels, 2 * downscale) == (known.channels, known.downscale):
        return known
    return scaled_spec("custom", channels=channels, scale=1.0, downscale=2 * downscale, patch=2)


def _locate(source: str, *, with_weights: bool) -> Path:
    if not source.startswith(PREFIX):
        return Path(source).expanduser()
    repo = source.removeprefix(PREFIX)
    if not looks_like_address(repo):
        raise CheckpointError(f"--teacher must be hub:OWNER/NAME for a pipeline on the hub, got {source!r}")
    return download(source, repo, [*_SETTINGS, *(_WEIGHTS if with_weights else ())])


def _settings(path: Path) -> dict[str, Any]:
    """A file of settings in a pipeline's folder. Raises: CheckpointError if it is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return dict(found)
    except (OSError, ValueError, TypeError) as err:
        raise CheckpointError(f"{path} must be a JSON file of a diffusers pipeline, got {err}") from err
