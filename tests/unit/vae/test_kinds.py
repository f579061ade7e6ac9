"""Every autoencoder is known by its tensors, in every layout and place, and every other file is named."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from flowcore.errors import CheckpointError, ConfigError
from flowcore.inspection import describe_file
from flowcore.models import flux
from flowcore.vae.autoencoder import Autoencoder, build_autoencoder, load_vae, save_autoencoder
from flowcore.vae.files import read_vae
from flowcore.vae.keys import to_diffusers
from flowcore.vae.latent_spec import LATENT_SPECS, scaled_spec

GOLDEN = Path(__file__).parents[2] / "golden" / "vae"
KINDS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
SMALL = {"block_out_channels": [32] * 4, "norm_num_groups": 32, "layers_per_block": 1, **KINDS}
QUANT = {"use_quant_conv": True, "use_post_quant_conv": True}
PLAIN = {"use_quant_conv": False, "use_post_quant_conv": False}
CONFIGS = {
    "sd15": {**SMALL, **QUANT, "latent_channels": 4},
    "sdxl": {**SMALL, **QUANT, "latent_channels": 4},
    "flux1": {**SMALL, **PLAIN, "latent_channels": 16},
    "flux2": {**SMALL, **QUANT, "latent_channels": 32, "batch_norm_eps": 1e-4},
}
BESIDE = {
    "sd15": "cond_stage_model.transformer.text_model.embeddings.position_ids",
    "sdxl": "conditioner.embedders.1.model.positional_embedding",
    "flux1": "model.diffusion_model.double_blocks.0.img_attn.qkv.bias",
    "flux2": "model.diffusion_model.double_stream_modulation_img.lin.weight",
}


def build(kind: str) -> AutoencoderKL:
    """A small autoencoder of the kind; FLUX.2's has statistics that count."""
    torch.manual_seed(3)
    module = build_autoencoder(CONFIGS[kind])
    if kind == "flux2":
        module.bn.running_mean.normal_()
        module.bn.running_var.uniform_(0.5, 2.0)
    return module.eval()


def to_bfl(state: dict[str, Tensor], *, is_flux2: bool) -> dict[str, Tensor]:
    """The tensors under the original names: the inverse of `to_diffusers`, found by trying every name."""
    levels = range(4)
    pairs = [
        (f"encoder.down.{i}.block.{j}.", f"encoder.down_blocks.{i}.resnets.{j}.")
        for i in levels
        for j in levels
    ]
    pairs += [(f"encoder.down.{i}.downsample.", f"encoder.down_blocks.{i}.downsamplers.0.") for i in levels]
    pairs += [
        (f"decoder.up.{3 - i}.block.{j}.", f"decoder.up_blocks.{i}.resnets.{j}.")
        for i in levels
        for j in levels
    ]
    pairs += [(f"decoder.up.{3 - i}.upsample.", f"decoder.up_blocks.{i}.upsamplers.0.") for i in levels]
    pairs += [("mid.block_1.", "mid_block.resnets.0."), ("mid.block_2.", "mid_block.resnets.1.")]
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    pairs += [(f"mid.attn_1.{bfl}.", f"mid_block.attentions.0.{name}.") for bfl, name in attention.items()]
    pairs += [("nin_shortcut.", "conv_shortcut."), ("norm_out.", "conv_norm_out.")]
    result = {}
    for name, tensor in state.items():
        new = name
        for bfl, diffusers in pairs:
            new = new.replace(diffusers, bfl)
        if is_flux2 and "quant_conv" in name:
            new = f"{'decoder' if 'post' in name else 'encoder'}.{name}"
        is_kernel = ".attentions.0.to_" in name and name.endswith("weight")
        result[new] = tensor[:, :, None, None] if is_kernel else tensor
    return result


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_layout_gives_the_network_and_a_checkpoint_tells_the_space(
    kind: str, layout: str, tmp_path: Path
) -> None:
    module = build(kind)
    state = module.state_dict()
    if layout == "bfl":
        state = to_bfl(state, is_flux2=kind == "flux2")
        assert any(".down.0.block." in name for name in state)
    prefix = "first_stage_model." if layout == "bfl" else "vae."
    inside = {prefix + name: tensor.contiguous() for name, tensor in state.items()}
    save_file({**inside, BESIDE[kind]: torch.zeros(1)}, tmp_path / "whole.safetensors")
    vae = load_vae(tmp_path / "whole.safetensors")
    assert vae.spec is LATENT_SPECS[kind]
    images = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = Autoencoder(module, LATENT_SPECS[kind])
    latents = vae.encode(images)
    cells = 16 if kind == "flux2" else 8
    assert latents.shape == (1, vae.spec.channels, 32 // cells, 48 // cells)
    assert torch.equal(latents, expected.encode(images))
    assert torch.equal(vae.decode(latents), expected.decode(latents))


def test_a_file_alone_fits_several_spaces_or_one(tmp_path: Path) -> None:
    fitting = {
        "sd15": ("sd15", "sdxl", "eq-sdxl"),
        "flux1": ("sd3", "flux1", "flux1-unshifted"),
        "flux2": ("flux2",),
    }
    for kind, spaces in fitting.items():
        save_file(build(kind).state_dict(), tmp_path / f"{kind}.safetensors")
        found = read_vae(tmp_path / f"{kind}.safetensors")
        assert found.fitting == spaces
        assert found.spec is (LATENT_SPECS["flux2"] if kind == "flux2" else None)
        described = describe_file(tmp_path / f"{kind}.safetensors")
        assert (described["kind"], described["latent_spaces"]) == ("vae", list(spaces))


def test_what_training_left_beside_is_not_read(tmp_path: Path) -> None:
    left = {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    save_file({**build("sd15").state_dict(), **left}, tmp_path / "a.safetensors")
    assert load_vae(tmp_path / "a.safetensors", spec="sd15").spec.name == "sd15"


def test_packed_posterior_is_the_normal_distribution_of_packed_samples() -> None:
    """Statistics of many samples of the raw posterior, packed and normalised by hand."""
    module = build("flux2").double()
    images = torch.rand(1, 3, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found = module.encode(images).latent_dist
    raw = AutoencoderKL.encode(module, images).latent_dist
    for part, expected in ((found.mean, raw.mean), (found.std, raw.std)):
        packed = torch.stack([expected[0, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=1).flatten(
            0, 1
        )
        center = module.bn.running_mean if part is found.mean else torch.zeros_like(module.bn.running_mean)
        spread = (module.bn.running_var + 1e-4).sqrt()
        assert_close(part[0], (packed - center[:, None, None]) / spread[:, None, None])


def test_flux2_goes_through_a_file_and_half_precision(tmp_path: Path) -> None:
    vae = Autoencoder(build("flux2"), LATENT_SPECS["flux2"])
    save_autoencoder(tmp_path / "a.safetensors", vae.module, vae.spec)
    loaded = load_vae(tmp_path / "a.safetensors")
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = vae.encode(images)
    assert loaded.spec is LATENT_SPECS["flux2"]
    assert torch.equal(loaded.encode(images), latents)
    half = loaded.to(dtype=torch.bfloat16)
    assert half.dtype is torch.bfloat16
    assert half.module.bn.running_var.dtype is torch.float32
    spread = float(latents.std())
    assert float((half.encode(images) - latents).abs().max()) < 0.1 * spread
    assert float((half.decode(latents) - vae.decode(latents)).abs().max()) < 0.1


def test_settings_of_flux2s_class_are_read_and_others_named(tmp_path: Path) -> None:
    save_file(build("flux2").state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    own = {name: value for name, value in CONFIGS["flux2"].items() if name != "batch_norm_eps"}
    config = {"_class_name": "AutoencoderKLFlux2", **own, "patch_size": [2, 2], "batch_norm_momentum": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_vae(tmp_path).spec is LATENT_SPECS["flux2"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "patch_size": [4, 4]}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"patch_size in .* must be \[2, 2\], got \[4, 4\]"):
        load_vae(tmp_path)


def test_the_convention_of_a_model_wins_over_that_of_the_same_autoencoder(tmp_path: Path) -> None:
    """A diffusers folder states the shift of FLUX.1, without which some models were trained."""
    config = {**CONFIGS["flux1"], "scaling_factor": 0.3611, "shift_factor": 0.1159}
    save_file(build("flux1").state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_vae(tmp_path).spec is LATENT_SPECS["flux1"]
    assert load_vae(tmp_path, spec="flux1-unshifted").spec is LATENT_SPECS["flux1-unshifted"]
    assert load_vae(tmp_path, spec="sd3").spec is LATENT_SPECS["flux1"]


def test_a_space_of_other_cells_is_refused(tmp_path: Path) -> None:
    save_file(build("flux1").state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(
        ConfigError, match=r"flux2 .128 channels, 1/16. must fit its autoencoder, got 16 channels, 1/8"
    ):
        load_vae(tmp_path / "a.safetensors", spec="flux2")
    packed = scaled_spec("mine", channels=64, scale=1.0, downscale=16, patch=2)
    with pytest.raises(ConfigError, match=r"mine .64 channels, 1/16. must fit"):
        load_vae(tmp_path / "a.safetensors", spec=packed)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (
            list(flux.Flux(flux.PRESETS["tiny"], device="meta").state_dict()),
            "a flux model",
        ),
        (["taesd_decoder.1.weight"], r"a preview autoencoder \(TAESD\)"),
        (["decoder.layers.0.weight", "encoder.layers.0.weight"], r"a preview autoencoder \(TAESD\)"),
        (["encoder.conv1.weight", "decoder.middle.0.residual.0.gamma"], "a video autoencoder"),
        (["encoder.stages.0.op_list.0.main.conv1.weight"], "a DC autoencoder"),
        (["model.embed_tokens.weight"], "a text encoder"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"], "a text encoder"),
        (["text_model.embeddings.token_embedding.weight"], "a text encoder"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a UNet"),
        (["joint_blocks.0.x_block.attn.qkv.weight"], "another diffusion transformer"),
        (["lora_unet_x.lora_up.weight"], "a LoRA"),
    ],
)
def test_other_files_are_named_by_what_they_are(names: list[str], kind: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"^a\.safetensors must hold a KL .*, got {kind} \(\d+ tensors"
    ):
        load_vae(tmp_path / "a.safetensors")


def test_the_golden_file_of_flux2_loads_as_users_files_do(tmp_path: Path) -> None:
    golden = load_file(GOLDEN / "flux2_mini.safetensors")
    weights = {name[7:]: tensor for name, tensor in golden.items() if name.startswith("weight.")}
    save_file(weights, tmp_path / "a.safetensors")
    spec = scaled_spec("mini", channels=16, scale=1.0, downscale=4, patch=2)
    vae = load_vae(tmp_path / "a.safetensors", spec=spec)
    assert_close(vae.encode(golden["input.image"]), golden["output.latent"], atol=2e-5, rtol=0)
    expected = golden["output.decoded"].clamp(-1, 1)
    assert_close(vae.decode(golden["input.latent"]), expected, atol=2e-5, rtol=0)
    assert set(to_diffusers(weights)) == set(vae.module.state_dict())
