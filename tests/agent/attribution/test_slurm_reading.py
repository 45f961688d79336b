"""What Slurm leaves on a node is read strictly: job files, gres.conf, cgroups, comments."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flopledger_agent.attribution.allocations import DeviceDirectory, DirectoryEntry
from flopledger_agent.attribution.job_mapping import read_job_mapping
from flopledger_agent.attribution.slurm_cgroups import job_of_process, paths_in, place_of_process
from flopledger_agent.attribution.slurm_comment import STAGES, is_stage, parse_comment
from flopledger_agent.attribution.slurm_gres import devices_of, expanded, parse_gres_conf
from flopledger_agent.attribution.slurm_jobs import (
    FILE_BYTES_MAX,
    BrokenJobFile,
    JobFolder,
    SlurmJob,
    job_from_environment,
    parse_job_file,
)
from flopledger_core.activities import ACTIVITIES
from flopledger_core.identity import require_project

ROOT: Final = Path(__file__).resolve().parents[3]
PROLOG: Final = ROOT / "deploy" / "slurm" / "prolog.sh"
EPILOG: Final = ROOT / "deploy" / "slurm" / "epilog.sh"
GOLDEN: Final = ROOT / "tests" / "golden" / "cgroups"
ME: Final = frozenset({os.getuid()})


def run(script: Path, folder: Path, environ: dict[str, str], *shell: str) -> int:
    """The exit status of the prolog or epilog with exactly this environment, as slurmd gives it."""
    done = subprocess.run(
        [*shell, str(script)],
        env={"FLOPLEDGER_SLURM_FOLDER": str(folder), **environ},
        timeout=20,
        check=False,
        capture_output=True,
    )
    return done.returncode


# --- prolog and epilog ---------------------------------------------------------------------------


@pytest.mark.parametrize("shell", [("sh",), ("bash", "--posix")])
def test_hostile_values_come_back_whole(shell: tuple[str, ...], tmp_path: Path) -> None:
    """Whatever bytes a user puts in a name, the reader gets that name, and the shell runs none."""
    values = [
        "a\nb",
        "\\",
        "\\n",
        "\n",
        "x\n\\\n",
        "$(touch pwned)`touch pwned`",
        "'\"; exit 3 #",
        "é\t*",
    ]
    for number, value in enumerate(values, start=1):
        environ = {"SLURM_JOB_ID": str(number), "SLURM_JOB_COMMENT": value, "SLURM_JOB_NAME": value}
        assert run(PROLOG, tmp_path / "jobs", environ, *shell) == 0
    view = JobFolder(tmp_path / "jobs", ME).read()
    assert not view.troubles
    found = {file.job.job_id: file.job for file in view.files}
    assert [found[number].comment for number in range(1, len(values) + 1)] == values
    assert [found[number].job_name for number in range(1, len(values) + 1)] == values
    assert not list(tmp_path.rglob("pwned"))


def test_the_epilog_removes_what_the_prolog_wrote(tmp_path: Path) -> None:
    """One file per job and node, complete, and gone afterwards."""
    environ = {"SLURM_JOB_ID": "12", "SLURMD_NODENAME": "n1", "SLURM_JOB_GPUS": "0,2"}
    assert run(PROLOG, tmp_path, environ) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["12.n1.job"]
    (file,) = JobFolder(tmp_path, ME).read().files
    assert file.job == SlurmJob(job_id=12, node="n1", gpu_index=(0, 2))
    assert run(EPILOG, tmp_path, environ) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "environ",
    [{}, {"SLURM_JOB_ID": "../x"}, {"SLURM_JOB_ID": "5", "SLURMD_NODENAME": "../../x"}],
    ids=["no job", "a path as job", "a path as node"],
)
def test_prolog_and_epilog_never_fail(environ: dict[str, str], tmp_path: Path) -> None:
    """Nonsense, a folder that cannot be made and links lead to exit 0 and nothing outside."""
    (tmp_path / "file").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for folder in ("jobs", "file/jobs", "link"):
        assert run(PROLOG, tmp_path / folder, environ) == 0
        assert run(EPILOG, tmp_path / folder, environ) == 0
    assert not list((tmp_path / "elsewhere").iterdir())
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "elsewhere", "link", "jobs"}


def test_a_prolog_takes_a_few_times_as_long_as_an_empty_script(tmp_path: Path) -> None:
    """Its cost is that of starting two programs, far below the 50 ms it may take."""
    empty = tmp_path / "empty.sh"
    empty.write_text("#!/bin/sh\nexit 0\n")
    empty.chmod(0o755)
    environ = {"SLURM_JOB_ID": "1", "SLURM_JOB_GPUS": "0,1", "SLURM_JOB_COMMENT": "x" * 300}
    took: dict[Path, list[float]] = {empty: [], PROLOG: [], EPILOG: []}
    for _ in range(15):
        for script, times in took.items():
            began = time.perf_counter()
            run(script, tmp_path / "jobs", environ)
            times.append(time.perf_counter() - began)
    best = {script.name: min(times) * 1000 for script, times in took.items()}
    print(f"milliseconds, best of 15: {best}")  # noqa: T201
    assert best["prolog.sh"] < 10 * best["empty.sh"]
    assert best["prolog.sh"] < 50


# --- job files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "first line"),
        (b"flopledger_slurm_job=1\njob_id=5\n", "cut short"),
        (b"flopledger_slurm_job=1\njob_id=5\nend=1", "cut short"),
        (b"flopledger_slurm_job=1\nend=1\n", "names no job"),
        (b"flopledger_slurm_job=1\njob_id=x\nend=1\n", "not a number"),
        (b"flopledger_slurm_job=1\njob_id=5\njob_id=6\nend=1\n", "twice"),
        (b"flopledger_slurm_job=1\njob_id=5\nnonsense\nend=1\n", "not name=value"),
        (b"flopledger_slurm_job=1\njob_id=5\ncomment=\\x\nend=1\n", "escape"),
        (b"flopledger_slurm_job=1\njob_id=5\ncomment=\\\nend=1\n", "escape"),
        (b"flopledger_slurm_job=1\njob_id=5\ngpus=1,,2\nend=1\n", "list of numbers"),
        (b"flopledger_slurm_job=1\njob_id=5\ngpus=0-99999999\nend=1\n", "list of numbers"),
        (b"x" * (FILE_BYTES_MAX + 1), "longer"),
    ],
)
def test_a_broken_job_file_is_refused_whole(content: bytes, why: str) -> None:
    """Half a file would be a wrong one."""
    with pytest.raises(BrokenJobFile, match=why):
        parse_job_file(content)


@given(st.binary(max_size=300))
def test_no_content_breaks_the_parser(content: bytes) -> None:
    """Any bytes are a job or a BrokenJobFile, in the middle of a well-formed file, too."""
    for whole in (content, b"flopledger_slurm_job=1\njob_id=5\n" + content + b"\nend=1\n"):
        try:
            assert parse_job_file(whole).job_id > 0
        except BrokenJobFile:
            continue


def test_unknown_fields_are_ignored() -> None:
    """A newer prolog may say more."""
    content = b"flopledger_slurm_job=1\njob_id=5\nnews=1\ntoo_long.comment=1\nend=1\n"
    assert parse_job_file(content) == SlurmJob(job_id=5, too_long=("comment",))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_files_of_others_are_not_believed(tmp_path: Path) -> None:
    """A file that its writer did not own, a link, a pipe: each is a trouble and hides no other."""
    for number in (1, 2):
        run(PROLOG, tmp_path, {"SLURM_JOB_ID": str(number)})
    os.chown(tmp_path / "1.node.job", 1234, 1234)
    (tmp_path / "3.node.job").symlink_to("2.node.job")
    os.mkfifo(tmp_path / "4.node.job")
    (tmp_path / "5.node.job").write_bytes((tmp_path / "2.node.job").read_bytes())
    (tmp_path / "notes.txt").write_text("no job file")
    view = JobFolder(tmp_path).read()
    assert [file.job.job_id for file in view.files] == [2]
    assert len(view.troubles) == 4
    tmp_path.chmod(0o777)
    view = JobFolder(tmp_path).read()
    assert not view.files
    assert "mode 755" in view.troubles[0]
    tmp_path.chmod(0o755)


def test_ids_are_those_of_sacct() -> None:
    """An array's task and a part of a heterogeneous job are called as people call them."""
    environ = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "4"}
    job = job_from_environment(environ)
    assert job is not None
    assert job.name == "7_4"
    content = b"flopledger_slurm_job=1\njob_id=9\nhet_job_id=8\nhet_job_offset=1\nend=1\n"
    assert parse_job_file(content).name == "8+1"


# --- devices -------------------------------------------------------------------------------------


def gpu(number: int) -> DirectoryEntry:
    """A GPU whose minor, ordinal and PCI address have three different orders."""
    return DirectoryEntry(
        key=f"GPU-{number}",
        uuid=f"GPU-{number}",
        minor=number,
        index=(number + 1) % 4,
        pci_bus_id=f"00000000:{(7 * number) % 4:02X}:00.0",
    )


FOUR: Final = DeviceDirectory(entries=tuple(gpu(number) for number in range(4)))
GRES: Final = """
# comment
NodeName=other Name=gpu File=/dev/nvidia[0-3]
NodeName=n[1-3] Name=gpu Type=a File=/dev/nvidia[2-3]
NodeName=n[1-3] Name=gpu Type=b \\
   File=/dev/nvidia1,/dev/nvidia0
"""


def test_gpus_are_counted_in_the_order_of_gres_conf() -> None:
    """Slurm's GPU 0 is the first file of gres.conf, not ordinal 0 and not minor 0."""
    order = parse_gres_conf(GRES, "n2")
    held = [devices_of(SlurmJob(job_id=1, gpu_index=(n,)), order, FOUR).devices for n in range(4)]
    assert held == [("GPU-2",), ("GPU-3",), ("GPU-1",), ("GPU-0",)]
    assert not order.may_share
    assert "not in gres.conf" in str(
        devices_of(SlurmJob(job_id=1, gpu_index=(4,)), order, FOUR).trouble
    )


def test_what_cannot_be_told_is_not_guessed() -> None:
    """Without the order a job is told of its GPUs only when it has them all."""
    two = devices_of(SlurmJob(job_id=1, gpu_index=(0, 1)), None, FOUR)
    assert not two.devices
    assert "gres.conf" in str(two.trouble)
    all_four = devices_of(SlurmJob(job_id=1, gpu_index=(0, 1, 2, 3)), None, FOUR)
    assert len(all_four.devices) == 4
    nothing = devices_of(SlurmJob(job_id=1, has_no_device_files=True), None, FOUR)
    assert "File=" in str(nothing.trouble)


def test_detected_gpus_are_counted_by_pci_address() -> None:
    """With AutoDetect=nvml the order is documented; with another, only where no doubt is left."""
    nvml = parse_gres_conf("AutoDetect=nvml", "n1")
    held = [devices_of(SlurmJob(job_id=1, gpu_index=(n,)), nvml, FOUR).devices for n in range(4)]
    assert held == [("GPU-0",), ("GPU-3",), ("GPU-2",), ("GPU-1",)]
    other = parse_gres_conf("AutoDetect=nvidia", "n1")
    assert devices_of(SlurmJob(job_id=1, gpu_index=(1,)), other, FOUR).trouble is not None


def test_instances_are_found_by_uuid_and_by_their_access_files() -> None:
    """MIG as AutoDetect gives it (UUIDs) and as MultipleFiles gives it (nvidia-cap minors)."""
    parts = DeviceDirectory(
        entries=tuple(
            DirectoryEntry(
                key=f"GPU-0/{n}",
                uuid="GPU-0",
                gpu_instance=n,
                minor=0,
                mig_uuids=(f"MIG-aaaaaaa{n}",),
                cap_minor=20 + n,
            )
            for n in (1, 2)
        )
    )
    by_uuid = SlurmJob(job_id=1, gpu_uuids=("MIG-aaaaaaa2",))
    assert devices_of(by_uuid, None, parts).devices == ("GPU-0/2",)
    order = parse_gres_conf(
        "Name=gpu MultipleFiles=/dev/nvidia0,/dev/nvidia-caps/nvidia-cap22\n"
        "Name=gpu MultipleFiles=/dev/nvidia0,/dev/nvidia-caps/nvidia-cap21\n",
        None,
    )
    assert devices_of(SlurmJob(job_id=1, gpu_index=(1,)), order, parts).devices == ("GPU-0/1",)


def test_shards_and_mps_mean_that_gpus_may_be_shared() -> None:
    """Then two jobs on a GPU are no contradiction."""
    assert parse_gres_conf("Name=gpu File=/dev/nvidia0\nName=shard Count=4", None).may_share
    assert parse_gres_conf("Name=mps Count=400 File=/dev/nvidia0", None).may_share


@given(st.text("[]0123456789-,ab/", max_size=30))
def test_no_list_expands_without_end(pattern: str) -> None:
    """Lists of a configuration file stay within their limit."""
    assert sum(1 for _name in expanded(pattern)) <= 4096


# --- cgroups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", json.loads((GOLDEN / "slurm-paths.json").read_text()))
def test_golden_slurm_trees(tree: dict[str, Any]) -> None:
    """Every recorded tree leads to its job, step and node."""
    place = place_of_process(paths_in(tree["cgroup"]))
    assert place is not None
    assert {name: getattr(place, name) for name in ("job_id", "sluid", "step", "node")} == {
        name: tree[name] for name in ("job_id", "sluid", "step", "node")
    }
    if tree["user_id"] is not None:
        assert place.user_id == tree["user_id"]


@pytest.mark.parametrize("tree", json.loads((GOLDEN / "slurm-none.json").read_text()))
def test_paths_that_are_no_slurm_job(tree: dict[str, str]) -> None:
    """Names that only look like Slurm's lead to no job."""
    assert place_of_process(paths_in(tree["cgroup"])) is None


def test_the_path_wins_over_the_environment() -> None:
    """A process that claims another job is told; a SLUID needs the job file or the environment."""
    path = ("/system.slice/slurmstepd.scope/job_5/step_0",)
    found = job_of_process(path, {"SLURM_JOB_ID": "6"}, {})
    assert found is not None
    assert (found.job_id, found.by_path) == (5, True)
    assert found.contradiction == "its environment claims job 6"
    only = job_of_process(("/user.slice",), {"SLURM_JOB_ID": "6"}, {})
    assert only is not None
    assert not only.by_path
    sluid = ("/system.slice/slurmstepd.scope/s5K1KKYAYG5D00/step_0",)
    assert job_of_process(sluid, None, {"s5K1KKYAYG5D00": 9}) is not None
    by_file = job_of_process(sluid, {"SLURM_JOB_ID": "1"}, {"s5K1KKYAYG5D00": 9})
    assert by_file is not None
    assert by_file.job_id == 9
    unknown = job_of_process(sluid, {"SLURM_JOB_ID": "1"}, {})
    assert unknown is not None
    assert unknown.job_id is None


# --- comments ------------------------------------------------------------------------------------

WORDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,12}", fullmatch=True).filter(
    lambda word: not is_stage(word) and word not in {"idle", "unattributed"}
)
STAGE = st.sampled_from([*sorted(STAGES), "pretrain", "sft", "eval_capability"])


@given(st.none() | WORDS, STAGE, WORDS, st.dictionaries(st.sampled_from(["run", "model"]), WORDS))
def test_a_comment_by_the_grammar_is_read(
    project: str | None, stage: str, run_type: str, pairs: dict[str, str]
) -> None:
    """What was written by the grammar comes back, and nothing else."""
    words = ([] if project is None else [project]) + [stage, run_type]
    text = " , ".join([*words, *(f"{key} = {value}" for key, value in pairs.items())])
    found = parse_comment(text)
    activity = {"activity": stage} if stage in ACTIVITIES else {}
    assert found.trouble is None
    assert found.tags == {**({"project": project} if project else {}), **pairs, **activity}
    assert found.names == {"stage": stage, "run_type": run_type}


@given(
    st.text(max_size=80) | st.lists(WORDS | STAGE | st.just("project=x"), max_size=6).map(",".join)
)
def test_a_comment_is_read_whole_or_not_at_all(text: str) -> None:
    """Any text gives valid tags, or none; with tags' signs and none of them, a reason."""
    found = parse_comment(text)
    if found.trouble is not None or ("," not in text and "=" not in text):
        assert not found.tags
        assert not found.names
    if "project" in found.tags:
        assert require_project(found.tags["project"])


@pytest.mark.parametrize(
    "text",
    [
        "llm,pretrain",  # a project where the stage belongs
        "pretrain,ablate",  # two stages
        "pretrain,main,llm",
        "sft,pretrain,main",
        "pretrain,pretrain",
        "a,b",
        "pretrain",
        "pretrain,",
        "a,pretrain,main,more",
        "run=r,pretrain,main",
        "project=a,project=b",
        "llm,pretrain,main,project=x",
        "pretrain,main,activity=sft",
        "colour=red",
        "project=",
        "project=idle",
        "activity=idle",
        "precision=fp7",
        "project=a b",
    ],
)
def test_an_ambiguous_comment_is_refused(text: str) -> None:
    """Nothing is taken from it, and where it looks like tags the reason is said."""
    found = parse_comment(text)
    assert not found.tags
    assert not found.names
    assert found.trouble is not None or text == "pretrain"


# --- job mapping ---------------------------------------------------------------------------------


def test_the_job_mapping_folder_is_read(tmp_path: Path) -> None:
    """One job per line, several lines share, other files are left alone, broken ones are told."""
    (tmp_path / "0").write_text("17\n18\n")
    (tmp_path / "1").write_text("19\n")
    (tmp_path / "2").write_text("")
    (tmp_path / "3").write_text("17 1000\n")  # another tool's format
    (tmp_path / "9").write_text("20\n")
    (tmp_path / "readme.txt").write_text("17")
    view = read_job_mapping(tmp_path, FOUR, 5)
    found = {(one.device, one.job, one.shared) for one in view.allocations}
    assert found == {("GPU-3", "17", True), ("GPU-3", "18", True), ("GPU-0", "19", False)}
    assert len(view.troubles) == 2
    assert view.as_of_boot_ns == 5
    assert read_job_mapping(tmp_path / "none", FOUR, 5).troubles
