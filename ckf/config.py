"""The settings of a run, as checked dataclasses; config_files.py reads and writes them."""

import difflib
import math
import sys
from dataclasses import dataclass, field
from operator import attrgetter

from ckf.cf import CFConfig
from ckf.data.config import LISTS, TASKS, DataConfig, TaskRows
from ckf.kernels.config import BACKENDS

VECTOR_MAPS = ("meta", "constant", "mlp", "linear", "none")
MATCHES = ("none", "score", "prior")
MAX_LETTERS = 26
_LOWEST = {
    "seed": 0,
    "model.layers": 1,
    "lora.r": 1,
    "lora.shared_r": 0,
    "lora.lora_dropout": 0,
    "metanet.hidden": 1,
    "prompt.history_titles": 0,
    "prompt.max_tokens": 1,
    "prompt.max_answer_tokens": 2,  # a word and the end
    "train.steps": 1,
    "train.batch_size": 1,
    "train.accumulation": 1,
    "train.weight_decay": 0,
    "train.warmup": 0,
    "train.max_grad_norm": 0,  # 0: no limit
    "train.curriculum_middle": 0,
    "train.fold_share": 0,
    "train.save_every": 1,
    "train.log_every": 1,
    "train.workers": 0,
    "evaluate.batch_tokens": 1,
    "evaluate.bootstrap": 0,
}
_HIGHEST = {
    "seed": 2**32 - 1,
    "train.warmup": 1,
    "train.curriculum_middle": 1,
    "train.fold_share": 1,
}
_ABOVE_ZERO = (
    "lora.lora_alpha",
    "train.lr",
    "train.vector_lr",
    "train.temperature",
    "train.curriculum_sharpness",
)


@dataclass
class ModelConfig:
    """The language model.

    name: a Hugging Face name, a folder, a .gguf file, or the known download "smollm2-135m".
    dtype: "auto" is bfloat16 on a GPU and float32 on a CPU; float16 is for evaluation alone:
    nothing scales the loss, so small gradients would be lost. layers: only the first of its decoder
    layers, for quick trials; None keeps all.
    """

    name: str
    dtype: str = "auto"
    layers: int | None = None


@dataclass
class LoRAConfig:
    """Arguments of ``ckf.patch_model``.

    r: rank of every LoRA; ranks: of single tasks, where theirs differ; shared_r: of the shared one
    (null: as r, 0: without it). per_task: true: a LoRA per task beside the shared one; false: one
    LoRA of rank r for all tasks. lora_alpha: updates count lora_alpha / r (use_rslora: / sqrt(r)).

    target_modules: the linears that get LoRAs: "all-linear" (but the output layer), or names, or a
    regular expression; shared_modules, task_modules: those of the shared LoRA or of the tasks'
    alone. gate: "hard" (a row's task and the shared LoRA) or "learned" (a weight for every pair of
    task and LoRA; gate_per_layer: for each layer of its own). backend: "auto", or one by name, as
    ``ckf info`` lists them.
    """

    r: int = 8
    per_task: bool = True
    shared_r: int | None = None
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str | list[str] = "all-linear"
    shared_modules: str | list[str] | None = None
    task_modules: str | list[str] | None = None
    gate: str = "hard"
    gate_per_layer: bool = False
    backend: str = "auto"
    ranks: dict[str, int] | None = None


@dataclass
class MetaNetConfig:
    """How CF vectors reach the language model.

    kind: "meta" (a map made for each user from the history), "constant" (one map for all users),
    "mlp", "linear", or "none" (text only). hidden: width of the meta-network's MLP.
    match: one more placeholder behind every item that says how user and item fit: "score" (the CF
    model's own score), or "none". "prior" adds to the placeholder what the CF model expects as the
    answer, as log-odds under the language model's (ckf.prior): for tasks answered by one token.
    shuffle_users: a control: every user gets the vectors of another user, items keep theirs.
    """

    kind: str = "meta"
    hidden: int = 64
    match: str = "none"
    shuffle_users: bool = False


@dataclass
class PromptConfig:
    """history_titles: last liked titles shown. max_tokens: longest prompt with its answer.
    max_answer_tokens: longest answer, of explanations mostly.

    item_word: what an item is called. rank_by: "letters" (the model picks the letter of a listed
    candidate) or "title" (candidates ranked by the likelihood of their titles).
    """

    history_titles: int = 3
    max_tokens: int = 512
    max_answer_tokens: int = 64
    item_word: str = "item"
    rank_by: str = "letters"


@dataclass
class TrainConfig:
    """Training. lr is for the LoRAs, vector_lr for the meta-network; batch_size counts rows.

    curriculum: rows are shown as plain text with probability s(step), a sigmoid that falls from 1
    to 0 around the share ``curriculum_middle`` of training; "joint" shows vectors from the start.
    temperature: tasks are mixed in proportion to size ** (1 / temperature). accumulation: batches a
    step. warmup: the share of steps in which the learning rate rises; it falls to 0 by a cosine.
    max_grad_norm: gradients are clipped to it, 0: never. save_every, log_every: steps. workers:
    processes that make batches, beside the one that trains.
    fold_share: of the train rows whose user is folded in from the history, as users without train
    rows are: vectors fitted on a row know its answer better than they know those of new rows.
    packing: several rows in one sequence: "auto" where rows attend within themselves, or on or off.
    cuda_graphs: decoder layers as CUDA graphs (``ckf.layer_graphs``): "auto" where they can be.
    liger: norms, rotary angles and activations by the kernels of liger-kernel, on a GPU.
    """

    steps: int = 100
    batch_size: int = 8
    accumulation: int = 1
    lr: float = 1e-3
    vector_lr: float = 3e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    schedule: str = "curriculum"
    curriculum_middle: float = 0.3
    curriculum_sharpness: float = 20.0
    fold_share: float = 0.0
    packing: str | bool = "auto"
    gradient_checkpointing: bool = False
    cuda_graphs: str | bool = "auto"
    liger: bool = False
    save_every: int = 50
    log_every: int = 5
    workers: int = 0


@dataclass
class EvaluateConfig:
    """batch_tokens: tokens in one evaluation pass. untrained: also evaluate the bare model.

    weigh: beside a prior, count the language model as much as valid rows say (ckf.weighing).
    bootstrap: resamples of users for the intervals, 0: none.
    """

    batch_tokens: int = 4096
    untrained: bool = True
    weigh: bool = True
    bootstrap: int = 1000


@dataclass
class RunConfig:
    """Everything a run needs; see configs/ for examples.

    name: of the run's folder, runs/NAME. tasks: which, each with how many rows of a split it takes
    (``ctr: {train: 1000}``; ``ctr: {}``: all). seed: of everything that is drawn.
    """

    name: str
    data: DataConfig
    model: ModelConfig
    tasks: dict[str, TaskRows]
    seed: int = 0
    cf: CFConfig = field(default_factory=CFConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    metanet: MetaNetConfig = field(default_factory=MetaNetConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        if not self.name or {*self.name} & {*"/\\\0"} or self.name in (".", ".."):
            raise ValueError(
                f"name is {self.name!r}; expected the name of one folder (runs/NAME is the run's): "
                "leave out slashes"
            )
        if not self.tasks:
            raise ValueError(f"tasks is empty; name one or more of {', '.join(TASKS)}")
        for task in self.tasks:
            _one_of("a name in tasks", task, TASKS)
        _one_of("metanet.kind", self.metanet.kind, VECTOR_MAPS)
        _one_of("metanet.match", self.metanet.match, MATCHES)
        _one_of("prompt.rank_by", self.prompt.rank_by, ("letters", "title"))
        _one_of("train.schedule", self.train.schedule, ("curriculum", "joint"))
        _one_of("train.packing", self.train.packing, ("auto", True, False))
        _one_of("train.cuda_graphs", self.train.cuda_graphs, ("auto", True, False))
        _one_of("model.dtype", self.model.dtype, ("auto", "float32", "bfloat16", "float16"))
        _one_of("lora.gate", self.lora.gate, ("hard", "learned"))
        _one_of("lora.backend", self.lora.backend, BACKENDS)
        self._check_numbers()
        self._check_lists()
        self._check_switches()
        if self.prompt.history_titles > self.data.history:
            raise ValueError(
                f"prompt.history_titles is {self.prompt.history_titles}, but only data.history = "
                f"{self.data.history} liked items are kept for a row; raise data.history"
            )
        for task in self.lora.ranks or {}:
            _one_of("a name in lora.ranks", task, tuple(self.tasks))

    def _check_numbers(self) -> None:
        for key, low in _LOWEST.items():
            value, high = attrgetter(key)(self), _HIGHEST.get(key, math.inf)
            if value is not None and not low <= value <= min(high, sys.float_info.max):
                wanted = f"{low} to {high}" if key in _HIGHEST else f"{low} or more"
                raise ValueError(f"{key} is {value}; expected {wanted}")
        for key in _ABOVE_ZERO:
            if not 0 < attrgetter(key)(self) < math.inf:
                raise ValueError(f"{key} is {attrgetter(key)(self)}; expected a number above 0")
        if self.lora.lora_dropout >= 1:
            raise ValueError(f"lora.lora_dropout is {self.lora.lora_dropout}; expected below 1")
        for task, rank in (self.lora.ranks or {}).items():
            if rank < 1:
                raise ValueError(f"lora.ranks.{task} is {rank}; expected 1 or more")

    def _check_switches(self) -> None:
        """Settings that would be ignored beside others are mistakes."""
        metanet, lora = self.metanet, self.lora
        if metanet.kind == "none" and (metanet.match != "none" or metanet.shuffle_users):
            raise ValueError(
                "metanet.kind is none (text only), but metanet.match or metanet.shuffle_users is "
                "set, which needs vectors; choose another kind, or leave them out"
            )
        why = self.why_no_prior() if metanet.match == "prior" else None
        if why is not None:
            raise ValueError(f"metanet.match is prior, {why}")
        if lora.per_task:
            return
        for key, value, unset in (
            ("gate", lora.gate, "hard"),
            ("ranks", lora.ranks, None),
            ("shared_r", lora.shared_r, None),
            ("shared_modules", lora.shared_modules, None),
            ("task_modules", lora.task_modules, None),
        ):
            if value != unset:
                raise ValueError(
                    "lora.per_task is false (one LoRA of rank lora.r for all tasks), but "
                    f"lora.{key} is {value!r}; leave lora.{key} out"
                )

    def why_no_prior(self) -> str | None:
        """What is in the way of ``metanet.match: prior``, and what to do about it."""
        if not self.cf.blend:
            return (
                "which trusts the CF score of a train row only where the score does not know the "
                "row: set cf.blend, for example to 5"
            )
        if self.metanet.shuffle_users or self.train.fold_share:
            return (
                "which leaves a train row's own label out by its user, but metanet.shuffle_users "
                "or train.fold_share shows another: leave them out, or set metanet.match to score"
            )
        if self.train.schedule != "joint":
            return (
                "but train.schedule shows rows as plain text, without their items' scores: set "
                "train.schedule to joint"
            )
        return None

    def _check_lists(self) -> None:
        """Every candidate needs its letter, one that training shows, where letters name them."""
        if "topk" not in self.tasks or self.prompt.rank_by != "letters":
            return
        for name in (self.data.train_list, *self.data.test_lists):
            size = LISTS[name][0] + 1
            if size > MAX_LETTERS:
                raise ValueError(
                    f"the list {name} has {size} candidates, but letters name at most "
                    f"{MAX_LETTERS}; set prompt.rank_by: title, or choose a shorter list in "
                    "data.train_list and data.test_lists"
                )
        shown = LISTS[self.data.train_list][0] + 1
        for name in self.data.test_lists:
            size = LISTS[name][0] + 1
            if size > shown:
                raise ValueError(
                    f"data.test_lists has {name} with {size} candidates, but training on "
                    f"{self.data.train_list} shows {shown}, so {size - shown} of the letters would "
                    f"never be an answer; set data.train_list: {name}, leave {name} out of "
                    "data.test_lists, or set prompt.rank_by: title"
                )


def _one_of(what: str, value: object, known: tuple) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), [str(k) for k in known], 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{what} is {value!r}; expected {', '.join(map(str, known))}{hint}")
