# SPDX-License-Identifier: MIT
"""Families of models are known by their registration, whatever they are called."""

import json
import sys
import types

import pytest
import timm
import torch
from timm.models import _registry, generate_default_cfgs
from torch import nn

import internimage
from internimage import CheckpointError
from internimage.cli import main
from internimage.convert.convert import convert
from internimage.engine.create import ModelError, create_model
from internimage.models import families
from internimage.models.builder import build_model
from internimage.models.model_config import read_model_config
from internimage.weights.key_maps import KeyMap


class Throwaway(families.FamilyModel):
    """A convolution, a block and a classifier, under names of their own."""

    key_map = KeyMap(
        family="Throwaway",
        first_conv="entry",
        anchors=("entry.weight", "body.0.mix.weight"),
        classifier="exit",
        head=("exit",),
        width="entry.bias",
        block=r"(body)\.(\d+)\.",
        renamings=((r"\.blend\.", ".mix."),),
    )

    def __init__(self, in_chans=3, num_classes=1000, width=4, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, width
        self.entry = nn.Conv2d(in_chans, width, 1, **dd)
        self.body = nn.ModuleList([nn.ModuleDict(dict(mix=nn.Conv2d(width, width, 1, **dd)))])
        self.exit = nn.Linear(width, num_classes, **dd) if num_classes else nn.Identity()

    def forward(self, x):
        return self.exit(self.body[0]["mix"](self.entry(x)).mean((2, 3)))

    def materialize(self, children, device):
        for name in children:
            self.get_submodule(name).to_empty(device=device)
            self.get_submodule(name).reset_parameters()


@pytest.fixture(autouse=True)
def family(monkeypatch):
    """A family that is gone after the test, from timm's registry too."""
    monkeypatch.setattr(families, "_families", list(families._families))
    for registry in ("_model_entrypoints", "_model_to_module", "_model_has_pretrained", "_model_pretrained_cfgs",
                     "_model_default_cfgs", "_model_with_tags", "_module_to_models"):  # fmt: skip
        monkeypatch.setattr(_registry, registry, getattr(_registry, registry).copy())
    module = types.ModuleType("throwaway_models")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    cfg = dict(input_size=(3, 8, 8), num_classes=1000, url="https://nowhere.invalid/w.pth")
    module.default_cfgs = generate_default_cfgs({"zebra_one.own": cfg, "zebra_two.none": dict(cfg, url="")})
    family = families.register_family("Throwaway", Throwaway)

    def zebra_one(pretrained=False, **kwargs):
        return build_model(Throwaway, "zebra_one", pretrained, **kwargs)

    def zebra_two(pretrained=False, **kwargs):
        return build_model(Throwaway, "zebra_two", pretrained, **dict(width=8, **kwargs))

    for function in (zebra_one, zebra_two):
        function.__module__ = module.__name__
        family.register(function)
    return family


def test_lists_and_hints(family, capsys):
    assert {"zebra_one", "zebra_two", "internimage_tiny"} < set(internimage.list_models())
    pretrained = internimage.list_models(pretrained=True)
    assert "zebra_one.own" in pretrained and not any("zebra_two" in name for name in pretrained)
    assert families.family_of("zebra_two.none") is family and families.is_ours("zebra_one")
    assert not families.is_ours("resnet18") and not families.is_ours("zebra_three")
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == internimage.list_models()
    assert main(["info"]) == 0
    assert "zebra_two" in capsys.readouterr().out
    with pytest.raises(ModelError, match="did you mean zebra_one"):
        create_model("zebra_ome")
    with pytest.raises(ModelError, match="ours are .*zebra_one, zebra_two"):
        create_model("")
    with pytest.raises(ModelError, match="is for InternImage and Throwaway models, which 'resnet18' is not"):
        create_model("resnet18", pretrained=False, head_from_22k=["n01440764"])


def test_weights_of_another_family_by_its_own_key_map(tmp_path):
    """No file of `weights` knows the names: detectors' prefixes, renamings and hints come from the key map."""
    source = Throwaway()
    renamed = {f"backbone.{key}".replace(".mix.", ".blend."): value for key, value in source.state_dict().items()}
    path = tmp_path / "zebra.pth"
    torch.save({"state_dict": {**renamed, "neck.weight": torch.ones(2)}}, path)
    model = create_model("zebra_one", str(path))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in source.state_dict().items())
    gray = create_model("zebra_one", str(path), in_chans=1)
    torch.testing.assert_close(gray.entry.weight, source.entry.weight.sum(1, keepdim=True))
    with pytest.raises(CheckpointError, match=r"another size: channels=4, depths=\(1,\); the model has channels=8"):
        create_model("zebra_two", str(path))
    with pytest.raises(CheckpointError, match="holds no InternImage: no 'patch_embed.conv1.weight' in it"):
        create_model("internimage_atto", str(path))


def test_folders_of_another_family(tmp_path):
    source = Throwaway(num_classes=7)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    result = convert(tmp_path / "w.pth", tmp_path / "out", model="zebra_one")
    assert result.model == "zebra_one" and result.parameters == sum(p.numel() for p in source.parameters())
    assert read_model_config(tmp_path / "out").ours
    model = create_model(str(tmp_path / "out"))
    assert isinstance(model, Throwaway) and torch.equal(model.exit.weight, source.exit.weight)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "model_args": {"widht": 3}}))
    with pytest.raises(CheckpointError, match="'widht', which Throwaway does not take; did you mean 'width'"):
        timm.create_model(f"local-dir:{tmp_path / 'out'}")
