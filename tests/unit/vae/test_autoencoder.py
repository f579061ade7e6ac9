"""Autoencoders: published key layouts, the file of this project, latent spaces, and files that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from flowcore.errors import CheckpointError, ConfigError, ShapeError
from flowcore.vae.autoencoder import Autoencoder, build_autoencoder, load_vae, save_autoencoder
from flowcore.vae.config import infer_config, latent_grid
from flowcore.vae.keys import to_diffusers
from flowcore.vae.latent_spec import LATENT_SPECS, LatentSpec, fitting_spaces, scaled_spec

GOLDEN = Path(__file__).parents[2] / "golden" / "vae"
# The reference computes the same sums in another order.
GOLDEN_TOLERANCE = 2e-5
TINY = {
    "latent_channels": 4,
    "block_out_channels": [8, 8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
SPEC = LatentSpec(name="mine", channels=4, downscale=8, mean=(0.1, -0.2, 0.3, 0.0), std=(1.0, 2.0, 0.5, 3.0))


@pytest.fixture
def tiny() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(build_autoencoder(TINY), SPEC)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def write_sdxl_like(path: Path, prefix: str = "", **extra: Tensor) -> None:
    """A file without metadata, of widths whose groups can be inferred."""
    torch.manual_seed(0)
    module = build_autoencoder({**TINY, "block_out_channels": [32, 32, 32, 32], "norm_num_groups": 32})
    save_file({**{prefix + key: tensor for key, tensor in module.state_dict().items()}, **extra}, path)


def test_reference_outputs_of_a_small_flux_autoencoder() -> None:
    golden = load_file(GOLDEN / "flux1_mini.safetensors")
    weights = {key[7:]: tensor.float() for key, tensor in golden.items() if key.startswith("weight.")}
    state = to_diffusers(weights)
    module = build_autoencoder(infer_config(state, source="golden"))
    module.load_state_dict(state)
    spec = scaled_spec("flux1-mini", channels=4, scale=0.3611, shift=0.1159, downscale=2)
    autoencoder = Autoencoder(module, spec)
    latents = autoencoder.encode(golden["input.image"])
    assert_close(latents, golden["output.latent"], atol=GOLDEN_TOLERANCE, rtol=0)
    decoded = golden["output.decoded"].clamp(-1, 1)
    assert_close(autoencoder.decode(golden["input.latent"]), decoded, atol=GOLDEN_TOLERANCE, rtol=0)
    roundtrip = golden["output.roundtrip"].clamp(-1, 1)
    assert_close(autoencoder.decode(latents), roundtrip, atol=GOLDEN_TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "table",
    ["FLUX.1-ae.bfl", "FLUX.1-ae.diffusers", "FLUX.2-ae.bfl", "FLUX.2-ae.diffusers", "SDXL-vae.diffusers"],
)
def test_published_key_tables_map_onto_the_module_exactly(table: str) -> None:
    shapes = json.loads((GOLDEN / f"{table}.keys.json").read_text(encoding="utf-8"))
    state = to_diffusers({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    config = infer_config(state, source=table)
    module = build_autoencoder(config, device="meta")
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert config["use_quant_conv"] == (not table.startswith("FLUX.1"))
    spaces = {"FLUX.1": ("sd3", "flux1", "flux1-unshifted"), "FLUX.2": ("flux2",)}
    expected = spaces.get(table[:6], ("sd15", "sdxl", "eq-sdxl"))
    assert fitting_spaces(latent_grid(config), shapes) == expected


def test_old_diffusers_names_of_attention_are_read() -> None:
    names = ["query.weight", "key.bias", "value.weight", "proj_attn.weight"]
    state = to_diffusers(
        {f"encoder.mid_block.attentions.0.{name}": torch.zeros(2, 2, 1, 1) for name in names}
    )
    assert [key.rsplit("attentions.0.", 1)[1] for key in state] == [
        "to_q.weight",
        "to_k.bias",
        "to_v.weight",
        "to_out.0.weight",
    ]
    assert state["encoder.mid_block.attentions.0.to_q.weight"].shape == (2, 2)


def test_saved_file_gives_the_same_latents_images_and_space(
    tiny: Autoencoder, images: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "vae.safetensors"
    save_autoencoder(path, tiny.module, tiny.spec, metadata={"note": "kept"})
    loaded = load_vae(path)
    assert loaded.spec == tiny.spec
    latents = tiny.encode(images)
    assert_close(loaded.encode(images), latents, atol=0, rtol=0)
    assert_close(loaded.decode(latents), tiny.decode(latents), atol=0, rtol=0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["vae.safetensors"]


def test_shapes_and_ranges(tiny: Autoencoder, images: Tensor) -> None:
    latents = tiny.encode(images)
    assert latents.shape == (2, 4, 2, 3)
    decoded = tiny.decode(latents * 50)
    assert decoded.shape == images.shape
    assert -1 <= float(decoded.min()) <= float(decoded.max()) <= 1


def test_encode_is_the_mode_and_with_a_generator_a_sample(tiny: Autoencoder, images: Tensor) -> None:
    mode = tiny.encode(images)
    assert_close(tiny.encode(images), mode, atol=0, rtol=0)
    moments = tiny.module.encode(images).latent_dist
    assert_close(mode, SPEC.to_model(moments.mean))
    first, second = (tiny.encode(images, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert_close(first, second, atol=0, rtol=0)
    assert not torch.equal(first, mode)


def test_weights_are_frozen_and_inputs_are_not(tiny: Autoencoder, images: Tensor) -> None:
    latents = tiny.encode(images).requires_grad_()
    tiny.decode(latents).sum().backward()
    assert latents.grad is not None
    assert all(parameter.grad is None for parameter in tiny.module.parameters())


def test_file_dtype_is_kept_on_request(tiny: Autoencoder, images: Tensor, tmp_path: Path) -> None:
    save_autoencoder(tmp_path / "vae.safetensors", tiny.module.to(torch.bfloat16), SPEC)
    kept = load_vae(tmp_path / "vae.safetensors", dtype=None)
    assert kept.dtype is torch.bfloat16
    assert kept.encode(images).dtype is torch.float32
    assert load_vae(tmp_path / "vae.safetensors").dtype is torch.float32


def test_diffusers_folder_states_its_space(tmp_path: Path) -> None:
    write_sdxl_like(tmp_path / "diffusion_pytorch_model.safetensors")
    config = {
        **TINY,
        "block_out_channels": [32] * 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.13025,
        "_class_name": "AutoencoderKL",
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_vae(tmp_path).spec == LATENT_SPECS["sdxl"]


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_autoencoder_inside_a_checkpoint_is_found(prefix: str, tmp_path: Path) -> None:
    other = {"unet.model.weight": torch.zeros(1)} if prefix else {}
    write_sdxl_like(tmp_path / "whole.safetensors", prefix, **other)
    assert load_vae(tmp_path / "whole.safetensors", spec="sdxl").spec.name == "sdxl"


def test_space_in_a_file_wins_over_the_given_one(tmp_path: Path) -> None:
    eq = LATENT_SPECS["eq-sdxl"]
    statistics = {"vae_mean": torch.tensor(eq.mean).half(), "vae_std": torch.tensor(eq.std).half()}
    write_sdxl_like(tmp_path / "hdm.safetensors", "vae.", **statistics)
    assert load_vae(tmp_path / "hdm.safetensors", spec="sdxl").spec is eq


def test_space_must_be_named_when_the_file_does_not(tmp_path: Path) -> None:
    write_sdxl_like(tmp_path / "a.safetensors")
    with pytest.raises(
        ConfigError, match=r"a\.safetensors must be named.*spec= as one of sd15, sdxl, eq-sdxl"
    ):
        load_vae(tmp_path / "a.safetensors")


def test_space_must_fit_the_network(tmp_path: Path) -> None:
    write_sdxl_like(tmp_path / "a.safetensors")
    with pytest.raises(
        ConfigError, match=r"flux1 .16 channels, 1/8. must fit its autoencoder, got 4 channels"
    ):
        load_vae(tmp_path / "a.safetensors", spec="flux1")


def test_missing_and_unexpected_tensors_are_named_on_one_line(tiny: Autoencoder, tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_autoencoder(path, tiny.module, SPEC)
    state = load_file(path)
    state["stray"] = state.pop("decoder.conv_out.bias")
    save_file(state, path, metadata={"flowcore.config": json.dumps(TINY)})
    with pytest.raises(CheckpointError) as caught:
        load_vae(path, spec=SPEC)
    message = str(caught.value)
    assert "1 missing (decoder.conv_out.bias)" in message
    assert "1 unexpected (stray)" in message
    assert message.startswith("vae.safetensors must hold exactly the")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x.lora_down.weight": torch.zeros(1)}, r"must hold a KL autoencoder .*got a LoRA \(1 tensors such"),
        ({"x": torch.zeros(1)}, r"must hold a KL autoencoder .*got no known kind \(1 tensors such as x\)"),
        (
            {"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)},
            "must hold a whole KL autoencoder, got no decoder",
        ),
        (
            {
                "encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
                "quantize.embedding.weight": torch.zeros(9, 2),
            },
            "must hold a KL autoencoder .*got a VQ autoencoder",
        ),
        (
            {"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3, 3)},
            "must hold a KL autoencoder of images, got one of videos",
        ),
    ],
)
def test_other_files_are_named(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=rf"other\.safetensors.*{message}|{message}"):
        load_vae(tmp_path / "other.safetensors")


def test_unknown_setting_and_class_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be AutoencoderKL settings, got \['width'\]"):
        build_autoencoder({**TINY, "width": 3})
    with pytest.raises(ConfigError, match="must be AutoencoderKL or AutoencoderKLFlux2, got AutoencoderDC"):
        build_autoencoder({"_class_name": "AutoencoderDC"})
    with pytest.raises(ConfigError, match="settings of the VAE must fit AutoencoderKL, got"):
        build_autoencoder({**TINY, "norm_num_groups": 7})
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"VAE folder must hold config\.json"):
        load_vae(tmp_path / "empty")


def test_image_sides_are_multiples_of_the_cell(tiny: Autoencoder) -> None:
    with pytest.raises(ShapeError, match=r"multiples of 8, got \(1, 3, 16, 20\)"):
        tiny.encode(torch.zeros(1, 3, 16, 20))


def test_missing_path_lists_the_bundled_names() -> None:
    with pytest.raises(
        CheckpointError, match=r"existing file or folder or a bundled name .*got 'no-such-vae'"
    ):
        load_vae("no-such-vae")
