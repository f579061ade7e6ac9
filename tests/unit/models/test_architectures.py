"""The table of architectures and detection."""

import pytest

from flowcore.errors import CheckpointError
from flowcore.models import ARCHITECTURES, Architecture, detect, find_architecture, find_layout
from flowcore.models.xut import PRESETS, XUDiT

KEYS = list(XUDiT(PRESETS["tiny"], device="meta").state_dict())
PREFIXES = ["", "model.", "transformer.", "unet.model.", "diffusion_model.", "model.diffusion_model."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefix_is_found(prefix: str) -> None:
    keys = [prefix + key for key in KEYS] + ["vae.encoder.conv_in.weight", "vae_mean"]
    architecture, found = detect(keys)
    assert (architecture.name, found) == ("xut", prefix)


def test_jax_layout_is_found() -> None:
    architecture, prefix = detect(["backbone.enc_stacks.0.0.sa.qkv.kernel", "in_patch.proj.kernel"])
    layout = find_layout(architecture, ["backbone.enc_stacks.0.0.sa.qkv.kernel"])
    assert (architecture.name, prefix) == ("xut", "")
    assert layout is not None
    assert layout.name == "jax"
    assert find_layout(architecture, KEYS) is None


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ([], "no tensor at all"),
        (
            ["diffusion_model.a.lora_A.weight"],
            "1 tensors of an adapter such as diffusion_model.a.lora_A.weight",
        ),
        (["encoder.conv_in.weight"], "1 tensors of a VAE"),
        (["model.embed_tokens.weight"], "1 tensors of a text encoder"),
        (["embed_tokens.weight"], "1 tensors of a text encoder"),
        (["a.weight", "b.weight"], "2 others such as a.weight, b.weight"),
    ],
)
def test_what_else_was_found_is_said(keys: list[str], found: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        detect(keys)
    assert found in str(caught.value)


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.name)
def test_rows_have_every_preset_and_channels(row: Architecture) -> None:
    assert find_architecture(row.name) is row
    assert {"tiny", "demo"} <= set(row.presets)
    assert row.latent_channels(row.presets["demo"]) == 16
    assert row.config_from_dict(row.presets["demo"].to_dict()) == row.presets["demo"]


@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.name)
def test_rows_are_not_taken_for_each_other(row: Architecture) -> None:
    for preset in row.presets.values():
        keys = row.model(preset, device="meta").state_dict().keys()
        assert [other.name for other in ARCHITECTURES if other.is_match(keys)] == [row.name]
        assert all(find_layout(other, keys) is None for other in ARCHITECTURES)
        assert detect(keys) == (row, "")


def test_unknown_architecture_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"must be one of .*xut.*, got 'xot'"):
        find_architecture("xot")
