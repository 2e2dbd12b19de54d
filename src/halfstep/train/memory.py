"""How much memory a training step takes, found without its weights, and the settings that fit one into a budget."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from halfstep.errors import InputError
from halfstep.models.family import Network
from halfstep.precision import PrecisionPolicy, settle
from halfstep.precision.audits.gradients import mean_square
from halfstep.precision.memory import (
    Footprint,
    forward_footprint,
    largest,
    least,
    parse_size,
    planning,
    samples_of,
    told,
    with_batch,
)
from halfstep.train.config import TrainConfig
from halfstep.train.data import TrainingData
from halfstep.train.state import TrainState, Updates
from halfstep.train.trial import step_trial


def step_footprint(
    module: nn.Module,
    inputs: tuple[Any, ...] | dict[str, Any],
    policy: PrecisionPolicy,
    updates: Updates,
    device: torch.device,
    *,
    parts: int = 1,
) -> Footprint:
    """Of a training step as TrainState does it, once there are moments: `parts` times forward and backward pass for
    `inputs`, then an update by AdamW and of the moving average. The mean square of the outputs stands for the loss.
    `module` may be any; of one that is no Network nothing is recomputed. Values are not read. Raises InputError when
    the module cannot be called so, its forward looks at values, or its outputs have no gradient."""
    if policy.params == "fp16":
        raise InputError(f"precision: fp16 weights cannot be trained; use 16-mixed or bf16-mixed instead of {policy}")
    with planning(as_network(module), device) as planned:
        network: Any = planned.module
        given = planned.like(inputs)
        state = TrainState(network, policy, replace(updates, compiled=False), device)

        simulated = min(parts, 2)  # the second finds gradients there, as all after it do

        def backward() -> None:
            for part in range(simulated):
                with state.microbatch(last=part + 1 == simulated):
                    state.backward(mean_square(planned.call(state.model, given)) / simulated)

        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        state.backward(sum((p.float().sum() for p in trained), torch.zeros((), device=device)))
        state.update()  # the first makes the moments
        moments = [value for kept in state.optimizer.state.values() for value in kept.values()]
        copies = [*state.weights.values(), *state.fixed.values(), *state.ema.values()]
        own = [*network.parameters(), *network.buffers()]  # counted last: they are among the weights of fp32 training
        with planned.books(optimizer=[*moments, *copies], weights=own, activations=tree_leaves(given)) as books:
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(lambda p: books.hold("gradients", [p.grad]))
            backward()
            books.kind = "gradients"  # fp32 ones beside those of half weights
            state.update()
        return books.footprint()


@dataclass(frozen=True)
class Plan:
    """What `batch` samples take in `policy`, where of a network's `blocks` so many are `recomputed`. `blocks` is 0 for
    inference and where none can be."""

    policy: str
    batch: int
    recomputed: int
    blocks: int
    footprint: Footprint


def plan(
    module: nn.Module,
    inputs: tuple[Any, ...] | dict[str, Any],
    policy: PrecisionPolicy,
    device: torch.device,
    *,
    train: bool,
    batch: int | None = None,
    budget: int | None = None,
) -> Plan:
    """Of a forward call or, with `train`, a step of `batch` samples, by default as many as the inputs have. Within a
    `budget` in bytes the batch is the largest that fits, where it is not given, and then the fewest blocks are
    recomputed with which it does. Raises InputError naming the least that is needed when nothing fits, and as
    `forward_footprint` and `step_footprint` do."""
    blocks = len(module.blocks) if train and isinstance(module, Network) else 0

    @cache
    def footprint(samples: int, recomputed: int) -> Footprint:
        given = with_batch(inputs, samples)
        if not train:
            return forward_footprint(module, given, policy, device)
        updates = Updates(learning_rate=1.0, recomputed=recomputed / max(1, blocks))
        return step_footprint(module, given, policy, updates, device)

    if budget is None:
        samples, recomputed = batch or samples_of(inputs), 0
    else:
        what = f"{type(module).__name__} in {policy}"
        samples = batch or largest(lambda number: footprint(number, blocks).peak, budget, f"{what} with one sample")
        needing = f"{what} with {samples} samples"
        recomputed = least(lambda number: footprint(samples, number).peak, blocks, budget, needing)
    return Plan(str(policy), samples, recomputed, blocks, footprint(samples, recomputed))


def fitted(config: TrainConfig, data: TrainingData, device: torch.device, processes: int) -> tuple[TrainConfig, str]:
    """The config with the settings by which a step fits into `config.memory`, and a line that says them.

    The batch is kept, because it is part of what is learned. The share of blocks that are computed again is the least
    that is enough: it changes no number. Where all of them are not enough, a step has more micro-batches. Raises
    InputError, naming the least that is needed, when nothing fits, and for what is not planned: pixels that are encoded
    on the way, and several processes.
    """
    assert config.memory is not None
    if data.encoder is not None:
        raise InputError("memory: pixels that are encoded in every step are not planned; encode them first")
    if processes > 1:
        raise InputError(f"memory: is planned for one process, not for {processes}; leave it out")
    budget = parse_size(config.memory)
    about = config.about(data.latent_shape, data.num_classes)
    policy = settle(config.precision, device, "train", trial=lambda: step_trial(config, about, data, device)).policy
    with torch.device("meta"):
        network = about.build()
        example = about.family.example(network)
    blocks = len(network.blocks)
    asked, items = config.gradient_accumulation_steps, data.items_per_step
    choices = [parts for parts in range(asked, items + 1, asked) if items % parts == 0]

    @cache
    def peak(parts: int, recomputed: int) -> int:
        inputs = with_batch(example, items // parts * data.goals)
        updates = replace(config.updates, recomputed=recomputed / blocks)
        return step_footprint(network, inputs, policy, updates, device, parts=parts).peak

    if peak(choices[-1], blocks) > peak(asked, blocks):
        choices = [asked]  # the gradients that the first leaves to the next outweigh what smaller ones save
    what = f"a step of {about.name} with {items} items in {policy}"
    parts = choices[least(lambda number: peak(choices[number], blocks), len(choices) - 1, budget, what)]
    asked_share = round(config.updates.recomputed * blocks)
    more = least(lambda number: peak(parts, asked_share + number), blocks - asked_share, budget, what)
    recomputed = asked_share + more
    changed = {"gradient_accumulation_steps": parts, "activation_budget": 1 - recomputed / blocks}
    line = (
        f"memory: {told(peak(parts, recomputed))} of {told(budget)} at most is predicted for {items} items a step in "
        f"{parts} micro-batches, with {recomputed} of {blocks} blocks computed again"
    )
    return config.model_copy(update=changed), line


def as_network(module: nn.Module) -> Network:
    """A network as it is; any other module as one of which no part is computed again."""
    return module if isinstance(module, Network) else _Whole(module)


class _Whole(Network):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.blocks = module, nn.ModuleList()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)
