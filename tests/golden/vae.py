"""Golden cases of KL autoencoders; weights stored in float16 are exact, everything computes in float32."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flowcore.vae.autoencoder import build_autoencoder
from flowcore.vae.config import infer_config, latent_grid
from flowcore.vae.keys import to_diffusers
from flowcore.vae.latent_spec import LatentSpec, scaled_spec
from flowcore.weights.strict import assign_strict
from tests.golden.compare import Case, Metadata, Options, Tensors, part, stored_config


def cases(tensors: Tensors, metadata: Metadata, _options: Options) -> Iterator[Case]:
    """Moments, latents, decoded and re-decoded images of FLUX.1 and FLUX.2; images are not clamped."""
    config = stored_config(metadata)
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in to_diffusers(part(tensors, "weight.")).items()
    }
    inferred = infer_config(state, source="weights")
    module = build_autoencoder(inferred, device="meta").eval()
    assign_strict(module, state, source="weights", what="AutoencoderKL")
    spec = stored_spec(config)
    if latent_grid(inferred) != spec.grid:
        raise LookupError(f"the weights make {latent_grid(inferred)}, the config says {spec.grid}")
    if config.get("bn_eps", inferred.get("batch_norm_eps")) != inferred.get("batch_norm_eps"):
        raise LookupError(f"bn_eps must be {inferred.get('batch_norm_eps')}, got {config.get('bn_eps')}")
    moments: list[Tensor] = []
    first = module.encoder if module.quant_conv is None else module.quant_conv
    first.register_forward_hook(lambda _layer, _inputs, output: moments.append(output))
    with torch.no_grad():
        latents = spec.to_model(module.encode(tensors["input.image"]).latent_dist.mode())
        computed = {
            "moments": moments[0],
            "latent": latents,
            "decoded": module.decode(spec.from_model(tensors["input.latent"])).sample,
            "roundtrip": module.decode(spec.from_model(latents)).sample,
        }
    for name, expected in part(tensors, "output.").items():
        yield Case(f"output.{name}", computed[name], expected)


def stored_spec(config: dict[str, Any]) -> LatentSpec:
    """The latent space that a golden file's config states."""
    levels, channels = len(config["ch_mult"]), config["z_channels"]
    if config["kind"] == "flux1":
        return scaled_spec(
            "golden",
            channels=channels,
            scale=config["scale_factor"],
            shift=config["shift_factor"],
            downscale=2 ** (levels - 1),
        )
    if config["kind"] != "flux2":
        raise LookupError(f"no autoencoder here is of kind {config['kind']}")
    rows, columns = config["patch"]
    return scaled_spec(
        "golden",
        channels=channels * rows * columns,
        scale=1.0,
        downscale=2 ** (levels - 1) * rows,
        patch=columns,
    )
