"""Prompt and picture to picture with Exo: the trunk reads them once, steps refine, masks say what changed."""

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

import torch
from PIL import Image
from torch import Tensor, nn

from ..conditioning import Conditioning
from ..errors import ConfigError, FlowCoreWarning
from ..flow.guidance import guided_pair
from ..flow.masking import restore_kept
from ..flow.path import VelocityFn
from ..flow.schedule import flux2_mu
from ..flow.steps import StepCallback
from ..images import add_settings, image_to_tensor
from ..layers.attention import find_attention
from ..models.exo import Exo, PrefixState, StepResult, join_prefixes
from ..models.exo.config import MAX_ITERATIONS
from ..ops import Runtime
from ..parts import Source, load_model_vae
from ..pipeline import Pipeline
from ..settings import Settings, check_request, whole_size
from ..text.qwen3_vl import END, PromptReader, last_line
from ..vae.tiling import tiling_of
from ..weights.checkpoint import LoadedModel
from .facts import trained_iterations
from .loading import TrunkOptions, give_trunk, vae_source
from .masks import late_level, preserving
from .offload import brought, decoder_layers, streamed
from .prefixes import Recent, digest, prompt_keys, prompt_rows, weights_key
from .settings import ExoSettings
from .trace import ExoInfo, Trace

_TOKEN = 16
"""Pixels on a side of an image token, by whose number the schedule of FLUX.2 goes."""
MOST_SAID = 96
"""Tokens of a rewritten prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """A picture with its settings attached, and what its run left."""

    image: Image.Image
    info: ExoInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class ExoPipeline(Pipeline):
    """An Exo with its autoencoder. Its text encoder is its own trunk, which looks at pictures, too.

    offload: which parts of the trunk lie on the CPU until they are needed. prefixes: what the trunk made of
    the latest prompts. rewritten: what it said of the latest instructions. encoded: what the autoencoder made
    of the latest initial images.
    """

    settings_type: ClassVar[type[Settings]] = ExoSettings
    fallback_side: ClassVar[int] = 1024

    text_encoder: PromptReader
    offload: str = "none"
    prefixes: Recent[PrefixState] = field(default_factory=Recent)
    rewritten: Recent[str] = field(default_factory=Recent)
    encoded: Recent[Tensor] = field(default_factory=Recent)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        trunk: str | Path | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        attn: str = "auto",
    ) -> "ExoPipeline":
        """Return the pipeline of an Exo file; trunk: folder or repository, None = what the file names.

        `from_files` has further options, and says what these are.
        Raises: CheckpointError or ConfigError, naming the file or the argument.
        """
        found = Pipeline.from_files(path, text_encoder=trunk, dtype=dtype, device=device, attention=attn)
        if not isinstance(found, ExoPipeline):
            raise ConfigError(f"{path} must be an Exo file, got a {found.model.architecture.name} model")
        return found

    @property
    def exo(self) -> Exo:
        """The network."""
        return cast("Exo", self.model.model)

    @property
    def dtype(self) -> torch.dtype:
        """What adapters, projector and heads compute in; the trunk may have a dtype of its own."""
        return next(self.exo.adapters.parameters()).dtype

    def sized(self, settings: Settings, image: Image.Image | None = None) -> ExoSettings:
        """Return the settings as Exo's, with size and shift, as `Pipeline.sized`."""
        found = ExoSettings.of(Pipeline.sized(self, ExoSettings.of(settings), image))
        if found.schedule != "flux2":
            return found
        width, height = whole_size(found)
        tokens = (width // _TOKEN) * (height // _TOKEN)
        return replace(found, shift=math.exp(flux2_mu(tokens, found.num_steps)))

    def encode_prompt(
        self, prompts: Sequence[str], images: Tensor | None = None, *, size: tuple[int, int]
    ) -> PrefixState:
        """Return what prompts and pictures amount to for all steps, from the cache where it is there.

        Args:
            prompts: one or more; the empty one leads guidance.
            images: a picture for each prompt, `b 3 y x` in [-1, 1].
            size: height and width in pixels of the pictures to be made.

        Raises: ConfigError for a size that is no multiple of the latent cell.
        """
        cell = self.vae.spec.downscale
        if size[0] % cell or size[1] % cell:
            raise ConfigError(f"height and width must be multiples of {cell}, got {size[0]} and {size[1]}")
        latents = (size[0] // cell, size[1] // cell)
        told = self.text_encoder.read(prompts, images).to(self.device)
        place: Hashable = (weights_key(self.exo), latents, self.dtype)
        keys = [(place, key) for key in prompt_keys(told)]
        parts = self.prefixes.get(keys, partial(self._read, told, latents))
        return join_prefixes(parts, room=MAX_ITERATIONS * self.exo.config.suffix_length)

    def rewrite(self, prompts: Sequence[str], images: Tensor) -> list[str]:
        """Return what pictures show after what each prompt asks of them, in the trunk's own words.

        It may first say other things, a line each, such as what they show now; the last line counts.
        Shapes: images `b 3 y x` in [-1, 1]. An empty prompt asks for nothing and stays, as does one to which
        the trunk has nothing to say.
        Raises: ConfigError for a model that does not rewrite.
        """
        if not self.exo.config.rewrites:
            raise ConfigError(
                f"{self.sources['model']} must be a model that rewrites prompts, got one that does not"
            )
        told = self.text_encoder.read(prompts, images).to(self.device)
        keys = [(weights_key(self.exo), key) for key in prompt_keys(told)]
        said = self.rewritten.get(keys, partial(self._answers, told))
        return [text if prompt and text else prompt for prompt, text in zip(prompts, said, strict=True)]

    def step(self, z: Tensor, t: Tensor, prefix: PrefixState, *, iters: int = 4) -> StepResult:
        """Return velocity, estimates and edits of noised latents `b c h w` at times `b`, 1 = noise.

        The latents are cast to what the model computes in. Raises: as `Exo.step`.
        """
        return self.exo.step(
            z.to(self.device, self.dtype), t.to(self.device), prefix, iterations=iters, runtime=self.runtime
        )

    @property
    def runtime(self) -> Runtime:
        """How the blocks are computed."""
        attention = find_attention(self.attention)
        if self.offload != "layers":
            return Runtime(attention=attention)
        return Runtime(attention=attention, run_block=streamed(decoder_layers(self._trunk), self.device))

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
        """Return the pictures of `refine`, all from one initial image, as `Pipeline.generate`."""
        images = None if init_image is None else [init_image] * len(prompts)
        made = self.refine(prompts, seeds, settings, init_images=images, mask=mask, callback=callback)
        return [one.image for one in made]

    def refine(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: Settings | None = None,
        *,
        init_images: Sequence[Image.Image] | None = None,
        mask: Image.Image | None = None,
        callback: StepCallback | None = None,
    ) -> list[Refined]:
        """Return a picture and the masks of its edits for each prompt and seed.

        Args:
            prompts: one text for each picture.
            seeds: one number for each picture.
            settings: None = the defaults.
            init_images: one for each picture, resized to one size: the trunk looks at it, and with a strength
                below 1 the run starts from it.
            mask: white where the initial images are replaced; resized to the size.
            callback: told of every step.

        Warns of more iterations than the model was trained with.
        Raises: ConfigError that names the setting.
        """
        first = init_images[0] if init_images else None
        sized = self.sized(settings or self.settings_type(), first)
        check_request(prompts, seeds, sized, has_clean=init_images is not None, has_mask=mask is not None)
        if init_images is not None and len(init_images) != len(prompts):
            raise ConfigError(
                f"initial images must be one for each of {len(prompts)} prompts, got {len(init_images)}"
            )
        if sized.preserve and init_images is None:
            raise ConfigError(
                f"preserve must be 0 without an initial image, got {sized.preserve}; pass init_image (--init)"
            )
        self._warn_of_iterations(sized.iterations)
        trace = Trace(self.device)
        pictures, drawn = None, list(prompts)
        if init_images is not None:
            pictures = torch.cat([image_to_tensor(image, *whole_size(sized)) for image in init_images])
            if sized.rewrite and self.exo.config.rewrites:
                with trace.timed("rewrite prompt"):
                    drawn = self.rewrite(prompts, pictures)
        keep = None if mask is None else self.encode_mask(mask, sized)
        latents = self.sample_refined(
            drawn, seeds, sized, trace=trace, pictures=pictures, mask=keep, callback=callback
        )
        with trace.timed("decode"):
            images = self.decode(latents)
        rows, columns = latents.shape[-2:]
        infos = trace.infos((rows, columns), self.vae.spec.downscale, seeds, drawn)
        for image, prompt, seed, info in zip(images, prompts, seeds, infos, strict=True):
            said = None if info.prompt == prompt else info.prompt
            add_settings(image, {"prompt": prompt, "rewritten": said, "seed": seed, **self.describe(sized)})
        return [Refined(image=image, info=info) for image, info in zip(images, infos, strict=True)]

    def _warn_of_iterations(self, iterations: int) -> None:
        source = Path(str(self.sources["model"])).name
        most = trained_iterations(self.model.metadata, source)[1]
        if iterations > most:
            warnings.warn(
                f"iterations should be at most {most}, as in the training of {source}, got {iterations}; "
                "pictures and masks get worse beyond",
                FlowCoreWarning,
                stacklevel=3,
            )

    @torch.inference_mode()
    def sample_refined(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: ExoSettings,
        *,
        trace: Trace,
        pictures: Tensor | None = None,
        mask: Tensor | None = None,
        callback: StepCallback | None = None,
    ) -> Tensor:
        """Return model-space latents `b c h w`, float32, and leave masks and timings in the trace.

        pictures: initial images `b 3 y x` in [-1, 1], of the size of the settings; mask: `1 1 h w` or `b 1 h
        w`, 1 = generate. The rest is as in `refine`, where arguments are checked.
        """
        clean = None
        if pictures is not None and (settings.strength < 1 or settings.preserve or mask is not None):
            with trace.timed("encode image"):
                clean = self._encoded(pictures)
        with trace.timed("read prompt"):
            velocity = self.guided_velocity(prompts, settings, pictures=pictures, trace=trace)
        width, height = whole_size(settings)
        cell = self.vae.spec.downscale
        last = partial(trace.last_stretched, (height // cell, width // cell))
        if clean is not None and settings.preserve:
            start = late_level(settings.sigmas()[:-1].tolist())
            velocity = preserving(velocity, last, clean, settings.preserve, start)
        with trace.timed("steps"):
            latents = self.integrate(velocity, seeds, settings, clean=clean, mask=mask, callback=callback)
        if clean is None or settings.preserve != 1:
            return latents
        return restore_kept(latents, last(), clean)

    def guided_velocity(
        self,
        prompts: Sequence[str],
        settings: Settings,
        *,
        pictures: Tensor | None = None,
        trace: Trace | None = None,
    ) -> VelocityFn:
        """Return the velocity under guidance for a batch of prompts; both branches are one batch of steps.

        The branch without the prompt has the same pictures. Masks of the other one go to the trace.
        """
        chosen, count = self.sized(settings), len(prompts)
        texts = list(prompts)
        if chosen.cfg_scale != 1:
            texts += [chosen.negative_prompt] * count
        images = None if pictures is None else pictures.repeat(len(texts) // count, 1, 1, 1)
        both = self.encode_prompt(texts, images, size=whole_size(chosen)[::-1])
        conditional = both.rows(0, count)

        def velocity(x: Tensor, sigma: Tensor, prefix: PrefixState) -> Tensor:
            result = self.step(x, sigma, prefix, iters=chosen.iterations)
            if trace is not None:
                trace.record(result, count)
            return result.velocity.to(x.dtype)

        def pair(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            first, second = velocity(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
            return first, second

        return guided_pair(
            pair,
            lambda x, sigma: velocity(x, sigma, conditional),
            chosen.cfg_scale,
            interval=None if chosen.cfg_interval == (0.0, 1.0) else chosen.cfg_interval,
            combine=chosen.guidance_rule(),
        )

    @torch.inference_mode()
    def _encoded(self, pictures: Tensor) -> Tensor:
        """Return the latents of pictures, each encoded alone: its bits are the same in any batch."""
        place: Hashable = (weights_key(self.vae.module), self.vae.tiling, tuple(pictures.shape[1:]))
        keys = [(place, digest(picture)) for picture in pictures]
        made = self.encoded.get(keys, lambda rows: [self.vae.encode(pictures[row : row + 1]) for row in rows])
        return torch.cat(made).to(self.device)

    @torch.inference_mode()
    def _read(self, told: Conditioning, size: tuple[int, int], rows: list[int]) -> list[PrefixState]:
        """Return the states of some of the prompts, one sample each."""
        ids, mask, extras = prompt_rows(told, rows)
        with self._seeing(extras):
            state = self.exo.encode(ids, mask, size=size, dtype=self.dtype, runtime=self.runtime, **extras)
            return state.split()

    @torch.inference_mode()
    def _answers(self, told: Conditioning, rows: list[int]) -> list[str]:
        """Return what the trunk's answers to some of the prompts come to."""
        (ids, mask, extras), reader = prompt_rows(told, rows), self.text_encoder.tokenizer
        with self._seeing(extras):
            said = self.exo.answer(
                ids, mask, end=reader.ids(END)[0], most=MOST_SAID, runtime=self.runtime, **extras
            )
        return [last_line(reader.text(row)) for row in said]

    def _seeing(self, extras: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Have the vision tower on the device if there are pictures to look at."""
        away = self.offload != "none" and bool(extras)
        return brought(self._trunk.get_submodule("visual"), self.device) if away else nullcontext()

    @property
    def _trunk(self) -> nn.Module:
        assert self.exo.trunk is not None  # `from_loaded` gives one
        return self.exo.trunk


def from_loaded(
    loaded: LoadedModel,
    name: Source,
    path: Path,
    *,
    vae: Source | None,
    trunk: Source | Sequence[Source] | None,
    options: TrunkOptions | None,
    attention: str,
    tile: int | None,
) -> ExoPipeline:
    """Return the pipeline of a model that has been read from a path; the rest is as in `Pipeline.from_files`.

    Raises: CheckpointError or ConfigError, naming the file or the argument.
    """
    folders = [trunk] if trunk is None or isinstance(trunk, str | Path) else list(trunk)
    if len(folders) != 1:
        raise ConfigError(
            f"the text encoder of an exo model must be its trunk alone, got {len(folders)} sources"
        )
    folder = folders[0]
    device = next(loaded.model.parameters()).device
    dtype = next(loaded.model.parameters()).dtype
    chosen = options or TrunkOptions()
    chosen.check(device)
    autoencoder = vae_source(vae, loaded.metadata, path, may_download=chosen.may_download)
    reader = give_trunk(loaded, path, trunk=folder, options=chosen, device=device, dtype=dtype)
    sources = {"model": str(name), "vae": autoencoder}
    if chosen.dtype != "auto":
        sources["trunk_dtype"] = chosen.dtype
    return ExoPipeline(
        model=loaded,
        text_encoder=reader,
        vae=load_model_vae(autoencoder, loaded, path.name, device, tiling_of(tile)),
        attention=attention,
        offload=chosen.offload,
        sources=sources if folder is None else {**sources, "text_encoder": str(folder)},
    )
