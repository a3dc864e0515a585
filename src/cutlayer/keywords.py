"""The options of runs and comparisons as typed keywords. Written by cutlayer.derive: do not edit."""

from __future__ import annotations

from typing import Any, Literal, TypedDict


class CommonKeywords(TypedDict, total=False):
    """Keywords of a run or comparison."""

    client_device: str | None
    server_device: str | None
    link: str | None
    up_mbps: float | None
    down_mbps: float | None
    latency_ms: float | None
    server_mbps: float | None
    multicast: bool
    utilisation: float
    speed_spread: float
    rate_spread: float
    stragglers: float
    straggler_slowdown: float
    profiles: str | None
    trace: str | None
    trace_period: float | None
    data_format: str
    label_column: str
    client_column: str | None
    class_names: tuple[str, ...]
    validation: float
    test: float
    test_seed: int | None
    data_in_memory: Literal["auto", "always", "never"]
    data_workers: int
    clients: int
    partition: Any
    samples_per_client: int | None
    participation: float
    sampling: Literal["fixed", "proportional", "global"]
    task: str
    primary_metric: str | None
    cut: str | None
    cut_by: Literal["memory", "time", "profile"] | None
    client_memory: tuple[float, ...]
    client_seconds: tuple[float, ...]
    tail_cut: str | None
    untie: bool
    weights: str | None
    weights_strict: bool
    start: Literal["equal", "independent"]
    freeze: str | None
    epochs: int
    rounds: int | None
    batch: int
    client_optimizer: Any
    client_optimizer_options: dict[str, Any]
    client_lr: float
    client_clip_grad_norm: float | None
    server_optimizer: Any
    server_optimizer_options: dict[str, Any] | None
    server_lr: float | None
    server_clip_grad_norm: float | None
    accumulate: int
    gradient_checkpointing: Literal["none", "client", "server", "both"]
    server_accumulate: int | None
    param_groups: tuple[dict[str, Any], ...]
    lr_schedule: Any
    server_lr_schedule: Any
    lr_warmup: float
    averaging: Any
    logit_adjust: Literal["none", "client", "server", "both"]
    tau: float
    up_codec: str
    cache_features: bool
    down_codec: str
    screening: Any
    defences: Any
    attack: tuple[str, ...]
    engine: Literal["auto", "local", "stacked"]
    tune: Literal["off", "cached", "on"]
    deterministic: bool
    device: str
    precision: Literal["float32", "float64", "bfloat16", "tf32"]
    memory_limit: float | None
    client_states: Literal["auto", "memory", "disk"]
    eval_every: int | None
    eval_clients: int | None
    judge: Literal["mean", "average", "ensemble"]
    evaluate_on: Literal["global", "own", "both"]
    own_test: float
    log_to: Any
    stop_after: int | None
    checkpoint_every: int | None
    keep_best: bool
    snapshot_every: int | None
    aux: str | None
    client_share: float
    pool_batch: int
    local_epochs: int
    local_steps: int | None
    upload_every: int
    gradient_scale: Literal["own", "union"]
    server_batch: int
    running_statistics: bool
    alpha: float
    alpha_clients: Literal["participating", "enrolled"]
    phi: float
    phi_when: Literal["always", "initial", "final"]
    phi_until: float
    average_over: Literal["clients", "clients-and-rows"]
    average_reduce: Literal["mean", "sum"]
    align_every: int
    align_rows: int
    align_epochs: int
    align_batch: int
    align_lr: float
    align_scale: Literal["row", "mean"]
    working: int | None
    buffer_batches: int | None
    buffer_models: int | None
    answer: Literal["arrival", "full"]
    generate: Literal["complete", "seen", "never"]
    fill: Literal["share", "most"]
    statistics: Literal["growing", "equal"]
    decay: float
    average_every: Literal["step", "round", "gradients"]
    hand_over: Literal["batch", "epoch"]
    hand_over_optimizer: bool
    visit_order: Literal["fixed", "random"]
    server_order: Literal["interleaved", "sequential"]
    model_head: Literal["auto", "language", "classification"]
    lora_rank: int
    lora_ranks: tuple[int, ...]
    lora_alpha: float | None
    lora_targets: tuple[str, ...]
    lora_dropout: float
    lora_sides: Literal["both", "client", "server"]
    base_precision: Literal["float32", "bfloat16"]
    auxiliary_weights: tuple[float, ...]
    positive_weight: float
    class_weights: tuple[float, ...]
    balanced_classes: bool
    label_smoothing: float
    ignore_index: int | None
    positive_weights: tuple[float, ...]
    huber_delta: float
    next_token: bool
    columns: tuple[str, ...]
    ignore_columns: tuple[str, ...]
    impute: Literal["mean", "median", "zero"] | None
    resize: str | None
    tokenizer: str | None
    sequence_length: int
    packing: Literal["auto", "packed", "padded"]
    padding_side: Literal["right", "left"]
    loss_on: Literal["auto", "all", "answers"]
    documents: Literal["file", "paragraph", "line"]
    text_column: str | None
    messages_column: str | None
    prompt_column: str | None
    completion_column: str | None
    dirichlet_alpha: float
    quantity: Literal["linear", "square", "exponential"]
    shards_per_client: int
    lr_end: float
    lr_peak_at: float
    lr_first: float
    lr_last: float
    lr_decay: float
    lr_decay_at: tuple[float, ...]
    norm_multiple: float
    norm_limit: float | None
    trim: float
    row_limit: float | None
    row_multiple: float
    feature_dropout: float
    clip: float | None
    gaussian_noise: float
    laplace_noise: float
    nopeek: float
    log_every: int
    mlflow_uri: str | None
    mlflow_experiment: str
    trackio_project: str
    wandb_project: str
    wandb_mode: Literal["online", "offline"] | None


class RunKeywords(CommonKeywords, total=False):
    """Keywords of a run."""

    algorithm: Any
    seed: int
    share_server_model: bool


class CompareKeywords(CommonKeywords, total=False):
    """Keywords of a comparison."""

    algorithms: Any
    seeds: tuple[int, ...]
    variant: dict[str, dict[str, Any]]
    sweep: dict[str, bool | int | float | str | Any | dict[str, int | float | bool]]
    tuning: dict[str, bool | int | float | str | Any | dict[str, Any]]
