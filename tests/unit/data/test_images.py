import dataclasses as dc
import gzip
import itertools
import struct

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.models import tiny
from txtrain.data.samples.augment import Augment
from txtrain.data.samples.draws import Draws
from txtrain.data.sources.files import Limits
from txtrain.data.sources.images import SetImages, read_idx
from txtrain.data.sources.source import build_source
from txtrain.errors import ConfigError
from txtrain.model import options
from txtrain.objectives.config import ImageClassificationConfig
from txtrain.training.data_module import DataModule

RNG = np.random.default_rng(0)
PIXELS, LABELS = RNG.integers(0, 256, (120, 6, 6), dtype=np.uint8), np.arange(120) % 5


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


@pytest.fixture
def config(make_config):
    def make(kind: str = "images", size: int = 6, channels: int = 1, n_classes: int = 5, **data):
        made = make_config(kind, {"seq_len": None, "val_fraction": 0.2, **data})
        patch = options.PatchEmbeddingConfig(type="patch", image_size=size, patch_size=2, n_channels=channels)
        model = tiny(
            topology="encoder",
            vocab_size=0,
            embedding=patch,
            head=options.ClassHeadConfig(type="class", n_classes=n_classes),
            position=options.LearnedConfig(type="learned"),
            max_seq_len=patch.n_positions(),
            tie_word_embeddings=False,
        )
        return dc.replace(made, model=model, objective=ImageClassificationConfig(type="image_classification"))

    return make


def everything(module: DataModule) -> tuple[torch.Tensor, torch.Tensor]:
    module.prepare()
    parts = [rows.batch(np.arange(len(rows)), Draws(0, "train", np.arange(len(rows)))) for rows in (module._train, module._val)]
    return torch.cat([p["pixel_values"] for p in parts]), torch.cat([p["labels"] for p in parts])


@pytest.mark.parametrize("layout", ["idx", "idx.gz", "idx folder", "npz", "npz with validation", "npy", "folders", "folders with validation"])
def test_every_layout_gives_the_same_images(layout, config, tmp_path):
    keys = {}
    if layout.startswith("idx"):
        end = ".gz" if "gz" in layout else ""
        pack = gzip.compress if end else bytes
        parts = {"train": slice(0, 100), "t10k": slice(100, 120)} if "folder" in layout else {"train": slice(0, 120)}
        for name, rows in parts.items():
            (tmp_path / f"{name}-images-idx3-ubyte{end}").write_bytes(pack(idx(PIXELS[rows])))
            (tmp_path / f"{name}-labels-idx1-ubyte{end}").write_bytes(pack(idx(LABELS[rows].astype(np.uint8))))
        path = tmp_path if "folder" in layout else tmp_path / f"train-images-idx3-ubyte{end}"
    elif layout == "npz":
        path = tmp_path / "all.npz"
        np.savez(path, images=PIXELS, labels=LABELS)
    elif layout == "npz with validation":
        path = tmp_path / "all.npz"
        np.savez(path, x_train=PIXELS[:100], y_train=LABELS[:100], x_test=PIXELS[100:], y_test=LABELS[100:])
    elif layout == "npy":
        path = tmp_path / "x.npy"
        np.save(path, PIXELS)
        np.save(tmp_path / "y.npy", LABELS)
        keys["labels"] = str(tmp_path / "y.npy")
    else:
        image = pytest.importorskip("PIL.Image", reason="Pillow reads the pictures")
        path = tmp_path / "set"
        for i, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
            part = ("train" if i < 100 else "val") if "validation" in layout else "."
            folder = path / part / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            image.fromarray(pixels).save(folder / f"{i:03}.png")
    module = DataModule(config(path=str(path), mean=(0.0,), std=(1.0,), **keys))
    pixels, labels = everything(module)
    own_split = "validation" in layout or layout.split()[-1] == "folder"
    assert (module.n_train, module.n_val) == ((100, 20) if own_split else (96, 24))
    got = {(tuple(p.flatten().tolist()), int(label)) for p, label in zip(pixels * 255, labels, strict=True)}
    wanted = {(tuple(p.flatten().astype(float).tolist()), int(label)) for p, label in zip(PIXELS, LABELS, strict=True)}
    assert {(tuple(round(v) for v in p), label) for p, label in got} == wanted


def test_images_are_normalised_by_what_the_training_part_measures(config, tmp_path):
    np.savez(tmp_path / "all.npz", x=PIXELS, y=LABELS)
    module = DataModule(config(path=str(tmp_path / "all.npz")))
    module.prepare()
    pixels = module._train.batch(np.arange(96))["pixel_values"]
    assert pixels.dtype == torch.float32
    assert float(pixels.mean()) == pytest.approx(0, abs=1e-5)
    assert float(pixels.std()) == pytest.approx(1, abs=1e-3)
    (batch,) = itertools.islice(module.train_dataloader(), 1)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in batch.items()} == {
        "pixel_values": (torch.float32, (4, 1, 6, 6)),
        "labels": (torch.int64, (4,)),
        "sample_index": (torch.int64, (4,)),
    }


def test_images_get_the_models_size_and_channels(config, tmp_path):
    np.savez(tmp_path / "gray.npz", x=PIXELS, y=LABELS)
    np.savez(tmp_path / "colour.npz", x=np.repeat(PIXELS[..., None], 3, -1), y=LABELS)
    plain, _ = everything(DataModule(config(path=str(tmp_path / "gray.npz"), mean=(0.0,), std=(1.0,))))
    colour, _ = everything(DataModule(config(path=str(tmp_path / "gray.npz"), channels=3, size=12, mean=(0.0,), std=(1.0,))))
    assert colour.shape == (120, 3, 12, 12)
    assert torch.allclose(colour.mean((1, 2, 3)), plain.mean((1, 2, 3)), atol=0.02)
    gray, _ = everything(DataModule(config(path=str(tmp_path / "colour.npz"), mean=(0.0,), std=(1.0,))))
    assert torch.allclose(gray, plain, atol=1e-6), "equal channels have that luminance"


def test_digits_need_no_files(config):
    module = DataModule(config("digits", size=8, n_classes=10))
    module.prepare()
    assert (module.n_train, module.n_val, module.tokenizer, module.prompts(2)) == (1438, 359, None, [])
    labels = module._val.batch(np.arange(359))["labels"]
    assert labels.bincount().min() > 25


def test_a_crop_is_a_window_of_the_padded_image_and_a_flip_is_a_mirror():
    pixels = torch.rand(400, 2, 5, 5) + 1
    batch, draws = {"pixel_values": pixels, "labels": torch.zeros(400)}, Draws(0, "train", np.arange(400))
    moved = Augment(crop_padding=2)(batch, draws)["pixel_values"]
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2), mode="replicate")
    places = []
    for i in range(400):
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(padded[i, :, y : y + 5, x : x + 5], moved[i])]
        assert len(found) == 1
        places += found
    assert set(places) == {(y, x) for y in range(5) for x in range(5)}
    flipped = Augment(flip=True)(batch, draws)["pixel_values"]
    mirrored = (flipped == pixels.flip(-1)).all(-1).all(-1).all(-1)
    assert bool(((flipped == pixels).all(-1).all(-1).all(-1) | mirrored).all())
    assert 0.4 < float(mirrored.float().mean()) < 0.6


def test_a_turn_is_a_turn_in_pixels_and_a_shift_a_share_of_the_side():
    """On ramps bilinear sampling is exact, away from the edge."""
    y, x = torch.meshgrid(torch.arange(12.0) - 5.5, torch.arange(20.0) - 9.5, indexing="ij")  # from the centre
    ramps = torch.stack((x, y)).expand(300, 2, 12, 20)
    batch, draws = {"pixel_values": ramps}, Draws(0, "train", np.arange(300))
    inner = (slice(None), slice(None), slice(5, 7), slice(5, 15))
    turned = Augment(rotation=15)(batch, draws)["pixel_values"][inner]
    cos, sin = turned[:, 0, 0, 1] - turned[:, 0, 0, 0], turned[:, 1, 0, 1] - turned[:, 1, 0, 0]
    assert torch.allclose(cos**2 + sin**2, torch.ones(300), atol=1e-4)
    expected = torch.stack((cos[:, None, None] * x - sin[:, None, None] * y, sin[:, None, None] * x + cos[:, None, None] * y), 1)[inner]
    assert torch.allclose(turned, expected, atol=1e-4)
    degrees = torch.atan2(sin, cos).rad2deg()
    assert -15 <= float(degrees.min()) < -14 < 14 < float(degrees.max()) <= 15
    moved = Augment(shift=0.1)(batch, draws)["pixel_values"][inner] - ramps[inner]
    assert torch.allclose(moved, moved[:, :, :1, :1].expand_as(moved), atol=1e-5)
    for channel, most in ((0, 2.0), (1, 1.2)):  # a tenth of 20 and of 12 pixels
        by = moved[:, channel, 0, 0]
        assert -most - 1e-5 <= float(by.min()) < -0.9 * most < 0.9 * most < float(by.max()) <= most + 1e-5


AUGMENTATIONS = {"crop_padding": 2, "rotation": 20.0, "shift": 0.2, "flip": True}


@pytest.mark.parametrize("names", [*([name] for name in AUGMENTATIONS), list(AUGMENTATIONS)], ids="+".join)
def test_an_augmentation_is_a_function_of_the_seed_and_the_samples_index(names):
    change = Augment(**{name: AUGMENTATIONS[name] for name in names})
    pixels = torch.rand(1, 1, 6, 6).expand(40, -1, -1, -1)  # one image, so that only the numbers drawn differ
    together = change({"pixel_values": pixels}, Draws(3, "train", np.arange(40)))["pixel_values"]
    some = np.array([31, 2, 7])
    assert torch.equal(change({"pixel_values": pixels[:3]}, Draws(3, "train", some))["pixel_values"], together[some]), "whatever batch it is in"
    others = change({"pixel_values": pixels}, Draws(4, "train", np.arange(40)))["pixel_values"]
    assert not torch.equal(others, together), "another seed"
    assert len({tuple(p.flatten().tolist()) for p in together}) > (1 if names == ["flip"] else 10), "another index"


def test_augmented_images_do_not_depend_on_the_batch_they_are_read_in(config):
    small, large = (
        DataModule(config("digits", size=8, n_classes=10, rotation=10.0, shift=0.1, crop_padding=1, flip=True, global_batch_size=n)) for n in (4, 8)
    )
    halves = [batch["pixel_values"] for batch in itertools.islice(small.train_dataloader(), 2)]
    assert torch.equal(torch.cat(halves), next(iter(large.train_dataloader()))["pixel_values"])


def test_validation_images_are_not_augmented(config):
    plain, moved = (DataModule(config("digits", size=8, n_classes=10, crop_padding=p)) for p in (0, 2))
    for a, b in zip(plain.val_dataloader(), moved.val_dataloader(), strict=True):
        assert torch.equal(a["pixel_values"], b["pixel_values"])
    a, b = (next(iter(m.train_dataloader())) for m in (plain, moved))
    assert not torch.equal(a["pixel_values"], b["pixel_values"])


def test_validation_images_are_numbered_by_the_training_classes(config, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow reads the pictures")
    for part, names in (("train", ["cat", "dog", "eel"]), ("held", ["cat", "eel"]), ("both/train", ["cat", "dog"]), ("both/val", ["dog"])):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                image.fromarray(PIXELS[i]).save(tmp_path / part / name / f"{i}.png")
    source = build_source(config(path=str(tmp_path / "train"), val_path=str(tmp_path / "held")))
    assert source.images("train").labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert source.images("validation").labels.tolist() == [0, 0, 2, 2]
    assert build_source(config(path=str(tmp_path / "both"))).images("validation").labels.tolist() == [1, 1]
    (tmp_path / "held" / "fox").mkdir()
    with pytest.raises(ConfigError, match=r"`data\.val_path`: \S+held must have the classes of the training images \(cat, dog, eel\), but has fox too"):
        build_source(config(path=str(tmp_path / "train"), val_path=str(tmp_path / "held")))


class Rows(dict):
    """A set of the library."""

    column_names, _fingerprint, features = ("image", "label"), "abc", None

    def select_columns(self, names):
        return Rows({name: self[name] for name in names})

    def with_format(self, kind):
        assert kind == "arrow"
        return self

    def __getitem__(self, key):
        if isinstance(key, str):
            return super().__getitem__(key)
        return pa.table({name: values[key] if isinstance(key, slice) else [values[key]] for name, values in self.items()})


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (["cat", "dog"], r"but they are <U3, the first .*cat"),
        ([0.5, 1.9], r"but they are float64 from 0\.5 on"),
        ([-1, 0], r"but they are int64 from -1 on"),
        ([None, 1], r"but they are object, the first None"),
    ],
)
def test_classes_of_a_set_are_integers_from_0_on(labels, says):
    pytest.importorskip("PIL.Image", reason="Pillow reads the pictures")
    assert SetImages(Rows(image=[], label=[1, 0]), ("image", "label")).labels.tolist() == [1, 0]
    with pytest.raises(ConfigError, match=rf"`data\.columns`: label must have labels that are integers from 0 on, {says}"):
        _ = SetImages(Rows(image=[], label=labels), ("image", "label")).labels


def test_pixels_of_a_set_are_in_the_range_of_all_pixels():
    pytest.importorskip("PIL.Image", reason="Pillow reads the pictures")
    images = SetImages(Rows(image=[[[0, 255]], [[0.0, 1.0]], [[0, 256]], [[0.0, 2.0]], [["a"]]], label=[0] * 5), ("image", "label"))
    assert (images.read(0).dtype, images.read(0).tolist(), images.read(1).tolist()) == (np.uint8, [[0, 255]], [[0.0, 1.0]])
    for row in (2, 3, 4):
        with pytest.raises(ConfigError, match=rf"`data\.columns`: image in row {row} of the set must be integers from 0 to 255 or floats from 0 to 1"):
            images.read(row)


def test_mistakes_are_told(config, tmp_path):
    np.savez(tmp_path / "all.npz", x=PIXELS, y=LABELS)
    with pytest.raises(ConfigError, match=r"model\.head\.n_classes.*at least 5.*but is 3 instead"):
        DataModule(config(path=str(tmp_path / "all.npz"), n_classes=3)).prepare()
    np.savez(tmp_path / "short.npz", x=PIXELS, y=LABELS[:7])
    with pytest.raises(ConfigError, match=r"labels \[N\], but they are \[120, 6, 6\] and \[7\]"):
        build_source(config(path=str(tmp_path / "short.npz")))
    np.savez(tmp_path / "named.npz", a=PIXELS, b=LABELS)
    with pytest.raises(ConfigError, match="but holds a, b"):
        build_source(config(path=str(tmp_path / "named.npz")))
    np.save(tmp_path / "object.npy", np.array([{}]))
    with pytest.raises(ConfigError, match="without Python objects"):
        build_source(config(path=str(tmp_path / "object.npy"), labels=str(tmp_path / "object.npy")))
    cut = tmp_path / "cut-images-idx3-ubyte"
    cut.write_bytes(idx(PIXELS)[:-5])
    with pytest.raises(ConfigError, match="must hold 120 x 6 x 6 values"):
        read_idx(cut, "data.path", Limits())
    with pytest.raises(ConfigError, match=r"no cut-labels-idx1-ubyte"):
        build_source(config(path=str(cut)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="must hold a folder of"):
        build_source(config(path=str(tmp_path / "empty")))
