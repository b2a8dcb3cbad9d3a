"""All tasks on one system, beside the same system with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from jrl.downstream.captioning import Captioning
from jrl.downstream.classification import Classification
from jrl.downstream.detection import Detection
from jrl.downstream.fit import FrozenFeatures, Result, fit_head
from jrl.downstream.retrieval import Retrieval, retrieval
from jrl.downstream.scenes import ScenePart
from jrl.downstream.segmentation import Segmentation
from jrl.downstream.task import Task
from jrl.downstream.vqa import VisualQuestions
from jrl.systems import System
from jrl.training.run import Run

RETRIEVAL = "retrieval"
KINDS: dict[str, Callable[[], Task]] = {
    kind.name: kind for kind in (Classification, Segmentation, Detection, Captioning, VisualQuestions)
}
TASKS = (*KINDS, RETRIEVAL)


@dataclass
class Outcome:
    """One task.

    Attributes:
        metric: the score that stands for it.
        scores: of the system.
        random: of the same system with random weights; None when that was not asked for.
        baseline: without the picture.
        task: None for retrieval.
        result: the head and what it said, or what was retrieved.
    """

    metric: str
    scores: dict[str, float]
    random: dict[str, float] | None
    baseline: dict[str, float]
    task: Task | None
    result: Result | Retrieval


def probe(
    run: Run,
    data: Mapping[str, ScenePart],
    tasks: Sequence[str | Task] = TASKS,
    *,
    frozen: bool = True,
    against_random: bool = False,
    epochs: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Outcome]:
    """Measure what the image encoder of a system has learned.

    Args:
        run: the system and its tokenizer; heads look through its `image_trunk`, retrieval compares what it embeds.
        data: "train", "val" and "test", as `scene_parts` gives.
        tasks: names out of TASKS, or tasks.
        frozen: leave the encoder as it is under the heads; train a copy of it with each head when False. Retrieval
            has no head, so it takes the system as it is.
        against_random: also measure the same system with random weights.
        epochs, lr: as for `fit_head`.
        seed: of the heads and of the random weights.
        say: is told of each task that is done.

    Returns:
        Outcomes by the names of the tasks.

    Raises:
        ValueError: no task, an unknown one, one named twice, or an encoder or number that does not fit.
    """
    chosen = choose(tasks)
    device = run.device
    features = FrozenFeatures(run.system, data, device)
    other = replace(run, system=random_twin(run.system, seed)) if against_random else None
    other_features = None if other is None else FrozenFeatures(other.system, data, device)
    outcomes: dict[str, Outcome] = {}
    for name, task in chosen.items():

        def measure(run: Run, features: FrozenFeatures, task: Task | None = task) -> Result | Retrieval:
            if task is None:
                return retrieval(run, data["test"])
            shared = features if frozen else None
            return fit_head(
                run.system,
                task,
                data,
                frozen=frozen,
                epochs=epochs,
                lr=lr,
                seed=seed,
                device=device,
                features=shared,
            )

        result = measure(run, features)
        twin = None
        if other is not None and other_features is not None:
            twin = measure(other, other_features).scores
        metric = "mean_recall" if task is None else task.metric
        outcomes[name] = Outcome(metric, result.scores, twin, result.baseline, task, result)
        beside = "" if twin is None else f", random weights {100 * twin[metric]:.1f}"
        say(
            f"{name}: {metric} {100 * result.scores[metric]:.1f}{beside}, "
            f"without the picture {100 * result.baseline[metric]:.1f}"
        )
    return outcomes


def random_twin(system: System, seed: int) -> System:
    """The same system with fresh weights, on the same device, in evaluation mode.

    Args:
        system: any.
        seed: of the weights; the state of torch's generator is left as it was.
    """
    device = next(system.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = type(system).from_config(system.to_config())
    return twin.to(device).eval()


def choose(tasks: Sequence[str | Task]) -> dict[str, Task | None]:
    """Tasks by their names; None for retrieval, which has no head.

    Raises:
        ValueError: no task, an unknown one, or one named twice.
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {tasks!r}")
    chosen: dict[str, Task | None] = {}
    for task in tasks:
        name = task if isinstance(task, str) else task.name
        if isinstance(task, str) and task not in TASKS:
            raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {task!r}")
        if name in chosen:
            raise ValueError(f"tasks: {name!r} is named twice")
        if isinstance(task, str):
            chosen[name] = None if task == RETRIEVAL else KINDS[task]()
        else:
            chosen[name] = task
    return chosen
