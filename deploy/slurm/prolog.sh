#!/bin/sh
# Slurm prolog: tells the FlopLedger agent on this node which GPUs a job was given.
#
# Writes one file per job and node, FOLDER/<job id>.<node>.job, under a temporary name and then renames
# it. Calls no Slurm command, starts at most two short programs (mv, and mkdir once), and always exits 0:
# metering never keeps a job from starting. Format: deploy/slurm/README.md.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
trap 'exit 0' EXIT
umask 022
LC_ALL=C
folder=${FLOPLEDGER_SLURM_FOLDER:-/run/flopledger-agent/slurm}
# Only where the agent cannot read gres.conf: the device minors (/dev/nvidia<minor>) of this node's GPUs
# in the order of gres.conf, as in "2 0 3 1".
gpu_minors=${FLOPLEDGER_GPU_MINORS:-}
value_bytes_max=1024
newline='
'

# field NAME VALUE: one line; a backslash becomes \\ and a newline \n, so that no value makes a line.
field() {
    [ -n "$2" ] || return 0
    if [ ${#2} -gt $value_bytes_max ]; then
        printf 'too_long.%s=1\n' "$1"
        return 0
    fi
    rest=$2
    line=
    while :; do
        plain=${rest%%[\\"$newline"]*}
        line=$line$plain
        [ "$plain" != "$rest" ] || break
        rest=${rest#"$plain"}
        case $rest in
            \\*) line=$line'\\' ;;
            *) line=$line'\n' ;;
        esac
        rest=${rest#?}
    done
    printf '%s=%s\n' "$1" "$line"
}

# minors INDEX,INDEX,...: the device minors of these places in gpu_minors; nothing where one is missing.
minors() {
    found=
    old_separator=$IFS
    IFS=,
    set -f
    for place in $1; do
        IFS=' '
        case $place in '' | *[!0-9]*) found= && break ;; esac
        position=0
        minor=
        for candidate in $gpu_minors; do
            [ "$position" -ne "$place" ] || minor=$candidate
            position=$((position + 1))
        done
        [ -n "$minor" ] || { found= && break; }
        found=${found:+$found,}$minor
    done
    IFS=$old_separator
    set +f
    field device_minors "$found"
}

describe() {
    printf 'flopledger_slurm_job=1\n'
    field job_id "$id"
    field node "${SLURMD_NODENAME:-}"
    field cluster "${SLURM_CLUSTER_NAME:-}"
    field sluid "${SLURM_JOB_SLUID:-}"
    field user "${SLURM_JOB_USER:-}"
    field uid "${SLURM_JOB_UID:-${SLURM_UID:-}}"
    field account "${SLURM_JOB_ACCOUNT:-}"
    field partition "${SLURM_JOB_PARTITION:-}"
    field qos "${SLURM_JOB_QOS:-}"
    field reservation "${SLURM_JOB_RESERVATION:-}"
    field job_name "${SLURM_JOB_NAME:-}"
    field comment "${SLURM_JOB_COMMENT:-}"
    field wckey "${SLURM_JOB_WCKEY:-${SLURM_WCKEY:-}}"
    field restart_count "${SLURM_JOB_RESTART_COUNT:-${SLURM_RESTART_COUNT:-}}"
    field array_job_id "${SLURM_ARRAY_JOB_ID:-}"
    field array_task_id "${SLURM_ARRAY_TASK_ID:-}"
    field het_job_id "${SLURM_HET_JOB_ID:-${SLURM_PACK_JOB_ID:-}}"
    field het_job_offset "${SLURM_HET_JOB_OFFSET:-${SLURM_PACK_JOB_OFFSET:-}}"
    field gpus "${SLURM_JOB_GPUS:-}"
    field gres "${SLURM_JOB_GRES:-}"
    field visible_devices "${CUDA_VISIBLE_DEVICES:-}"
    field shards "${SLURM_SHARDS_ON_NODE:-}"
    field mps_percent "${CUDA_MPS_ACTIVE_THREAD_PERCENTAGE:-}"
    field start_time "${SLURM_JOB_START_TIME:-}"
    field end_time "${SLURM_JOB_END_TIME:-}"
    field slurm_conf "${SLURM_CONF:-}"
    [ -z "$gpu_minors" ] || [ -z "${SLURM_JOB_GPUS:-}" ] || minors "$SLURM_JOB_GPUS"
    printf 'end=1\n'
}

id=${SLURM_JOB_ID:-${SLURM_JOBID:-}}
case $id in '' | *[!0-9]*) exit 0 ;; esac
node=${SLURMD_NODENAME:-}
case $node in '' | .* | *[!A-Za-z0-9._-]*) node=node ;; esac
[ ! -L "$folder" ] || exit 0
[ -d "$folder" ] || mkdir -p "$folder" || exit 0
temporary=$folder/.$id.$node.$$
set -C # never write through a link or over a file that is there
if describe >"$temporary"; then
    mv -f "$temporary" "$folder/$id.$node.job"
fi
exit 0
