"""Any system as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from jrl.evaluation import evaluate
from jrl.systems import System
from jrl.systems.base import OptimizerSpec
from jrl.training.optim import parameter_groups, warmup_cosine
from jrl.training.watch import TrainingWatch

_COLLECTED = ("image", "text", "image_index", "caption_image")


class SystemModule(lightning.LightningModule):
    """Trains a system with AdamW, linear warm-up and a cosine, and validates it by retrieval.

    The generator is seeded from (`seed`, step, rank) before every step, so dropout and noise depend on
    nothing else and a resumed run repeats an uninterrupted one. Under data parallelism Lightning averages the
    gradients of the ranks; contrastive losses are over the batches of all ranks and made for that average.

    Args:
        system: what to train.
        lr: peak learning rate.
        weight_decay: of the matrices; biases, norms and temperatures never decay.
        betas: of AdamW.
        eps: of AdamW.
        warmup: steps of warm-up when 1 or more, else its share of the run.
        warmup_lr_factor: learning rate from which the warm-up rises, as a share of the peak.
        final_lr_factor: learning rate at the end, likewise.
        seed: of everything random inside the system.
        freeze: names of submodules that are not trained, such as "image_encoder".
        channels_last: keep pictures and convolutions in that memory format, which is faster for most.

    Attributes:
        results: what `jrl.evaluation.evaluate` said of each part, after the latest evaluation.
        losses, plots: of the latest training step, detached.

    Raises:
        ValueError: a value out of range, or `freeze` names no submodule.
    """

    def __init__(
        self,
        system: System,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        warmup: float = 0.1,
        warmup_lr_factor: float = 0.0,
        final_lr_factor: float = 0.0,
        seed: int = 0,
        freeze: tuple[str, ...] = (),
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr: expected a positive number, got {lr}")
        if weight_decay < 0:
            raise ValueError(f"weight_decay: expected 0 or more, got {weight_decay}")
        if warmup < 0 or (warmup >= 1 and warmup != int(warmup)):
            raise ValueError(f"warmup: expected a share below 1 or a whole number of steps, got {warmup}")
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        children = dict(system.named_modules())
        for name in freeze:
            if not name or name not in children:
                raise ValueError(f"freeze: the system has no submodule {name!r}")
            children[name].requires_grad_(False)
        if channels_last:
            system.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.system = system
        self.channels_last = channels_last
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.warmup, self.warmup_lr_factor, self.final_lr_factor = warmup, warmup_lr_factor, final_lr_factor
        self.seed = seed
        self._specs: list[OptimizerSpec] = []
        self._outputs: dict[int, dict[str, list[Tensor]]] = {}
        self._bounds: dict[int, list[tuple[int, dict[str, Tensor]]]] = {}
        self._frozen = tuple(freeze)
        self.results: dict[str, dict[str, float]] = {}
        self.losses: dict[str, Tensor] = {}
        self.plots: dict[str, Tensor] = {}
        # one optimiser steps by itself; several take turns in training_step
        self.automatic_optimization = len(system.optimization()) == 1

    def configure_callbacks(self) -> list[Callback]:
        """A `TrainingWatch`, unless the trainer has one."""
        has_one = any(isinstance(callback, TrainingWatch) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if has_one else [TrainingWatch()]

    def configure_optimizers(self) -> Any:
        """The optimisers that the system declares, each with its schedule."""
        self._specs = self.system.optimization()
        self._check_strategy()
        total = self._total_steps()
        warmup = int(self.warmup) if self.warmup >= 1 else math.floor(self.warmup * total)
        optimizers, schedulers = [], []
        for spec in self._specs:
            decay = self.weight_decay if spec.weight_decay is None else spec.weight_decay
            groups = parameter_groups(spec.parameters, decay)
            # Lightning refuses to clip the gradients of a fused optimiser under mixed precision
            fused = "mixed" not in str(self.trainer.precision)
            fused &= all(p.device.type == "cpu" for group in groups for p in group["params"])
            optimizer = torch.optim.AdamW(
                groups, lr=self.lr * spec.lr_factor, betas=self.betas, eps=self.eps, fused=fused or None
            )
            optimizers.append(optimizer)
            schedule = warmup_cosine(warmup, total, self.final_lr_factor, self.warmup_lr_factor)
            schedulers.append({"scheduler": LambdaLR(optimizer, schedule), "interval": "step"})
        return optimizers, schedulers

    def on_train_start(self) -> None:
        """Training mode for all but frozen parts, whose statistics and dropout rest too."""
        # Lightning leaves the modes as it finds them, and what was loaded rests
        self.system.train()
        for name in self._frozen:
            self.system.get_submodule(name).eval()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """One step of every optimiser."""
        self._seed_step()
        self._set_memory_format(batch)
        if self.automatic_optimization:
            losses, plots = self.system(batch)
            total = torch.stack([loss.float() for loss in losses.values()]).sum()
        else:
            losses, plots, total = self._take_turns(batch)
        self._report(losses, plots, total)
        return total if self.automatic_optimization else None

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect the embeddings of one batch."""
        self._collect(batch, dataloader_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Collect the embeddings of one batch."""
        self._collect(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log retrieval on every validation part."""
        self._evaluate(self.trainer.val_dataloaders)

    def on_test_epoch_end(self) -> None:
        """Log retrieval on every test part."""
        self._evaluate(self.trainer.test_dataloaders)

    def _take_turns(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        all_losses: dict[str, Tensor] = {}
        all_plots: dict[str, Tensor] = {}
        optimizers: Any = self.optimizers()
        for turn in self.system.turns(batch):
            with self._training_only(turn.optimizers):
                losses, plots = self.system(turn.batch)
                for place in turn.optimizers:
                    names = _losses_of(self._specs[place], losses)
                    optimizers[place].zero_grad()
                    # `inputs`: the gradients of one optimiser's losses stay out of another's parameters
                    with self._without_reducer():
                        self.manual_backward(
                            torch.stack([losses[name].float() for name in names]).sum(),
                            inputs=self._trained(place),
                            retain_graph=place != turn.optimizers[-1],
                        )
                    self._average_gradients(place)
                    all_losses.update({name: losses[name].detach() for name in names})
            for place in turn.optimizers:
                optimizers[place].step()
            self.system.after_turn(turn)
            all_plots.update(plots)
        schedulers: Any = self.lr_schedulers()
        for scheduler in schedulers:
            scheduler.step()
        return all_losses, all_plots, torch.stack([loss.float() for loss in all_losses.values()]).sum()

    def _without_reducer(self) -> AbstractContextManager[Any]:
        """DDP's reducer waits for every parameter in every backward, where a turn has gradients for some."""
        no_sync = getattr(self.trainer.model, "no_sync", None)
        return nullcontext() if no_sync is None else no_sync()

    def _average_gradients(self, place: int) -> None:
        ranks = self.trainer.world_size
        if ranks == 1:
            return
        gradients = [p.grad for p in self._trained(place) if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(together)
        parts = (together / ranks).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _trained(self, place: int) -> list[torch.nn.Parameter]:
        groups = self.trainer.optimizers[place].param_groups
        return [parameter for group in groups for parameter in group["params"]]

    @contextmanager
    def _training_only(self, places: tuple[int, ...]) -> Iterator[None]:
        """Parameters of the other optimisers need no gradients meanwhile, so what leads to them alone is not recorded."""
        wanted = {id(parameter) for place in places for parameter in self._trained(place)}
        others = [
            parameter
            for place in range(len(self._specs))
            for parameter in self._trained(place)
            if id(parameter) not in wanted and parameter.requires_grad
        ]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def _report(self, losses: dict[str, Tensor], plots: dict[str, Tensor], total: Tensor) -> None:
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        self.plots = plots
        self.log("loss", total.detach(), prog_bar=True)
        # the loggers are called directly: a `log` for every name at every step costs more than a small step
        # itself
        trainer: Any = self.trainer
        if trainer.fit_loop.epoch_loop.total_batch_idx % trainer.log_every_n_steps:
            return
        values = {f"train/{name}": value.item() for name, value in (*losses.items(), *plots.items())}
        values["train/lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        for logger in self.loggers:
            logger.log_metrics(values, step=self.trainer.global_step)

    def _collect(self, batch: dict[str, Any], part: int) -> None:
        self._set_memory_format(batch)
        kept = self._outputs.setdefault(part, {name: [] for name in _COLLECTED})
        kept["image"].append(self.system.encode_image(batch["pixel_values"]).global_.float())
        encoded = self.system.encode_text(batch["input_ids"], batch["attention_mask"])
        kept["text"].append(encoded.global_.float())
        for name in ("image_index", "caption_image"):
            kept[name].append(batch[name])
        compatibility = getattr(self.system, "compatibility", None)
        # one pair has nothing to be told apart from
        if compatibility is not None and len(batch["pixel_values"]) > 1:
            values = compatibility(_first_captions(batch))
            self._bounds.setdefault(part, []).append((len(batch["pixel_values"]), values))

    def _evaluate(self, loaders: Any) -> None:
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        objective = getattr(self.system, "objective", None)
        scale = getattr(objective, "scale", None)
        scores: list[float] = []
        bounds: list[float] = []
        self.results.clear()
        for part, kept in sorted(self._outputs.items()):
            image, text, index, owner = (torch.cat(kept[name]) for name in _COLLECTED)
            # pictures that could not be read leave gaps in the numbering
            caption_image = torch.searchsorted(index, owner)
            result = evaluate(image, text, caption_image, scale=None if scale is None else scale.item())
            result.update(_mean_bounds(self._bounds.get(part, [])))
            name = getattr(loaders[part], "name", None) or str(part)
            prefix = "test" if self.trainer.testing else "val"
            self.log_dict(
                {f"{prefix}/{name}/{key}": value for key, value in result.items()}, add_dataloader_idx=False
            )
            self.results[name] = result
            scores.append(result["mean_recall"])
            bounds += [result["bound_nats"]] if "bound_nats" in result else []
        self._outputs.clear()
        self._bounds.clear()
        if bounds and not self.trainer.testing:
            self.log("val/bound", sum(bounds) / len(bounds), prog_bar=True)
        if scores and not self.trainer.testing:
            self.log("val/mean_recall", sum(scores) / len(scores), prog_bar=True)

    def _check_strategy(self) -> None:
        if len(self._specs) > 1 and self.trainer.precision == "16-mixed":
            # one scaler serves all optimisers, and each of them would change the scale under the gradients of the next
            raise ValueError(
                f"precision: {type(self.system).__name__} has {len(self._specs)} optimisers, which train with 'bf16-mixed' or "
                "'32-true', got '16-mixed'"
            )
        strategy = self.trainer.strategy
        if len(self._specs) > 1 and not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"strategy: {type(self.system).__name__} has {len(self._specs)} optimisers, which train on one device or with "
                f"'ddp', got {type(strategy).__name__}"
            )
        waits = isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters")
        # several optimisers leave the averaging to this module, which waits for no gradient
        if waits and len(self._specs) == 1 and self.system.idle:
            raise ValueError(
                f"strategy: 'ddp' would wait for gradients of {self.system.idle}; "
                "use 'ddp_find_unused_parameters_true'"
            )

    def _set_memory_format(self, batch: dict[str, Any]) -> None:
        if self.channels_last:
            batch["pixel_values"] = batch["pixel_values"].contiguous(memory_format=torch.channels_last)

    def _seed_step(self) -> None:
        step, rank = self.trainer.global_step, self.trainer.global_rank
        torch.manual_seed(((self.seed * 1_000_003 + step) * 1_000_003 + rank) % 2**64)

    def _total_steps(self) -> int:
        trainer = self.trainer
        limits = []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            # reading it once makes Lightning set up the loader whose length it needs
            estimated = trainer.estimated_stepping_batches
            limits.append(estimated)
        if trainer.max_steps is not None and trainer.max_steps >= 0:
            limits.append(math.ceil(trainer.max_steps / self.system.steps_per_batch))
        total = min(limits, default=math.inf)
        if not math.isfinite(total):
            raise ValueError("trainer: the schedule needs max_epochs or max_steps")
        return max(1, int(total))


def _losses_of(spec: OptimizerSpec, losses: dict[str, Tensor]) -> tuple[str, ...]:
    names = tuple(losses) if spec.losses is None else spec.losses
    unknown = [name for name in names if name not in losses]
    if unknown:
        raise ValueError(
            f"optimization: no loss is called {', '.join(unknown)}; there are {', '.join(losses)}"
        )
    return names


def _first_captions(batch: dict[str, Any]) -> dict[str, Any]:
    """Each picture of an evaluation batch with the first of its captions, which lie together in the pictures' order."""
    first = torch.searchsorted(batch["caption_image"], batch["image_index"])
    texts = {name: batch[name][first] for name in ("input_ids", "attention_mask")}
    return {"pixel_values": batch["pixel_values"], **texts}


def _mean_bounds(batches: list[tuple[int, dict[str, Tensor]]]) -> dict[str, float]:
    """Bounds of all batches, each with the weight of its pairs; "bound" is `bound_nats` as `evaluate` calls it."""
    total = sum(count for count, _ in batches)
    names = {"bound": "bound_nats", "ceiling": "bound_ceiling"}
    return {
        names.get(name, name): sum(count * float(values[name]) for count, values in batches) / total
        for name in (batches[0][1] if batches else ())
    }
