"""PSTConfig: every choice that PST offers, validated where it is made."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType

from .importance import IMPORTANCES, Importance
from .patterns import COUPLED, GroupsOf, parse_pattern
from .schedule import SCHEDULES
from .update import UPDATES

BIAS = ("none", "all", "pst_only")
BUDGETS = ("layer", "global")


@dataclass
class PSTConfig(PeftConfig):
    """Configuration of sparse training: how a weight trains, what its entries are worth, which may be pruned together,
    how many stay. The defaults are parameter-efficient sparse training (PST, arXiv 2205.11005).

    With W the frozen weight of a target module, [out, in]:

        W' = W + beta * U @ V
        S  = |W'| + alpha1 * A @ B + alpha2 * (R 1ᵀ + 1 Cᵀ)
        y  = (M ∘ W') x + b,  M keeps the entries with the largest S

    Args:
        importance (`str`):
            S. `"pst"` as above; `"magnitude"`, |W'|; `"movement"`, a full matrix of trained scores (arXiv
            2005.07683), and `"soft_movement"`, the same scores under one threshold for the model and a penalty;
            `"l0"`, hard concrete gates (arXiv 1712.01312); `"wanda"`, |W'| times the norm of the input (arXiv
            2306.11695), which needs `calibrate(model, dataloader)`.
        update (`str`):
            W'. `"low_rank"` as above; `"full"`, W + D with a dense delta D that trains; `"none"`, W itself.
        r (`int`):
            Rank of U @ V, the low-rank update of the weight.
        mask_r (`int`):
            Rank of A @ B, PST's data-driven importance of single entries.
        beta (`float`):
            Factor of U @ V in the weight. Above 1, U starts at N(0, 1 / beta²), so that V, which starts at 0, moves
            the weight no faster, and U learns the faster the larger beta is; with 1, the paper's, it hardly does.
        alpha1 (`float`):
            Factor of A @ B in PST's importance; to A and B what beta is to U and V.
        alpha2 (`float`):
            Factor of R and C, PST's importance of whole rows and columns.
        penalty (`float`):
            Factor of what `"soft_movement"` and `"l0"` charge for open gates, the mean of sigmoid(S) or of a gate's
            probability of being open over all target entries. It is added to the loss that the model returns in
            training; `model.base_model.penalty()` gives it to a loop with a loss of its own.
        straight_through (`bool`):
            Whether pruned entries learn like the others, dW' being what it would be under a mask of ones, so that
            they can come back; otherwise only what the mask keeps learns.
        masked_decay (`float`):
            Lambda, the decay of masked weights (annealed SR-STE, AST, arXiv 2407.20584). It acts through the optimizer
            that `SparsityScheduler` and the Trainer's callback are given, on top of the step; see
            `peft_pst.decay.decay_masked`. Needs `update="full"` and `straight_through`.
        masked_decay_warmup_ratio (`float`):
            Share of the optimizer steps, the first ones, in which lambda grows from 0 to `masked_decay`.
        boost (`int`, *optional*):
            k of AST's sparse low-rank boost: y += (x Pᵀ) Sᵀ, where P [in/k, in] sums each k consecutive inputs and S
            [out, in/k] trains. S starts from what the first mask prunes, over k. The branch stays after merging. None
            for no boost.
        boost_projection (`bool`):
            Whether P trains too.
        pattern (`str`):
            Which entries are pruned together: `"unstructured"`, single ones; `"N:M"` such as `"2:4"`, of every M
            consecutive inputs N stay; `"block:RxC"`, R outputs by C inputs; `"row"` or `"column"` of a weight;
            `"neuron"`, an intermediate unit of a feed-forward block with its rows and its column; `"head"`, an
            attention head, or a group that shares a key and a value, with its rows and columns. Those with the
            smallest sum of importances go first; of `"N:M"`, the groups that lose the least.
        coupled_modules (`list[list[str]]`, *optional*):
            For `"neuron"` and `"head"` in an architecture that is not known: the names of the linear layers of each
            structure, those that make the units first, the one that takes them last, such as
            `[["gate_proj", "up_proj", "down_proj"]]`.
        budget (`str`):
            `"layer"` prunes each weight to the sparsity; `"global"` prunes the least important entries of the whole
            model, wherever they are, but keeps a tenth of what `"layer"` would leave of each weight.
        sparsity (`float`, *optional*):
            Share of the entries of each target weight that is pruned at the end, in [0, 1), by default 0.9.
            `int(units * sparsity)` units of the pattern are pruned. With `"N:M"` it follows from the pattern.
        initial_sparsity (`float`):
            Share that is pruned before the training and during its warm-up, in [0, sparsity].
        schedule (`str`):
            How the sparsity grows between warm-up and cool-down: `"cubic"`, `"linear"`, or `"constant"`, which is at
            the final sparsity from the first step on.
        warmup_ratio (`float`):
            Share of the optimizer steps spent at `initial_sparsity`.
        cooldown_ratio (`float`):
            Share of the optimizer steps, the last ones, spent at `sparsity`.
        mask_interval (`int`):
            Sparsity and masks change every that many optimizer steps, and when the sparsity becomes final.
        target_modules (`list[str]` or `str`, *optional*):
            Names of the modules to train, or a regular expression, or `"all-linear"`, as in PEFT. By default all
            linear layers in the blocks of the model that the pattern is about: no embedding, pooler or head; with
            `coupled_modules` those.
        exclude_modules (`list[str]` or `str`, *optional*):
            Names of modules to leave out, or a regular expression.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the blocks to train. Needs `target_modules` to be a list or left out.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list that holds the blocks, for `layers_to_transform`, if it is not a common one.
        bias (`str`):
            Which biases train: `"none"`, `"all"`, or `"pst_only"` (those of the target modules).
        norms (`bool`, *optional*):
            Whether the scales and biases of the normalisation layers (LayerNorm, RMSNorm and GroupNorm of any make)
            train too, in the blocks in which something is pruned: less than a thousandth of the parameters, which set
            right what pruning does to the size of activations (PERP, arXiv 2312.15230). They change as part of the
            adapter, and merge. By default they do; with False, as in the paper, they do not.
        modules_to_save (`list[str]`, *optional*):
            Modules that train in full and are saved with the adapter. With `task_type="SEQ_CLS"` PEFT adds the head,
            by its names `classifier` and `score`. By default heads of other names and what lies between the blocks
            and the head, such as BERT's pooler, are then added as well: dense fine-tuning trains them, and a new one
            that stayed frozen would be noise.
        init_weights (`bool`):
            `True` for the start of the method, in PST U, A ~ N(0, 1), or less if beta or alpha1 is above 1, and V, B,
            R, C = 0, at which W' = W and S = |W|.
            `False` draws all parameters at random, for tests.

    Raises:
        ValueError, TypeError: if a value is out of range; the message names the value and what is expected.
    """

    importance: str = field(default="pst", metadata={"help": f"What an entry is worth: one of {list(IMPORTANCES)}."})
    update: str = field(default="low_rank", metadata={"help": f"How the weight trains: one of {list(UPDATES)}."})
    r: int = field(default=8, metadata={"help": "Rank of U @ V, the update of the weight."})
    mask_r: int = field(default=8, metadata={"help": "Rank of A @ B, the importance of single entries."})
    beta: float = field(default=1.0, metadata={"help": "Factor of U @ V in the weight."})
    alpha1: float = field(default=1.0, metadata={"help": "Factor of A @ B in the importance."})
    alpha2: float = field(default=1.0, metadata={"help": "Factor of R and C in the importance."})
    penalty: float = field(default=0.0, metadata={"help": "Factor of what l0 and soft_movement charge for gates."})
    straight_through: bool = field(default=False, metadata={"help": "Whether pruned entries learn like the others."})
    masked_decay: float = field(default=0.0, metadata={"help": "Decay of masked weights, for update='full'."})
    masked_decay_warmup_ratio: float = field(
        default=0.25, metadata={"help": "Share of the steps in which the decay of masked weights grows."}
    )
    boost: int | None = field(default=None, metadata={"help": "Inputs of a group of the low-rank boost."})
    boost_projection: bool = field(default=False, metadata={"help": "Whether the boost's projection trains."})
    pattern: str = field(default="unstructured", metadata={"help": "Which entries are pruned together."})
    coupled_modules: list[list[str]] | None = field(
        default=None, metadata={"help": "Linear layers that share neurons or heads, the one that takes them last."}
    )
    budget: str = field(default="layer", metadata={"help": f"What has the sparsity: one of {list(BUDGETS)}."})
    sparsity: float | None = field(
        default=None, metadata={"help": "Final share of pruned entries, in [0, 1): 0.9, or what the pattern implies."}
    )
    initial_sparsity: float = field(default=0.0, metadata={"help": "Share of pruned entries at the start."})
    schedule: str = field(default="cubic", metadata={"help": f"How the sparsity grows: one of {list(SCHEDULES)}."})
    warmup_ratio: float = field(default=0.1, metadata={"help": "Share of the steps at the initial sparsity."})
    cooldown_ratio: float = field(default=0.3, metadata={"help": "Share of the steps at the final sparsity."})
    mask_interval: int = field(default=1, metadata={"help": "Optimizer steps between two masks."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the modules to train; all linear layers of the blocks by default."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names of modules to leave out."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to train."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list that holds the blocks, for layers_to_transform."}
    )
    bias: str = field(default="none", metadata={"help": f"Which biases train: one of {list(BIAS)}."})
    norms: bool | None = field(default=None, metadata={"help": "Whether normalisation layers train too; they do."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that train in full and are saved with the adapter."}
    )
    init_weights: bool = field(default=True, metadata={"help": "The paper's start, or a random one for tests."})

    def __post_init__(self) -> None:
        self.is_new = self.peft_version is None  # PEFT sets it below; an adapter that was saved has what it has
        if self.norms is None:
            self.norms = self.is_new
        super().__post_init__()
        self.base_mismatch_warned = False  # shared by the layers of an adapter, so that one of them warns
        self.peft_type = PeftType("PST")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        for name, what in (("r", "a rank"), ("mask_r", "a rank"), ("mask_interval", "a number of steps")):
            _check_count(name, getattr(self, name), what)
        for name in ("beta", "alpha1", "alpha2", "penalty", "masked_decay"):
            _check_number(name, getattr(self, name))
        if self.masked_decay < 0:
            raise ValueError(f"masked_decay={self.masked_decay!r} would let masked weights grow: expected at least 0.")
        if self.boost is not None:
            _check_count("boost", self.boost, "the size of a group of inputs")
        for name, known in (("importance", IMPORTANCES), ("update", UPDATES), ("budget", BUDGETS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: expected one of {list(known)}.")
        self._check_sparsity()
        self._check_combination()
        self._check_schedule()
        self._check_targets()

    def _check_sparsity(self) -> None:
        pattern = parse_pattern(self.pattern)
        implied = pattern.max_sparsity if isinstance(pattern, GroupsOf) else 1.0
        if self.sparsity is None:
            self.sparsity = implied if implied < 1 else 0.9
        for name in ("sparsity", "initial_sparsity"):
            value = getattr(self, name)
            _check_number(name, value)
            if not 0 <= value < 1:
                raise ValueError(
                    f"{name}={value!r} is not a share of pruned entries: expected 0 <= {name} < 1, "
                    "such as 0.9 for 90 %."
                )
        if implied < 1:
            if not math.isclose(self.sparsity, implied):
                raise ValueError(
                    f"sparsity={self.sparsity!r} contradicts pattern={self.pattern!r}, which prunes {implied:g} of "
                    "the entries: leave sparsity out."
                )
            self.sparsity = implied
        if self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"initial_sparsity={self.initial_sparsity!r} is larger than sparsity={self.sparsity!r}: sparsity "
                "grows during the training, so lower initial_sparsity or raise sparsity."
            )

    @property
    def keeps_masks(self) -> bool:
        """Whether masks are selected between the steps and kept, for several weights together or for several steps;
        otherwise each layer selects its own in each step."""
        return self.budget == "global" or self.pattern in COUPLED or self.mask_interval > 1

    @property
    def selects_at_start(self) -> bool:
        """Whether `initial_sparsity` needs masks: to keep them, or for a boost, which starts from what they prune."""
        return self.keeps_masks or self.boost is not None

    @property
    def counts_flips(self) -> bool:
        """Whether it is counted how masks change: where they are kept, and no growing sparsity changes them."""
        return self.keeps_masks and self.schedule == "constant"

    @classmethod
    def ast(cls, **choices: Any) -> "PSTConfig":
        """The choices of the Adaptive Sparse Trainer (AST, arXiv 2407.20584), with the values of its authors: a dense
        weight that trains under a 2:4 mask, which is selected anew every 10 steps from the first on, the decay of what
        it prunes, and the boost. The loss that goes with them is
        `DistillationConfig(task=1/3, logits=2/3, temperature=2)`.

        Args:
            **choices: any argument of `PSTConfig`, such as `boost=None` ("AST-Naive") or `importance="wanda"`.
        """
        defaults = {
            "importance": "magnitude",
            "update": "full",
            "pattern": "2:4",
            "schedule": "constant",
            "mask_interval": 10,
            "straight_through": True,
            "masked_decay": 1e-4,
            "boost": 16,
        }
        return cls(**{**defaults, **choices})

    def _check_combination(self) -> None:
        importance = IMPORTANCES[self.importance]
        if self.budget == "global" and isinstance(parse_pattern(self.pattern), GroupsOf):
            raise ValueError(
                f"budget='global' has nothing to choose under pattern={self.pattern!r}, which gives every weight the "
                "same sparsity: leave budget out, or choose another pattern."
            )
        if self.importance == "soft_movement" and self.budget != "global":
            raise ValueError(
                f"importance='soft_movement' has one threshold for the whole model, but budget={self.budget!r} asks "
                "for one a weight: set budget='global', or importance='movement'."
            )
        if self.penalty and importance.penalty is Importance.penalty:
            raise ValueError(
                f"penalty={self.penalty!r} has no effect on importance={self.importance!r}, which has no gates to "
                "charge for: leave it out, or choose 'soft_movement' or 'l0'."
            )
        if self.masked_decay and self.update != "full":
            raise ValueError(
                f"masked_decay={self.masked_decay!r} changes single entries of the weight, which update="
                f"{self.update!r} does not train: leave it out, or set update='full'."
            )
        if self.masked_decay and not self.straight_through:
            raise ValueError(
                f"masked_decay={self.masked_decay!r} is measured against the gradients of pruned entries, which have "
                "none: leave it out, or set straight_through=True."
            )
        if self.straight_through and self.update == "none":
            raise ValueError(
                "straight_through=True has no effect on update='none', which trains no weight: leave it out, or "
                "choose 'low_rank' or 'full'."
            )
        if self.boost is not None and self.pattern in COUPLED:
            raise ValueError(
                f"boost={self.boost!r} would keep alive what pattern={self.pattern!r} prunes, and nothing could be "
                "removed: leave it out, or choose a pattern of entries."
            )
        if self.boost_projection and self.boost is None:
            raise ValueError(
                "boost_projection=True has no effect without a boost: give the size of its groups, such as boost=16."
            )
        if self.coupled_modules is not None and self.pattern not in COUPLED:
            raise ValueError(
                f"coupled_modules={self.coupled_modules!r} has no effect on pattern={self.pattern!r}: leave it out, "
                "or choose 'neuron' or 'head'."
            )
        if importance.buffers and self.initial_sparsity > 0:
            raise ValueError(
                f"initial_sparsity={self.initial_sparsity!r} would prune before importance={self.importance!r} has "
                "seen any data: leave it at 0, call calibrate(model, dataloader), then set_sparsity()."
            )
        if importance.starts_equal and (self.initial_sparsity > 0 or self.schedule == "constant"):
            warnings.warn(
                f"importance={self.importance!r} starts with the same score everywhere, so what is pruned before the "
                "training has moved the scores is arbitrary: keep initial_sparsity=0 and a schedule with a warm-up.",
                stacklevel=4,
            )

    def _check_schedule(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is unknown: expected one of {list(SCHEDULES)}.")
        for name in ("warmup_ratio", "cooldown_ratio", "masked_decay_warmup_ratio"):
            value = getattr(self, name)
            _check_number(name, value)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} is not a share of the training: expected 0 <= {name} <= 1.")
        if self.warmup_ratio + self.cooldown_ratio > 1:
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio!r} and cooldown_ratio={self.cooldown_ratio!r} add up to more than "
                "1, the whole training: lower one of them."
            )

    def _check_targets(self) -> None:
        if self.bias not in BIAS:
            raise ValueError(f"bias={self.bias!r} is unknown: expected one of {list(BIAS)}.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform={self.layers_to_transform!r} cannot be combined with a target_modules that is "
                f"one string ({self.target_modules!r}): give a list of names, or put the layers into the expression."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform: give the indices "
                "of the layers too."
            )


def _check_count(name: str, value: object, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is not {what}: expected an int of at least 1.")
    if value < 1:
        raise ValueError(f"{name}={value!r} is not {what}: expected an int of at least 1.")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}: expected a number.")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not finite: expected a number.")
