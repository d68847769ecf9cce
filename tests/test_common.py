"""Networks, checkpoints and data of common.py."""

import argparse
import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import UserError, build_model, load_weights

# name: parameters with 100 and with 10 classes, state-dict entries, embedding width, map shapes
ZOO = {
    "resnet8": (83892, 78042, 56, 64, [(16, 32), (32, 16), (64, 8)]),
    "resnet14": (181108, 175258, 92, 64, [(16, 32), (32, 16), (64, 8)]),
    "resnet20": (278324, 272474, 128, 64, [(16, 32), (32, 16), (64, 8)]),
    "resnet32": (472756, 466906, 200, 64, [(16, 32), (32, 16), (64, 8)]),
    "resnet44": (667188, 661338, 272, 64, [(16, 32), (32, 16), (64, 8)]),
    "resnet56": (861620, 855770, 344, 64, [(16, 32), (32, 16), (64, 8)]),
    "resnet110": (1736564, 1730714, 668, 64, [(16, 32), (32, 16), (64, 8)]),
    "resnet8x4": (1233540, 1210410, 62, 256, [(64, 32), (128, 16), (256, 8)]),
    "resnet32x4": (7433860, 7410730, 206, 256, [(64, 32), (128, 16), (256, 8)]),
    "ResNet50": (23705252, 23520842, 320, 2048, [(256, 32), (512, 16), (1024, 8), (2048, 4)]),
    "wrn_16_1": (180916, 175066, 82, 64, [(16, 32), (32, 16), (64, 8)]),
    "wrn_16_2": (703284, 691674, 83, 128, [(32, 32), (64, 16), (128, 8)]),
    "wrn_16_8": (11007540, 10961370, 83, 512, [(128, 32), (256, 16), (512, 8)]),
    "wrn_40_1": (569780, 563930, 226, 64, [(16, 32), (32, 16), (64, 8)]),
    "wrn_40_2": (2255156, 2243546, 227, 128, [(32, 32), (64, 16), (128, 8)]),
    "vgg8": (3965028, 3918858, 37, 512, [(128, 16), (256, 8), (512, 4), (512, 4)]),
    "vgg11": (9277284, 9231114, 58, 512, [(128, 16), (256, 8), (512, 4), (512, 4)]),
    "vgg13": (9462180, 9416010, 72, 512, [(128, 16), (256, 8), (512, 4), (512, 4)]),
    "vgg16": (14774436, 14728266, 93, 512, [(128, 16), (256, 8), (512, 4), (512, 4)]),
    "vgg19": (20086692, 20040522, 114, 512, [(128, 16), (256, 8), (512, 4), (512, 4)]),
    "MobileNetV2": (812836, 697546, 320, 1280, [(12, 16), (16, 8), (48, 4), (160, 2)]),
    "ShuffleV1": (949258, 862768, 296, 960, [(240, 16), (480, 8), (960, 4)]),
    "ShuffleV2": (1355528, 1263278, 338, 1024, [(116, 16), (232, 8), (464, 4)]),
}
KEYS = {  # some of the names that published checkpoints use
    "resnet56": {"layer3.8.bn2.running_var", "layer2.0.downsample.1.bias", "fc.weight"},
    "resnet32x4": {"layer1.0.downsample.0.weight", "layer3.4.conv2.weight", "fc.bias"},
    "ResNet50": {"layer4.2.conv3.weight", "layer1.0.shortcut.1.weight", "linear.weight"},
    "wrn_40_2": {"block1.layer.0.convShortcut.weight", "block3.layer.5.bn2.bias", "bn1.weight"},
    "vgg13": {"block0.3.bias", "block4.4.running_mean", "classifier.bias"},
    "vgg19": {"block3.10.num_batches_tracked", "block2.9.weight"},
    "MobileNetV2": {
        "conv1.0.weight",
        "blocks.3.3.conv.7.bias",
        "conv2.1.weight",
        "classifier.0.bias",
    },
    "ShuffleV1": {"layer2.7.conv2.weight", "layer1.0.bn3.weight", "linear.bias"},
    "ShuffleV2": {"layer1.0.conv5.weight", "layer2.7.bn3.bias", "conv2.weight", "bn2.bias"},
}


def in_eval(name, classes=100):
    """A network whose BatchNorm statistics are not the initial ones."""
    torch.manual_seed(0)
    net = build_model(name, classes)
    net.train()
    net(torch.randn(8, 3, 32, 32))
    return net.eval()


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    parameters, with_ten, entries, width, maps = ZOO[name]
    net = build_model(name, 100)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert sum(p.numel() for p in build_model(name, 10).parameters()) == with_ten
    assert len(net.state_dict()) == entries
    assert KEYS.get(name, set()) <= net.state_dict().keys()
    net.eval()
    x = torch.randn(2, 3, 32, 32)
    logits, features = net(x, return_features=True)
    assert torch.equal(net(x), logits) and logits.shape == (2, 100)
    assert features.embedding.shape == (2, width)
    assert [tuple(m.shape[1:3]) for m in features.maps] == maps
    assert [m.shape for m in features.preact] == [m.shape for m in features.maps]


# Logits of weights by a formula, written down once: the order of layers, shortcuts, shuffles and
# activations stays, which no count of parameters sees.
GOLDEN = {
    "resnet8": (-1.92158, -2.73492, -1.56999),
    "resnet14": (16.3331, -8.5155, -27.5979),
    "resnet20": (37.2157, -8.51808, -48.3959),
    "resnet32": (86.8003, 10.193, -72.515),
    "resnet44": (139.826, 45.9975, -76.7561),
    "resnet56": (196.17, 115.604, -37.7174),
    "resnet110": (87.6445, 164.505, 137.842),
    "resnet8x4": (-11.2077, 11.4605, -8.54593),
    "resnet32x4": (358.685, -316.935, 271.796),
    "wrn_16_1": (9.98679, -11.3883, -25.4027),
    "wrn_16_2": (20.1527, -47.2161, -13.4532),
    "wrn_40_1": (12.113, -7.74957, -22.235),
    "wrn_40_2": (24.6331, -46.6882, -16.6885),
    "wrn_16_8": (86.8238, 36.2873, -16.5136),
    "ResNet50": (-302.538, -504.08, -212.982),
    "vgg8": (83.6488, 32.3649, -21.1514),
    "vgg11": (82.3148, 31.6448, -21.3993),
    "vgg13": (83.1459, 32.1312, -20.6786),
    "vgg16": (82.1784, 30.2916, -23.4573),
    "vgg19": (81.1998, 29.4172, -24.3951),
    "MobileNetV2": (215.015, 103.148, -379.372),
    "ShuffleV1": (44.702, 117.593, 180.297),
    "ShuffleV2": (159.398, -46.7201, -240.513),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_zoo_computes_what_it_did(name):
    net = build_model(name, 7).double()
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            wave = torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + k)
            p.copy_((wave + (0.5 if p.dim() == 1 else 0.0)).view(p.shape))
    images = torch.cos(0.3 * torch.arange(4 * 3 * 32 * 32, dtype=torch.float64) ** 1.1)
    logits = net.train()(images.view(4, 3, 32, 32))  # batch statistics: nothing vanishes
    assert logits[1, :3].tolist() == pytest.approx(GOLDEN[name], rel=1e-4)


def test_zoo_is_complete():
    assert set(GOLDEN) == set(ZOO)
    assert set(common.ZOO) == set(ZOO) and len(ZOO) == 23  # the 22 of RepDistiller and wrn_16_8


@pytest.mark.parametrize("name", ["resnet20", "resnet8x4", "ResNet50", "vgg13", "ShuffleV1"])
def test_preact_is_the_map_before_its_relu(name):
    _, features = in_eval(name)(torch.randn(2, 3, 32, 32), return_features=True)
    for before, after in zip(features.preact, features.maps):
        assert torch.equal(before.relu(), after) and before.min() < 0


@pytest.mark.parametrize("name", ["wrn_16_1", "wrn_16_2"])
def test_preact_of_a_wide_resnet_is_the_map_after_the_next_batchnorm(name):
    net = in_eval(name)
    _, features = net(torch.randn(2, 3, 32, 32), return_features=True)
    following = [net.block2.layer[0].bn1, net.block3.layer[0].bn1, net.bn1]
    for bn, sums, preact in zip(following, features.maps, features.preact):
        assert torch.equal(bn(sums), preact)


def test_the_embedding_is_what_the_classifier_sees():
    for name in (
        "resnet8",
        "wrn_16_1",
        "vgg8",
        "MobileNetV2",
        "ShuffleV2",
        "resnet18",
        "mobilenet_v2",
    ):
        net = in_eval(name, 7)
        logits, features = net(torch.randn(2, 3, 64, 64), return_features=True)
        head = [m for m in net.modules() if isinstance(m, torch.nn.Linear)][-1]
        assert torch.allclose(head(features.embedding), logits)


def test_torchvision_models_keep_their_state_dict():
    import torchvision

    net = build_model("resnet18", 10)
    plain = torchvision.models.resnet18(num_classes=10)
    assert net.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(plain.eval()(x), net.eval()(x))
    assert [m.shape[1] for m in net(x, return_features=True)[1].maps] == [64, 128, 256, 512]


@pytest.mark.parametrize(
    "name", ["resnet8", "resnet56", "wrn_16_1", "wrn_16_2", "vgg8", "MobileNetV2", "ShuffleV1",
             "ShuffleV2", "ResNet50", "resnet18", "densenet121"]
)  # fmt: skip
def test_folding_batchnorm_keeps_the_outputs(name):
    net = in_eval(name, 10)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(4, 3, 32, 32)
    folded = common.fold_batchnorm(net, x[:2])
    with torch.no_grad():
        logits, features = net(x, return_features=True)
        new_logits, new_features = folded(x, return_features=True)
    assert (logits - new_logits).abs().max() <= 1e-5 * max(1, logits.abs().max())
    for a, b in zip(features.preact, new_features.preact):
        assert torch.allclose(a, b, atol=1e-4 * max(1, float(a.abs().max())))
    count = lambda n: sum(isinstance(m, torch.nn.BatchNorm2d) for m in n.modules())  # noqa: E731
    assert count(folded) < count(net) and not any(p.requires_grad for p in folded.parameters())
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


# --- checkpoints ---------------------------------------------------------------------------------


def test_maps_of_torchvisions_families():
    for name, channels in (
        ("shufflenet_v2_x0_5", [24, 24, 48, 96, 1024]),
        ("mnasnet0_5", [8, 16, 24, 48, 1280]),
        ("mobilenet_v3_small", [16, 16, 24, 48, 576]),
    ):
        _, features = in_eval(name, 7)(torch.randn(1, 3, 64, 64), return_features=True)
        assert [m.shape[1] for m in features.maps] == channels
        assert [m.shape[2] for m in features.maps] == [32, 16, 8, 4, 2]

    class Regnet(torch.nn.Module):  # its names, not its size
        def __init__(self):
            super().__init__()
            self.stem, self.fc = torch.nn.Conv2d(3, 4, 1), torch.nn.Linear(6, 7)
            self.trunk_output = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 1, 2))

        def forward(self, x):
            return self.fc(self.trunk_output(self.stem(x)).mean((2, 3)))

    def maps(net):
        return common._with_features(net, "tiny", 7)(torch.zeros(1, 3, 8, 8), True)[1].maps

    assert [m.shape for m in maps(Regnet())] == [(1, 6, 4, 4)]
    transformer = Regnet()
    transformer.conv_proj = torch.nn.Identity()
    assert maps(transformer) == []


@pytest.mark.parametrize("wrap", [None, "model", "state_dict", "student"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_load_weights_takes_the_usual_layouts(tmp_path, wrap, prefix):
    net, other = build_model("resnet8", 10), build_model("resnet8", 10)
    state = {prefix + k: v for k, v in net.state_dict().items() if "num_batches" not in k}
    torch.save({wrap: state, "epoch": 240, "accuracy": 0.7} if wrap else state, tmp_path / "a.pth")
    load_weights(other, tmp_path / "a.pth")
    for name, value in net.named_parameters():
        assert torch.equal(value, other.get_parameter(name))
    if wrap == "model":  # whatever else lies beside it
        torch.save({"model": state, "state": {"epoch": 3}}, tmp_path / "b.pth")
        load_weights(build_model("resnet8", 10), tmp_path / "b.pth")


def refuse(tmp_path, content, words, net="resnet8"):
    path = tmp_path / "bad.pth"
    path.write_bytes(content)
    model = build_model(net, 10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=words) as error:
        load_weights(model, path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_bad_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = saved(build_model("resnet8", 10).state_dict())
    refuse(tmp_path, b"", "damaged")
    refuse(tmp_path, good[: len(good) // 2], "damaged")
    refuse(tmp_path, b"hello, I am text", "damaged")
    refuse(tmp_path, saved({"model": Bomb()}), "state dict alone")
    refuse(tmp_path, pickle.dumps({"model": Bomb()}), "state dict alone|damaged")
    assert not (tmp_path / "exploded").exists()
    refuse(
        tmp_path, saved(build_model("resnet8", 100).state_dict()), "fc.weight.*number of classes"
    )
    refuse(tmp_path, saved(build_model("resnet14", 10).state_dict()), "another architecture")
    refuse(tmp_path, saved(build_model("wrn_16_1", 10).state_dict()), "another architecture")
    refuse(tmp_path, saved({"model": {"fc.weight": torch.zeros(10, 64)}}), "another architecture")
    refuse(tmp_path, saved([1, 2, 3]), "no state dict")
    refuse(tmp_path, saved({"epoch": 3}), "no state dict")
    with pytest.raises(UserError, match="no such file"):
        load_weights(build_model("resnet8", 10), tmp_path / "absent.pth")
    with pytest.raises(UserError, match="not a file"):
        load_weights(build_model("resnet8", 10), tmp_path)
    for odd, words in ((torch.zeros(10).to_sparse(), "plain numbers"),
                       (torch.full((10,), torch.inf), "infinite or nan")):  # fmt: skip
        torch.save(build_model("resnet8", 10).state_dict() | {"fc.bias": odd}, tmp_path / "odd.pth")
        with pytest.raises(UserError, match=words):
            load_weights(build_model("resnet8", 10), tmp_path / "odd.pth")


def test_names_are_found_however_they_are_spelled():
    for spelled, name in (("RESNET20", "resnet20"), ("WRN-40-2", "wrn_40_2"), ("Vgg8", "vgg8")):
        with pytest.raises(UserError, match=f"did you mean {name},"):
            build_model(spelled, 10)
    with pytest.raises(UserError, match="did you mean ResNet50, resnet50"):
        build_model("RESNET50", 10)


def test_near_chance():
    for classes, least in ((100, 2), (10, 20), (4, 50), (3, 40), (2, 60)):
        assert common.near_chance(least - 0.1, classes)
        assert not common.near_chance(least + 0.1, classes)


def test_every_cut_of_a_checkpoint_is_refused(tmp_path):
    good = saved(build_model("resnet8", 10).state_dict())
    for cut in range(1, len(good) - 1, len(good) // 25):
        refuse(tmp_path, good[:cut], "damaged|no state dict")


def test_a_flipped_bit_is_noticed(tmp_path):
    good = bytearray(saved(build_model("resnet8", 10).state_dict()))
    good[len(good) // 2] ^= 1
    refuse(tmp_path, bytes(good), "damaged")


def test_state_hash_sees_every_tensor():
    net = build_model("resnet8", 10)
    first = common.state_hash(net)
    assert first == common.state_hash(net)
    net.bn1.running_mean[0] += 1e-6
    assert common.state_hash(net) != first


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "f.pt"
    common.save_whole(path, {"a": 1})
    with pytest.raises(RuntimeError):

        class Stubborn:
            def __reduce__(self):
                raise RuntimeError("cannot be pickled")

        common.save_whole(path, {"a": 2, "b": Stubborn()})
    assert common.read_checkpoint(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


# --- data ----------------------------------------------------------------------------------------


def arguments(**changes):
    values = dict(dataset="shapes", data_dir="data", image_size=32, train_size=None, val_size=None)
    values |= dict(workers=2)
    return argparse.Namespace(**values | changes)


CPU = torch.device("cpu")


def tree(root, classes=3, train=4, test=2, size=32, splits=("train", "val")):
    rng = np.random.default_rng(0)
    for split, count in zip(splits, (train, test)):
        for k in range(classes):
            folder = root / split / f"class{k}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


def test_shapes_are_deterministic_balanced_and_all_different():
    first = common.draw_shapes(1200, 0)
    again, other = common.draw_shapes(600, 7), common.draw_shapes(600, 8)
    assert torch.equal(again.images, common.draw_shapes(600, 7).images)
    assert not torch.equal(again.images, other.images)
    assert len(common.SHAPE_CLASSES) >= 20
    assert first.labels.bincount().tolist() == [50] * 24
    assert first.images.shape == (1200, 32, 32, 3) and first.images.dtype == torch.uint8
    assert len({image.tobytes() for image in first.images.numpy()}) == 1200  # no two alike
    assert not {i.tobytes() for i in again.images.numpy()} & {
        i.tobytes() for i in other.images.numpy()
    }


def test_augmentation_equals_a_literal_loop():
    """Every image is a 32-pixel window of its zero-padded self, perhaps mirrored; and all occur."""
    data = common.Data(
        "shapes", common.draw_shapes(64, 0), common.draw_shapes(24, 1), ["c"] * 24, CPU
    )
    seen = set()
    for images, labels in data.batches("train", 16, seed=3, augment=True):
        raw = (images * data.std + data.mean).round().byte().permute(0, 2, 3, 1)
        for image, label in zip(raw, labels):
            found = None
            for i in range(64):
                if data.train.labels[i] != label:
                    continue
                padded = torch.zeros(40, 40, 3, dtype=torch.uint8)
                padded[4:36, 4:36] = data.train.images[i]
                for dy in range(9):
                    for dx in range(9):
                        window = padded[dy : dy + 32, dx : dx + 32]
                        for flip in (False, True):
                            if torch.equal(window.flip(1) if flip else window, image):
                                found = (i, dy, dx, flip)
            assert found is not None
            seen.add(found)
    assert len({s[0] for s in seen}) == 64  # each image once
    assert {s[3] for s in seen} == {False, True} and len({s[1:3] for s in seen}) > 30


def test_a_checkpoint_says_how_many_classes_it_knows(tmp_path):
    """RegNet cannot be built without its weights, as others can."""
    path = tmp_path / "net.pth"
    torch.save(build_model("regnet_x_400mf", 7).state_dict(), path)
    assert common.load_model("regnet_x_400mf", path)(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_pixels_are_normalised_as_the_field_does():
    assert common.STATS["cifar100"] == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert common.STATS["cifar10"] == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    assert common.STATS["svhn"] == ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
    for name in ("imagenet", "folder"):
        assert common.STATS[name] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_evaluate_counts_the_largest_logit(few_shapes):
    data = common.load_data(arguments(), CPU)
    torch.manual_seed(0)
    net = build_model("resnet8", 24)
    images, _ = next(data.batches("test", 24))
    with torch.no_grad():
        answers = net.eval()(images).tolist()
    said = [row.index(max(row)) for row in answers]
    wrong = [(k + 1) % 24 for k in said]
    data.test.labels.copy_(torch.tensor(said[:9] + wrong[9:]))
    assert common.evaluate(net.train(), data, argparse.Namespace(precision="fp32")) == 37.5


def test_normalisation_and_order(few_shapes):
    data = common.load_data(arguments(train_size=60), CPU)
    images, labels = next(data.batches("train", 60))
    expected = (data.train.images.double() / 255 - 0.5) / 0.25
    assert torch.allclose(images.permute(0, 2, 3, 1).double(), expected, atol=1e-5)
    assert torch.equal(labels, data.train.labels) and images.is_contiguous(
        memory_format=torch.channels_last
    )
    one, two = ([y for _, y in data.batches("train", 32, seed=s)] for s in (5, 5))
    assert all(torch.equal(a, b) for a, b in zip(one, two)) and sum(map(len, one)) == 60
    other = torch.cat([y for _, y in data.batches("train", 32, seed=6)])
    assert not torch.equal(torch.cat(one), other)


def test_a_last_batch_of_one_is_left_out_when_training_only(few_shapes):
    data = common.load_data(arguments(train_size=33), CPU)
    assert [len(y) for _, y in data.batches("train", 16, seed=0)] == [16, 16]
    assert (
        data.steps(16) == 2 and data.steps(11) == 3 and data.steps(20) == 2 and data.steps(64) == 1
    )
    assert [len(y) for _, y in data.batches("train", 16)] == [16, 16, 1]


def test_train_size_is_even_over_classes_and_the_same_every_time(few_shapes):
    data = common.load_data(arguments(train_size=60), CPU)
    counts = data.train.labels.bincount(minlength=24)
    assert counts.min() == 2 and counts.max() == 3 and len(data.test.labels) == 24
    common._LOADED.clear()
    assert common.load_data(arguments(train_size=60), CPU).fingerprint == data.fingerprint
    for size in (23, 73):
        with pytest.raises(UserError, match=f"--train-size {size}"):
            common.load_data(arguments(train_size=size), CPU)


def test_validation_images_come_from_the_training_set_alone(few_shapes, capsys):
    whole = common.load_data(arguments(), CPU)
    usual = common.load_data(arguments(train_size=30), CPU)
    data = common.load_data(arguments(train_size=30, val_size=24), CPU)
    assert "'test' is of 24 images kept out of training" in capsys.readouterr().out
    assert torch.equal(data.train.images, usual.train.images)  # the same images to learn from
    assert data.test.labels.bincount().tolist() == [1] * 24
    known = {image.numpy().tobytes(): k for k, image in enumerate(whole.train.images)}
    kept_out = [known[image.numpy().tobytes()] for image in data.test.images]
    assert torch.equal(whole.train.labels[kept_out], data.test.labels)
    trained = {known[image.numpy().tobytes()] for image in data.train.images}
    assert len(set(kept_out)) == 24 and not trained & set(kept_out)
    rest = common.load_data(arguments(val_size=24), CPU)
    assert len(rest.train.labels) == 48
    for size in (23, 25):
        with pytest.raises(UserError, match=f"--val-size {size}: must be from 24 .* to 24"):
            common.load_data(arguments(val_size=size), CPU)
    with pytest.raises(UserError, match="--train-size 50: must be from 24 .* to 48"):
        common.load_data(arguments(train_size=50, val_size=24), CPU)


def test_every_class_keeps_half_of_its_images_to_learn_from():
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1)
    train = common.Split(images, torch.tensor([0] * 8 + [1] * 3 + [2]))
    for size in (3, 4, 5):
        rest, kept_out = common._chosen(arguments(val_size=size), train, train, 3)
        assert kept_out.labels.bincount(minlength=3).tolist() == [size - 1, 1, 0]
        both = torch.cat([rest.images, kept_out.images]).flatten()
        assert sorted(both.tolist()) == list(range(12))


def test_a_tree_is_decoded_once(tmp_path, capsys):
    tree(tmp_path)
    options = arguments(dataset="folder", data_dir=str(tmp_path))
    first = common.load_data(options, CPU)
    common._LOADED.clear()
    capsys.readouterr()
    again = common.load_data(options, CPU)
    assert "decoding" not in capsys.readouterr().out and again.fingerprint == first.fingerprint
    image = Image.open(tmp_path / "train" / "class1" / "2.png")
    assert np.array_equal(first.train.images[6].numpy(), np.asarray(image))
    assert first.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and first.num_classes == 3
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "train" / "class1" / "2.png")
    common._LOADED.clear()
    assert common.load_data(options, CPU).fingerprint != first.fingerprint  # a changed file counts
    (tmp_path / ".decoded-train-32.pt").write_bytes(b"torn")
    common._LOADED.clear()
    assert common.load_data(options, CPU).train.images[6].sum() == 0


def test_cifar100_from_a_tree_uses_its_own_statistics(tmp_path):
    tree(tmp_path / "cifar100", classes=2, splits=("train", "test"))
    data = common.load_data(arguments(dataset="cifar100", data_dir=str(tmp_path)), CPU)
    assert data.name == "cifar100" and abs(float(data.mean[0, 0, 0, 0]) - 255 * 0.5071) < 1e-4


def test_other_sizes_grey_and_cmyk_images(tmp_path):
    tree(tmp_path, size=40)
    Image.fromarray(np.zeros((20, 50), np.uint8)).save(tmp_path / "train" / "class0" / "grey.png")
    Image.new("CMYK", (64, 48)).save(tmp_path / "train" / "class0" / "ink.jpg")
    data = common.load_data(
        arguments(dataset="folder", data_dir=str(tmp_path), image_size=24, workers=0), CPU
    )
    assert data.train.images.shape == (14, 24, 24, 3) and data.pad == 3


def test_sixteen_bit_grey_is_scaled_and_hidden_files_are_skipped(tmp_path):
    tree(tmp_path)
    ramp = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(ramp).save(tmp_path / "train" / "class0" / "deep.png")
    (tmp_path / "train" / "class0" / "._0.png").write_bytes(b"not an image")
    (tmp_path / "train" / "class0" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    data = common.load_data(arguments(dataset="folder", data_dir=str(tmp_path)), CPU)
    assert data.classes == ["class0", "class1", "class2"] and len(data.train.labels) == 13
    assert np.array_equal(data.train.images[4, :, :, 0].numpy(), ramp // 256)
    for name, values in (("a.pgm", ramp), ("b.tif", ramp.astype(">u2")), ("c.tif", ramp + 0)):
        image = Image.fromarray(values.astype(np.int32)) if name == "c.tif" else None
        (image or Image.fromarray(values)).save(tmp_path / name)
        assert np.array_equal(np.asarray(common.read_rgb(tmp_path / name))[..., 0], ramp // 256)
    Image.fromarray((ramp // 256).astype(np.int32)).save(tmp_path / "f.tif")  # 8 bits in 32
    dark = common.read_rgb(tmp_path / "f.tif")
    assert np.array_equal(np.asarray(dark)[..., 0], ramp // 256)
    for name, values in (("d.tif", ramp / 65535.0), ("e.tif", ramp.astype(np.int32) * 1000)):
        Image.fromarray(values.astype(np.float32 if name == "d.tif" else np.int32)).save(
            tmp_path / name
        )
        with pytest.raises(UserError, match="unclear which of its values is white"):
            common.read_rgb(tmp_path / name)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    tree(tmp_path)
    os.mkfifo(tmp_path / "train" / "class0" / "pipe.png")
    with pytest.raises(UserError, match="pipe.png: not a file"):
        common.load_data(arguments(dataset="folder", data_dir=str(tmp_path)), CPU)


def test_swapped_class_folders_are_decoded_again(tmp_path):
    """Same names, sizes and times: only the paths tell the images apart."""
    tree(tmp_path, classes=2)
    options = arguments(dataset="folder", data_dir=str(tmp_path))
    first = common.load_data(options, CPU).train.images
    for a, b in (("class0", "x"), ("class1", "class0"), ("x", "class1")):
        (tmp_path / "train" / a).rename(tmp_path / "train" / b)
    common._LOADED.clear()
    again = common.load_data(options, CPU).train.images
    assert torch.equal(again, torch.cat([first[4:], first[:4]]))


def test_bad_trees(tmp_path):
    def fails(words):
        common._LOADED.clear()
        with pytest.raises(UserError, match=words) as error:
            common.load_data(arguments(dataset="folder", data_dir=str(tmp_path)), CPU)
        assert "\n" not in str(error.value)

    fails("--data-dir.*train")
    tree(tmp_path)
    (tmp_path / "train" / "empty").mkdir()
    fails("empty")
    (tmp_path / "train" / "empty").rmdir()
    bad = tmp_path / "train" / "class0" / "bad.png"
    bad.write_bytes((tmp_path / "train" / "class0" / "0.png").read_bytes()[:300])
    fails("bad.png")
    bad.unlink()
    (tmp_path / "val" / "class2").rename(tmp_path / "val" / "class9")
    fails("class2|class9")


def test_no_data_and_no_network(tmp_path, monkeypatch):
    def offline(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", offline)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    for name in ("cifar100", "cifar10", "stl10"):
        common._LOADED.clear()
        with pytest.raises(UserError, match=f"--dataset {name}.*--dataset shapes needs no files"):
            common.load_data(arguments(dataset=name, data_dir=str(tmp_path)), CPU)


def test_official_cifar_files(tmp_path):
    """The layout of cifar-100-python, written here; only its checksums are not the real ones."""
    import torchvision

    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 200), ("test", 100)):
        pixels = rng.integers(0, 256, (count, 3072), np.uint8)
        labels = [i % 100 for i in range(count)]
        (folder / split).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels}))
    names = [f"c{i}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)
        data = common.load_data(arguments(dataset="cifar100", data_dir=str(tmp_path)), CPU)
    assert data.train.images.shape == (200, 32, 32, 3) and data.num_classes == 100
    first = pickle.loads((folder / "train").read_bytes())["data"][0].reshape(3, 32, 32)
    assert np.array_equal(data.train.images[0].permute(2, 0, 1).numpy(), first)


def test_svhn_and_stl10_as_torchvision_gives_them(tmp_path, monkeypatch):
    """[N,3,H,W] arrays with `labels`; STL-10 is resized from 96 to 32 pixels."""
    import torchvision

    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 96, 96), np.uint8)
    labels = np.arange(20) % 10

    class Fake:
        def __init__(self, root, split, download):
            assert root == str(tmp_path) and download and split in ("train", "test")
            self.data, self.labels = pixels, labels

    for name in ("SVHN", "STL10"):
        monkeypatch.setattr(torchvision.datasets, name, Fake)
        options = arguments(dataset=name.lower(), data_dir=str(tmp_path))
        data = common.load_data(options, CPU)
        assert data.train.images.shape == (20, 32, 32, 3) and data.num_classes == 10
        assert data.test.labels.tolist() == labels.tolist()
        mean = pixels.astype(float).mean()  # resizing keeps the place and the mean of an image
        assert abs(data.train.images.double().mean() - mean) < 1
        first = torch.from_numpy(pixels[0, 0, :48, :48].astype(float)).mean()
        assert abs(data.train.images[0, :16, :16, 0].double().mean() - first) < 3


def test_svhn_without_scipy_says_what_to_install(tmp_path, monkeypatch):
    def fails(*_args, **_kwargs):
        raise ModuleNotFoundError("No module named 'scipy'")

    monkeypatch.setattr("torchvision.datasets.SVHN", fails)
    with pytest.raises(UserError, match="pip install scipy"):
        common.load_data(arguments(dataset="svhn", data_dir=str(tmp_path)), CPU)


def test_svhn_digits_are_not_mirrored():
    split = common.draw_shapes(48, 0)
    data = common.Data("svhn", split, split, [str(k) for k in range(10)], CPU)
    mirrored = split.images.flip(2)
    for images, _ in data.batches("train", 48, seed=0, augment=True):
        raw = (images * data.std + data.mean).round().byte().permute(0, 2, 3, 1)
        centre = {r[8:24, 8:24].numpy().tobytes() for r in mirrored[:, 4:28, 4:28]}
        assert not any(r[8:24, 8:24].numpy().tobytes() in centre for r in raw)


# --- table ---------------------------------------------------------------------------------------


def test_table_is_computed_from_results(tmp_path, capsys):
    base = dict(
        dataset="d", train_images=1000, epochs=3, teacher="t", student="s", teacher_top1=70.0
    )
    rows = [dict(base, method="KD", student_top1=v) for v in (60.0, 62.0, 64.0)]
    rows.append(dict(base, method="CE", student_top1=50.0))
    paths = []
    for i, row in enumerate(rows):
        paths.append(str(tmp_path / f"{i}.json"))
        (tmp_path / f"{i}.json").write_text(json.dumps(row))
    common.print_table(paths)
    out = capsys.readouterr().out
    assert "| KD | 3 | 62.00 ± 2.00 | 60.00, 64.00 | - |" in out
    assert "| CE | 1 | 50.00 | 50.00, 50.00 | one run |" in out
    # a difference inside the larger spread is marked, of the same pair only
    rows += [dict(base, method="SP", student_top1=v) for v in (60.4, 60.5, 60.6)]
    rows += [dict(base, method="AT", student_top1=v) for v in (59.8, 59.9, 60.0)]
    rows += [dict(base, student="u", method="SP", student_top1=v) for v in (62.0, 62.1)]
    out = common.table(rows)
    assert "| KD | 3 | 62.00 ± 2.00 | 60.00, 64.00 | SP |" in out  # 59.90 is 2.1 away
    assert "| SP | 3 | 60.50 ± 0.10 | 60.40, 60.60 | KD |" in out
    assert "| AT | 3 | 59.90 ± 0.10 | 59.80, 60.00 | - |" in out
    assert "| u | SP | 2 | 62.05 ± 0.07 | 62.00, 62.10 | - |" in out
    # other flags: another row, which says what differs; of the validation images: said too
    rows = [
        dict(
            base, method="KD", student_top1=60.0, seed=0, args=dict(sp_weight=1.0, epochs=3, seed=0)
        )
    ]
    rows.append(dict(rows[0], student_top1=62.0, seed=1, args=rows[0]["args"] | dict(seed=1)))
    rows[1]["args"]["unknown_before"] = None
    rows.append(dict(rows[0], student_top1=50.0, args=dict(sp_weight=10.0, epochs=3, seed=0)))
    rows.append(dict(base, method="KD", student_top1=40.0, args=dict(sp_weight=1.0, val_size=9)))
    out = common.table(rows)
    assert "| d, 1,000, 3 | t (70.00) | s | KD --sp-weight 1.0 | 2 | 61.00 ± 1.41 |" in out
    assert "| KD --sp-weight 10.0 | 1 | 50.00 |" in out
    assert "| d (validation), 1,000, 3 | t (70.00) | s | KD | 1 | 40.00 |" in out
    # other numbers of processes, other images: neither one row nor compared
    # probes of two students with one seed are two runs; the same run twice is one
    rows = [dict(base, method="probe", student_top1=t, seed=0, student_hash=h)
            for t, h in ((60.0, "a"), (62.0, "b"), (62.0, "b"))]  # fmt: skip
    assert "| probe | 2 | 61.00 ± 1.41 |" in common.table(rows)
    rows = [dict(base, method="KD", student_top1=60.0 + s, seed=s, world_size=2) for s in (0, 1)]
    rows += [dict(r, student_top1=40.0, world_size=8) for r in rows]
    out = common.table(rows)
    assert "| KD --world-size 2 | 2 | 60.50 ± 0.71 |" in out
    assert "| KD --world-size 8 | 2 | 40.00 ± 0.00 |" in out
    rows = [dict(base, method=m, student_top1=60.0, seed=s, data_hash=h)
            for m, h in (("CE", "a"), ("KD", "b"), ("SP", "b")) for s in (0, 1)]  # fmt: skip
    out = common.table(rows)
    assert "| CE | 2 | 60.00 ± 0.00 | 60.00, 60.00 | - |" in out
    assert "| KD | 2 | 60.00 ± 0.00 | 60.00, 60.00 | SP |" in out
    for bad in ('{"method": "KD", "stu', "[" * 100_000, '["method"]',
                json.dumps(rows[0] | {"args": [1]}), json.dumps(rows[0] | {"student_ap": 3.0}),
                json.dumps(rows[0]).replace("60.0", "1" + "0" * 400)):  # fmt: skip
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(UserError, match="bad.json"):
            common.print_table([str(tmp_path / "bad.json")])
