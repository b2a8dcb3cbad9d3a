"""The mutual-information system under Lightning: validation bounds, the stop rule, turns, resume, the command line."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from jrl.cli import main
from jrl.encoders import ImageEncoder, TextEncoder
from jrl.objectives import DeepInfoMax, MaskedWords, MutualInformationEstimator
from jrl.systems import CLIP, CriticOptions, LayerPair, MutualInformation, System
from jrl.training import CaptionDataModule, Run, SystemModule

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("mutual_information_*.yaml"))
BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 300,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [12, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}
Config = Callable[..., dict[str, Any]]


def small(**options: Any) -> MutualInformation:
    torch.manual_seed(0)
    critic = CriticOptions(dim=16, scale=None)
    return MutualInformation(ImageEncoder(RESNET), TextEncoder(BERT), critic, **options)


def fit(system: System, values: dict[str, Any], folder: Path, **options: Any) -> lightning.Trainer:
    trainer = lightning.Trainer(
        **{**values["trainer"], "logger": False, "default_root_dir": folder, **options},
        enable_checkpointing=False,
    )
    trainer.fit(SystemModule(system, lr=2e-3), CaptionDataModule(**{**values["data"], "augment": None}))
    return trainer


def test_validation_logs_the_bounds_of_held_out_pairs(config: Config, tmp_path: Path) -> None:
    values = config(trainer={"max_epochs": 1}, data={"eval_batch_size": 5})
    system = small(layers=[LayerPair(), LayerPair(image=1, text=0, weight=0.5)])
    trainer = fit(system, values, tmp_path)
    logged = trainer.callback_metrics
    assert {"val/bound", "val/val/bound_nats", "val/val/bound_last", "val/val/bound_image_1_text_0"} <= set(
        logged
    )
    last, other = (float(logged[f"val/val/bound_{name}"]) for name in ("last", "image_1_text_0"))
    assert float(logged["val/val/bound_nats"]) == pytest.approx(last + 0.5 * other, rel=1e-4)
    assert float(logged["val/bound"]) == pytest.approx(float(logged["val/val/bound_nats"]))
    # by hand: first captions, batches of five, each with the weight of its pairs
    data: CaptionDataModule = trainer.datamodule  # type: ignore[attr-defined]
    total, count = 0.0, 0
    for batch in data.val_dataloader()[0]:
        first = [batch["caption_image"].tolist().index(image) for image in batch["image_index"].tolist()]
        texts = {name: batch[name][first] for name in ("input_ids", "attention_mask")}
        pairs = {"pixel_values": batch["pixel_values"], **texts}
        total += len(first) * float(system.eval().compatibility(pairs)["bound_last"])
        count += len(first)
    assert last == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("bound", ["nce", "jsd", "dv"])
def test_a_last_batch_of_one_pair_has_no_bound(config: Config, tmp_path: Path, bound: str) -> None:
    values = config(trainer={"max_epochs": 1}, data={"eval_batch_size": 4})
    system = small(estimator=MutualInformationEstimator(bound))
    trainer = fit(system, values, tmp_path)
    data: CaptionDataModule = trainer.datamodule  # type: ignore[attr-defined]
    batches = list(data.val_dataloader()[0])
    assert [len(batch["pixel_values"]) for batch in batches] == [4, 4, 4, 1]
    wanted = [float(system.eval().compatibility(batch)["bound"]) for batch in batches[:3]]
    assert float(trainer.callback_metrics["val/bound"]) == pytest.approx(sum(wanted) / 3, rel=1e-4, abs=1e-6)


def test_every_system_with_a_temperature_logs_its_bound(config: Config, tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = CLIP(ImageEncoder(RESNET), TextEncoder(BERT), projection_dim=8)
    logged = fit(clip, config(trainer={"max_epochs": 1}), tmp_path).callback_metrics
    assert float(logged["val/bound"]) == float(logged["val/val/bound_nats"])


def test_stop_rule(config: Config, tmp_path: Path) -> None:
    """No step improves the bound by a thousand nats: training ends after `patience` further validations."""
    stop = EarlyStopping("val/bound", mode="max", min_delta=1000.0, patience=2)
    trainer = fit(small(), config(trainer={"max_epochs": 9}), tmp_path, callbacks=[stop])
    assert trainer.current_epoch == 3
    stop = EarlyStopping("val/bound", mode="max", min_delta=-1000.0, patience=2)
    trainer = fit(small(), config(trainer={"max_epochs": 5}), tmp_path, callbacks=[stop])
    assert trainer.current_epoch == 5


def test_discriminator_takes_turns(config: Config, tmp_path: Path) -> None:
    system = small(
        image_objective=DeepInfoMax(16, 16, units=8, prior_weight=0.1),
        text_objective=MaskedWords(24, 300, 4, [0, 1, 2, 3]),
    )
    state = {name: value.clone() for name, value in system.state_dict().items()}
    fit(system, config(trainer={"max_epochs": 1}), tmp_path)
    moved = {name for name, value in system.state_dict().items() if not torch.equal(value, state[name])}
    for part in (
        "critics",
        "image_encoder",
        "text_encoder",
        "image_objective.discriminator",
        "text_objective",
    ):
        assert any(name.startswith(part) for name in moved), part


def modes(system: MutualInformation) -> dict[str, set[bool]]:
    """Whether each encoder was in training mode whenever the system trained on a batch; filled while it trains."""
    seen: dict[str, set[bool]] = {"image": set(), "text": set()}

    def look(side: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            if system.critics.training:
                seen[side].add(module.training)

        return hook

    system.image_encoder.model.register_forward_hook(look("image"))
    system.text_encoder.model.register_forward_hook(look("text"))
    return seen


@pytest.mark.parametrize("sides", [["image", "text"], ["image"]], ids=["both", "image"])
def test_frozen_encoders_rest_in_training(config: Config, tmp_path: Path, sides: list[str]) -> None:
    system = small(freeze=sides)
    assert [system.image_encoder.training, system.text_encoder.training] == [False, "text" not in sides]
    state = {name: value.clone() for name, value in system.state_dict().items()}
    seen = modes(system)
    fit(system, config(trainer={"max_epochs": 1}), tmp_path)
    assert seen == {"image": {False}, "text": {"text" not in sides}}
    moved = {
        name.split(".")[0]
        for name, value in system.state_dict().items()
        if not torch.equal(value, state[name])
    }
    assert moved == {"critics"} | ({"text_encoder"} if "text" not in sides else set())


def test_encoders_from_folders_train_on(config: Config, tmp_path: Path) -> None:
    """transformers loads a model in evaluation mode, in which neither dropout nor batch statistics work."""
    ImageEncoder(RESNET).model.save_pretrained(tmp_path / "image")
    TextEncoder(BERT).model.save_pretrained(tmp_path / "text")
    encoders = ImageEncoder(tmp_path / "image"), TextEncoder(tmp_path / "text")
    system = MutualInformation(*encoders, CriticOptions(dim=16, scale=None))
    counts = {name: int(value) for name, value in system.state_dict().items() if "num_batches" in name}
    assert counts
    # as what `System.from_pretrained` returns
    system.eval()
    seen = modes(system)
    trainer = fit(system, config(trainer={"max_epochs": 1}), tmp_path)
    assert seen == {"image": {True}, "text": {True}}
    state = system.state_dict()
    assert all(int(state[name]) >= trainer.global_step for name in counts)


def test_ddp_does_not_wait_for_layers_that_nothing_reads() -> None:
    module = SystemModule(small(layers=[LayerPair(image=1)]))
    module._specs = module.system.optimization()
    for strategy, refused in (
        (DDPStrategy(), True),
        (DDPStrategy(find_unused_parameters=True), False),
        (SingleDeviceStrategy(torch.device("cpu")), False),
    ):
        module.trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
        with (
            pytest.raises(ValueError, match="use 'ddp_find_unused_parameters_true'")
            if refused
            else nullcontext()
        ):
            module._check_strategy()


def as_run(values: dict[str, Any], **options: Any) -> dict[str, Any]:
    system = values["model"]["system"]
    system["class_path"] = "jrl.systems.MutualInformation"
    arguments = system["init_args"]
    del arguments["projection_dim"]
    arguments["image_encoder"]["init_args"]["model"] = RESNET
    arguments.update(
        {"critic": {"dim": 16, "scale": None}, "layers": [{}, {"image": 1, "weight": 0.5}], **options}
    )
    return values


def test_stopped_and_resumed_run_is_the_run(config: Config, tmp_path: Path) -> None:
    states = []
    for name, epochs in (("whole", [2]), ("parts", [1, 2])):
        values = as_run(config())
        # the schedule of both is that of two epochs
        values["model"]["warmup"], values["model"]["final_lr_factor"] = 0, 1.0
        values["data"]["augment"] = None
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        for turn, last in enumerate(epochs):
            arguments = ["fit", "--config", str(path), "--run", str(tmp_path / name)]
            arguments += ["--trainer.max_epochs", str(last), "--resume", str(bool(turn)).lower()]
            assert main([*arguments, "--traceback"]) == 0
        states.append(Run.load(tmp_path / name).system.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6, msg=name)
    run = Run.load(tmp_path / "whole")
    assert isinstance(run.system, MutualInformation)
    assert run.encode_texts(["a large red circle"]).shape == (1, 16)
    assert (
        main(
            [
                "validate",
                "--config",
                str(tmp_path / "whole" / "config.yaml"),
                "--run",
                str(tmp_path / "whole"),
            ]
        )
        == 0
    )
    table = (tmp_path / "whole" / "validate.md").read_text(encoding="utf-8")
    assert "of at most" in table


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_build_their_system(path: Path) -> None:
    from jsonargparse import ArgumentParser

    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(System, "system")
    parser.add_class_arguments(CaptionDataModule, "data")
    built = parser.instantiate_classes(
        parser.parse_object({"system": values["model"]["system"], "data": values["data"]})
    )
    system, side = built.system, values["data"]["image_size"]
    assert isinstance(system, MutualInformation)
    ids = torch.randint(5, 50, (2, 7))
    losses, plots = system.train()({"pixel_values": torch.randn(2, 3, side, side), "input_ids": ids})
    assert all(loss.isfinite() for loss in losses.values())
    assert {"bound", "bound_last"} <= set(plots)
    found = system.eval().word_regions(torch.randn(2, 3, side, side), ids)
    assert found.grid[0] >= 6
    callbacks = values["trainer"]["callbacks"]
    (stop,) = (entry["init_args"] for entry in callbacks if entry["class_path"].endswith("EarlyStopping"))
    # a run without joint training has no bound to stop at
    assert stop["monitor"] == "val/bound" and stop["strict"] is False
