"""Golden cases of KL autoencoders; weights stored in float16 are exact, everything computes in float32."""

from collections.abc import Iterator

import torch

from flowcore.vae.autoencoder import build_autoencoder
from flowcore.vae.config import infer_config
from flowcore.vae.keys import to_diffusers
from flowcore.vae.latent_spec import scaled_spec
from flowcore.weights.strict import assign_strict
from tests.golden.compare import Case, Metadata, Options, Tensors, part, stored_config


def cases(tensors: Tensors, metadata: Metadata, _options: Options) -> Iterator[Case]:
    """Moments, latents, decoded and re-decoded images of a FLUX.1 autoencoder; images are not clamped."""
    config = stored_config(metadata)
    if config["kind"] != "flux1":
        raise LookupError(f"no autoencoder here is of kind {config['kind']}")
    spec = scaled_spec(
        "golden",
        channels=config["z_channels"],
        scale=config["scale_factor"],
        shift=config["shift_factor"],
        downscale=2 ** (len(config["ch_mult"]) - 1),
    )
    state = {name: tensor.float() for name, tensor in to_diffusers(part(tensors, "weight.")).items()}
    module = build_autoencoder(infer_config(state, source="weights"), device="meta")
    assign_strict(module, state, source="weights", what="AutoencoderKL")
    with torch.no_grad():
        posterior = module.eval().encode(tensors["input.image"]).latent_dist
        latents = spec.to_model(posterior.mode())
        computed = {
            "moments": posterior.parameters,
            "latent": latents,
            "decoded": module.decode(spec.from_model(tensors["input.latent"])).sample,
            "roundtrip": module.decode(spec.from_model(latents)).sample,
        }
    for name, expected in part(tensors, "output.").items():
        yield Case(f"output.{name}", computed[name], expected)
