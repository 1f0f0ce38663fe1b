"""edm2.export: the weights for code that has a unet and its block alone."""

import json
import sys
import pytest
import torch
from conftest import NETS, refused, succeed, tiny_config, weights
from edm2 import diffusion
from edm2.config import load_config
from edm2.posthoc_ema import load_denoiser

@pytest.mark.parametrize("net_type", NETS)
def test_what_is_exported_is_the_network(tmp_path, net_type):
    """With labels and augmentation; the EMA and a post-hoc EMA; F is the same, bitwise."""
    from safetensors.torch import load_file
    config = tiny_config(tmp_path, net_type, n_epoch=1, network={"label_dim": 10}, augment=0.1,
                         posthoc_ema={"sigma_rels": [0.05, 0.1]})
    succeed("train.py", "--config", config)
    for args, given in (([], {}), (["--sigma_rel", 0.07], {"sigma_rel": 0.07})):
        out = tmp_path / "out" / str(len(args))
        succeed("export.py", "--config", config, *args, "--out", out)
        about = json.loads((out / "config.json").read_text())
        net = getattr(diffusion.NETWORKS[net_type], about["net_type"])(**about["network"]).eval()
        net.load_state_dict(load_file(out / "model.safetensors"))
        expected = load_denoiser(load_config(config), 0, **given).net
        x, label = torch.randn(2, 1, 8, 8), torch.eye(10)[:2]
        with torch.no_grad():
            assert torch.equal(net(x, torch.zeros(2), label), expected(x, torch.zeros(2), label))
        assert about["diffusion"]["sigma_data"] == 0.85 and about["epoch"] == 0
    for more, variant in (([], "0"), (["--sigma_rel", 0.07], "0_sigma_rel0.07")):
        succeed("export.py", "--config", config, *more)
        assert (tmp_path / "run" / "export" / variant / "config.json").exists()
    saved, ema = load_file(tmp_path / "run/export/0/model.safetensors"), weights(
        tmp_path / "run", 0, "ema")
    assert saved.keys() == ema.keys() and all(torch.equal(saved[name], ema[name]) for name in ema)

def test_what_cannot_be(trained, tmp_path, monkeypatch):
    flags = ("export.py", "--config", trained / "config.yaml")
    refused(*flags, "--epoch", 7, words=["no checkpoint of epoch 7"])
    refused(*flags, "--sigma_rel", 0.1, words=["without posthoc_ema"])
    (tmp_path / "file").write_text("")
    refused(*flags, "--out", tmp_path / "file", words=["file"])
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused(*flags, words=["pip install safetensors"])
