"""Damaged data sets, and downloads that are cut, wrong or killed: each is one clear line, or is begun anew.

Small data sets in the layouts of the real ones, and the real ones where they lie.
"""

import contextlib
import http.server
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torchvision
from conftest import DATA, ROOT, needs_cifar10, needs_tiny, tiny_config
from PIL import Image
from test_errors import refused
from torchvision.datasets.utils import calculate_md5

import data
from runtime import UserError


def config(dataset, root):
    """What data.load reads of a config."""
    shape = [3, 64, 64] if dataset == "tinyimagenet" else [3, 32, 32]
    return {"dataset": dataset, "data_root": str(root), "cache_dir": None, "network": {"image_shape": shape}}


def says(dataset, root, *words, train=True):
    """data.load raises a UserError that is one sane line with all of `words`."""
    with pytest.raises(UserError) as error:
        data.load(config(dataset, root), train)
    for word in words:
        assert str(word) in str(error.value), error.value
    assert len(str(error.value)) < 1000 and "Traceback" not in str(error.value)


def picture(seed, mode="RGB", size=64):
    """A picture of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).convert(mode)


def make_folder(root):
    """Two classes of three pictures."""
    for i in range(6):
        path = root / "abc"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return root


def make_tiny(root):
    """Tiny ImageNet of two classes with three training images each, and four for validation; return its folder."""
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("n02\nn01\n")
    for i in range(6):
        path = folder / "train" / f"n0{1 + i % 2}" / "images" / f"{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    for i in range(4):
        picture(i).save(folder / "val" / "images" / f"val_{i}.JPEG")
    (folder / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{i}.JPEG\tn0{1 + i % 2}\t0\t0\t62\t62\n" for i in range(4)))
    return folder


def cut(path):
    """Leave half of a file."""
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flip_a_byte(path):
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


TINY = "remove {folder} to download it again"


@pytest.mark.parametrize(("damage", "words", "train"), [
    (lambda f: (f / "wnids.txt").unlink(), ["wnids.txt", "No such file", TINY], True),
    (lambda f: (f / "wnids.txt").write_text(" \n"), ["train is damaged", "n01", TINY], True),
    (lambda f: (f / "wnids.txt").write_bytes(b"n01\n\xff\xfe"), ["wnids.txt is damaged", "decode", TINY], True),
    (lambda f: (f / "wnids.txt").write_text("n01\n"), ["wnids.txt differ in n02", TINY], True),
    (lambda f: shutil.rmtree(f / "train"), ["train", "No such file", TINY], True),
    (lambda f: shutil.rmtree(f / "train" / "n02"), ["differ in n02", TINY], True),
    (lambda f: shutil.rmtree(f / "train" / "n02" / "images"), ["n02/images", "No such file", TINY], True),
    (lambda f: [p.unlink() for p in (f / "train" / "n02" / "images").iterdir()], ["n02/images", "no images"], True),
    (lambda f: (f / "train" / "n01" / "images" / "2.JPEG").write_text("text"), ["2.JPEG is not a whole", TINY], True),
    (lambda f: cut(f / "train" / "n01" / "images" / "2.JPEG"), ["2.JPEG is not a whole", "truncated", TINY], True),
    (lambda f: (f / "val" / "val_annotations.txt").unlink(), ["val_annotations.txt", "No such file", TINY], False),
    (lambda f: (f / "val" / "val_annotations.txt").write_text(""), ["val_annotations.txt is damaged", "empty"], False),
    (lambda f: (f / "val" / "val_annotations.txt").write_text("val_0.JPEG"), ["val_annotations.txt is damaged"], False),
    (lambda f: flip_high(f / "val" / "val_annotations.txt"), ["val_annotations.txt is damaged", "decode", TINY], False),
    (lambda f: (f / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn09\n"), ["no class 'n09'", TINY], False),
    (lambda f: (f / "val" / "images" / "val_3.JPEG").unlink(), ["val_3.JPEG", "No such file", TINY], False),
])
def test_damaged_tinyimagenet(tmp_path, damage, words, train):
    folder = make_tiny(tmp_path)
    images, labels = data.load(config("tinyimagenet", tmp_path), train)
    assert len(images) == (6 if train else 4) and labels.tolist() == ([0, 0, 0, 1, 1, 1] if train else [0, 1, 0, 1])
    damage(folder)
    says("tinyimagenet", tmp_path, *(word.format(folder=folder) for word in words), train=train)


def flip_high(path):
    """Make a text no UTF-8."""
    path.write_bytes(path.read_bytes() + b"\xff")


def bomb(path):
    """A PNG whose header promises 20,000 times 20,000 pixels."""
    picture(0).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (20000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


def link_to_nothing(path):
    """A symbolic link in the place of a file, to a file that is not there."""
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(("damage", "words"), [
    (lambda f: [p.unlink() for p in (f / "b").iterdir()], ["{folder}", "classes b"]),
    (lambda f: (f / "c").mkdir(), ["{folder}", "classes c"]),
    (lambda f: [shutil.rmtree(f / name) for name in "ab"], ["{folder}", "class folder"]),
    (lambda f: shutil.rmtree(f), ["{folder} is not a folder"]),
    (lambda f: (f / "a" / "0.png").write_text("text"), ["a/0.png is not a whole image", "replace or remove it"]),
    (lambda f: (f / "a" / "0.png").write_bytes(b""), ["a/0.png is not a whole image", "replace or remove it"]),
    (lambda f: cut(f / "a" / "0.png"), ["a/0.png is not a whole image", "replace or remove it"]),
    (lambda f: bomb(f / "a" / "0.png"), ["a/0.png is not a whole image", "exceeds limit", "replace or remove it"]),
    (lambda f: link_to_nothing(f / "a" / "0.png"), ["a/0.png is not a whole image (No such file"]),
    (lambda f: picture(0, "F").save(f / "a" / "1.tif"), ["a/1.tif is not a whole image", "32 bits"]),
    (lambda f: (f / "a" / "0.png").chmod(0), ["a/0.png is not a whole image (Permission denied)"]),
])
def test_damaged_folder(tmp_path, damage, words):
    folder = make_folder(tmp_path / "images")
    damage(folder)
    if "Permission" in words[0] and os.access(folder / "a" / "0.png", os.R_OK):
        pytest.skip("root may read all files")
    says("folder", folder, *(word.format(folder=folder) for word in words))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "YCbCr", "I;16", "gif"])
def test_images_of_other_modes_and_sizes(tmp_path, mode):
    (tmp_path / "a").mkdir()
    ramp = np.tile(np.arange(0, 256, 4, np.uint8), (64, 1))[..., None].repeat(3, 2)
    image = Image.fromarray(ramp)
    if mode == "I;16":
        image = Image.fromarray((ramp[..., 0].astype(np.uint16) << 8) + 255)
    elif mode != "gif":
        image = image.convert(mode)
    name = {"CMYK": "0.tif", "YCbCr": "0.jpg"}.get(mode, "0.png")
    image.save(tmp_path / "a" / name, "GIF" if mode == "gif" else None)
    images, _ = data.load(config("folder", tmp_path))
    expected = ramp.astype(float).reshape(32, 2, 32, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(images[0].numpy() - expected).mean() < 6


def test_an_image_of_one_column(tmp_path):
    """Resized before it is cropped, it would take 15 GB."""
    (tmp_path / "a").mkdir()
    Image.new("RGB", (1, 5_000_000), (9, 99, 199)).save(tmp_path / "a" / "0.png")
    images, _ = data.load(config("folder", tmp_path))
    assert images[0, :, 0, 0].tolist() == [9, 99, 199]


@needs_cifar10
@pytest.mark.parametrize(("name", "damage"), [
    ("data_batch_3", cut), ("test_batch", flip_a_byte), ("data_batch_5", os.unlink), ("batches.meta", cut)])
def test_damaged_cifar10(tmp_path, name, damage):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for path in (DATA / folder.name).iterdir():
        (folder / path.name).symlink_to(path)
    (folder / name).unlink()
    shutil.copyfile(DATA / folder.name / name, folder / name)
    damage(folder / name)
    says("cifar10", tmp_path, f"{folder / name} is missing, damaged or cut", f"remove {folder} to download it again")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["no image", "empty class", "wnids", "batch", "no network"])
def test_damaged_data_as_a_user_meets_them(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")                  # Where nothing answers.
    dataset, shape = "folder", [3, 64, 64]
    if kind == "no image":
        (make_folder(tmp_path) / "a" / "2.png").write_text("text")
        words = ["a/2.png is not a whole image"]
    elif kind == "empty class":
        (make_folder(tmp_path) / "c").mkdir()
        words = [str(tmp_path), "classes c"]
    elif kind == "batch":
        (tmp_path / "cifar-10-batches-py").mkdir()
        (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"short")
        dataset, shape, words = "cifar10", [3, 32, 32], ["data_batch_1 is missing, damaged or cut", "remove"]
    else:
        if kind == "wnids":
            (make_tiny(tmp_path) / "wnids.txt").write_text("n0")
        dataset, words = "tinyimagenet", ["wnids.txt differ in n0"] if kind == "wnids" else ["could not be downloaded"]
    path = tiny_config(tmp_path, dataset=dataset, data_root=str(tmp_path), network={"image_shape": shape})
    refused(tmp_path, "train.py", "--config", path, words=words)


# ----------------------------------------------------------------------------------------------------------------------
# Downloads from a server on this machine.

@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A small CIFAR-10 and a small Tiny ImageNet as archives with their MD5 in place; return their names and bytes."""
    monkeypatch.setenv("no_proxy", "*")
    make_tiny(tmp_path)
    shutil.make_archive(tmp_path / "tiny-imagenet-200", "zip", tmp_path, "tiny-imagenet-200")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    lists = {}
    for i, name in enumerate(["data_batch_1", "test_batch", "batches.meta"]):
        (folder / name).write_bytes(pickle.dumps(
            {"data": np.full((2, 3072), i, np.uint8), "labels": [0, 1], "label_names": ["a", "b"]}))
        lists[name] = calculate_md5(folder / name)
    shutil.make_archive(tmp_path / "cifar-10-python", "gztar", tmp_path, folder.name)
    found = {name: (tmp_path / name).read_bytes() for name in ("tiny-imagenet-200.zip", "cifar-10-python.tar.gz")}
    monkeypatch.setattr(data, "TINY_MD5", calculate_md5(tmp_path / "tiny-imagenet-200.zip"))
    small = {"tgz_md5": calculate_md5(tmp_path / "cifar-10-python.tar.gz"),
             "train_list": [["data_batch_1", lists["data_batch_1"]]],
             "test_list": [["test_batch", lists["test_batch"]]],
             "meta": {"filename": "batches.meta", "key": "label_names", "md5": lists["batches.meta"]}}
    for name, value in small.items():
        monkeypatch.setattr(torchvision.datasets.CIFAR10, name, value)
    return found


@pytest.fixture
def server(archives, monkeypatch):
    """A server of the archives; its `fault` says what it does wrong, its `sent` which names it has sent."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = archives[self.path[1:]]
            self.server.sent.append(self.path[1:])
            if self.server.fault == "not there":
                return self.send_error(404)
            if self.server.fault == "no HTTP":
                return self.wfile.write(b"SSH-2.0-dropbear\r\n")
            self.send_response(200)
            self.send_header("Content-Length", len(body))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write({"cut": body[:len(body) // 2], "stalls": body[:len(body) // 2],
                                  "wrong": body[:-1] + b"?"}.get(self.server.fault, body))
                self.wfile.flush()
                if self.server.fault == "stalls":
                    self.server.go_on.wait(30)

        def log_message(self, *args):
            """Say nothing."""

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.fault, httpd.sent, httpd.go_on = None, [], threading.Event()
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setattr(data, "TINY_URL", f"{httpd.url}/tiny-imagenet-200.zip")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{httpd.url}/cifar-10-python.tar.gz")
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield httpd
    httpd.go_on.set()
    httpd.shutdown()
    thread.join()
    httpd.server_close()


WHOLE = {"tinyimagenet": ["tiny-imagenet-200", "tiny-imagenet-200.zip"],
         "cifar10": ["cifar-10-batches-py", "cifar-10-python.tar.gz"]}


def arrives(dataset, root):
    """data.load gives the whole data set, and leaves its folder and archive alone behind."""
    assert len(data.load(config(dataset, root))[0]) == {"tinyimagenet": 6, "cifar10": 2}[dataset]
    assert sorted(path.name for path in root.iterdir()) == WHOLE[dataset]


@pytest.mark.parametrize("dataset", WHOLE)
@pytest.mark.parametrize("fault", ["cut", "wrong", "not there", "no HTTP"])
def test_faulty_downloads_leave_nothing_behind(tmp_path, server, dataset, fault):
    root = tmp_path / "root"
    server.fault = fault
    for _ in range(2):
        says(dataset, root, server.url, "could not be downloaded", f"so that {root / WHOLE[dataset][0]} exists")
        assert list(root.iterdir()) == []
    server.fault = None
    arrives(dataset, root)
    server.sent.clear()
    arrives(dataset, root)
    assert server.sent == []


@pytest.mark.parametrize("dataset", WHOLE)
def test_archive_that_lies_there(tmp_path, archives, server, dataset):
    """A whole one is unpacked; one that is cut is not, and is downloaded again."""
    root = tmp_path / "root"
    root.mkdir()
    folder, archive = WHOLE[dataset]
    (root / archive).write_bytes(archives[archive])
    arrives(dataset, root)
    assert server.sent == []
    shutil.rmtree(root / folder)
    cut(root / archive)
    server.fault = "not there"
    says(dataset, root, "could not be downloaded")
    server.fault = None
    arrives(dataset, root)


def test_two_runs_download_once(tmp_path, server):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: arrives("tinyimagenet", tmp_path / "root"), range(2)))
    assert len(server.sent) == 2                # torchvision asks once for redirects, once for the file.


@pytest.mark.slow
@pytest.mark.parametrize("dataset", WHOLE)
def test_killed_download_is_begun_anew(tmp_path, server, dataset):
    root = tmp_path / "root"
    code = (f"import data, torchvision; data.TINY_URL, data.TINY_MD5 = {data.TINY_URL!r}, {data.TINY_MD5!r}; "
            f"cifar = torchvision.datasets.CIFAR10; cifar.url, cifar.tgz_md5 = {server.url!r} + "
            f"'/cifar-10-python.tar.gz', {torchvision.datasets.CIFAR10.tgz_md5!r}; "
            f"data.load({config(dataset, root)!r})")
    server.fault = "stalls"
    for _ in range(2):
        server.sent.clear()
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while len(server.sent) < 2 or not any(path.is_file() for path in root.rglob("*")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        process.kill()
        process.wait()
        assert [path.name for path in root.iterdir()] == [f".{WHOLE[dataset][0]}.partial"]
    stale = root / f".{WHOLE[dataset][0]}.partial" / WHOLE[dataset][0] / "stale"
    stale.parent.mkdir()
    stale.touch()
    server.fault = None
    arrives(dataset, root)
    assert not (root / stale.parent.name / stale.name).exists()


@needs_tiny
def test_real_tinyimagenet_cut_in_the_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TINY_URL", "http://127.0.0.1:9/tiny-imagenet-200.zip")
    with open(DATA / "tiny-imagenet-200-small.zip", "rb") as f:
        (tmp_path / "tiny-imagenet-200.zip").write_bytes(f.read(5_000_000))
    says("tinyimagenet", tmp_path, "could not be downloaded from http://127.0.0.1:9", "Connection refused")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-imagenet-200.zip"]
