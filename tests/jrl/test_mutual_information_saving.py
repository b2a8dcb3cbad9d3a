"""The mutual-information system: saving, loading, what older runs hold, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jrl.encoders import ImageEncoder, TextEncoder
from jrl.objectives import DeepInfoMax, MaskedWords, MutualInformationEstimator
from jrl.systems import LayerPair, MutualInformation, load_system

from .mutual_information_fixtures import BERT, RESNET, SPECIAL, small, squares, train


def test_saved_and_loaded(tmp_path: Path) -> None:
    system = small(
        layers=[LayerPair(), LayerPair(image=1)],
        image_objective=DeepInfoMax(24, 24, units=16, prior_weight=0.1),
        text_objective=MaskedWords(24, 32, 4, SPECIAL),
        freeze=[],
        estimator=MutualInformationEstimator("jsd"),
        embedding="encoder",
    ).eval()
    system.save_pretrained(tmp_path / "model")
    again = load_system(tmp_path / "model")
    assert isinstance(again, MutualInformation)
    assert again.to_config() == system.to_config()
    batch, _ = squares(4, 0)
    torch.testing.assert_close(again.critic_scores(**batch), system.critic_scores(**batch))
    assert torch.equal(again.word_regions(**batch).attention, system.word_regions(**batch).attention)


def test_a_hidden_width_without_a_meaning_is_forgotten() -> None:
    """It was accepted once, so there may be saved systems that have one."""
    config = small(critic={"projection": "identity"}).to_config()
    config["critic"]["hidden"] = 7
    assert MutualInformation.from_config(config).to_config()["critic"]["hidden"] is None


def test_a_system_from_before_the_map_to_the_code_is_loaded(tmp_path: Path) -> None:
    small(image_objective=DeepInfoMax(24, 24, units=16, prior_weight=0.1)).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    older = {name: value for name, value in state.items() if ".code." not in name}
    assert len(older) == len(state) - 2
    save_file(older, tmp_path / "model.safetensors")
    system = load_system(tmp_path)
    assert isinstance(system, MutualInformation)
    assert system.image_objective is not None and system.image_objective.code is not None
    assert torch.equal(system.image_objective.code.weight, torch.eye(24))
    del older["image_objective.discriminator.0.weight"]
    save_file(older, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="discriminator.0.weight is missing"):
        load_system(tmp_path)


def test_starts_from_a_run(tmp_path: Path) -> None:
    first = small(joint_weight=0.0, image_objective=DeepInfoMax(24, 24, units=16))
    train(first, 2)
    first.save_pretrained(tmp_path / "run" / "model")
    torch.manual_seed(5)
    fresh = ImageEncoder(RESNET), TextEncoder(BERT)
    system = MutualInformation(*fresh, image_weights=str(tmp_path / "run"), freeze=["image"])
    for name, value in first.image_encoder.state_dict().items():
        assert torch.equal(system.image_encoder.state_dict()[name], value), name
    assert not torch.equal(
        system.text_encoder.model.get_input_embeddings().weight,
        first.text_encoder.model.get_input_embeddings().weight,
    )
    assert "image_weights" not in system.to_config()
    with pytest.raises(FileNotFoundError, match="no such folder; expected a run or a saved system"):
        small(text_weights=str(tmp_path / "nowhere"))
    other = TextEncoder({**BERT, "hidden_size": 32})
    with pytest.raises(ValueError, match="the weights do not fit the config"):
        MutualInformation(ImageEncoder(RESNET), other, text_weights=str(tmp_path / "run"))


def test_refusals() -> None:
    image, text = ImageEncoder(RESNET), TextEncoder(BERT)
    with pytest.raises(TypeError, match="image_encoder: expected ImageEncoder, got TextEncoder"):
        MutualInformation(text, text)
    with pytest.raises(TypeError, match="text_objective: expected MaskedWords, got DeepInfoMax"):
        MutualInformation(image, text, text_objective=DeepInfoMax(4, 4))
    for options, message in (
        (
            {"critic": {"projection": "conv"}},
            "critic: projection: expected one of linear, mlp, mlp_bn, identity",
        ),
        ({"embedding": "mean"}, "embedding: expected one of values, encoder, got 'mean'"),
        (
            {"embedding": "encoder", "text_encoder": TextEncoder({**BERT, "hidden_size": 32})},
            "embedding: 'encoder' compares vectors of one width, got 24 of pictures and 32 of texts",
        ),
        ({"freeze": ["critic"]}, "freeze: expected one of image, text, got 'critic'"),
        ({"duplicate_captions": "merge"}, "duplicate_captions: expected one of negative, exclude"),
        ({"layers": []}, "layers: expected one pair or more, each once"),
        ({"layers": [LayerPair(), LayerPair()]}, "layers: expected one pair or more, each once"),
        ({"critic": {"dim": 0}}, "critic: dim: expected at least 1, got 0"),
        ({"critic": {"hidden": 0}}, "critic: hidden: expected at least 1, got 0"),
        *(
            ({"critic": {"projection": kind, "hidden": 3}}, "critic: hidden: has a meaning only for 'mlp'")
            for kind in ("linear", "identity")
        ),
        ({"critic": {"scale": math.inf}}, "scale: expected a positive finite number or None, got inf"),
        *(
            ({"layers": [LayerPair(weight=weight)]}, "layers: expected positive finite weights")
            for weight in (0.0, math.nan, math.inf)
        ),
        *(
            (
                {"special_token_ids": [2, token]},
                r"special_token_ids: expected whole numbers in \[0, 32\), got",
            )
            for token in (32, -1, "a", 2.5)
        ),
        (
            {"image_objective": DeepInfoMax(10, 24, units=8)},
            "image_objective: expected local_width and global_width 24 as the image encoder, got 10 and 24",
        ),
        (
            {"joint_weight": math.nan},
            "joint_weight, image_weight, text_weight: expected 0 or more and finite",
        ),
        ({"layers": [LayerPair(image=9)]}, "layers: image: expected -1 for the last layer or 0 to 2, got 9"),
        ({"joint_weight": 0.0}, "there is nothing to train"),
        ({"joint_weight": -1.0}, "joint_weight, image_weight, text_weight: expected 0 or more"),
        (
            {"critic": {"per_word": True}, "estimator": MutualInformationEstimator()},
            "critics per word need bound 'nce' and direction 'text_to_image'",
        ),
        (
            {"estimator": MutualInformationEstimator("dv"), "duplicate_captions": "exclude"},
            "duplicate_captions: the bound 'dv' cannot leave pairs out",
        ),
        (
            {"freeze": ["image"], "image_objective": DeepInfoMax(24, 24)},
            "a frozen image encoder cannot learn by image_objective",
        ),
        (
            {"critic": {"projection": "identity"}, "layers": [LayerPair(image=1)]},
            "needs layers of one width, got 16 and 24",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            small(**options)
    batch, _ = squares(4, 0)
    with pytest.raises(ValueError, match="expected as many captions as the 4 pictures, got 3"):
        small()({**batch, "input_ids": batch["input_ids"][:3], "attention_mask": batch["attention_mask"][:3]})
    batch["attention_mask"][:, 1:] = False
    batch["attention_mask"][0, 1] = True
    with pytest.raises(
        ValueError, match="a batch norm in training needs at least 2 real ones in a batch, got 1"
    ):
        small().train()(batch)
    assert small().eval()(batch)[0]["joint"].isfinite()
    with pytest.warns(UserWarning, match=r"hides and draws the tokens \[2, 3\], which special_token_ids"):
        small(text_objective=MaskedWords(24, 32, 4, [0]))
    config = small().to_config()
    del config["layers"]
    with pytest.raises(ValueError, match="config: has no 'layers'"):
        MutualInformation.from_config(config)
