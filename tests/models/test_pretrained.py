import json

import pytest
import torch

from sixfold import LanguageModel, models
from sixfold.models import ModelError

TINY = {
    "language": {"vocab_size": 40, "context": 16, "d_model": 16, "num_layers": 2},
    "vision": {"image_size": 8, "patch_size": 4, "num_classes": 10, "d_model": 16},
    "simulator": {"channels": 1, "grid_size": 8, "d_model": 16},
}


def test_loading_gives_every_bit_back(kind, tiny, inputs, tmp_path):
    folder = models.save(tiny, tmp_path / "deep" / "folder")
    again = models.load(folder)
    assert type(again) is type(tiny)
    assert again.arguments == tiny.arguments
    assert not again.training
    assert torch.equal(again(inputs), tiny.eval()(inputs))
    own, other = tiny.state_dict(), again.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_buffers_that_a_repair_changed_come_back(tmp_path):
    model = models.build("language", TINY["language"])
    for block in model.blocks:
        block.attention.scale_head_(2, -1)
    again = models.load(models.save(model, tmp_path))
    tokens = torch.arange(16)[None]
    assert torch.equal(again(tokens), model(tokens))


def test_precision_is_kept(kind, tiny, tmp_path):
    again = models.load(models.save(tiny.bfloat16(), tmp_path))
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_saving_again_replaces(tmp_path):
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = models.build("vision", TINY["vision"])
        models.save(model, tmp_path)
    again = models.load(tmp_path)
    assert torch.equal(again.head.weight, model.head.weight)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_the_description_can_be_read(tmp_path):
    models.save(models.build("simulator", TINY["simulator"]), tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    assert (description["kind"], description["class"]) == ("simulator", "PhysicsSimulator")
    assert description["arguments"]["grid_size"] == 8


def test_defaults_and_positions_in_the_call_are_remembered():
    model = LanguageModel(10, 8, num_layers=1)
    assert model.arguments == {
        "vocab_size": 10,
        "context": 8,
        "d_model": 128,
        "num_layers": 1,
        "attention": {"num_heads": 4},
        "positions": "rotary",
        "mlp_ratio": 4.0,
        "dropout": 0.0,
    }


# ---------------------------------------------------------------- errors


def test_build_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"unknown models 'vison'.*Did you mean 'vision'"):
        models.build("vison", {})
    with pytest.raises(ValueError, match=r"argument of vision 'd_modl'.*Did you mean 'd_model'"):
        models.build("vision", {"d_modl": 3})
    with pytest.raises(ValueError, match="language needs vocab_size, context"):
        models.build("language", {})


class Heir(LanguageModel):
    """A user's own class."""


def test_other_models_are_refused(tmp_path):
    for model in (torch.nn.Linear(2, 2), Heir(10, 8, 8, 1, {"num_heads": 2})):
        with pytest.raises(ModelError, match=f"{type(model).__name__} is not one of the models"):
            models.save(model, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_arguments_that_json_cannot_hold_are_refused(tmp_path):
    attention = {"num_heads": 2, "dtype": torch.float32}
    with pytest.raises(ModelError, match="argument cannot be written as JSON"):
        models.save(LanguageModel(10, 8, 8, 1, attention), tmp_path)


def test_several_precisions_are_refused(tmp_path):
    model = LanguageModel(10, 8, 8, 1, {"num_heads": 2})
    model.norm.double()
    with pytest.raises(ModelError, match="one precision"):
        models.save(model, tmp_path)


@pytest.fixture
def saved(tmp_path):
    return models.save(models.build("language", TINY["language"]), tmp_path / "model")


def test_what_is_not_a_model_is_refused(tmp_path, saved):
    with pytest.raises(ModelError, match="is no saved model"):
        models.load(tmp_path)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        models.load(saved)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_cut_file_is_refused(saved, cut):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelError, match="damaged"):
        models.load(saved)


def test_a_flipped_bit_is_refused(saved):
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match="does not match its checksum"):
        models.load(saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("not json", r"model\.json is damaged"),
        ("[]", "is no description of a model: 'format'"),
        ({"format": 2}, "has format 2; this version reads 1"),
        ({"kind": None}, "'kind' is missing or wrong"),
        ({"kind": "_block"}, "unknown models '_block'"),
        ({"kind": "os"}, "unknown models 'os'"),
        ({"kind": "classifier"}, "argument of classifier 'positions'"),
        ({"class": "Other"}, "holds a Other, not a LanguageModel"),
        ({"arguments": {}}, "language needs vocab_size, context"),
        ({"arguments": {"vocab_size": "x", "context": 3}}, "cannot be read"),
        ({"arguments": {**TINY["language"], "d_model": 32}}, "tensors do not fit the arguments"),
        ({"arguments": {**TINY["language"], "num_layers": 1}}, "expected nothing"),
        ({"arguments": {**TINY["language"], "num_layers": 3}}, "is absent, expected"),
    ],
)
def test_a_foreign_description_is_refused(saved, edit, message):
    path = saved / "model.json"
    if isinstance(edit, dict):
        edit = json.dumps({**json.loads(path.read_text()), **edit})
    path.write_text(edit)
    with pytest.raises(ModelError, match=message):
        models.load(saved)


def test_weights_that_are_no_safetensors_are_refused(saved):
    (saved / "model.safetensors").write_bytes(b"\x80\x04pickle")
    path = saved / "model.json"
    description = json.loads(path.read_text())
    description["sha256"] = models._pretrained.digest(saved / "model.safetensors")
    path.write_text(json.dumps(description))
    with pytest.raises(ModelError, match="cannot be read"):
        models.load(saved)
