"""Policy files: every activity has a cited verdict, and a bad file is refused with a sentence."""

from __future__ import annotations

from datetime import date
from importlib import resources
from pathlib import Path

import pytest

from flopledger_collector.policies.definitions import (
    HEADLINE_POLICIES,
    Policy,
    load_policies,
    parse_policy,
)
from flopledger_collector.policies.rulefiles import (
    RULE_FILE_BYTES_MAX,
    RULE_FILES_MAX,
    read_rule_text,
)
from flopledger_core.activities import ACTIVITIES
from flopledger_core.errors import InvalidInput


def _packaged(policy_id: str) -> str:
    folder = resources.files("flopledger_collector.policies")
    return (folder / f"{policy_id}.toml").read_text(encoding="utf-8")


def _refusal(text: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        parse_policy(read_rule_text("own.toml", text))
    return str(caught.value)


def test_the_three_headline_policies_and_the_instruments_scopes_are_packaged() -> None:
    """Three policies are shown; two more exist because instruments name them as their scope."""
    policies = load_policies()
    assert set(policies) == {*HEADLINE_POLICIES, "ec-training", "us-state-1e26"}
    assert all(policies[name].file == f"{name}.toml" for name in policies)


@pytest.mark.parametrize("policy_id", sorted(load_policies()))
def test_every_activity_has_a_verdict_that_rests_on_a_cited_rule(policy_id: str) -> None:
    """No kind of work falls between two verdicts, and none lacks its citation."""
    policy = load_policies()[policy_id]
    assert tuple(policy.activities) == tuple(ACTIVITIES)
    assert all(policy.rule_of(activity).citation for activity in ACTIVITIES)
    used = {rule.rule for rule in policy.activities.values()}
    assert used == set(policy.rules), "a rule that no activity rests on says nothing"


def _verdicts(policy: Policy, *activities: str) -> set[str]:
    return {policy.activities[activity].verdict for activity in activities}


def test_the_four_sharpest_conflicts_between_casper_and_the_commission_are_in_the_data() -> None:
    """Teachers, auxiliary models, evaluations and safety tuning part the two standards."""
    policies = load_policies()
    casper, commission = policies["casper-2025"], policies["ec-cumulative"]
    contested = ("teacher_train", "reward_model", "ablation", "eval_capability", "synth_gen_failed")
    assert _verdicts(casper, *contested) == {"counted"}
    assert _verdicts(commission, *contested) == {"excluded"}
    assert _verdicts(casper, "safety_tune", "eval_safety") == {"conditional"}
    assert _verdicts(commission, "safety_tune") == {"counted"}


def test_rejected_synthetic_samples_count_for_the_commission_and_failed_attempts_do_not() -> None:
    """100 samples made for 10 that are kept count as 100; a discarded experiment does not."""
    commission = load_policies()["ec-cumulative"]
    assert _verdicts(commission, "synth_gen_kept", "synth_gen_rejected") == {"counted"}
    assert _verdicts(commission, "synth_gen_failed", "synth_gen_public") == {"excluded"}


def test_the_headline_convention_counts_the_official_training_only() -> None:
    """Prior research and ablations are out, as the report that made the convention says."""
    final = load_policies()["final-run-only"]
    counted = {name for name, rule in final.activities.items() if rule.verdict == "counted"}
    assert counted == {"pretrain", "midtrain", "sft", "rl_update", "rl_rollout", "safety_tune"}


def test_work_without_a_known_owner_never_raises_a_low_bound() -> None:
    """Unattributed work could belong to any project, so no policy counts it outright."""
    assert {policy.activities["unattributed"].verdict for policy in load_policies().values()} == {
        "conditional"
    }


def test_unclassified_work_counts_where_the_policy_includes_by_default() -> None:
    """Elsewhere it may count: the low end of a narrow policy claims only what a text names."""
    verdicts = {
        name: policy.activities["unclassified"].verdict for name, policy in load_policies().items()
    }
    assert verdicts["casper-2025"] == verdicts["ec-cumulative"] == "counted"
    assert verdicts["ec-training"] == verdicts["final-run-only"] == "conditional"


def test_a_policy_past_its_review_date_warns() -> None:
    """On the review date itself nothing is overdue."""
    policy = load_policies()["casper-2025"]
    assert policy.warnings(policy.review_date) == ()
    assert "due for review" in policy.warnings(date(2030, 1, 1))[0]


def test_an_unknown_activity_is_refused_by_name() -> None:
    """The list is closed; the sentence names file, key, value and the list."""
    text = _packaged("casper-2025").replace("pretrain =", "pretraining =")
    message = _refusal(text)
    assert message.startswith("own.toml: activities is 'pretraining': use only: pretrain,")


def test_a_missing_activity_is_refused_by_name() -> None:
    """A verdict is never assumed; silence is written down."""
    lines = _packaged("casper-2025").splitlines()
    message = _refusal("\n".join(line for line in lines if not line.startswith("ablation =")))
    assert message.startswith("own.toml: activities.ablation is None: give every activity")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            'pretrain = { verdict = "counted"',
            'pretrain = { verdict = "include"',
            "own.toml: activities.pretrain.verdict is 'include': use one of: counted, excluded,",
        ),
        (
            'citation = "arXiv:2502.15873v1, scope of development"\n',
            "",
            "own.toml: rules.C1 is {'text': ",
        ),
        ('rule = "C7"', 'rule = "C77"', "own.toml: activities.purchased_query.rule is 'C77'"),
        (
            ', depends_on = "research_reused_in_this_model"',
            "",
            "own.toml: activities.basic_research.depends_on is None: a conditional verdict",
        ),
        ('version = "1"', "version = 1", "own.toml: version is 1: expected `str`, got `int`"),
        ('read_status = "P"', 'read_status = "Q"', "own.toml: source.read_status is 'Q'"),
        ('status = "published"', 'state = "published"', "own.toml: file is"),
        ('id = "casper-2025"', 'id = "Casper 2025"', "own.toml: id is 'Casper 2025'"),
        ("valid_from = 2025-02-21", 'valid_from = "soon"', "own.toml: valid_from is 'soon'"),
        (
            'pretrain = { verdict = "counted"',
            'pretrain = { counts = true, verdict = "counted"',
            "own.toml: activities.pretrain is",
        ),
        ("inferred = true, note =", "inferred = true, # ", "own.toml is "),
    ],
)
def test_a_faulty_policy_file_is_refused_with_file_key_value_and_remedy(
    old: str, new: str, expected: str
) -> None:
    """Nothing that a standard says has a default, so every fault is an error."""
    text = _packaged("casper-2025")
    assert old in text
    message = _refusal(text.replace(old, new, 1))
    assert message.startswith(expected), message


def test_an_inferred_verdict_without_its_reason_is_refused() -> None:
    """Where the text does not name the work, the data says why it is read so."""
    text = _packaged("final-run-only").replace(', note = "serving is not training"', "", 1)
    assert _refusal(text).startswith("own.toml: activities.inference_deploy.note is None: say why")


def test_a_policy_of_ones_own_is_loaded_beside_the_packaged_ones(tmp_path: Path) -> None:
    """A directory adds policies; the digest is that of the file's bytes."""
    text = _packaged("casper-2025").replace('id = "casper-2025"', 'id = "house-rules"')
    (tmp_path / "own.toml").write_text(text, encoding="utf-8")
    policies = load_policies(tmp_path)
    assert set(policies) == {*load_policies(), "house-rules"}
    assert policies["house-rules"].digest != policies["casper-2025"].digest


def test_a_policy_of_ones_own_never_replaces_a_packaged_one(tmp_path: Path) -> None:
    """An id stands for one text, so a second file with it is an error."""
    (tmp_path / "own.toml").write_text(_packaged("casper-2025"), encoding="utf-8")
    with pytest.raises(InvalidInput, match="choose an id that no packaged or other rule file has"):
        load_policies(tmp_path)


def test_unreadable_oversized_and_too_many_rule_files_are_refused(tmp_path: Path) -> None:
    """Each limit has its sentence."""
    with pytest.raises(InvalidInput, match="name an existing directory"):
        load_policies(tmp_path / "absent")
    with pytest.raises(InvalidInput, match="keep a rule file within"):
        read_rule_text("own.toml", "#" * (RULE_FILE_BYTES_MAX + 1))
    with pytest.raises(InvalidInput, match="write the rule file as valid TOML"):
        read_rule_text("own.toml", "deep = " + "[" * 100_000)
    (tmp_path / "own.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidInput, match="encode it as UTF-8"):
        load_policies(tmp_path)
    for number in range(RULE_FILES_MAX):
        (tmp_path / f"{number}.toml").write_text("", encoding="utf-8")
    with pytest.raises(InvalidInput, match="keep at most"):
        load_policies(tmp_path)
