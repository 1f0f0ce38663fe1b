"""Data sets: layouts, labels, caches, downloads, order, batches; what is damaged or missing."""

import os
import shutil
import socketserver
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock
import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, needs_cifar10, needs_tiny, wait_until
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5
from edm2 import data, image_files
from edm2.config import Config, load_config
from edm2.errors import UserError

def config(dataset, root, shape=None, cache=None):
    """A Config of a data set."""
    return Config(
        dataset=dataset, data_root=str(root), cache_dir=cache and str(cache), net_type="UNetC",
        network={"image_shape": shape or data.SETS[dataset][1] or [3, 16, 16]}, n_epoch=1,
        batch_size=1, lrate=1, save_dir="run")

def says(words, function, *args):
    """A function raises a UserError of sane length with all of `words`."""
    with pytest.raises(UserError) as error:
        function(*args)
    assert all(word in str(error.value) for word in words.split(" … ")), error.value
    assert len(str(error.value)) < 1000

def picture(path, seed, mode="RGB", size=16):
    """Write a picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)

def make_folder(root):
    """Two classes, c0 and c1, of two pictures each, a.png and b.png; return root."""
    for i in range(4):
        picture(root / f"c{i // 2}" / f"{'ab'[i % 2]}.png", i)
    return root

def cut(path):
    """Leave half of a file."""
    os.truncate(path, path.stat().st_size // 2)

def flip(path):
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)

def damage(path, change):
    """Remove a file or folder (None) or the files in it ("clear"), write bytes, or call."""
    if callable(change):
        change(path)
    elif change == "clear":
        [file.unlink() for file in path.iterdir()]
    elif change is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        path.write_bytes(change)

@pytest.mark.parametrize(("dataset", "shape", "n"), [
    ("digits", (1, 8, 8), (1437, 360)),
    pytest.param("cifar10", (3, 32, 32), (50000, 10000), marks=needs_cifar10)])
def test_digits_and_cifar10(tmp_path, monkeypatch, dataset, shape, n):
    given = config(dataset, DATA, cache=tmp_path)
    all_four = images, labels, test_images, test_labels = [
        *data.load(given), *data.load(given, train=False)]
    assert images.shape == (n[0], *shape) and test_images.shape == (n[1], *shape)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert (images.min(), images.max()) == (0, 255)
    assert set(labels.tolist()) == set(test_labels.tolist()) == set(range(10))
    # sigma_data is the RMS of the pixels: inputs and targets of the network have unit size.
    rms = data.to_float(images[:10000]).square().mean().sqrt().item()
    configs = map(load_config, (ROOT / "config" / dataset).iterdir())
    assert [c.diffusion.sigma_data for c in configs] == pytest.approx([rms] * 4, rel=0.03)
    if dataset == "cifar10":
        mean = images.double().mean((0, 2, 3)) / 255
        np.testing.assert_allclose(mean, [0.49139968, 0.48215841, 0.44653091], atol=1e-6)
        assert labels.bincount().tolist() == [5000] * 10
        assert test_labels.bincount().tolist() == [1000] * 10
        monkeypatch.setattr(CIFAR10, "__init__", None)      # They are kept decoded.
        assert all(map(torch.equal, all_four, [*data.load(given), *data.load(given, train=False)]))

@needs_tiny
def test_tinyimagenet_in_its_original_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TINY_SIZES", {True: 5000, False: 2000})
    shutil.unpack_archive(DATA / "tiny-imagenet-200-small.zip", tmp_path)
    folder, given = tmp_path / "tiny-imagenet-200", config("tinyimagenet", tmp_path)
    wnids = sorted((folder / "wnids.txt").read_text().split())
    (images, labels), (test_images, test_labels) = data.load(given), data.load(given, train=False)
    assert images.shape == (5000, 3, 64, 64) and test_images.shape == (2000, 3, 64, 64)
    assert labels.bincount().tolist() == [25] * 200
    assert test_labels.bincount().tolist() == [10] * 200
    def pixels(path):
        return np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1).tobytes()
    rows = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    for i in (0, 777, 1999):
        name, wnid = rows[i].split("\t")[:2]
        assert test_labels[i] == wnids.index(wnid)
        assert test_images[i].numpy().tobytes() == pixels(folder / "val" / "images" / name)
    for label in (0, 123, 199):
        expected = set(map(pixels, (folder / "train" / wnids[label] / "images").iterdir()))
        assert {image.numpy().tobytes() for image in images[labels == label]} == expected
    gray = [path for path in folder.glob("*/**/*.JPEG") if Image.open(path).mode == "L"]
    channels_equal = sum((x == x[:, :1]).flatten(1).all(1).sum() for x in (images, test_images))
    assert len(gray) == 114 and channels_equal >= 114

def test_folder_with_train_and_val(tmp_path):
    make_folder(tmp_path / "train")
    for shape in ([3, 8, 8], [1, 8, 8]):
        images, labels = data.load(config("folder", tmp_path, shape))
        assert images.shape == (4, *shape) and labels.tolist() == [0, 0, 1, 1]
    says("no val or val.npz", data.load, config("folder", tmp_path), False)
    (make_folder(tmp_path / "val") / "c0" / "a.png").unlink()
    assert data.load(config("folder", tmp_path), train=False)[1].tolist() == [0, 1, 1]
    (tmp_path / "val" / "c0").rename(tmp_path / "val" / "z")        # Its rank is another label.
    says(f"class 2 (c0, z) … {tmp_path}/train or … val", data.load, config("folder", tmp_path), 0)
    images, labels = data.load(config("folder", tmp_path / "val" / "z"))     # Without classes.
    assert images.shape == (1, 3, 16, 16) and labels.tolist() == [-1]

@pytest.mark.parametrize(("mode", "name"), [
    ("L", "0.png"), ("LA", "0.png"), ("RGBA", "0.png"), ("P", "0.png"),
    ("CMYK", "0.tif"), ("YCbCr", "0.jpg"), ("I;16", "0.png")])
def test_images_of_other_modes_and_sizes(tmp_path, mode, name):
    ramp = np.tile(np.arange(0, 256, 4, np.uint8), (64, 1))[..., None].repeat(3, 2)
    image = (Image.fromarray((ramp[..., 0].astype(np.uint16) << 8) + 255) if mode == "I;16" else
             Image.fromarray(ramp).convert(mode))
    image.save(tmp_path / name)
    expected = ramp.astype(float).reshape(32, 2, 32, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    for shape in ([3, 32, 32], [1, 32, 32]):
        decoded = image_files.decode_image(tmp_path / name, shape[0], shape[1:])
        assert decoded.shape == tuple(shape) and np.abs(decoded - expected).mean() < 6
    gray = image_files.is_gray(tmp_path / name)
    whole = image_files.decode_image(tmp_path / name, 1 if gray else 3)
    assert gray == (mode in ("L", "LA", "I;16"))
    assert whole.shape == (1 if gray else 3, 64, 64) and whole.dtype == np.uint8
    assert np.abs(whole - ramp.astype(float).transpose(2, 0, 1)).mean() < (20 if mode == "P" else 6)

def test_images_are_cropped_in_the_centre(tmp_path):
    stripes = np.repeat(np.uint8([0, 255, 0]), 8)[None, :, None].repeat(8, 0).repeat(3, 2)
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    assert (image_files.decode_image(tmp_path / "wide.png", 3, [8, 8]) == 255).all()
    Image.new("RGB", (1, 5_000_000), (9, 99, 199)).save(tmp_path / "column.png")
    # Resized first it would take 15 GB.
    column = image_files.decode_image(tmp_path / "column.png", 3, [32, 32])
    assert column[:, 0, 0].tolist() == [9, 99, 199]

N02, NOTES, TEXT = "train/n02/images", "val/val_annotations.txt", "wnids.txt"

@pytest.mark.parametrize(("part", "change", "words"), [
    (TEXT, None, "No such file"), (TEXT, b"\xff", "decode"), (N02, None, "/train: … one has n02"),
    (TEXT, b" ", "/train: … only one has 2 (n01, n02)"), (TEXT, b"n01\n", "/train: … has n02"),
    ("train", None, "No such file"), ("train/n02", None, "/train: … n02"),
    (N02, "clear", "/train: … n02"), (f"{N02}/1.JPEG", None, "/train: 5 images of 2 … has 6"),
    (f"{N02}/1.JPEG", b"text", "is not a whole image"),
    (f"{N02}/1.JPEG", cut, "is not a whole image … truncated"), (NOTES, None, "No such file"),
    (NOTES, b"\xff", "decode"), (NOTES, b"", "one has 2 (n01, n02)"), (NOTES, b"0.JPEG", "unp"),
    (NOTES, b"0.JPEG\tn09\n", "n09"), ("val/images/3.JPEG", None, "No such file")])
def test_damaged_tinyimagenet(tmp_path, monkeypatch, part, change, words):
    monkeypatch.setattr(data, "TINY_SIZES", {True: 6, False: 6})
    folder, given = tmp_path / "tiny-imagenet-200", config("tinyimagenet", tmp_path)
    for i in range(6):
        picture(folder / "train" / f"n0{1 + i % 2}" / "images" / f"{i}.JPEG", i, size=64)
        picture(folder / "val" / "images" / f"{i}.JPEG", i)
    (folder / "wnids.txt").write_text("n02\nn01\n")
    (folder / NOTES).write_text("".join(f"{i}.JPEG\tn0{1 + i % 2}\t0\t0\n" for i in range(6)))
    train = not part.startswith("val")
    assert data.load(given, train)[1].tolist() == ([0, 0, 0, 1, 1, 1] if train else [0, 1] * 3)
    damage(folder / part, change)
    words = f"{folder}{'' if words[0] == '/' else f'/{part} … '}{words}"
    remedy = data.TINY_URL if "whole image" in words or part.startswith("val/images") else (
        f"remove {folder} to download it again")
    says(f"{words} … {remedy}", data.load, given, train)

@pytest.mark.parametrize(("part", "change", "words"), [
    ("c1", "clear", "no images"), ("c2", Path.mkdir, "no images"), ("", None, "is missing"),
    ("c0/a.png", b"text", "replace or remove it"), ("c0/a.png", b"", "replace or remove it"),
    ("c0/a.png", cut, "replace or remove it"), ("c0/e.tif", lambda p: picture(p, 0, "F"), "32 b"),
    ("c0/a.png", lambda path: Image.new("1", (20000, 10000)).save(path), "exceeds limit"),
    ("c0/d.png", lambda path: path.symlink_to("nowhere"), "(No such file")])
def test_damaged_folder(tmp_path, part, change, words):
    damage(make_folder(tmp_path) / part, change)
    named = f"{tmp_path}/{part} is not a whole image" if "/" in part else str(tmp_path)
    says(f"{named} … {words}", data.load, config("folder", tmp_path))

@needs_cifar10
@pytest.mark.parametrize(("name", "change"), [
    ("data_batch_3", cut), ("test_batch", flip), ("data_batch_5", None), ("batches.meta", cut)])
def test_damaged_cifar10(tmp_path, name, change):
    folder = tmp_path / "cifar-10-batches-py"
    shutil.copytree(DATA / folder.name, folder, copy_function=lambda source, to: (
        shutil.copyfile if Path(to).name == name else os.symlink)(source, to))
    damage(folder / name, change)
    says(f"{folder / name} is missing, damaged or cut … remove {folder} to download it again",
         data.load, config("cifar10", tmp_path))

@pytest.mark.parametrize(("dataset", "words"), [
    ("cifar10", "cs.toronto.edu … /cifar-10-batches-py … c58f30108f718f92721af3b95e74349a"),
    ("cifar100", "cs.toronto.edu … /cifar-100-python … eb9058c3a382ffc7106e4002c42a8d85"),
    ("tinyimagenet", "stanford.edu … /tiny-imagenet-200 … 90528d7ca1a48142e341f4ef8d21d0de")])
def test_without_a_network_it_says_how_by_hand(tmp_path, monkeypatch, dataset, words):
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=OSError("no network")))
    says(f"{tmp_path} … no network … {words}", data.load, config(dataset, tmp_path))

@pytest.fixture(params=["zip", "gztar"])
def server(tmp_path, monkeypatch, request):
    """A server of a folder's archive, data.fetch's `args`, its `fault`, how much it has `sent`."""
    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline().strip():
                pass
            httpd.sent += 1
            body = httpd.archive.read_bytes()
            head = f"HTTP/1.0 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            self.wfile.write({
                "not there": b"HTTP/1.0 404 ?\r\n\r\n", "no HTTP": b"SSH-2\r\n", None: head + body,
                "wrong": head + bytes(len(body))}.get(httpd.fault, head + body[:len(body) // 2]))
            if httpd.fault == "stalls":
                httpd.go_on.wait(30)

    monkeypatch.setenv("no_proxy", "*")
    make_folder(tmp_path / "set")
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.fault, httpd.sent, httpd.go_on = None, 0, threading.Event()
        httpd.archive = Path(shutil.make_archive(tmp_path / "set", request.param, tmp_path, "set"))
        url = f"http://127.0.0.1:{httpd.server_address[1]}/{httpd.archive.name}"
        httpd.args = "Set", url, calculate_md5(httpd.archive), tmp_path / "root" / "set"
        threading.Thread(target=httpd.serve_forever, args=[0.01]).start()
        yield httpd
        httpd.go_on.set()
        httpd.shutdown()

def left(folder):
    """What lies beside a folder, but for locks."""
    return sorted(path.name for path in folder.parent.iterdir() if path.suffix != ".lock")

def arrives(server, requests, runs=1):
    """So many runs at once leave the folder and the archive alone, after so many requests."""
    server.fault, server.sent, folder = None, 0, server.args[-1]
    with ThreadPoolExecutor(runs) as pool:
        list(pool.map(lambda _: data.fetch(*server.args), range(runs)))
    assert left(folder) == ["set", server.archive.name] and server.sent == requests
    assert len(list(folder.glob("c?/?.png"))) == 4 and not (folder / "stale").exists()

def test_downloads(server):
    """Faulty ones leave nothing behind; an archive that lies there is unpacked if it is whole."""
    _, url, md5, folder = server.args
    words = f"{url} … {md5} … {folder} … could not be downloaded"
    for server.fault in ("cut", "wrong", "not there", "no HTTP"):
        says(words, data.fetch, *server.args)
        assert left(folder) == []
    arrives(server, requests=2)         # torchvision asks once for redirects, once for the file.
    arrives(server, requests=0)
    shutil.rmtree(folder)
    arrives(server, requests=0)
    shutil.rmtree(folder)
    cut(folder.with_name(server.archive.name))
    server.fault = "not there"
    says(words, data.fetch, *server.args)
    assert left(folder) == [server.archive.name]
    arrives(server, requests=2)

@pytest.mark.parametrize("server", ["zip"], indirect=True)
def test_killed_download_is_begun_anew_and_two_runs_download_once(server):
    code = ("import sys, pathlib; from edm2 import data; "
            "data.fetch(*sys.argv[1:4], pathlib.Path(sys.argv[4]))")
    server.fault, partial = "stalls", server.args[-1].with_name(".set.partial")
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, server.args)], cwd=ROOT)
    wait_until(lambda: server.sent == 2 and list(partial.glob("*")))
    process.kill()
    assert process.wait() < 0 and left(partial) == [partial.name]
    (partial / "set" / "stale").mkdir(parents=True)         # As if it had been unpacking.
    arrives(server, requests=2, runs=2)

@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A config of a folder of images, kept decoded, and the folder; data.decode counts."""
    monkeypatch.setattr(data, "decode", Mock(wraps=data.decode))
    folder = make_folder(tmp_path / "images")
    return config("folder", folder, cache=tmp_path / "cache"), folder

def loaded(given, expected, decoded):
    """data.load gives what is expected, and has by now decoded so many sets."""
    assert all(map(torch.equal, expected, data.load(given))) and data.decode.call_count == decoded

def test_a_data_set_is_decoded_once(kept, tmp_path, monkeypatch, capsys):
    given, folder = kept
    (folder / "c0" / "2.txt").symlink_to("nowhere")         # Keeps nothing from being kept.
    first = data.load(given)
    assert [path.suffix for path in sorted(Path(given.cache_dir, "data").iterdir())] == [
        ".npy", ".npz"]
    loaded(given, first, 1)
    data.load(config("folder", folder, [3, 8, 8], given.cache_dir))     # Another shape.
    loaded(given, first, 2)
    monkeypatch.setattr(data, "DECODED", data.DECODED + 1)
    loaded(given, first, 3)
    make_folder(tmp_path / "split" / "train")
    split = config("folder", tmp_path / "split", cache=given.cache_dir)
    loaded(split, first, 4)
    (tmp_path / "split" / "log.txt").write_text("what lies beside train/ does not count")
    loaded(split, first, 4)
    loaded(config("folder", folder), first, 5)
    assert "2.txt left out" in capsys.readouterr().err
    (tmp_path / "a.png").touch()
    loaded(config("folder", folder, cache=tmp_path / "a.png"), first, 6)
    assert "a.png" in (err := capsys.readouterr().err) and err.count("not kept for the next") == 1

def test_changed_sources_are_decoded_anew(kept):
    given, f = kept
    data.load(given)
    for i, change in enumerate([
            lambda: picture(f / "c0/a.png", 9), lambda: picture(f / "c0/c.png", 9),
            (f / "c0/a.png").unlink, lambda: (f / "c1").rename(f / "c2"),
            lambda: (f / "c0/b.png").rename(f / "c2/d.png")]):
        change()
        again = data.load(given)
        loaded(given, again, 2 * i + 2)
        loaded(config("folder", f), again, 2 * i + 3)
    (f / "c9").mkdir()
    says("class c9", data.load, given)

@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("change", [flip, cut, b"", b"[1, 2]", "code"])
def test_a_damaged_kept_data_set_is_decoded_anew(kept, tmp_path, capsys, suffix, change):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "it ran"), "w")
    first, (path,) = data.load(kept[0]), Path(kept[0].cache_dir, "data").glob(f"*{suffix}")
    first = tuple(tensor.clone() for tensor in first)
    if change == "code" and suffix == ".npy":
        np.save(path, np.array([Bomb()], object))
    elif change == "code":
        np.savez(path, labels=np.array([Bomb()], object), sha256=data.digest(first[0]))
    else:
        damage(path, change)
    loaded(kept[0], first, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and "made anew" in line
    loaded(kept[0], first, 2)
    assert not (tmp_path / "it ran").exists()

def test_kept_images_are_mapped_not_read(kept):
    """So the processes of a machine share them; what one writes there stays its own."""
    for _ in range(2):                      # Decoded, and taken from the cache.
        images, _ = data.load(kept[0])
        (path,) = Path(kept[0].cache_dir, "data").glob("*.npy")
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        assert any(start <= images.data_ptr() < end for start, end in (
            [int(x, 16) for x in line[0].split("-")] for line in lines if line[-1] == str(path)))
        images.zero_()
    assert data.load(kept[0])[0].any() and data.decode.call_count == 1

def test_order_is_a_function_of_seed_and_epoch():
    order = data.epoch_order(1000, 1, 2)
    data.epoch_order.cache_clear()
    assert torch.equal(order, data.epoch_order(1000, 1, 2))
    assert sorted(order.tolist()) == list(range(1000))
    for other in ((1, 3), (2, 2)):
        assert (order == data.epoch_order(1000, *other)).float().mean() < 0.02

def test_batch_is_in_minus_one_to_one_and_flips():
    images, cpu = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8), torch.device("cpu")
    x = data.batch(images, torch.tensor([3, 0]), cpu, torch.tensor([False, True]))
    assert x.dtype == torch.float32 and x.max() == 1 and x.min() == -1
    torch.testing.assert_close(x[0], images[3].float() / 127.5 - 1)
    torch.testing.assert_close(x[1], (images[0].float() / 127.5 - 1).flip(-1))
    back = (data.batch(images, torch.arange(4), cpu) * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    assert torch.equal(back, images)

def test_png_and_grid(tmp_path):
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    for x in (images[0], images[:3, 0]):                # Gray and RGB.
        image_files.save_png(x, tmp_path / "a.png")
        assert np.array_equal(image_files.decode_image(tmp_path / "a.png", len(x)), x)
    grid = image_files.grid(images, 3)
    assert grid.shape == (3, 2 * 34 + 2, 3 * 34 + 2)
    assert image_files.grid(images[:1], 3).shape == (3, 34 + 2, 3 * 34 + 2)
    assert torch.equal(grid[0, 2:34:4, 2:34:4], images[0, 0])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
