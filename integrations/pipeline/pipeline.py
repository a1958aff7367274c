"""A transformers model that trains in stages on several processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from . import checkpoints
from .adapters import check_adapter, penalised_entries
from .balance import balance
from .cost import measure_costs
from .processes import check_same_model, default_device, fork_random, random_state, set_random_state, start_processes
from .schedules import CountedStage, check_schedule, make_schedule
from .stages import Stage, count_labels, count_layers, layer_ranges
from .watch import Watch


class Pipeline(nn.Module):
    """The stages that this process has of a model that trains on several, one schedule of
    `torch.distributed.pipelining`, and what keeps the processes together.

    Every process makes one, from the same model, and gives it the same batches:

        pipeline = Pipeline(model, "1f1b", micro_batches=4, example=batch)
        optimizer = torch.optim.AdamW(pipeline.parameters(), lr=1e-4)
        for batch in batches:
            loss = pipeline.step(batch)
            pipeline.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        pipeline.save("checkpoint", optimizer, step)

    Started by torchrun, or where `torch.distributed` has been initialised before. The process has rank r of K; with S
    stages it has the stages r, r + K, .... A model with a PST adapter trains as in one process: give the pipeline in
    the model's place to `create_pst_optimizer` and `SparsityScheduler`; what they say is about this process's layers.
    The model of the other stages' layers is of no use here, except on rank 0, which gathers it to save: `del model`.

    Attributes:
        stages (`nn.ModuleList`): those of this process, each a `Stage`.
        most_alive (`dict[int, int]`): by the number of each stage of this process, how many micro-batches were alive
            on it at once in the last step: whose forward pass had run and whose backward pass had not.
        busy (`float`): for how many seconds of the last step this process computed. On a GPU, which computes on its
            own, how long it took to tell it what.

    Args:
        model (`nn.Module`):
            A causal language model or encoder of transformers with a head, of an architecture in
            `stages.ARCHITECTURES`, with or without an adapter. Each process has the same one, on any device.
        schedule (`str`):
            `"gpipe"`: all forward passes, then all backward passes. `"1f1b"`: backward passes as early as possible, so
            that at most K micro-batches are alive. `"interleaved"`: 1F1B with several stages for each process.
        micro_batches (`int`):
            In how many parts of as many rows a batch goes through the stages.
        layers (`Sequence[int]`, *optional*):
            How many layers each stage has. By default they are balanced by their cost.
        example (`Mapping[str, Tensor]`, *optional*):
            A batch, on which rank 0 measures the cost of the layers, if `layers` is not given.
        chunks (`int`, *optional*):
            How many stages each process has, where they are balanced: by default 2 if interleaved, else 1.
        device (`torch.device`, *optional*):
            Where this process computes; by default the GPU of its local rank, or the CPU.
        autocast (`torch.dtype`, *optional*):
            The dtype of the products under `torch.autocast`, such as `torch.bfloat16`.
        timeout (`float`):
            Seconds after which a process that shows no sign of life ends the run.

    Raises:
        ValueError: if the model cannot be cut or is not the same on all processes, or the arguments do not fit each
            other, the number of processes or the adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: str = "1f1b",
        micro_batches: int = 4,
        layers: Sequence[int] | None = None,
        example: Mapping[str, Tensor] | None = None,
        chunks: int | None = None,
        device: torch.device | str | None = None,
        autocast: torch.dtype | None = None,
        timeout: float = 15.0,
    ) -> None:
        super().__init__()
        self.device = torch.device(device) if device is not None else default_device()
        start_processes(self.device)
        self.rank, self.processes = dist.get_rank(), dist.get_world_size()
        self.schedule, self.micro_batches = schedule, micro_batches
        total = count_layers(model)
        check_same_model(model)
        check_adapter(model, self.processes)
        chunks = chunks or (2 if schedule == "interleaved" else 1)
        check_schedule(schedule, micro_batches, self.processes, len(layers) if layers else chunks * self.processes)
        self.layers = list(layers) if layers else self._balanced(model, example, chunks, autocast)
        ranges = layer_ranges(self.layers, total)
        stages = [Stage(model, index, own, autocast) for index, own in enumerate(ranges)]
        self.stages = nn.ModuleList(stages[self.rank :: self.processes]).to(self.device)
        self.most_alive: dict[int, int] = {}
        self.busy = 0.0
        own = {id(parameter) for parameter in self.parameters()}
        self.names = {p: name for name, p in model.named_parameters() if id(p) in own}
        """The names that the parameters of this process have in the model."""
        self._model = (model,) if self.rank == 0 else ()  # in a tuple: its modules are not this one's
        self._tied = self._find_tied(stages)
        self._penalised = penalised_entries(model)
        self._running: tuple[Any, Any, list[CountedStage]] | None = None
        with fork_random(self.device):
            torch.manual_seed(torch.initial_seed() + self.rank)
            self.random_state = random_state(self.device)
            """Of the numbers that this process draws in a step, for dropout."""
        self.watch = Watch([self._describe(ranges, rank) for rank in range(self.processes)], timeout)

    def step(self, batch: Mapping[str, Tensor]) -> float:
        """Forward and backward pass of a batch; the gradients are added to those that are there.

        Args:
            batch: what the model's forward takes, on every process the same: `input_ids` and `labels`, and where there
                is padding `attention_mask`, each [rows, ...]. As many rows in each step as the micro-batches divide.

        Returns:
            The loss, the same on every process: the mean over the labels of the whole batch, as one process has it.

        Raises:
            ValueError: if the batch cannot be split, has no label, or is not the same on all processes.
            StageError: if a process was killed or hangs.
        """
        counts = self._count_labels(batch)
        before = {parameter: parameter.grad for parameter, _ in self._tied if parameter.requires_grad}
        for parameter in before:
            parameter.grad = None
        with self.watch.waiting():
            losses = self._run(batch, counts)
            for parameter, group in self._tied:
                if parameter in before:
                    dist.all_reduce(parameter.grad, group=group)
                    if before[parameter] is not None:
                        parameter.grad += before[parameter]
            return self._share_loss(batch, losses, self._charge_penalty())

    def evaluate(self, batch: Mapping[str, Tensor]) -> float:
        """The loss of a batch without dropout and gradients, as `step` returns it."""
        training, counts = self.training, self._count_labels(batch)
        self.eval()
        try:
            with self.watch.waiting(), torch.no_grad():
                return self._share_loss(batch, self._run(batch, counts))
        finally:
            self.train(training)

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scale the gradients down to a norm over all stages, as `torch.nn.utils.clip_grad_norm_` does in one process.

        Returns:
            The norm before.
        """
        elsewhere = {parameter for parameter, group in self._tied if self.rank != dist.get_global_rank(group, 0)}
        gradients = {p: p.grad for p in self.parameters() if p.grad is not None}
        squares = [gradient.float().square().sum() for p, gradient in gradients.items() if p not in elsewhere]
        total = torch.stack(squares).sum() if squares else torch.zeros((), device=self.device)
        with self.watch.waiting():
            dist.all_reduce(total)
        norm = total.sqrt()
        for gradient in gradients.values():
            gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm.item()

    def gather(self) -> nn.Module | None:
        """The whole model as it is now, on rank 0; on the other processes None. Every process calls it."""
        with self.watch.waiting():
            return checkpoints.gather(self)

    def save(
        self,
        folder: str | Path,
        optimizer: torch.optim.Optimizer,
        step: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Write a checkpoint: what the model's own `save_pretrained` writes, and what `resume` needs.

        Every process calls it; rank 0 writes. The folder is replaced as a whole, when all of it is there.

        Args:
            folder: where to, on the machine of rank 0. To resume, each process needs it.
            optimizer: of this pipeline's parameters.
            step: the number of steps made.
            tokenizer: what to save beside the model.
        """
        with self.watch.waiting():
            checkpoints.save(self, Path(folder), optimizer, step, tokenizer)
        self._advise(folder, step)

    def resume(self, folder: str | Path, optimizer: torch.optim.Optimizer) -> int:
        """Go on from a checkpoint, from whose folder the model was opened: `from_pretrained(folder)`, for an adapter
        `PeftModel.from_pretrained(base, folder, is_trainable=True)`.

        The number of stages may be another one than before; dropout then draws other numbers.

        Returns:
            The number of steps that were made.

        Raises:
            ValueError: if the folder has no checkpoint of a pipeline, or one of another model or optimizer.
        """
        step = checkpoints.resume(self, Path(folder), optimizer)
        self._advise(folder, step)
        return step

    def whole_model(self) -> nn.Module | None:
        """The model that rank 0 was given, None elsewhere. Other stages' layers are as `gather` last found them."""
        return self._model[0] if self._model else None

    def close(self) -> None:
        """Let go of the other processes; the end of the program does it too."""
        self.watch.stop()

    def _advise(self, folder: str | Path, step: int) -> None:
        self.watch.advice = (
            f"The last checkpoint is {folder}, of step {step}: start all processes again, open the model from it and "
            f"call pipeline.resume({str(folder)!r}, optimizer)."
        )

    def _run(self, batch: Mapping[str, Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Let a batch go through the stages; on the last stage what each micro-batch adds to the loss."""
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}
        schedule, running = self._prepare(inputs["input_ids"])
        for stage in self.stages:
            stage.shares = iter([count / sum(counts) for count in counts])
        losses: list[Tensor] = []
        args = (inputs["input_ids"],) if self.stages[0].is_first else ()
        target = inputs["labels"] if self.stages[-1].is_last else None
        run = schedule.step if torch.is_grad_enabled() else schedule.eval
        with self._own_randomness():
            run(*args, target=target, losses=losses, return_outputs=False, **inputs)
        self.most_alive = {stage.stage_index: stage.most_alive for stage in running}
        self.busy = sum(stage.busy for stage in running)
        return losses

    def _prepare(self, ids: Tensor) -> tuple[Any, list[CountedStage]]:
        """The schedule for batches of this shape, and its stages: what they receive has a fixed size."""
        key = ids.shape, torch.is_grad_enabled()
        if self._running is None or self._running[0] != key:
            rows, tokens = ids.shape[0] // self.micro_batches, ids.shape[1]
            running = [CountedStage(stage, len(self.layers), self.device, rows, tokens) for stage in self.stages]
            schedule = make_schedule(self.schedule, running, self.micro_batches)
            self._running = key, schedule, running
        for stage in self._running[2]:
            stage.reset()
        return self._running[1:]

    def _count_labels(self, batch: Mapping[str, Tensor]) -> list[int]:
        """How many labels each micro-batch has."""
        missing = {"input_ids", "labels"} - batch.keys()
        if missing:
            raise ValueError(f"The batch has {sorted(batch)}, but no {' and '.join(sorted(missing))}.")
        rows = len(batch["input_ids"])
        if rows % self.micro_batches or rows == 0:
            raise ValueError(
                f"A batch of {rows} rows cannot be split into micro_batches={self.micro_batches} of as many rows: "
                "choose a batch size that it divides, and leave a smaller last batch out (DataLoader(drop_last=True))."
            )
        parts = batch["labels"].chunk(self.micro_batches)
        counts = [count_labels(self.stages[0].model, labels) for labels in parts]
        if sum(counts) == 0:
            raise ValueError("No label of the batch counts, all are -100: its loss would be the mean of nothing.")
        return counts

    def _share_loss(self, batch: Mapping[str, Tensor], losses: list[Tensor], penalty: Tensor | None = None) -> float:
        """The loss of the step, from the last stage; with it comes what its batch was."""
        ids = batch["input_ids"].flatten().long().cpu()
        checksum = int((ids * torch.arange(1, ids.numel() + 1)).sum() % 2**40)
        loss = sum(losses, torch.zeros((), device=self.device)).item()
        found = torch.tensor([loss, checksum], dtype=torch.float64, device=self.device)
        dist.broadcast(found, (len(self.layers) - 1) % self.processes)
        if penalty is not None:
            dist.all_reduce(penalty)
        loss, expected = found.tolist()
        if checksum != expected:
            raise ValueError(
                f"Rank {self.rank} got another batch than the last stage: every process must read the same batches "
                "in the same order. Leave out samplers that share the data out, and seed the one that shuffles."
            )
        return loss if penalty is None else loss + penalty.item()

    def _charge_penalty(self) -> Tensor | None:
        """Add the gradient of what a PST adapter charges for its open gates; its part in this process's layers."""
        if not self._penalised or not self.training:
            return None
        total = torch.zeros((), device=self.device)
        for stage in self.stages:
            if entries := penalised_entries(stage):  # the adapter takes the mean over its own
                penalty = stage.model.base_model.penalty() * (entries / self._penalised)
                penalty.backward()
                total += penalty.detach()
        return total

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Dropout draws from this process's own numbers, so that what is drawn outside of a step, such as the order
        of the data, stays the same on all processes."""
        with fork_random(self.device):
            set_random_state(self.device, self.random_state)
            yield
            self.random_state = random_state(self.device)

    def _find_tied(self, stages: Sequence[Stage]) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
        """This process's parameters that others have too, each with the group of those who have it."""
        holders: dict[nn.Parameter, set[int]] = defaultdict(set)
        for stage in stages:
            for parameter in stage.parameters():
                holders[parameter].add(stage.index % self.processes)
        shared = {parameter: sorted(ranks) for parameter, ranks in holders.items() if len(ranks) > 1}
        # all processes take part in making a group
        groups = {parameter: dist.new_group(ranks) for parameter, ranks in shared.items()}
        return [(parameter, groups[parameter]) for parameter, ranks in shared.items() if self.rank in ranks]

    def _balanced(
        self, model: nn.Module, example: Mapping[str, Tensor] | None, chunks: int, autocast: torch.dtype | None
    ) -> list[int]:
        if example is None:
            raise ValueError(
                "Give layers, how many layers each stage has, or example, a batch on which the cost of the layers is "
                "measured to balance them."
            )
        found = [None]
        if self.rank == 0:
            rows = max(1, len(example["input_ids"]) // self.micro_batches)
            device = next(model.parameters()).device
            part = {name: tensor[:rows].to(device) for name, tensor in example.items()}
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                costs = measure_costs(model, part)
            found[0] = balance(costs, chunks * self.processes, self.processes)
        dist.broadcast_object_list(found, 0)
        return found[0]

    def _describe(self, ranges: Sequence[range], rank: int) -> str:
        own = range(len(ranges))[rank :: self.processes]
        layers = ", ".join(f"{ranges[i].start}-{ranges[i].stop - 1}" for i in own)
        return f"stage{'s' * (len(own) > 1)} {' and '.join(map(str, own))} (layers {layers})"
