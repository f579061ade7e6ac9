"""The cache of encoded samples: what it finds again, and what it does about damage."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from training.data import cache
from training.data.cache import Encoded, TensorCache, content_key
from training.files import RunError
from training.stop import StopFlag, StoppedError

ITEMS = [(content_key(str(number)), number) for number in range(6)]


class Encoder:
    """Counts what it encodes; None for numbers in `refused`."""

    def __init__(self, refused: Sequence[int] = (), stop: StopFlag | None = None, stop_at: int = -1) -> None:
        self.calls: list[int] = []
        self.refused, self.stop, self.stop_at = refused, stop, stop_at

    def __call__(self, items: list[tuple[str, int]]) -> list[Encoded | None]:
        self.calls += [number for _, number in items]
        if self.stop is not None and self.stop_at in self.calls:
            self.stop.requested = True
        return [
            None if number in self.refused else {"a": torch.full((3,), float(number)), "b": torch.tensor([1])}
            for _, number in items
        ]


def fill(
    folder: Path | None, encoder: Encoder, items: Sequence[tuple[str, int]] = ITEMS, chunk: int = 1
) -> TensorCache:
    made = TensorCache(folder, StopFlag() if encoder.stop is None else encoder.stop)
    made.fill(items, encoder, chunk=chunk, what="encode")
    return made


def assert_complete(made: TensorCache) -> None:
    assert set(made.entries) >= {key for key, _ in ITEMS}
    for key, number in ITEMS:
        assert torch.equal(made.entries[key]["a"], torch.full((3,), float(number)))
        assert torch.equal(made.entries[key]["b"], torch.tensor([1]))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples a shard."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 30)


def test_without_a_folder_nothing_is_kept() -> None:
    for _ in range(2):
        encoder = Encoder()
        assert_complete(fill(None, encoder))
        assert encoder.calls == list(range(6))


@pytest.mark.usefixtures("small_shards")
def test_a_filled_cache_is_read_and_left_as_it_is(tmp_path: Path) -> None:
    assert_complete(fill(tmp_path, Encoder()))
    assert len(shards(tmp_path)) == 3
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    encoder = Encoder()
    assert_complete(fill(tmp_path, encoder))
    assert encoder.calls == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("small_shards")
def test_only_what_is_new_is_encoded(tmp_path: Path) -> None:
    fill(tmp_path, Encoder(), ITEMS[:4])
    encoder = Encoder()
    assert_complete(fill(tmp_path, encoder))
    assert encoder.calls == [4, 5]


def test_a_chunk_is_encoded_whole(tmp_path: Path) -> None:
    fill(tmp_path, Encoder(), ITEMS[:3], chunk=3)
    encoder = Encoder()
    fill(tmp_path, encoder, [*ITEMS[:2], ITEMS[4]], chunk=3)
    assert encoder.calls == [0, 1, 4]


def test_an_item_that_is_left_out_is_tried_again_each_time(tmp_path: Path) -> None:
    for _ in range(2):
        encoder = Encoder(refused=[2])
        made = fill(tmp_path, encoder)
        assert ITEMS[2][0] not in made.entries
        assert len(made.entries) == 5
    assert encoder.calls == [2]
    assert len(shards(tmp_path)) == 1


def test_a_stop_keeps_what_was_encoded(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        fill(tmp_path, Encoder(stop=StopFlag(), stop_at=2))
    encoder = Encoder()
    assert_complete(fill(tmp_path, encoder))
    assert encoder.calls == [3, 4, 5]


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "emptied": lambda path: path.write_bytes(b""),
    "bit flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "garbage": lambda path: path.write_bytes(b"garbage" * 20),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_shard_is_named_once_and_encoded_again(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, Encoder())
    spoilt = shards(tmp_path)[1]
    DAMAGE[how](spoilt)
    capsys.readouterr()
    encoder = Encoder()
    assert_complete(fill(tmp_path, encoder))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert str(spoilt) in warnings[0]
    assert len(encoder.calls) == 2
    again = Encoder()
    assert_complete(fill(tmp_path, again))
    assert again.calls == []
    assert "warning" not in capsys.readouterr().err


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_index_is_named_and_its_samples_are_encoded_again(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, Encoder())
    index = tmp_path / cache.INDEX
    DAMAGE[how](index)
    capsys.readouterr()
    encoder = Encoder()
    assert_complete(fill(tmp_path, encoder))
    err = capsys.readouterr().err
    if how != "bit flipped":  # the last bit flipped ends no line: nothing is lost
        assert cache.INDEX in err
        assert encoder.calls
    assert_complete(fill(tmp_path, again := Encoder()))
    assert again.calls == []
    assert "warning" not in capsys.readouterr().err


@pytest.mark.usefixtures("small_shards")
def test_any_flipped_bit_of_the_index_is_survived(tmp_path: Path) -> None:
    fill(tmp_path, Encoder())
    index = tmp_path / cache.INDEX
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for place in range(0, len(whole[cache.INDEX]), 61):
        for name, content in whole.items():
            (tmp_path / name).write_bytes(content)
        flipped = bytearray(whole[cache.INDEX])
        flipped[place] ^= 0x10
        index.write_bytes(flipped)
        assert_complete(fill(tmp_path, Encoder()))


def test_the_index_lists_shards_by_their_checksums(tmp_path: Path) -> None:
    fill(tmp_path, Encoder())
    records = [json.loads(line) for line in (tmp_path / cache.INDEX).read_text(encoding="utf-8").splitlines()]
    assert [record["samples"] for record in records] == [6]
    assert records[0]["shard"] == shards(tmp_path)[0].name


def test_a_name_in_the_index_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    fill(tmp_path / "other", Encoder())
    line = (tmp_path / "other" / cache.INDEX).read_text(encoding="utf-8")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / cache.INDEX).write_text(line.replace('"shard": "', '"shard": "../other/'), "utf-8")
    assert TensorCache(tmp_path / "own", StopFlag()).entries == {}


@pytest.mark.usefixtures("small_shards")
def test_two_builders_share_one_folder(tmp_path: Path) -> None:
    first, second = TensorCache(tmp_path, StopFlag()), TensorCache(tmp_path, StopFlag())
    first.fill(ITEMS, Encoder(), chunk=1, what="encode")
    second.fill(ITEMS, Encoder(), chunk=1, what="encode")
    encoder = Encoder()
    assert_complete(fill(tmp_path, encoder))
    assert encoder.calls == []


def test_leftovers_of_a_killed_builder_are_removed(tmp_path: Path) -> None:
    fill(tmp_path, Encoder())
    (tmp_path / ".tmp-1-x.safetensors").write_bytes(b"half")
    fill(tmp_path, Encoder())
    assert not list(tmp_path.glob(".tmp*"))


def test_a_full_disk_is_an_error_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, *rest: object) -> None:
        del tensors, rest
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(
        RunError, match=r"\.safetensors: could not be written \(No space left on device\); make"
    ):
        fill(tmp_path, Encoder())
    assert list(tmp_path.iterdir()) == []
