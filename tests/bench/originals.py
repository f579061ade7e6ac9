"""Adapters that build and call the original code of a checkout; nothing of it is imported before that.

An adapter maps this project's configuration to the original's arguments and the project's convention to its
forward. It knows the revision named with it; another one may need other arguments.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from einops import rearrange
from torch import Tensor, nn

from flowcore.conditioning import Conditioning
from flowcore.models.flux.packing import grid_ids, pack

Call: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
"""(module, latents, sigma, conditioning) -> velocity; an original's may lie in another layout."""

Opened: TypeAlias = tuple[Callable[[Any], nn.Module], Call]
"""(configuration -> module, its call)."""


def put_on_path(folder: Path) -> None:
    """Let the packages of a checkout be imported: those in its `src`, or in the folder itself."""
    source = folder / "src"
    sys.path.insert(0, str(source if source.is_dir() else folder))


def hdm(folder: Path) -> Opened:
    """XUT as in KohakuBlueleaf/HDM at de8e1c9, without torch.compile."""
    put_on_path(folder)
    importlib.import_module("xut.env").TORCH_COMPILE = False
    cls = importlib.import_module("xut.xut").XUDiT

    def make(config: Any) -> nn.Module:  # noqa: ANN401
        ours_alone = {"residual", "skip_source", "ln_eps"}
        return cls(**{name: value for name, value in asdict(config).items() if name not in ours_alone})

    return make, lambda module, x, sigma, given: module(x, sigma, given.context)


def tiny_flux(folder: Path) -> Opened:
    """TinyFlux as in AbstractEyes/tiny-flux at 2e3a210."""
    put_on_path(folder)
    original = importlib.import_module("tinyflux.model.model")

    def make(config: Any) -> nn.Module:  # noqa: ANN401
        known = original.TinyFluxConfig.__dataclass_fields__
        values = {name: value for name, value in asdict(config).items() if name in known}
        return original.TinyFluxDeep(original.TinyFluxConfig(**values))

    def call(module: nn.Module, x: Tensor, sigma: Tensor, given: Conditioning) -> Tensor:
        tokens = rearrange(x, "b c h w -> b (h w) c")
        places = grid_ids(*x.shape[-2:], device=x.device)[0].float()
        result: Tensor = module(tokens, given.context, given.pooled, 1 - sigma, places)
        return rearrange(-result, "b (h w) c -> b c h w", h=x.shape[2])

    return make, call


def single_stream(folder: Path) -> Opened:
    """SingleStreamDiT as in Particle1904/SingleStreamDiT_T5Gemma2 at 333d3fa (V3) or 01b01b7 (HEAD)."""
    put_on_path(folder)
    original = importlib.import_module("model")
    cls = getattr(original, "SingleStreamDiTV2", None) or original.SingleStreamDiT

    def make(config: Any) -> nn.Module:  # noqa: ANN401
        names = "in_channels patch_size hidden_size depth num_heads text_embed_dim refiner_depth"
        values = {name: getattr(config, name) for name in [*names.split(), "max_token_length", "dropout"]}
        return cls(gradient_checkpointing=False, **values)

    return make, lambda module, x, sigma, given: -module(x, 1 - sigma, given.context)


class FluxTokens(NamedTuple):
    """Inputs of a Flux in the originals' form."""

    img: Tensor
    img_ids: Tensor
    txt_ids: Tensor


def flux_tokens(x: Tensor, given: Conditioning) -> FluxTokens:
    """Tokens and positions of a grid or of a sequence, in the dtype that the originals expect."""
    assert given.context is not None
    if x.ndim == 3:
        return FluxTokens(rearrange(x, "b c n -> b n c"), given.extras["img_ids"], given.extras["txt_ids"])
    img_ids = grid_ids(x.shape[2] // 2, x.shape[3] // 2, device=x.device).expand(x.shape[0], -1, -1)
    return FluxTokens(pack(x), img_ids, img_ids.new_zeros(*given.context.shape[:2], 3))


def flux_call(forward: str) -> Callable[..., Tensor]:
    """A call of the method that takes tokens, in the order of arguments that three originals share."""

    def call(module: nn.Module, x: Tensor, sigma: Tensor, given: Conditioning) -> Tensor:
        img, img_ids, txt_ids = flux_tokens(x, given)
        guidance = given.extras.get("guidance")
        result: Tensor = getattr(module, forward)(
            img, img_ids, given.context, txt_ids, sigma, given.pooled, guidance
        )
        return rearrange(result, "b n c -> b c n") if x.ndim == 3 else result

    return call


def flux_values(config: Any) -> dict[str, Any]:  # noqa: ANN401
    """The fields of the configuration, which three originals call the same."""
    values = {name: value for name, value in asdict(config).items() if name != "pooled_from_text"}
    return {**values, "axes_dim": list(config.axes_dim)}


def seed_flux(folder: Path) -> Opened:
    """Flux as in Souymodip/flux_core at 3da5567."""
    put_on_path(folder)
    original = importlib.import_module("model")
    return lambda config: original.Flux(original.FluxParams(**flux_values(config))), flux_call("forward")


def bfl(folder: Path) -> Opened:
    """Flux as in black-forest-labs/flux at 802fb47."""
    put_on_path(folder)
    original = importlib.import_module("flux.model")
    return lambda config: original.Flux(original.FluxParams(**flux_values(config))), flux_call("forward")


def diffusers(folder: Path) -> Opened:
    """Flux of diffusers; the folder is a checkout, or the one that holds the installed package."""
    put_on_path(folder)
    cls = importlib.import_module("diffusers").FluxTransformer2DModel

    def make(config: Any) -> nn.Module:  # noqa: ANN401
        return cls(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            num_single_layers=config.depth_single_blocks,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.num_heads,
            joint_attention_dim=config.context_in_dim,
            pooled_projection_dim=config.vec_in_dim,
            guidance_embeds=config.guidance_embed,
            axes_dims_rope=tuple(config.axes_dim),
        )

    def call(module: nn.Module, x: Tensor, sigma: Tensor, given: Conditioning) -> Tensor:
        img, img_ids, txt_ids = flux_tokens(x, given)
        (result,) = module(
            hidden_states=img,
            encoder_hidden_states=given.context,
            pooled_projections=given.pooled,
            timestep=sigma.to(x.dtype),
            img_ids=img_ids[0],
            txt_ids=txt_ids[0],
            guidance=given.extras.get("guidance"),
            return_dict=False,
        )
        return rearrange(result, "b n c -> b c n") if x.ndim == 3 else result

    return make, call


def comfyui(folder: Path) -> Opened:
    """Flux of ComfyUI 0.3.64, with PyTorch's attention, in ComfyUI's interpreter."""
    sys.path.insert(0, str(folder))
    arguments = importlib.import_module("comfy.cli_args").args
    arguments.cpu = not torch.cuda.is_available()
    arguments.use_pytorch_cross_attention = True
    cls = importlib.import_module("comfy.ldm.flux.model").Flux
    operations = importlib.import_module("comfy.ops").disable_weight_init

    def make(config: Any) -> nn.Module:  # noqa: ANN401
        module: nn.Module = cls(
            image_model="flux", patch_size=1, operations=operations, **flux_values(config)
        )
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)  # these layers start with whatever is in memory
        return module

    return make, flux_call("forward_orig")
