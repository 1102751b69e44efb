"""Data sets: fixed splits, folders with all their faults, augmentation and batching against plain loops."""

import hashlib
import os
import pickle
import signal
import threading
import time
import urllib.error
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from nbs_lib import data as module
from nbs_lib.data import MEAN, STD, Batches, load_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NBS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NBS_DATA", raising=False)
    return tmp_path / "cache" / "data"


def pixels(rng, height, width):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)
    return path


@pytest.fixture
def tree(tmp_path, rng):
    """train/ of 3 + 2 images and test/ of 1 + 2, all 7 high and 5 wide; {file under the root: its pixels}."""
    names = ["train/ant/1.png", "train/ant/2.png", "train/ant/more/0.PNG", "train/bee/1.png", "train/bee/2.png"]
    names += ["test/ant/1.png", "test/bee/1.png", "test/bee/2.png"]
    images = {name: pixels(rng, 7, 5) for name in names}
    for name, image in images.items():
        write(tmp_path / "set" / name, image)
    return tmp_path / "set", images


def load(root, **options):
    return load_data(f"folder:{root}", device="cpu", **options)


def stacked(images, *names):
    return torch.from_numpy(np.stack([images[name] for name in names])).permute(0, 3, 1, 2)


def raw(normalised):
    """The uint8 pixels behind a batch, by the definition of normalising: (pixel / 255 - mean) / std."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
    return ((normalised * std + mean) * 255).round().to(torch.uint8)


# --- digits ---


def test_digits_are_all_there_once_and_split_the_same_way_always():
    torch.manual_seed(1)
    data = load_data(size=8, device="cpu")
    torch.manual_seed(2)
    again = load_data("digits", size=8, augment=False, batch_size=7, device="cpu")
    assert data.classes == tuple("0123456789") and data.input_shape == (3, 8, 8) and not data.skipped
    assert data.train.images.shape == (1437, 3, 8, 8) and data.test.images.shape == (360, 3, 8, 8)
    assert data.train.images.dtype == torch.uint8 and data.train.labels.dtype == torch.int64
    for part, other in ((data.train, again.train), (data.test, again.test)):
        assert torch.equal(part.images, other.images) and torch.equal(part.labels, other.labels)
        assert (part.images == part.images[:, :1]).all()
    images, labels = load_digits(return_X_y=True)
    wanted = sorted((int(y), *np.rint(x / 16 * 255).astype(int)) for x, y in zip(images, labels, strict=True))
    both = torch.cat([data.train.images, data.test.images])[:, 0].flatten(1)
    found = zip(torch.cat([data.train.labels, data.test.labels]).tolist(), both.tolist(), strict=True)
    assert sorted((y, *x) for y, x in found) == wanted
    shares = torch.bincount(data.test.labels) / torch.from_numpy(np.bincount(labels))
    assert (shares - 0.2).abs().max() < 0.01


def test_digits_take_any_size_and_are_never_mirrored():
    data = load_data(size=13, device="cpu")
    assert data.input_shape == (3, 13, 13) and (data.train.crop, data.train.flip, data.train.shuffle) == (
        1,
        False,
        True,
    )
    assert (data.test.crop, data.test.flip, data.test.shuffle) == (0, False, False)
    assert load_data(device="cpu").input_shape == (3, 32, 32)
    assert load_data(augment=False, device="cpu").train.crop == 0


@pytest.mark.parametrize("name", ["mnist", "", "folder", "folder:", "digits:8", "Digits", "cifar10:/data"])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(KeyError, match="Expected a data set out of digits, cifar10, cifar100 or folder:<path>. Got"):
        load_data(name)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"size": 3}, {"size": 0}, {"size": -8}])
def test_sizes_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="Expected batch_size >= 1 and size >= 4 pixels. Got"):
        load_data(**wrong)


# --- batches ---


def numbered(count, height=6, width=5, **options):
    """Images of one value each, their label plus one."""
    labels = torch.arange(count)
    images = (labels + 1).to(torch.uint8).view(-1, 1, 1, 1).expand(count, 3, height, width)
    return Batches(images.contiguous(), labels, **options)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("size", [1, 4, 5])
def test_lengths_are_what_comes_and_only_a_single_last_image_is_left_out(size, shuffle):
    for count in range(12):
        batches = numbered(count, batch_size=size, shuffle=shuffle)
        labels = [labels for _, labels in batches]
        assert len(batches) == len(labels)
        seen = torch.cat([*labels, torch.empty(0, dtype=torch.int64)]).tolist()
        single = shuffle and 1 < size < count and count % size == 1
        assert len(seen) == len(set(seen)) == count - single and set(seen) <= set(range(count))
        if not shuffle:
            assert seen == list(range(count))
        if single:
            assert all(len(part) == size for part in labels)


def test_values_are_normalised_by_channel(rng):
    images = torch.from_numpy(pixels(rng, 5, 6)).permute(2, 0, 1)[None]
    ((batch, labels),) = Batches(images, torch.tensor([3]))
    assert batch.shape == (1, 3, 5, 6) and batch.dtype == torch.float32 and labels.tolist() == [3]
    for channel in range(3):
        wanted = (images[0, channel].double() / 255 - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(batch[0, channel].double(), wanted, atol=1e-6, rtol=1e-5)


def test_labels_follow_their_images_and_an_epoch_is_a_permutation():
    batches = numbered(23, batch_size=4, shuffle=True, crop=2, flip=True)
    torch.manual_seed(0)
    epochs = []
    for _ in range(2):
        seen = []
        for images, labels in batches:
            assert torch.equal(raw(images).amax((1, 2, 3)), (labels + 1).to(torch.uint8))
            seen += labels.tolist()
        epochs.append(seen)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(23)) and epochs[0] != epochs[1]
    torch.manual_seed(0)
    assert [label for _, labels in batches for label in labels.tolist()] == epochs[0]


@pytest.mark.parametrize("crop, flip", [(0, False), (0, True), (2, False), (2, True)])
def test_an_augmented_image_is_a_window_of_the_padded_one(rng, crop, flip):
    height, width, count = 6, 5, 300
    images = torch.from_numpy(rng.integers(1, 256, (count, 3, height, width), dtype=np.uint8))
    batches = Batches(images, torch.arange(count), batch_size=count, crop=crop, flip=flip)
    torch.manual_seed(3)
    ((first, labels),) = batches
    ((other, _),) = batches
    torch.manual_seed(3)
    ((again, _),) = batches
    assert torch.equal(first, again) and torch.equal(first, other) == (not crop and not flip)
    found = []
    for image, label in zip(raw(first).numpy(), labels, strict=True):
        padded = np.pad(images[label].numpy(), ((0, 0), (crop, crop), (crop, crop)))
        for down, right in np.ndindex(2 * crop + 1, 2 * crop + 1):
            window = padded[:, down : down + height, right : right + width]
            found += [(down, right, False)] if (window == image).all() else []
            found += [(down, right, True)] if (window[..., ::-1] == image).all() else []
    assert len(found) == count  # each is one window, and one only
    assert len(set(found)) == (2 * crop + 1) ** 2 * (1 + flip)  # and every shift happens
    if flip:
        assert 0.4 < np.mean([mirrored for *_, mirrored in found]) < 0.6


def test_the_images_themselves_stay_as_they_are():
    batches = numbered(9, shuffle=True, crop=1, flip=True)
    before = batches.images.clone()
    list(batches)
    assert torch.equal(batches.images, before)


def test_subset_takes_as_many_of_each_class_and_always_the_same_ones():
    data = load_data(size=8, device="cpu")
    for count in (10, 57, 200):
        part = data.subset(count)
        per_class = torch.bincount(part.train.labels, minlength=10)
        assert len(part.train.labels) == len(part.train.images) == count and per_class.max() - per_class.min() <= 1
        assert torch.equal(part.train.images, data.subset(count).train.images) and part.test is data.test
        assert part.name == f"digits, 8 px[:{count}]" and (part.train.crop, part.train.shuffle) == (1, True)
        rows = {(int(y), *x.flatten().tolist()) for x, y in zip(data.train.images, data.train.labels, strict=True)}
        chosen = zip(part.train.images, part.train.labels, strict=True)
        assert {(int(y), *x.flatten().tolist()) for x, y in chosen} <= rows
    assert torch.equal(data.subset(1437).train.images, data.train.images)
    for wrong in (9, 0, -1, 1438):
        with pytest.raises(ValueError, match=f"Expected 10..1437 training images. Got {wrong}"):
            data.subset(wrong)


def test_subset_of_uneven_classes(tree):
    root, images = tree
    part = load(root, augment=False).subset(4)
    assert part.train.labels.tolist() == [0, 0, 1, 1]
    wanted = stacked(images, "train/ant/1.png", "train/ant/2.png", "train/bee/1.png", "train/bee/2.png")
    assert torch.equal(part.train.images, wanted)
    assert load(root).subset(5).train.labels.tolist() == [0, 0, 0, 1, 1]


# --- folders ---


def test_folder_gives_every_image_under_its_class(tree):
    root, images = tree
    (root / "train" / "README.txt").write_text("not an image, not in a class")
    (root / "train" / "ant" / "list.csv").write_text("not an image")
    (root / "train" / ".hidden").mkdir()
    data = load(root, batch_size=2)
    assert data.classes == ("ant", "bee") and data.input_shape == (3, 7, 5) and data.skipped == ()
    assert torch.equal(data.train.images, stacked(images, *sorted(name for name in images if name[:5] == "train")))
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1] and data.train.labels.dtype == torch.int64
    assert torch.equal(data.test.images, stacked(images, "test/ant/1.png", "test/bee/1.png", "test/bee/2.png"))
    assert (
        data.test.labels.tolist() == [0, 1, 1]
        and data.train.flip
        and (data.train.batch_size, len(data.train)) == (2, 2)
    )


def test_relative_folders_lie_in_nbs_data(tree, monkeypatch, tmp_path):
    root, _ = tree
    monkeypatch.setenv("NBS_DATA", str(root.parent))
    assert len(load("set").train.labels) == 5
    assert len(load(root).train.labels) == 5  # absolute ones do not
    monkeypatch.setenv("NBS_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        load("set")
    monkeypatch.delenv("NBS_DATA")
    monkeypatch.chdir(root.parent)
    assert load("set").name == "folder:set"


def test_val_stands_in_for_test(tree):
    root, _ = tree
    (root / "test").rename(root / "val")
    assert load(root).test.labels.tolist() == [0, 1, 1]
    write(root / "test" / "ant" / "1.png", np.zeros((7, 5, 3), np.uint8))
    write(root / "test" / "bee" / "1.png", np.zeros((7, 5, 3), np.uint8))
    assert not load(root).test.images.any()  # where there are both, it is test


@pytest.mark.parametrize("missing", ["train", "test", "."])
def test_missing_parts_are_named(tree, missing):
    root, _ = tree
    (root / missing).rename(root.parent / "away")
    with pytest.raises(FileNotFoundError, match=rf"Expected {root} to hold train/<class>/ and test/<class>/"):
        load(root)


def test_folders_without_images_and_mislabelled_ones_are_named(tree):
    root, _ = tree
    (root / "train" / "cow").mkdir()
    with pytest.raises(
        FileNotFoundError, match=rf"in every class folder of {root / 'train'}. Got .*{root / 'train'}/cow"
    ):
        load(root)
    write(root / "train" / "cow" / "1.png", np.zeros((7, 5, 3), np.uint8))
    with pytest.raises(ValueError, match=rf"same class folders in {root / 'train'} and .*Got in one only: {{'cow'}}"):
        load(root)
    (root / "empty" / "train").mkdir(parents=True)
    (root / "empty" / "test").mkdir()
    with pytest.raises(FileNotFoundError, match="Got no class folder"):
        load(root / "empty")


def test_images_of_several_sizes_need_a_size(tree):
    root, _ = tree
    write(root / "train" / "bee" / "3.png", np.zeros((5, 7, 3), np.uint8))
    for skip_bad in (False, True):  # it can be read
        with pytest.raises(ValueError, match=rf"Got {root / 'train'}/bee/3.png of \(5, 7\), others of \(7, 5\)\."):
            load(root, skip_bad=skip_bad)
    assert load(root, size=6).input_shape == (3, 6, 6)
    (root / "train" / "bee" / "3.png").unlink()
    for file in (root / "test").rglob("*.png"):
        write(file, np.zeros((6, 6, 3), np.uint8))
    with pytest.raises(ValueError, match="Expected size= for training and test images of different sizes"):
        load(root)


def test_size_cuts_the_middle(tmp_path, rng):
    wide, high = np.zeros((16, 33, 3), np.uint8), np.zeros((37, 17, 3), np.uint8)
    wide[:, :, 0], wide[:, 8:25] = 255, (0, 255, 0)  # red, the middle green
    high[:, :, 0], high[9:28] = 255, (0, 255, 0)
    flat, exact = np.full((9, 41, 3), (3, 200, 77), np.uint8), pixels(rng, 8, 8)
    odd = pixels(rng, 31, 31)
    for name, image in dict(a=wide, b=high, c=flat, d=exact, e=np.maximum(odd, odd[:, ::-1])).items():
        write(tmp_path / "cut" / "train" / "x" / f"{name}.png", image)
    write(tmp_path / "cut" / "test" / "x" / "a.jpeg", pixels(rng, 11, 3))
    a, b, c, d, e = load(tmp_path / "cut", size=8).train.images
    for image in (a, b):
        assert (image == torch.tensor([0, 255, 0]).view(3, 1, 1)).all()
    assert (c == torch.tensor([3, 200, 77]).view(3, 1, 1)).all()
    assert torch.equal(d, torch.from_numpy(exact).permute(2, 0, 1))
    assert (e.int() - e.flip(2).int()).abs().max() <= 1  # symmetric stays symmetric
    # A ramp over 56 pixels: the cut keeps the middle 49 (7/8) of them, 7 of the ramp per pixel.
    ramp = np.repeat(np.arange(56, dtype=np.uint8)[None, :, None] * 4, 56, 0).repeat(3, 2)
    image = module._read(write(tmp_path / "ramp.png", ramp), 7)
    np.testing.assert_allclose(image[0, 3], 4 * (27.5 + 7 * np.arange(-3, 4)), atol=5)


def test_other_kinds_of_images_become_rgb(tmp_path, rng):
    grey = rng.integers(0, 256, (6, 9), dtype=np.uint8)
    made = {"grey.png": Image.fromarray(grey), "palette.bmp": Image.fromarray(pixels(rng, 6, 9)).quantize(7)}
    made["alpha.png"] = Image.fromarray(rng.integers(0, 256, (6, 9, 4), dtype=np.uint8))
    made["ink.JPG"] = Image.fromarray(pixels(rng, 6, 9)).convert("CMYK")
    made["bit.png"] = Image.fromarray(grey > 99)
    for part in ("train", "val"):
        (tmp_path / "all" / part / "x").mkdir(parents=True)
        for name, image in made.items():
            image.save(tmp_path / "all" / part / "x" / name)
    images = dict(zip(sorted(made), load(tmp_path / "all").train.images, strict=True))
    assert all(image.shape == (3, 6, 9) for image in images.values())
    assert (images["grey.png"] == torch.from_numpy(grey)).all()
    assert set(images["bit.png"].unique().tolist()) == {0, 255}
    for name in ("alpha.png", "palette.bmp"):
        assert torch.equal(images[name], torch.from_numpy(np.array(made[name].convert("RGB"))).permute(2, 0, 1))


def cut_short(path, rng):
    """A JPEG that ends in the middle."""
    write(path, pixels(rng, 40, 40), quality=95)
    path.write_bytes(path.read_bytes()[:-400])
    return path


BAD = {"cut.jpg": cut_short, "empty.png": lambda path, rng: path.touch(), "text.png": lambda p, rng: p.write_text("x")}


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("first", [False, True])
def test_a_bad_image_is_named_and_left_out_only_if_asked(tree, rng, own_cache, name, size, first):
    root, _ = tree
    bad = root / "train" / "ant" / f"{'0' if first else '11'}{name}"
    BAD[name](bad, rng)
    with pytest.raises(ValueError, match=rf"Expected an image. Got {bad}: .*Mend or remove it, or .*skip_bad=True"):
        load(root, size=size)
    assert not list(own_cache.iterdir())
    for _ in range(2):  # every time, not only when the images are decoded
        with pytest.warns(UserWarning, match=rf"1 of 6 images left out: {bad}\.") as caught:
            data = load(root, size=size, skip_bad=True)
        assert caught[0].filename == __file__ and data.skipped == (str(bad),)
        bad.rename(bad.with_suffix(".txt"))
        clean = load(root, size=size)
        bad.with_suffix(".txt").rename(bad)
        assert torch.equal(data.train.images, clean.train.images) and clean.skipped == ()
        assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    bad.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(root, size=size, skip_bad=True)


def test_several_bad_images_are_all_named_and_a_class_of_bad_ones_only_is_refused(tree, rng):
    root, _ = tree
    bad = [cut_short(root / part / "bee" / "1.png", rng) for part in ("train", "test")]
    for path in bad:
        path.write_bytes(b"x")
    with pytest.warns(UserWarning, match="left out") as caught:
        data = load(root, skip_bad=True)
    assert [str(warning.message).split()[0] for warning in caught] == ["1", "1"]
    assert data.skipped == tuple(map(str, bad)) and data.test.labels.tolist() == [0, 1]
    (root / "train" / "bee" / "2.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match="2 of 5"), pytest.raises(ValueError, match=r"train. Got none in \['bee'\]"):
        load(root, skip_bad=True)
    for file in root.rglob("*.*"):
        if file.is_file():
            file.write_bytes(b"x")
    with pytest.warns(UserWarning, match="5 of 5"), pytest.raises(ValueError, match=r"Got none in \['ant', 'bee'\]"):
        load(root, skip_bad=True)


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that are read."""
    names, read = [], module._read

    def counted(file, size):
        names.append(file.name)
        return read(file, size)

    monkeypatch.setattr(module, "_read", counted)
    return names


def test_decoded_images_are_kept_until_a_file_changes(tree, rng, reads, own_cache):
    root, _ = tree
    first = load(root, size=6)
    assert len(reads) == 8 and len(list(own_cache.glob("*.npy"))) == len(list(own_cache.iterdir())) == 2
    reads.clear()
    again = load(root, size=6)
    assert not reads
    for one, two in ((first.train, again.train), (first.test, again.test)):
        assert torch.equal(one.images, two.images) and torch.equal(one.labels, two.labels)
    again.train.images.zero_()  # the caller's own
    assert torch.equal(load(root, size=6).train.images, first.train.images) and not reads
    load(root)
    assert len(reads) == 8 + 2  # another size; one each is read to learn it
    reads.clear()
    new = pixels(rng, 6, 6)
    stat = write(root / "train" / "ant" / "2.png", new).stat()
    os.utime(root / "train" / "ant" / "2.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = load(root, size=6).train.images
    assert len(reads) == 5 and torch.equal(changed[1], torch.from_numpy(new).permute(2, 0, 1))
    assert torch.equal(changed[[0, 2, 3, 4]], first.train.images[[0, 2, 3, 4]])
    (root / "train" / "ant" / "1.png").unlink()
    assert torch.equal(load(root, size=6).train.images, changed[1:])


def many(root, count=200):
    for part, number in (("train", count), ("test", 1)):
        for index in range(number):
            write(root / part / "x" / f"{index:04}.png", np.full((2, 2, 3), index % 256, np.uint8))
    return root


def test_the_order_is_kept_however_many_threads_decode(tmp_path):
    images = load(many(tmp_path / "many"), size=4).train.images
    assert images.amin((1, 2, 3)).tolist() == images.amax((1, 2, 3)).tolist() == list(range(200))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_or_an_interruption_stops_decoding_and_leaves_nothing(tmp_path, monkeypatch, own_cache, error):
    root, read, done, lock = many(tmp_path / "many"), module._read, [], threading.Lock()

    def slow(file, size):
        with lock:
            done.append(file)
        time.sleep(0.2 if file.name > "0020" else 0)
        if file.name == "0005.png" and error is ValueError:
            raise ValueError("bad")
        return read(file, size)

    def progress(reading, *_, **__):
        for place, image in enumerate(reading):
            if place == 5 and error is KeyboardInterrupt:
                raise error
            yield image

    with monkeypatch.context() as patch:
        patch.setattr(module, "_read", slow)
        patch.setattr(module, "tqdm", progress)
        with pytest.raises(error):
            load(root, size=4)
    assert 5 < len(done) < 150 and not list(own_cache.iterdir())
    assert len(load(root, size=4).train.images) == 200


def test_killed_decoding_leaves_nothing_wrong(tmp_path, own_cache):
    root, read = many(tmp_path / "many"), module._read
    child = os.fork()
    if not child:  # in the child: killed half-way

        def killed(file, size):
            if file.name == "0100.png":
                os.kill(os.getpid(), signal.SIGKILL)
            return read(file, size)

        try:
            module._read = killed
            load(root, size=4)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not list(own_cache.glob("*.npy")) and len(list(own_cache.glob("*.part"))) == 1
    images = load(root, size=4).train.images
    assert images.amax((1, 2, 3)).tolist() == list(range(200))
    assert [file.suffix for file in own_cache.iterdir()] == [".npy"] * 2  # what was left half-done is gone


def test_decoding_leaves_alone_what_another_process_decodes(tmp_path, own_cache):
    root, other, read = many(tmp_path / "many"), many(tmp_path / "other"), module._read
    (ready, told), (go, gone) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:  # in the child: waits half-way until the parent has decoded

        def slow(file, size):
            if file.name == "0100.png":
                os.write(told, b"x")
                os.read(go, 1)
            return read(file, size)

        status = 1
        try:
            module._read = slow
            status = int(len(load(other, size=4).train.images) != 200)
        finally:
            os._exit(status)
    os.read(ready, 1)
    (part,) = own_cache.glob("*.part")
    load(root, size=4)
    assert part.exists()
    os.write(gone, b"xx")
    assert os.waitpid(child, 0)[1] == 0
    assert [file.suffix for file in own_cache.iterdir()] == [".npy"] * 4


# --- CIFAR ---


def cifar(root, name, rng, monkeypatch, whole=True):
    """A folder as torchvision unpacks it, with a few images; its sums are made known to torchvision if `whole`."""
    made = getattr(module.datasets, name.upper())
    folder, sums = root / made.base_folder, {}
    folder.mkdir(parents=True)

    def dump(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        sums[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()

    labels = "labels" if name == "cifar10" else "fine_labels"
    names = [f"class {index}" for index in range(10 if name == "cifar10" else 100)]
    parts = {}
    for file, _ in made.train_list + made.test_list:
        parts[file] = {"data": rng.integers(0, 256, (3, 3072), dtype=np.uint8), labels: rng.integers(0, 10, 3).tolist()}
        dump(file, parts[file])
    dump(made.meta["filename"], {made.meta["key"]: names})
    if whole:
        for each in ("train_list", "test_list"):
            monkeypatch.setattr(made, each, [[file, sums[file]] for file, _ in getattr(made, each)])
        monkeypatch.setattr(made, "meta", made.meta | {"md5": sums[made.meta["filename"]]})
    train = [parts[file] for file, _ in made.train_list]
    return np.concatenate([part["data"] for part in train]), sum((part[labels] for part in train), []), tuple(names)


@pytest.fixture
def offline(monkeypatch):
    """No download; the folders where one was tried."""
    tried = []

    def fail(url, root, **_):
        tried.append(str(root))
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(module.datasets.cifar, "download_and_extract_archive", fail)
    return tried


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_comes_from_torchvisions_folder(tmp_path, rng, monkeypatch, offline, name):
    monkeypatch.setenv("NBS_DATA", str(tmp_path / "sets"))
    pictures, labels, names = cifar(tmp_path / "sets", name, rng, monkeypatch)
    data = load_data(name, batch_size=4, device="cpu")
    assert torch.equal(data.train.images, torch.from_numpy(pictures.reshape(-1, 3, 32, 32)))
    assert data.train.labels.tolist() == labels and data.train.labels.dtype == torch.int64
    assert data.classes == names and data.test.images.shape == (3, 3, 32, 32) and not offline
    assert (data.train.crop, data.train.flip, data.input_shape) == (4, True, (3, 32, 32))
    for images, _ in data.train:
        assert images.shape[1:] == (3, 32, 32)
    with pytest.raises(ValueError, match=f"Expected size 32 for {name}. Got 64"):
        load_data(name, size=64)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_that_is_missing_or_damaged_says_what_to_do(tmp_path, rng, monkeypatch, offline, name, own_cache):
    message = (
        rf"Expected {name} in {{}} \(NBS_DATA names another folder\), or a connection .*use folder:<path>.*no network"
    )
    with pytest.raises(FileNotFoundError, match=message.format(own_cache)):
        load_data(name)
    monkeypatch.setenv("NBS_DATA", str(tmp_path / "sets"))
    cifar(tmp_path / "sets", name, rng, monkeypatch, whole=False)
    with pytest.raises(FileNotFoundError, match=message.format(tmp_path / "sets")):
        load_data(name)
    assert offline == [str(own_cache), str(tmp_path / "sets")]
