"""The closed list of activities: what kind of work a GPU did for a project.

Policies map each activity to counted, excluded, conditional or silent, so the list is closed
and an unknown name is an error. Recomputation, zero operations, partners and initialisation are
attributes or lineage edges, never activities. Work that nobody classified is `unclassified` and
counts until someone justifies otherwise.
"""

from __future__ import annotations

from typing import Final

from flopledger_core.errors import UnknownName

UNCLASSIFIED: Final = "unclassified"
IDLE: Final = "idle"
UNATTRIBUTED: Final = "unattributed"

ACTIVITIES: Final[dict[str, str]] = {
    "pretrain": "large pre-training of a base model",
    "midtrain": "continued pre-training, annealing, long-context extension",
    "sft": "supervised fine-tuning",
    "rl_update": "parameter updates of reinforcement learning",
    "rl_rollout": "generation for reinforcement learning, forward passes only",
    "reward_model": "training reward or value models",
    "synth_gen_kept": "synthetic data generation, non-public, used",
    "synth_gen_rejected": "synthetic samples rejected from a used batch",
    "synth_gen_failed": "a synthetic-data attempt whose whole result was discarded",
    "synth_gen_public": "synthetic data that is publicly accessible",
    "teacher_train": "training a model that another one is distilled from",
    "teacher_infer": "forward passes of a teacher for distillation",
    "ablation": "ablations and comparisons",
    "scaling_validation": "scaling-law and validation runs",
    "failed_run": "a main run that failed or was aborted",
    "restart_loss": "steps lost and repeated after a restart",
    "discarded_branch": "a candidate that was not continued",
    "eval_capability": "capability evaluation",
    "eval_safety": "red-teaming and safety evaluation",
    "safety_tune": "fine-tuning only to reduce societal risk",
    "data_curation": "models and inference that curate or filter training data",
    "data_preprocess": "data preparation without a model",
    "safety_filter": "filtering of unlawful or unsafe data",
    "purchased_query": "queries bought from another provider",
    "scaffolding": "building the scaffolding around a model",
    "basic_research": "research without a model it belongs to",
    "inference_deploy": "serving a deployed model",
    IDLE: "an enrolled device that no job held",
    UNATTRIBUTED: "work whose owner is not known",
    UNCLASSIFIED: "work of a project whose kind nobody stated",
}


def require_activity(name: str, field: str = "activity") -> str:
    """`name` if it is in the closed list, else an `UnknownName` that shows the list."""
    if name not in ACTIVITIES:
        raise UnknownName(field, name, f"use one of: {', '.join(ACTIVITIES)}")
    return name
