"""Networks: the zoo computes what it did, published names of weights, features of any network."""

import copy
import types
from unittest import mock

import pytest
import torch
import torchvision

import common
from common import UserError, build_model

# Parameters with 100 and with 10 classes, state-dict entries, embedding width, (C, H) of the maps,
# and three logits of weights by a formula, written down once: the order of layers, shortcuts,
# shuffles and activations stays, which no count of parameters sees.
R, W = [(16, 32), (32, 16), (64, 8)], [(32, 32), (64, 16), (128, 8)]
X4, V = [(64, 32), (128, 16), (256, 8)], [(128, 16), (256, 8), (512, 4), (512, 4)]
ZOO = {
    "resnet8": (83892, 78042, 56, 64, R, (-1.92158, -2.73492, -1.56999)),
    "resnet14": (181108, 175258, 92, 64, R, (16.3331, -8.5155, -27.5979)),
    "resnet20": (278324, 272474, 128, 64, R, (37.2157, -8.51808, -48.3959)),
    "resnet32": (472756, 466906, 200, 64, R, (86.8003, 10.193, -72.515)),
    "resnet44": (667188, 661338, 272, 64, R, (139.826, 45.9975, -76.7561)),
    "resnet56": (861620, 855770, 344, 64, R, (196.17, 115.604, -37.7174)),
    "resnet110": (1736564, 1730714, 668, 64, R, (87.6445, 164.505, 137.842)),
    "resnet8x4": (1233540, 1210410, 62, 256, X4, (-11.2077, 11.4605, -8.54593)),
    "resnet32x4": (7433860, 7410730, 206, 256, X4, (358.685, -316.935, 271.796)),
    "ResNet50": (23705252, 23520842, 320, 2048, [(256, 32), (512, 16), (1024, 8), (2048, 4)],
                 (-302.538, -504.08, -212.982)),
    "wrn_16_1": (180916, 175066, 82, 64, R, (9.98679, -11.3883, -25.4027)),
    "wrn_16_2": (703284, 691674, 83, 128, W, (20.1527, -47.2161, -13.4532)),
    "wrn_16_8": (11007540, 10961370, 83, 512, [(128, 32), (256, 16), (512, 8)],
                 (86.8238, 36.2873, -16.5136)),
    "wrn_40_1": (569780, 563930, 226, 64, R, (12.113, -7.74957, -22.235)),
    "wrn_40_2": (2255156, 2243546, 227, 128, W, (24.6331, -46.6882, -16.6885)),
    "vgg8": (3965028, 3918858, 37, 512, V, (83.6488, 32.3649, -21.1514)),
    "vgg11": (9277284, 9231114, 58, 512, V, (82.3148, 31.6448, -21.3993)),
    "vgg13": (9462180, 9416010, 72, 512, V, (83.1459, 32.1312, -20.6786)),
    "vgg16": (14774436, 14728266, 93, 512, V, (82.1784, 30.2916, -23.4573)),
    "vgg19": (20086692, 20040522, 114, 512, V, (81.1998, 29.4172, -24.3951)),
    "MobileNetV1": (3309476, 3217226, 164, 1024, [(128, 8), (256, 4), (512, 2), (1024, 1)],
                    (163.064, -38.4915, -230.038)),
    "MobileNetV2": (812836, 697546, 320, 1280, [(12, 16), (16, 8), (48, 4), (160, 2)],
                    (215.015, 103.148, -379.372)),
    "ShuffleV1": (949258, 862768, 296, 960, [(240, 16), (480, 8), (960, 4)],
                  (44.702, 117.593, 180.297)),
    "ShuffleV2": (1355528, 1263278, 338, 1024, [(116, 16), (232, 8), (464, 4)],
                  (159.398, -46.7201, -240.513)),
}  # fmt: skip
KEYS = {  # some of the names that published checkpoints use
    "resnet56": "layer3.8.bn2.running_var layer2.0.downsample.1.bias fc.weight",
    "resnet32x4": "layer1.0.downsample.0.weight layer3.4.conv2.weight fc.bias",
    "ResNet50": "layer4.2.conv3.weight layer1.0.shortcut.1.weight linear.weight",
    "wrn_40_2": "block1.layer.0.convShortcut.weight block3.layer.5.bn2.bias bn1.weight",
    "vgg13": "block0.3.bias block4.4.running_mean classifier.bias",
    "vgg19": "block3.10.num_batches_tracked block2.9.weight",
    "MobileNetV1": "model.0.0.weight model.1.4.running_var model.13.3.weight fc.weight",
    "MobileNetV2": "conv1.0.weight blocks.3.3.conv.7.bias conv2.1.weight classifier.0.bias",
    "ShuffleV1": "layer2.7.conv2.weight layer1.0.bn3.weight linear.bias",
    "ShuffleV2": "layer1.0.conv5.weight layer2.7.bn3.bias conv2.weight bn2.bias",
}


TORCHVISION = {  # (C, H) of the maps of 64-pixel images
    "resnet18": [(64, 16), (128, 8), (256, 4), (512, 2)],
    "mobilenet_v2": [(16, 32), (24, 16), (32, 8), (96, 4), (1280, 2)],
    "mobilenet_v3_small": [(16, 32), (16, 16), (24, 8), (48, 4), (576, 2)],
    "shufflenet_v2_x0_5": [(24, 32), (24, 16), (48, 8), (96, 4), (1024, 2)],
    "mnasnet0_5": [(8, 32), (16, 16), (24, 8), (48, 4), (1280, 2)],
    "densenet121": [(64, 32), (256, 16), (512, 8), (1024, 4), (1024, 2)],
    "vit_b_16": [],
}


def in_eval(name, classes=100):
    """A network whose BatchNorm statistics are not the initial ones."""
    torch.manual_seed(0)
    net = build_model(name, classes)
    net(torch.randn(8, 3, 32, 32))
    return net.eval()


def assert_last_layer_makes_logits_of_embedding(net, logits, features):
    head = [m for m in net.modules() if isinstance(m, torch.nn.Linear)][-1]
    assert torch.allclose(head(features.embedding), logits, atol=1e-6)


@torch.no_grad()
def test_mobilenet_v1_equals_its_definition():
    net = in_eval("MobileNetV1", 1000)
    assert sum(p.numel() for p in net.parameters()) == 4231976
    images, state = torch.randn(2, 3, 64, 64), iter(net.state_dict().values())

    def conv_bn_relu(x, stride=1, groups=1):
        kernel, scale, shift, mean, variance, _ = (next(state) for _ in range(6))
        x = torch.nn.functional.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2, 1, groups)
        wide = (1, -1, 1, 1)
        x = (x - mean.view(wide)) / (variance.view(wide) + 1e-5).sqrt()
        return (x * scale.view(wide) + shift.view(wide)).relu()

    x, widths = conv_bn_relu(images, stride=2), []
    for stride in (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1):
        x = conv_bn_relu(conv_bn_relu(x, stride, groups=x.shape[1]))
        widths.append(x.shape[1])
    assert widths == [64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    assert torch.allclose(x.mean((2, 3)) @ next(state).T + next(state), net(images), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    parameters, with_ten, entries, width, maps, golden = ZOO[name]
    net = in_eval(name)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert sum(p.numel() for p in build_model(name, 10).parameters()) == with_ten
    assert len(net.state_dict()) == entries
    assert set(KEYS.get(name, "").split()) <= net.state_dict().keys()
    x = torch.randn(2, 3, 32, 32)
    logits, features = net(x, return_features=True)
    assert torch.equal(net(x), logits) and logits.shape == (2, 100)
    assert features.embedding.shape == (2, width)
    assert_last_layer_makes_logits_of_embedding(net, logits, features)
    assert [tuple(m.shape[1:3]) for m in features.maps] == maps
    found, wanted = features.maps, features.preact
    if name.startswith("wrn"):  # the map after the next BatchNorm
        following = [net.block2.layer[0].bn1, net.block3.layer[0].bn1, net.bn1]
        found = [bn(m) for bn, m in zip(following, features.maps)]
    elif name not in ("MobileNetV1", "MobileNetV2", "ShuffleV2"):  # the map before its ReLU
        assert all(m.min() < 0 for m in features.preact)
        wanted = [m.relu() for m in features.preact]
    assert len(wanted) == len(maps) and all(map(torch.equal, found, wanted))

    net = build_model(name, 7).double()
    for k, p in enumerate(net.parameters()):
        wave = torch.sin(0.7 * torch.arange(p.numel(), dtype=torch.float64) + k)
        p.copy_((wave + (0.5 if p.dim() == 1 else 0.0)).view(p.shape))
    images = torch.cos(0.3 * torch.arange(4 * 3 * 32 * 32, dtype=torch.float64) ** 1.1)
    logits = net.train()(images.view(4, 3, 32, 32))  # batch statistics: nothing vanishes
    assert logits[1, :3].tolist() == pytest.approx(golden, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_networks_keep_their_weights_and_logits_and_have_maps(name):
    net, plain = build_model(name, 10), torchvision.models.get_model(name, num_classes=10)
    assert net.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(net.state_dict())
    size = 224 if name == "vit_b_16" else 64
    x = torch.randn(2, 3, size, size)
    logits, features = net.eval()(x, return_features=True)
    assert torch.equal(plain.eval()(x), net(x)) and torch.equal(net(x), logits)
    assert [tuple(m.shape[1:3]) for m in features.maps] == TORCHVISION[name]
    assert_last_layer_makes_logits_of_embedding(net, logits, features)


def test_copies_have_features_of_their_own_and_none_are_stale():
    """Student and teacher may be of one kind; a call without features leaves nothing behind."""
    net = in_eval("mobilenet_v3_small", 7)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.classifier[0].weight += 1
    x, y = torch.randn(2, 1, 3, 64, 64)
    wanted = net(x, return_features=True)[1]
    net(y), other(y, return_features=True), other(x)
    again, copied = (n(x, return_features=True)[1] for n in (net, other))
    assert torch.equal(wanted.embedding, again.embedding)
    assert all(torch.equal(a, b) for a, b in zip(wanted.maps, again.maps))
    assert not torch.equal(again.embedding, copied.embedding)
    assert torch.equal(net(y), net(y, return_features=True)[0])


def test_build_for_tries_the_network_on_the_images():
    data = types.SimpleNamespace(num_classes=7, image_size=32)
    data.batches = lambda *_, **__: iter([(torch.zeros(2, 3, 32, 32), None)])
    torch.manual_seed(3)
    plain, after = build_model("mobilenet_v3_small", 7), torch.get_rng_state()
    torch.manual_seed(3)
    net = common.build_for(data, "mobilenet_v3_small")
    assert (net.name, net.embed_dim) == ("mobilenet_v3_small", 1024)
    assert net.stage_shapes == [(16, 16, 16), (16, 8, 8), (24, 4, 4), (48, 2, 2), (576, 1, 1)]
    assert torch.equal(torch.get_rng_state(), after) and net.training
    assert common.state_hash(net) == common.state_hash(plain)  # no statistics were gathered
    with pytest.raises(UserError, match="vit_b_16 does not take 32-pixel images"):
        common.build_for(data, "vit_b_16")


def test_pretrained_weights(monkeypatch):
    published = torchvision.models.resnet18()
    answer = mock.Mock(side_effect=lambda *_, **__: copy.deepcopy(published.state_dict()))
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", answer)
    net = build_model("resnet18", 10, pretrained=True)  # a new classifier
    assert net.fc.weight.shape == (10, 512)
    assert torch.equal(net.conv1.weight, published.conv1.weight)
    thousand = build_model("resnet18", 1000, pretrained=True)
    assert common.state_hash(thousand) == common.state_hash(published)
    answer.side_effect = OSError("no route to host")
    with pytest.raises(UserError, match="resnet18.*no route to host"):
        build_model("resnet18", 10, pretrained=True)
