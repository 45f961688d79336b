#!/bin/sh
# Slurm epilog: the job no longer holds GPUs of this node; removes what prolog.sh wrote.
#
# Calls no Slurm command, starts one short program (rm), and always exits 0: a failing epilog would
# drain the node.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
trap 'exit 0' EXIT
folder=${FLOPLEDGER_SLURM_FOLDER:-/run/flopledger-agent/slurm}
id=${SLURM_JOB_ID:-${SLURM_JOBID:-}}
case $id in '' | *[!0-9]*) exit 0 ;; esac
node=${SLURMD_NODENAME:-}
case $node in '' | .* | *[!A-Za-z0-9._-]*) node=node ;; esac
rm -f "$folder/$id.$node.job"
exit 0
