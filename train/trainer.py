"""The training loop: a step is gradients → sum over processes → update; between steps log and save."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.adapter import Adapter
from train.checkpoints import Checkpoints
from train.data.batches import ImageReader, Step, make_passes, share
from train.data.store import Store
from train.errors import Interrupted, TrainError
from train.forward import Forward
from train.groups import Groups, Leaf, gradients, set_gradients
from train.log import Log
from train.processes import Processes, StopSignal
from train.recipe import OptimizerRecipe, Recipe


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows of one source that are never trained on."""

    name: str
    store: Store
    rows: Sequence[int]


class Trainer:
    """One run. `finished_steps` is all that decides what comes next, so that a run resumes at any step."""

    def __init__(
        self,
        recipe: Recipe,
        adapter: Adapter,
        groups: Groups,
        forward: Forward,
        processes: Processes,
        total_steps: int,
    ) -> None:
        optimizer = recipe.optimizer
        self._recipe = recipe
        self._adapter = adapter
        self._groups = groups
        self._forward = forward
        self._processes = processes
        self._total_steps = total_steps
        self._optimizer = torch.optim.AdamW(
            groups.optimizer_groups(optimizer.weight_decay), lr=optimizer.peak_lr, betas=optimizer.betas
        )
        # Only float16 needs it: its gradients underflow.
        self._scaler = torch.amp.GradScaler(processes.device.type, enabled=recipe.compute.dtype == "float16")
        self.finished_steps = 0

    def state(self) -> dict[str, Any]:
        """What `restore` needs besides the adapter."""
        return {
            "finished_steps": self.finished_steps,
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        decays = [group["weight_decay"] for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(state["optimizer"])
        for group, decay in zip(self._optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay  # the recipe's, which may have changed since
        self._scaler.load_state_dict(state["scaler"])
        self.finished_steps = int(state["finished_steps"])

    def run(
        self,
        steps: Iterator[Step],
        held_out: Sequence[HeldOut],
        read_image: ImageReader,
        checkpoints: Checkpoints,
        log: Log | None,
        stop: StopSignal,
    ) -> bool:
        """Train to the end. False where a signal ended it first; then all is saved.

        Raises TrainError for a loss or gradient that is no number, before it reaches the weights, and
        Interrupted where a signal came before the first step.
        """
        keep, saved = self._recipe.keep, self.finished_steps
        # Perhaps it ended between saving and evaluating.
        if self._is_evaluated(saved) and not self._evaluate(held_out, read_image, log, stop):
            if not saved:
                raise Interrupted
            return False
        began = time.perf_counter()
        for step in steps:
            values, stopping = self._step(step, stop.requested, checkpoints)
            now = time.perf_counter()
            self.finished_steps += 1
            if log is not None:
                log.step(self.finished_steps, values | {"tokens_per_second": step.tokens / (now - began)})
            last = self.finished_steps == self._total_steps
            if last or stopping or self.finished_steps % keep.checkpoint_every == 0:
                self._save(checkpoints)
                saved = self.finished_steps
            if stopping and not last:
                return False
            evaluated = self._is_evaluated(self.finished_steps)
            if evaluated and not self._evaluate(held_out, read_image, log, stop):
                if saved < self.finished_steps:
                    self._save(checkpoints)
                return False  # whoever goes on makes the evaluation first
            began = time.perf_counter()
        assert saved == self.finished_steps
        return True

    def _is_evaluated(self, step: int) -> bool:
        return step == self._total_steps or step % self._recipe.keep.evaluate_every == 0

    def _step(self, step: Step, stop: bool, checkpoints: Checkpoints) -> tuple[dict[str, Any], bool]:
        """One update. Returns what to log, and whether any process is to stop after it."""
        active = self._groups.activate(step.source)
        loss = torch.zeros((), device=self._processes.device)
        scale = self._scaler.scale(torch.ones((), device=loss.device)) / step.targets
        for batch in step.passes:
            loss += self._forward.backward(batch, scale)
        stops = torch.tensor(float(stop), device=loss.device)
        *grads, loss, stops = self._processes.sum([*gradients(active), loss, stops])
        rate = self._set_rate()
        norm = self._update(active, grads, float(loss), checkpoints)
        values = {
            "source": list(self._recipe.data)[step.source],
            "loss": float(loss) / step.targets,
            "lr": rate,
            "gradient_norm": norm,
            "tokens": step.tokens,
        }
        return values, bool(stops > 0)

    def _update(
        self, active: Sequence[Leaf], grads: Sequence[Tensor], loss: float, checkpoints: Checkpoints
    ) -> float:
        """Clip and apply the gradients, and return their norm, unscaled."""
        norm = torch.nn.utils.get_total_norm(grads) / self._scaler.get_scale()
        number = float(norm)
        if not math.isfinite(loss) or not (math.isfinite(number) or self._scaler.is_enabled()):
            raise TrainError(
                f"step {self.finished_steps + 1}: the loss is {loss}, the gradient's norm {number}; "
                + checkpoints.remedy("lower optimizer.lr, or set optimizer.clip,")
            )
        set_gradients(active, grads)
        parameters = [part for leaf in active for part in leaf.parts]
        self._scaler.unscale_(self._optimizer)
        clip = self._recipe.optimizer.clip
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return number

    def _set_rate(self) -> float:
        rate = learning_rate(self._recipe.optimizer, self.finished_steps, self._total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _save(self, checkpoints: Checkpoints) -> None:
        if self._processes.first:
            checkpoints.save(self.finished_steps, self._adapter, self.state())

    def _evaluate(
        self, held_out: Sequence[HeldOut], read_image: ImageReader, log: Log | None, stop: StopSignal
    ) -> bool:
        """False where a signal ended it first."""
        losses = {}
        for part in held_out:
            loss = held_out_loss(
                self._forward, part, read_image, self._recipe.compute.pass_tokens, self._processes, stop
            )
            if loss is None:
                return False
            losses[part.name] = loss
        if log is not None:
            with torch.no_grad():
                gates_LH = self._adapter.gates().abs()
            rows = self._adapter.config.gated_layers
            log.evaluation(self.finished_steps, losses, gates_LH.mean(1)[list(rows)].tolist())
        return True


def held_out_loss(
    forward: Forward,
    part: HeldOut,
    read_image: ImageReader,
    pass_tokens: int,
    processes: Processes,
    stop: StopSignal,
) -> float | None:
    """Mean −log p of the held-out targets; each process takes its share of the rows.

    None where a signal came to any of the processes before it was through.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=processes.device)
    mine = share(part.rows, part.store, processes.rank, processes.world)
    for batch in make_passes(part.store, mine, read_image, pass_tokens):
        if stop.requested:
            sums[2] = 1
            break
        sums[0] += forward.loss(batch)
        sums[1] += len(batch.targets_M)
    [total] = processes.sum([sums])
    return None if total[2] > 0 else float(total[0] / total[1])


def learning_rate(optimizer: OptimizerRecipe, step: int, total: int) -> float:
    """Linear from 0 over the warm-up, then half a cosine down to `min_lr`; `step` counts from 0."""
    warmup = optimizer.warmup * total
    if step < warmup:
        return optimizer.peak_lr * step / warmup
    share_done = (step - warmup) / max(1.0, total - warmup)
    height = 0.5 * (1 + math.cos(math.pi * share_done))
    return optimizer.min_lr + (optimizer.peak_lr - optimizer.min_lr) * height
