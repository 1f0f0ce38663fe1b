"""Data sets: layouts, labels, order, batches, and what damaged or missing files say."""

import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, needs_cifar10, needs_tiny
from PIL import Image

import data
import files
import options
from runtime import UserError


def config(dataset, root, shape):
    return {"dataset": dataset, "data_root": str(root), "cache_dir": None, "network": {"image_shape": shape}}


def make_folder(root, sizes=((20, 20), (16, 40))):
    """Two classes of two images each, in colours that tell them apart."""
    for label, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
        (root / f"class{label}").mkdir(parents=True)
        for i, size in enumerate(sizes):
            Image.new("RGB", size, colour).save(root / f"class{label}" / f"{i}.png")
    return root


def test_digits():
    images, labels = data.load(config("digits", "nowhere", [1, 8, 8]))
    test_images, test_labels = data.load(config("digits", "nowhere", [1, 8, 8]), train=False)
    assert images.shape == (1437, 1, 8, 8) and test_images.shape == (360, 1, 8, 8)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert (images.min(), images.max()) == (0, 255)
    assert set(labels.tolist()) == set(test_labels.tolist()) == set(range(10))


@needs_cifar10
def test_cifar10():
    images, labels = data.load(config("cifar10", DATA, [3, 32, 32]))
    test_images, test_labels = data.load(config("cifar10", DATA, [3, 32, 32]), train=False)
    assert images.shape == (50000, 3, 32, 32) and test_images.shape == (10000, 3, 32, 32)
    mean = images.double().mean((0, 2, 3)) / 255
    np.testing.assert_allclose(mean, [0.49139968, 0.48215841, 0.44653091], atol=1e-6)
    assert labels.bincount().tolist() == [5000] * 10 and test_labels.bincount().tolist() == [1000] * 10


@pytest.mark.parametrize("dataset", ["digits", pytest.param("cifar10", marks=needs_cifar10)])
def test_sigma_data_is_the_rms_of_the_pixels(dataset):
    """So that inputs and targets of the network have unit size, as the preconditioning means them to."""
    configs = [options.load_config(path, [f"data_root={DATA}", "cache_dir=null"])
               for path in sorted((ROOT / "config" / dataset).glob("*.yaml"))]
    images, _ = data.load(configs[0])
    rms = (images[:10000] / 127.5 - 1).square().mean().sqrt().item()
    assert [c["diffusion"]["sigma_data"] for c in configs] == pytest.approx([rms] * 3, rel=0.03)


@pytest.fixture(scope="module")
def tiny_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    zipfile.ZipFile(DATA / "tiny-imagenet-200-small.zip").extractall(root)
    return root


@needs_tiny
def test_tinyimagenet_in_its_original_layout(tiny_root):
    folder = tiny_root / "tiny-imagenet-200"
    wnids = sorted((folder / "wnids.txt").read_text().split())
    images, labels = data.load(config("tinyimagenet", tiny_root, [3, 64, 64]))
    test_images, test_labels = data.load(config("tinyimagenet", tiny_root, [3, 64, 64]), train=False)
    assert images.shape == (5000, 3, 64, 64) and test_images.shape == (2000, 3, 64, 64)
    assert labels.bincount().tolist() == [25] * 200 and test_labels.bincount().tolist() == [10] * 200

    rows = [row.split("\t")[:2] for row in (folder / "val" / "val_annotations.txt").read_text().splitlines()]
    for i in (0, 777, 1999):
        name, wnid = rows[i]
        assert test_labels[i] == wnids.index(wnid)
        expected = np.asarray(Image.open(folder / "val" / "images" / name).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(test_images[i], expected)
    for label in (0, 123, 199):
        expected = {np.asarray(Image.open(path).convert("RGB")).tobytes()
                    for path in (folder / "train" / wnids[label] / "images").iterdir()}
        assert {image.numpy().transpose(1, 2, 0).tobytes() for image in images[labels == label]} == expected

    gray = [path for path in folder.glob("*/**/*.JPEG") if Image.open(path).mode == "L"]
    channels_equal = sum(((x[:, 0] == x[:, 1]) & (x[:, 1] == x[:, 2])).flatten(1).all(1).sum().item()
                         for x in (images, test_images))
    assert len(gray) == 114 and channels_equal >= 114


@needs_tiny
def test_tinyimagenet_with_a_missing_annotation_file(tmp_path, tiny_root):
    folder = tmp_path / "tiny-imagenet-200"
    (folder / "val").mkdir(parents=True)
    (folder / "wnids.txt").write_text((tiny_root / "tiny-imagenet-200" / "wnids.txt").read_text())
    with pytest.raises(UserError, match=r"val_annotations\.txt"):
        data.load(config("tinyimagenet", tmp_path, [3, 64, 64]), train=False)
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99999999\n")
    with pytest.raises(UserError, match="damaged"):
        data.load(config("tinyimagenet", tmp_path, [3, 64, 64]), train=False)


def test_folder_resizes_crops_and_labels(tmp_path):
    images, labels = data.load(config("folder", make_folder(tmp_path), [3, 8, 8]))
    assert images.shape == (4, 3, 8, 8) and labels.tolist() == [0, 0, 1, 1]
    assert (images[0, 0] == 255).all() and (images[3, 2] == 255).all() and (images[3, 0] == 0).all()
    gray, _ = data.load(config("folder", tmp_path, [1, 8, 8]))
    assert gray.shape == (4, 1, 8, 8)


def test_folder_crops_the_centre(tmp_path):
    (tmp_path / "a").mkdir()
    image = Image.new("RGB", (24, 8), (0, 0, 0))
    image.paste((255, 255, 255), (8, 0, 16, 8))
    image.save(tmp_path / "a" / "wide.png")
    images, _ = data.load(config("folder", tmp_path, [3, 8, 8]))
    assert (images == 255).all()


def test_folder_with_train_and_val(tmp_path):
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "val", sizes=((9, 9),))
    assert len(data.load(config("folder", tmp_path, [3, 8, 8]))[0]) == 4
    assert len(data.load(config("folder", tmp_path, [3, 8, 8]), train=False)[0]) == 2


def test_folder_whose_test_set_has_other_classes(tmp_path):
    """Its labels would be the ranks of other names."""
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "val")
    (tmp_path / "val" / "class0").rename(tmp_path / "val" / "zebras")
    with pytest.raises(UserError, match="other classes than the training images: they differ in class0"):
        data.load(config("folder", tmp_path, [3, 8, 8]), train=False)


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_image_is_named(tmp_path, damage):
    path = make_folder(tmp_path) / "class1" / "0.png"
    path.write_bytes({"cut": path.read_bytes()[:40], "text": b"not an image", "empty": b""}[damage])
    with pytest.raises(UserError, match=r"class1.0\.png"):
        data.load(config("folder", tmp_path, [3, 8, 8]))


def test_folder_without_classes_or_missing(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        data.load(config("folder", tmp_path, [3, 8, 8]))
    with pytest.raises(UserError, match="nowhere"):
        data.load(config("folder", tmp_path / "nowhere", [3, 8, 8]))
    (tmp_path / "empty_class").mkdir()
    with pytest.raises(UserError, match="empty_class"):
        data.load(config("folder", tmp_path, [3, 8, 8]))


@pytest.mark.parametrize(("dataset", "shape", "words"), [
    ("cifar10", [3, 32, 32], ["https://www.cs.toronto.edu", "cifar-10-batches-py", "c58f30108f718f92721af3b95e74349a"]),
    ("cifar100", [3, 32, 32], ["https://www.cs.toronto.edu", "cifar-100-python", "eb9058c3a382ffc7106e4002c42a8d85"]),
    ("tinyimagenet", [3, 64, 64], ["http://cs231n.stanford.edu", "tiny-imagenet-200", data.TINY_MD5])])
def test_failed_download_says_what_from_where_and_how_by_hand(tmp_path, monkeypatch, dataset, shape, words):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(UserError) as error:
        data.load(config(dataset, tmp_path, shape))
    for word in [*words, str(tmp_path)]:
        assert word in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Kept decoded.

@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder of images and a config that keeps them decoded; config["decoded"] counts how often they were decoded."""
    found = config("folder", make_folder(tmp_path / "images", sizes=((16, 16), (16, 16))), [3, 16, 16])
    found |= {"cache_dir": str(tmp_path / "cache"), "decoded": 0}
    decode = data.decode

    def counted(*args):
        found["decoded"] += 1
        return decode(*args)
    monkeypatch.setattr(data, "decode", counted)
    return found


def same(a, b):
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def test_a_data_set_is_decoded_once(kept, tmp_path):
    first = data.load(kept)
    assert kept["decoded"] == 1
    assert same(first, data.load(kept)) and kept["decoded"] == 1
    assert sorted(path.suffix for path in (tmp_path / "cache" / "data").iterdir()) == [".pt", ".sha256"]
    data.load(kept | {"network": {"image_shape": [3, 8, 8]}})           # Another shape is another data set.
    assert kept["decoded"] == 2
    assert same(first, data.load(kept | {"cache_dir": None})) and kept["decoded"] == 3


@pytest.mark.parametrize("change", ["another image", "a new image", "one less", "another class", "moved"])
def test_changed_sources_are_decoded_anew(kept, tmp_path, change):
    data.load(kept)
    root = tmp_path / "images"
    if change == "another image":
        Image.new("RGB", (16, 16), (0, 255, 0)).save(root / "class0" / "0.png")
    elif change == "a new image":
        Image.new("RGB", (16, 16), (0, 255, 0)).save(root / "class0" / "2.png")
    elif change == "one less":
        (root / "class0" / "1.png").unlink()
    elif change == "moved":
        (root / "class0" / "1.png").rename(root / "class1" / "11.png")
    else:
        (root / "class1").rename(root / "class2")
    again = data.load(kept)
    assert kept["decoded"] == 2
    assert same(again, data.load(kept | {"cache_dir": None}))
    assert same(again, data.load(kept)) and kept["decoded"] == 3        # And that is kept.


def test_links_and_what_lies_beside_train(kept, tmp_path):
    """A link that leads nowhere, or a log that grows beside train/, keeps nothing from being kept."""
    (tmp_path / "images" / "class0" / "2.txt").symlink_to(tmp_path / "nowhere")
    data.load(kept)
    assert same(data.load(kept), data.load(kept)) and kept["decoded"] == 1
    make_folder(tmp_path / "split" / "train", sizes=((16, 16), (16, 16)))
    split = kept | {"data_root": str(tmp_path / "split")}
    first = data.load(split)
    (tmp_path / "split" / "log.txt").write_text("a line")
    assert same(first, data.load(split)) and kept["decoded"] == 2


def test_an_empty_class_is_noticed(kept, tmp_path):
    data.load(kept)
    (tmp_path / "images" / "class2").mkdir()
    with pytest.raises(UserError, match="class2"):
        data.load(kept)


def test_another_decoder_decodes_anew(kept, monkeypatch):
    data.load(kept)
    monkeypatch.setattr(data, "DECODED", data.DECODED + 1)
    data.load(kept)
    assert kept["decoded"] == 2


def test_equal_data_give_equal_files(kept, tmp_path):
    """So two runs that write them at once cannot leave one's checksum beside the other's file."""
    data.load(kept)
    data.load(kept | {"cache_dir": str(tmp_path / "another")})
    one, other = (next((tmp_path / name / "data").glob("*.pt")) for name in ("cache", "another"))
    assert one.name == other.name and one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("suffix", [".pt", ".sha256"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone", "foreign"])
def test_a_damaged_kept_data_set_is_decoded_anew(kept, tmp_path, suffix, damage):
    first = data.load(kept)
    path = next((tmp_path / "cache" / "data").glob(f"*{suffix}"))
    content = path.read_bytes()
    changed = {"flip": content[:40] + bytes([content[40] ^ 1]) + content[41:], "cut": content[:-9], "empty": b"",
               "foreign": b"[1, 2]"}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    assert same(first, data.load(kept)) and kept["decoded"] == 2
    assert same(first, data.load(kept)) and kept["decoded"] == 2


def test_a_kept_data_set_that_runs_code_is_not_loaded(kept, tmp_path):
    """Not even with a note that fits it."""
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "it ran"), "w")

    first = data.load(kept)
    path = next((tmp_path / "cache" / "data").glob("*.pt"))
    torch.save({"images": Bomb(), "labels": first[1]}, path)
    path.with_suffix(".sha256").write_text(files.sha256(path))
    assert same(first, data.load(kept)) and not (tmp_path / "it ran").exists()


def test_a_data_set_that_cannot_be_kept(kept, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    first = data.load(kept)
    assert len(first[0]) == 4 and "not kept for the next time" in capsys.readouterr().err


@needs_cifar10
def test_cifar10_is_kept_and_mapped(tmp_path, monkeypatch):
    given = config("cifar10", DATA, [3, 32, 32]) | {"cache_dir": str(tmp_path)}
    first = [data.load(given, train) for train in (True, False)]
    monkeypatch.setattr(data, "load_cifar10", None)
    again = [data.load(given, train) for train in (True, False)]
    assert all(same(*pair) for pair in zip(first, again, strict=True))
    assert str(next((tmp_path / "data").glob("cifar10-train-*.pt"))) in Path("/proc/self/maps").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Batches and pictures.

def test_order_is_a_function_of_seed_and_epoch():
    order = data.epoch_order(1000, 1, 2)
    assert torch.equal(order, data.epoch_order(1000, 1, 2))
    assert sorted(order.tolist()) == list(range(1000))
    for other in ((1, 3), (2, 2)):
        assert (order == data.epoch_order(1000, *other)).float().mean() < 0.02


def test_batch_is_in_minus_one_to_one_and_flips():
    images = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    flip = torch.tensor([False, True])
    x = data.batch(images, torch.tensor([3, 0]), torch.device("cpu"), flip)
    assert x.dtype == torch.float32 and x.max() == 1 and x.min() == -1
    torch.testing.assert_close(x[0], images[3].float() / 127.5 - 1)
    torch.testing.assert_close(x[1], (images[0].float() / 127.5 - 1).flip(-1))
    back = (data.batch(images, torch.arange(4), torch.device("cpu")) * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    assert torch.equal(back, images)


def test_png_and_grid(tmp_path):
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    data.save_png(images[0], tmp_path / "a.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), images[0, 0])
    grid = data.grid(images, 3)
    assert grid.shape == (3, 2 * 34 + 2, 3 * 34 + 2)
    assert torch.equal(grid[0, 2:34:4, 2:34:4], images[0, 0])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
