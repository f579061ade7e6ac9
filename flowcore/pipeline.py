"""Prompt to picture in plain Python: encode, sample, decode. Every stage is usable alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from . import __version__
from .assets import resolve
from .conditioning import Conditioning, cat
from .devices import find_device, find_dtype
from .errors import ConfigError
from .flow.guidance import guided_pair
from .flow.masking import masked_velocity, noise_to_strength, restore_kept
from .flow.path import VelocityFn
from .flow.steps import StepCallback
from .images import add_settings, image_to_tensor, mask_to_tensor, tensor_to_images
from .layers.attention import find_attention
from .noise import draw_noise, step_noise
from .ops import Runtime
from .parts import Source, load_model_vae, part_source, stated_size, text_mode_of, text_sources
from .settings import Settings, check_request, whole_size
from .shifts import default_shift, stated_shift
from .text.encoder import TextEncoder, TextMode
from .text.loading import load_text_encoder
from .vae.autoencoder import Autoencoder
from .vae.tiling import Tiling, tiling_of
from .weights.checkpoint import LoadedModel, load_model

if TYPE_CHECKING:
    from .exo.loading import TrunkOptions

__all__ = ["Pipeline", "Settings", "draw_noise", "generate", "step_noise"]

DEFAULT_MODEL = "xut-demo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A diffusion model with its text encoder and autoencoder.

    attention: what computes it, a name of `layers.attention.ATTENTIONS`.
    sources: what the settings in a picture call the parts.
    settings_type: what decides its pictures. fallback_side: pixels a side for a model whose file states none.
    """

    settings_type: ClassVar[type[Settings]] = Settings
    fallback_side: ClassVar[int] = 512

    model: LoadedModel
    text_encoder: TextEncoder
    vae: Autoencoder
    text_mode: TextMode = "sequence"
    attention: str = "auto"
    sources: Mapping[str, str | list[str]]

    def __post_init__(self) -> None:
        """Check that model and autoencoder share their latents, and the attention. Raises: ConfigError."""
        find_attention(self.attention)
        channels = self.model.architecture.latent_channels(self.model.config)
        if channels != self.vae.spec.channels:
            raise ConfigError(
                f"the VAE must have the model's {channels} latent channels, got {self.vae.spec.channels} "
                f"({self.vae.spec.name}); pass the VAE that the model was trained with"
            )

    @classmethod
    def from_files(
        cls,
        model: Source = DEFAULT_MODEL,
        *,
        vae: Source | None = None,
        text_encoder: Source | Sequence[Source] | None = None,
        text_mode: TextMode | None = None,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        tile: int | None = None,
        trunk: "TrunkOptions | None" = None,
    ) -> "Pipeline":
        """Return the pipeline of files or bundled names.

        Args:
            model: a model file; its metadata may name the other parts.
            vae: None = what the model file names.
            text_encoder: one or several, as `load_text_encoder` takes them; of an exo model its trunk, a
                folder or a repository; None = what the model file names.
            text_mode: None = what the model file says, else "sequence".
            device: "auto" takes CUDA or MPS where there is one.
            dtype: of the diffusion model; "auto" is float32 on the CPU and bfloat16 elsewhere.
            attention: "auto" takes flash-attn where it is installed and fits; else "sdpa" or "flash".
            tile: pixels a side of the tiles in which the autoencoder works on larger pictures, 0 = no tiles;
                None = tiles for large pictures alone.
            trunk: how an exo model's trunk is loaded.

        Raises: CheckpointError or ConfigError, naming the file or the argument.
        """
        place = find_device(device)
        find_attention(attention)
        path = resolve(model)
        loaded = load_model(path, device=place, dtype=find_dtype(dtype, place))
        if loaded.architecture.name == "exo":
            from .exo.pipeline import from_loaded

            return from_loaded(
                loaded,
                model,
                path,
                vae=vae,
                trunk=text_encoder,
                options=trunk,
                attention=attention,
                tile=tile,
            )
        if trunk is not None:
            raise ConfigError(f"options of a trunk must go with an exo model, got {loaded.architecture.name}")
        autoencoder = part_source("vae", vae, loaded.metadata, path)
        texts = text_sources(text_encoder, loaded.metadata, path)
        shape = loaded.architecture.text_shape(loaded.config)
        return cls(
            model=loaded,
            text_encoder=load_text_encoder(texts, shape=shape, device=place),
            vae=load_model_vae(autoencoder, loaded, path.name, place, tiling_of(tile)),
            text_mode=text_mode_of(text_mode or loaded.metadata.get("flowcore.text_mode", "sequence")),
            attention=attention,
            sources={"model": str(model), "vae": autoencoder, "text_encoder": texts},
        )

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height in pixels at which the model was trained."""
        return stated_size(self.model.metadata) or (self.fallback_side, self.fallback_side)

    def default_shift(self, width: int, height: int) -> float:
        """Return the shift of the noise levels for a size: what the file states, else the published one."""
        stated = stated_shift(self.model.metadata, str(self.sources["model"]))
        if stated is not None:
            return stated
        cell = self.vae.spec.downscale
        return default_shift(self.model.architecture.name, self.model.config, height // cell, width // cell)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings | None = None,
        *,
        init_image: Image.Image | None = None,
        mask: Image.Image | None = None,
        callback: StepCallback | None = None,
    ) -> list[Image.Image]:
        """Return one picture for each prompt and seed, with the settings attached (see `images.save_image`).

        Args:
            prompts: one text for each picture.
            seeds: one number for each picture.
            settings: None = the defaults.
            init_image: where all pictures start from, at `settings.strength`; resized to the size.
            mask: white where the initial image is replaced; resized to the size.
            callback: told of every step.

        Raises: ConfigError that names the setting.
        """
        settings = self.sized(settings or self.settings_type(), init_image)
        clean = keep = None
        if init_image is not None:
            clean = self.encode_image(init_image, settings)
        if mask is not None:
            keep = self.encode_mask(mask, settings)
        latents = self.sample(prompts, seeds, settings, clean=clean, mask=keep, callback=callback)
        pictures = self.decode(latents)
        for picture, prompt, seed in zip(pictures, prompts, seeds, strict=True):
            add_settings(picture, {"prompt": prompt, "seed": seed, **self.describe(settings)})
        return pictures

    def sized(self, settings: Settings, image: Image.Image | None = None) -> Settings:
        """Return the settings with size and shift: their own, else the image's (rounded down) or the model's.

        Raises: ConfigError if a side is no multiple of the latent cell.
        """
        cell = self.vae.spec.downscale
        default = self.default_size
        if image is not None:
            default = (max(image.width // cell, 1) * cell, max(image.height // cell, 1) * cell)
        width, height = settings.width or default[0], settings.height or default[1]
        for name, side in (("width", width), ("height", height)):
            if side < cell or side % cell:
                low, high = max(side // cell, 1) * cell, (max(side // cell, 1) + 1) * cell
                raise ConfigError(
                    f"{name} must be a multiple of {cell}, got {side}; nearest are {low} and {high}"
                )
        shift = self.default_shift(width, height) if settings.shift is None else settings.shift
        return replace(settings, width=width, height=height, shift=shift)

    @torch.inference_mode()
    def encode_image(self, image: Image.Image, settings: Settings) -> Tensor:
        """Return the model-space latents `1 c h w` of a picture, resized to the settings' size."""
        width, height = self._size(settings)
        return self.vae.encode(image_to_tensor(image, width, height))

    def encode_mask(self, mask: Image.Image, settings: Settings) -> Tensor:
        """Return the mask on the latent grid, `1 1 h w` in [0, 1], 1 = generate."""
        width, height = self._size(settings)
        cell = self.vae.spec.downscale
        return mask_to_tensor(mask, width // cell, height // cell)

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings,
        *,
        clean: Tensor | None = None,
        mask: Tensor | None = None,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Return model-space latents `b c h w`, float32, for each prompt and seed.

        Args:
            prompts: one text for each picture.
            seeds: one number for each picture; its CPU generator draws the noise, so that all devices start
                from the same.
            settings: size and sampling.
            clean: latents of the initial image, `1 c h w` or `b c h w`.
            mask: `1 1 h w` or `b 1 h w`, 1 = generate; needs `clean`.
            callback: told of every step.

        Raises: ConfigError that names the setting.
        """
        check_request(prompts, seeds, settings, has_clean=clean is not None, has_mask=mask is not None)
        velocity = self.guided_velocity(prompts, settings)
        return self.integrate(velocity, seeds, settings, clean=clean, mask=mask, callback=callback)

    @torch.inference_mode()
    def integrate(
        self,
        velocity: VelocityFn,
        seeds: Sequence[int],
        settings: Settings,
        *,
        clean: Tensor | None = None,
        mask: Tensor | None = None,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Return the latents `b c h w` to which a velocity leads from the noise of the seeds, as `sample`."""
        settings = self.sized(settings)
        width, height = self._size(settings)
        cell = self.vae.spec.downscale
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        shape = (self.vae.spec.channels, height // cell, width // cell)
        noise = draw_noise(generators, shape).to(self.device)
        sigmas = settings.sigmas()
        start = noise
        if clean is not None:
            clean = clean.to(noise).expand_as(noise)
            start = noise_to_strength(clean, noise, sigmas)
        if clean is not None and mask is not None:
            mask = mask.to(noise)
            velocity = masked_velocity(velocity, mask, clean, noise)
        latents = settings.solve()(velocity, start, sigmas, callback=callback, noise=step_noise(generators))
        return latents if mask is None or clean is None else restore_kept(latents, mask, clean)

    def guided_velocity(self, prompts: Sequence[str], settings: Settings) -> VelocityFn:
        """Return the velocity under guidance for a batch of prompts; both predictions come from one call."""
        conditional = self.condition(prompts, settings)
        unconditional = self.condition([settings.negative_prompt] * len(prompts), settings)
        if not settings.negative_prompt:
            unconditional = self.model.architecture.null_text(unconditional)
        both = cat([conditional, unconditional])

        def pair(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            first, second = self.velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
            return first, second

        return guided_pair(
            pair,
            lambda x, sigma: self.velocity(x, sigma, conditional),
            settings.cfg_scale,
            interval=None if settings.cfg_interval == (0.0, 1.0) else settings.cfg_interval,
            combine=settings.guidance_rule(),
        )

    def condition(self, prompts: Sequence[str], settings: Settings) -> Conditioning:
        """Return the conditioning of prompts, with what the architecture wants to know of the size."""
        width, height = self._size(settings)
        architecture, config = self.model.architecture, self.model.config
        text = self.text_encoder.encode(prompts, self.text_mode).cut(architecture.text_shape(config).length)
        extras = architecture.size_extras(config, width, height)
        grown = {name: part.expand(len(prompts), *part.shape[1:]) for name, part in extras.items()}
        return replace(text, extras={**text.extras, **grown}).to(self.device)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the model's velocity `b c h w`, float32, of latents `b c h w` at levels `b`."""
        runtime = Runtime(attention=find_attention(self.attention))
        return self.model.architecture.velocity(
            self.model.model.forward, latents, sigma, conditioning, dtype=self.dtype, runtime=runtime
        )

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Return the pictures of model-space latents `b c h w`, decoded one by one to save memory."""
        return [tensor_to_images(self.vae.decode(one[None]))[0] for one in latents]

    @property
    def device(self) -> torch.device:
        """Where the diffusion model is."""
        return next(self.model.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the diffusion model's matrices compute in: half precision if any of its weights is."""
        dtypes = {p.dtype for p in self.model.model.parameters() if p.is_floating_point()}
        return min(dtypes, key=lambda dtype: dtype.itemsize)

    def describe(self, settings: Settings) -> dict[str, Any]:
        """Return everything but prompt and seed that decides a picture, as JSON-like values."""
        return {
            "flowcore": __version__,
            **self.sources,
            "text_mode": self.text_mode,
            "tile": None if self.vae.tiling == Tiling() else self.vae.tiling.side,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "attention": self.attention,
            **asdict(settings),
        }

    def _size(self, settings: Settings) -> tuple[int, int]:
        """Return width and height in pixels, checked."""
        return whole_size(self.sized(settings))


def generate(  # noqa: PLR0913 - the one call that spells out every setting
    prompt: str,
    *,
    negative_prompt: str = "",
    model: Source | Pipeline = DEFAULT_MODEL,
    vae: Source | None = None,
    text_encoder: Source | Sequence[Source] | None = None,
    width: int | None = None,
    height: int | None = None,
    num_steps: int = 20,
    cfg_scale: float = 2.0,
    seed: int = 0,
    solver: str = "euler",
    shift: float | None = None,
    init_image: Image.Image | None = None,
    strength: float = 1.0,
    mask: Image.Image | None = None,
    callback: StepCallback | None = None,
) -> Image.Image:
    """Return the picture of a prompt; the same arguments give the same pixels on the same machine.

    Args:
        prompt: what to show.
        negative_prompt: what guidance leads away from.
        model: a bundled name, a file, or a pipeline (which saves loading again and has its parts).
        vae: None = what the model file names.
        text_encoder: one or several, as `load_text_encoder` takes them; None = what the model file names.
        width: pixels; None = the initial image's, else the model's own.
        height: as width.
        num_steps: steps of the solver.
        cfg_scale: strength of classifier-free guidance; 1 = none.
        seed: start of the noise, drawn on the CPU.
        solver: a name of `flowcore.flow.SOLVERS`.
        shift: above 1 spends more steps at high noise; None = the model's own.
        init_image: where to start from.
        strength: in (0, 1]; how far the initial image is taken back to noise.
        mask: white where the initial image is replaced.
        callback: told of every step.

    Raises: ConfigError or CheckpointError, on one line, naming argument or file and the remedy.
    """
    settings = Settings(
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        num_steps=num_steps,
        cfg_scale=cfg_scale,
        solver=solver,
        shift=shift,
        strength=strength,
    )
    pipeline = (
        model
        if isinstance(model, Pipeline)
        else Pipeline.from_files(model, vae=vae, text_encoder=text_encoder)
    )
    return pipeline.generate([prompt], [seed], settings, init_image=init_image, mask=mask, callback=callback)[
        0
    ]
