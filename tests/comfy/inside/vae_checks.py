"""Checks of the VAE loader: SD1.5, SDXL, FLUX.1 and FLUX.2 in both layouts, under the stock VAE nodes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.sd
import comfy.utils
import torch
from context import Context
from fake_gpu import BUDGETS, GPU, on_fake_gpu
from safetensors.torch import save_file

import nodes as stock

KINDS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
QUANT = {"use_quant_conv": True, "use_post_quant_conv": True}
PLAIN = {"use_quant_conv": False, "use_post_quant_conv": False}
# Name -> settings beside the common ones, channels of a latent, pixels a side of a latent cell.
VAES: dict[str, tuple[dict[str, Any], int, int]] = {
    "sd15": ({**QUANT, "latent_channels": 4}, 4, 8),
    "sdxl": ({**QUANT, "latent_channels": 4}, 4, 8),
    "flux1": ({**PLAIN, "latent_channels": 16}, 16, 8),
    "flux2": ({**QUANT, "latent_channels": 32, "batch_norm_eps": 1e-4}, 128, 16),
}
TOLERANCE = 1e-4


def write(context: Context, kind: str) -> Path:
    """A small autoencoder of the kind in ComfyUI's folder, without metadata, as published files are."""
    torch.manual_seed(5)
    settings = {**KINDS, "block_out_channels": [32] * 4, "layers_per_block": 1, **VAES[kind][0]}
    with torch.inference_mode(False):
        module = context.part("flowcore.vae.autoencoder").build_autoencoder(settings)
        if kind == "flux2":
            module.bn.running_mean.normal_()
            module.bn.running_var.uniform_(0.5, 2.0)
        path = context.models / "vae" / f"small-{kind}.safetensors"
        save_file(module.state_dict(), path)
    return path


def loaded(context: Context) -> Iterator[tuple[str, Any, Any]]:
    """Every kind, as the loader node gives it and in plain Python; for inference mode, in which nodes run."""
    node = context.part("nodes.loaders").LoadVAE
    for kind in VAES:
        path = write(context, kind)
        plain = context.part("flowcore.vae.autoencoder").load_vae(path, spec=kind)
        yield kind, node.execute(vae_name=path.name).args[0], plain
        path.unlink()


@torch.inference_mode()
def every_kind_of_vae_serves_the_stock_nodes(context: Context) -> None:
    for kind, vae, plain in loaded(context):
        _, channels, cell = VAES[kind]
        pixels = torch.rand(2, 70, 97, 3, generator=torch.Generator().manual_seed(0))
        rows, columns = 70 // cell, 97 // cell
        top, left = (70 - rows * cell) // 2, (97 - columns * cell) // 2
        inner = pixels[:, top : top + rows * cell, left : left + columns * cell]
        (latent,) = stock.VAEEncode().encode(vae, pixels)
        assert latent["samples"].shape == (2, channels, rows, columns), kind
        expected = plain.spec.from_model(plain.encode(inner.movedim(-1, 1) * 2 - 1))
        assert torch.allclose(latent["samples"], expected, atol=TOLERANCE), kind
        (decoded,) = stock.VAEDecode().decode(vae, latent)
        back = plain.decode(plain.spec.to_model(latent["samples"])).movedim(1, -1)
        assert decoded.shape == inner.shape
        assert torch.allclose(decoded, (back + 1) / 2, atol=TOLERANCE), kind
        assert vae.spacial_compression_decode() == vae.spacial_compression_encode() == cell


@torch.inference_mode()
def every_kind_of_vae_serves_the_stock_nodes_in_tiles(context: Context) -> None:
    for kind, vae, _ in loaded(context):
        _, channels, cell = VAES[kind]
        pixels = torch.rand(1, 128, 96, 3, generator=torch.Generator().manual_seed(0))
        (latent,) = stock.VAEEncodeTiled().encode(vae, pixels, tile_size=64, overlap=16)
        assert latent["samples"].shape == (1, channels, 128 // cell, 96 // cell), kind
        (decoded,) = stock.VAEDecodeTiled().decode(vae, latent, tile_size=64, overlap=16)
        assert decoded.shape == pixels.shape, kind
        (whole,) = stock.VAEDecodeTiled().decode(vae, latent, tile_size=512)
        assert torch.allclose(whole, stock.VAEDecode().decode(vae, latent)[0], atol=TOLERANCE), kind
        assert not torch.equal(whole, decoded)


@torch.inference_mode()
def vaes_that_comfyui_knows_equal_its_own(context: Context) -> None:
    """FLUX.2 is among them in later versions; 0.3.64 takes its file for one of videos."""
    for kind, vae, _ in loaded(context):
        settings = {
            "double_z": True, "z_channels": VAES[kind][0]["latent_channels"], "resolution": 256,
            "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1,
            "attn_resolutions": [], "dropout": 0.0,
        }  # fmt: skip
        if kind == "flux2":
            settings["batch_norm_latent"] = True
        if kind == "flux1" or (kind == "flux2" and not hasattr(comfy.latent_formats, "Flux2")):
            continue  # stock's builder of networks by settings always has the layers that FLUX.1 lacks
        state = comfy.utils.load_torch_file(str(context.models / "vae" / f"small-{kind}.safetensors"))
        parameters = {"ddconfig": settings, "embed_dim": settings["z_channels"]}
        own = comfy.sd.VAE(sd=state, config={"params": parameters})
        pixels = torch.rand(1, 64, 48, 3, generator=torch.Generator().manual_seed(0))
        raw = vae.encode(pixels)
        assert torch.allclose(own.encode(pixels), raw, atol=TOLERANCE), kind
        assert torch.allclose(own.decode(raw), vae.decode(raw), atol=TOLERANCE), kind


def vaes_on_fake_gpu(context: Context) -> None:
    for kind, (_, channels, cell) in VAES.items():
        path = write(context, kind)
        for budget in BUDGETS.values():
            for name, shape in (
                ("encode", (1, 3, 64, 64)),
                ("decode", (1, channels, 64 // cell, 64 // cell)),
            ):
                with torch.inference_mode():
                    vae = context.part("nodes.host.vae").load_comfy_vae(path)
                with on_fake_gpu(vae.patcher, budget):
                    result = getattr(vae.first_stage_model, name)(torch.zeros(shape, device=GPU))
                    assert result.device == GPU, kind
        path.unlink()


VAE_CHECKS: tuple[Callable[[Context], None], ...] = (
    every_kind_of_vae_serves_the_stock_nodes,
    every_kind_of_vae_serves_the_stock_nodes_in_tiles,
    vaes_that_comfyui_knows_equal_its_own,
    vaes_on_fake_gpu,
)
