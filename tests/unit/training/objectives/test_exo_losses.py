"""The terms of Exo's loss: their values, their optima, and where gradients go."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from flowcore.errors import ConfigError
from flowcore.models.exo.labels import cell_distances
from flowcore.vae.autoencoder import Autoencoder, load_vae
from tests.support import assert_close
from tests.tiny import VAE, write_parts
from training.encoders import FileImageEncoder, PixelEncoder
from training.objectives.exo_losses import (
    DecoderLikeness,
    LpipsLikeness,
    kept_and_changed,
    label_loss,
    likeness,
)

DRAW = torch.Generator()


def latents(count: int, rows: int = 5, columns: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, rows, columns, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    folder = tmp_path_factory.mktemp("vae")
    write_parts(folder)
    return load_vae(folder / VAE)


def test_the_mask_chooses_cell_by_cell() -> None:
    estimate, reference, clean = latents(3)
    mask = torch.zeros(2, 3, 2)
    kept = kept_and_changed(mask, estimate, reference, clean)
    assert_close(kept, (reference - clean).square().mean(), limit=1e-6)
    changed = kept_and_changed(mask + 1, estimate, reference, clean)
    assert_close(changed, (estimate - clean).square().mean(), limit=1e-6)
    mask[:, 2, 1] = 1  # the last row, and the one column beyond the first cell
    mixed = reference.clone()
    mixed[:, :, 4, 2] = estimate[:, :, 4, 2]
    assert_close(
        kept_and_changed(mask, estimate, reference, clean), (mixed - clean).square().mean(), limit=1e-6
    )


def test_the_price_of_a_cell_has_the_optimum_of_the_specification() -> None:
    source, clean = latents(2, 4, 4)
    source = clean + 0.4 * (source - clean)
    distances = cell_distances(source, clean)
    weight = float(distances.flatten().sort().values[3:5].sum())  # twice the middle of all
    best = (1 - weight / (2 * distances)).clamp(0).requires_grad_()
    loss = kept_and_changed(best, clean, source, clean) + weight * best.mean()
    (gradient,) = torch.autograd.grad(loss, best)
    inside = best.detach() > 0
    assert 0 < int(inside.sum()) < inside.numel()
    assert gradient[inside].abs().max() < 1e-7
    assert (gradient[~inside] > 0).all()


def test_labels_pull_the_mask_to_the_cells_that_change() -> None:
    source, clean = latents(2, 4, 4)
    source[:, :, :2] = clean[:, :, :2]
    mask = torch.full((2, 2, 2), 0.5, requires_grad=True)
    loss = label_loss(mask, source, clean, 0.1)
    assert_close(loss.detach(), torch.tensor(0.5).log().neg(), limit=1e-6)
    (gradient,) = torch.autograd.grad(loss, mask)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1] < 0).all()
    sure = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).expand(2, 2, 2)
    assert float(label_loss(sure, source, clean, 0.1)) == 0
    assert torch.isfinite(label_loss(1 - sure, source, clean, 0.1))


def test_features_of_the_decoder_are_what_its_middle_block_gives(vae: Autoencoder) -> None:
    (found,) = latents(1, 4, 4)
    seen: list[Tensor] = []
    handle = vae.module.decoder.mid_block.register_forward_hook(lambda _m, _i, output: seen.append(output))
    vae.decode(found)
    handle.remove()
    assert torch.equal(vae.features(found), seen[0])


def test_likeness_in_the_decoder_moves_the_estimate_alone(vae: Autoencoder) -> None:
    found, wanted = latents(2, 4, 4)
    found.requires_grad_()
    measure = DecoderLikeness(vae)
    distance = measure(found, wanted, DRAW)
    assert distance.shape == (2,)
    distance.sum().backward()
    assert found.grad is not None
    assert found.grad.abs().max() > 0
    assert all(p.grad is None for p in vae.module.parameters())
    assert measure(wanted, wanted, DRAW).abs().max() == 0
    single = measure(found[:1], wanted[:1], DRAW)
    assert_close(single, distance[:1].detach(), limit=1e-5)


def test_lpips_compares_one_crop_of_both(vae: Autoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    class Lpips(nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert (net, verbose) == ("vgg", False)

        def forward(self, found: Tensor, wanted: Tensor) -> Tensor:
            shapes.append(tuple(found.shape))
            return (found - wanted).square().mean(dim=(1, 2, 3), keepdim=True)

    package = ModuleType("lpips")
    package.LPIPS = Lpips  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    found, wanted = latents(2, 40, 4)
    assert LpipsLikeness(vae)(found, wanted, DRAW).shape == (2,)
    assert shapes == [(2, 3, 256, 32)]
    assert LpipsLikeness(vae)(found, found, DRAW).abs().max() == 0


def test_which_likeness_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parts(tmp_path)
    encoder = FileImageEncoder(str(tmp_path / VAE), "tiny", torch.device("cpu"))
    assert likeness("none", encoder) is None
    assert likeness("decoder_mid", PixelEncoder(4)) is None
    assert isinstance(likeness("decoder_mid", encoder), DecoderLikeness)
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ConfigError, match=r"decoder_mid or none without the package lpips, got lpips"):
        likeness("lpips", encoder)
