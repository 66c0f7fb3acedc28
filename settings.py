"""What a run of train.py may be told: its keys with their meaning, limits and defaults, and which of them a resumed run keeps."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from configurator import Amount, Count, NonNegative, Positive, Range, Seed, Share, problems
from device import Dtype
from errors import ConfigError
from model import Capacity

Rate = Annotated[float, Range(0, open_high=True)]


@dataclass
class TrainConfig:
    data_dir: str = "data/stdlib"  # token files, as prepare.py writes them
    out_dir: str = "out/run"  # where metrics.jsonl, checkpoints and final_model go
    init_from: str = "scratch"  # scratch, a model directory, or a Hugging Face id: user/name or user/name@revision
    keep_layers: list[int] = field(default_factory=list)  # blocks of init_from that stay (none: all of them)
    routed_share: Share = 0.5  # share of the blocks that routed_layers=auto chooses: those that are missed least
    size: str = "demo"  # shape of a model from scratch: demo, 10M, 50M, 0.5B … 72B; single keys override it
    resume: str = "none"  # none; auto: the newest intact checkpoint of out_dir, if any; or a step or run directory

    seq_len: Count = 256  # tokens of a sequence
    batch_size: Count = 8  # sequences of a micro-batch, on one device
    grad_accum_steps: Count = 1  # micro-batches of a step, of the whole job: they are divided over the ranks
    max_steps: Amount = 600  # optimizer steps
    max_seconds: NonNegative = 0.0  # save and stop after so long, to go on with --resume=auto (0: no limit)
    eval_interval: Amount = 100  # steps between evaluations (0: only before the first step and after the last)
    eval_batches: Count = 8  # micro-batches of validation text in an evaluation, of the whole job
    log_interval: Count = 10  # steps between two lines of metrics: the device is read no more often
    log_layers: bool = False  # log the statistics of every routed layer too, as layer_{i}/…
    save_interval: Amount = 200  # steps between checkpoints (0: only after the last step)
    keep_last: Count = 2  # checkpoints to keep; the one with the best validation loss stays besides

    lr_base: Rate | None = None  # rate of all ordinary weights (unset: 1e-3 from scratch, 1e-5 on pretrained weights)
    lr_prior: Rate = 1e-3  # rate of priors and transition networks
    lr_router: Rate = 1e-2  # rate of routers and surprise gates
    lr_causal_router: Rate = 1e-3  # rate of causal routers
    lr_lora: Rate = 1e-4  # rate of LoRA adapters
    min_lr_ratio: Share = 0.1  # where the cosine decay ends, as a share of the rate
    warmup_ratio: Share = 0.01  # share of the steps with linear warm-up
    weight_decay: Rate = 0.01  # of matrices only
    grad_clip: NonNegative = 1.0  # largest norm of the gradient (0: no clipping)
    capacity_start: float | None = None  # anneal the capacity from here in 8 stairs (unset: no annealing)
    capacity_anneal_steps: Amount = 0  # steps until the annealed capacity reaches its value
    capacity_choices: list[Capacity] = field(default_factory=list)  # many: one drawn each step; one: calibrated to
    distill_from: str = ""  # dense teacher: a directory, a hub id, or init_from (weight of its loss: distill_weight)
    lora: bool = False  # freeze the weights of init_from and train adapters beside them, and all routed parts (lora.py)
    lora_r: Count = 16  # rank of the adapters
    lora_alpha: Positive = 32  # an adapter's product is scaled by lora_alpha / lora_r
    lora_dropout: Annotated[float, Range(0, 1, open_high=True)] = 0.05  # on the input of the adapters
    lora_merge: bool = False  # final_model is a plain model, the adapters added to its weights
    max_bad_steps: Count = 10  # end the run after so many steps in a row without a finite loss and gradient

    seed: Seed = 42  # of initial weights and of the order of the data
    device: str = "auto"  # auto, cuda, mps, cpu
    dtype: Dtype = "auto"  # of products, over float32 weights; auto: the fastest here (device.py)
    compile: bool | Literal["auto"] = "auto"  # torch.compile, kept in TORCHINDUCTOR_CACHE_DIR; auto: on CUDA
    gradient_checkpointing: bool = False  # less memory, a third more compute
    parallel: Literal["ddp", "fsdp"] = "ddp"  # fsdp: weights, gradients, optimizer are divided over the ranks
    offload: bool = False  # fsdp: weights, gradients and optimizer in CPU memory

    push_to_hub: str = ""  # user/name: upload final_model to the hub at the end (a new repository is private)
    eval_tasks: list[str] = field(default_factory=list)  # for bench.py on final_model at the end: general,math
    allow_code_execution: bool = False  # eval_tasks=code runs programs that the model wrote
    wandb_log: bool = False  # log to Weights & Biases too (WANDB_MODE=offline: into out_dir only)
    wandb_project: str = "nanodtf"  # W&B project
    wandb_entity: str = ""  # W&B user or team (empty: your default)
    wandb_run_name: str = ""  # W&B run name (empty: out_dir)

    def __post_init__(self):
        found = problems(self)
        if self.offload and self.parallel != "fsdp":
            found.append("offload=True needs parallel=fsdp")
        if (self.capacity_start is None) != (self.capacity_anneal_steps == 0):
            found.append("capacity_start and capacity_anneal_steps need each other: set both or none")
        if len(set(self.capacity_choices)) > 1 and self.capacity_start is not None:
            found.append("capacity_choices and capacity_start do not go together: drop one of them")
        if self.keep_layers and self.init_from == "scratch":
            found.append("keep_layers needs pretrained weights: set init_from")
        if self.distill_from == "init_from":
            self.distill_from = self.init_from
        if self.distill_from == "scratch":
            found.append("distill_from=init_from needs a pretrained model: set init_from")
        if not self.out_dir:
            found.append("out_dir is empty: name a folder")
        if self.lora and self.init_from == "scratch":
            found.append("lora=True needs pretrained weights: set init_from")
        if self.lora and self.parallel == "fsdp":
            found.append("lora=True does not work with parallel=fsdp: its frozen weights need no dividing, use ddp")
        if self.lora_merge and not self.lora:
            found.append("lora_merge=True needs lora=True")
        if self.lr_base is None:
            self.lr_base = 1e-3 if self.init_from == "scratch" else 1e-5
        if found:
            raise ConfigError("; ".join(found))


# What a resumed run must not change: with another value it would be another run. Beside them every field of the model,
# the data, and batch_size · grad_accum_steps (their product alone decides which sequences make a step).
FIXED = (
    "init_from",
    "keep_layers",
    "size",
    "seq_len",
    "seed",
    "capacity_start",
    "capacity_anneal_steps",
    "capacity_choices",
    "distill_from",
    "lora",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
)
