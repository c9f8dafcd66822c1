#!/usr/bin/env bash
# One machine with several GPUs, data parallel: a process for each GPU.
#
#   PROCESSES=8 bash one_node.sh --data_path data --output_dir outputs [settings of seqgpt train]
#
# Interrupted by Ctrl-C, SIGTERM, SIGUSR1 or a closed terminal (SIGHUP, unless started with nohup), it saves a
# checkpoint; the same command goes on from there.
# Exit code: 0 finished; 1 interrupted, or failed, or nothing left to do (torchrun knows no other: the last line of
# seqgpt says which).
#
# Run by the tests (tests/test_scale.py): two processes on a CPU. NOT RUN when this was written: eight GPUs.
set -euo pipefail

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # else each process would take all cores
# seconds that torchrun, told to stop, leaves to save; it would kill after 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}

handled=SIGTERM,SIGINT,SIGQUIT,SIGUSR1 # what torchrun passes on to the processes
if [ -z "$(trap -p HUP)" ]; then handled=$handled,SIGHUP; fi # not ignored, as under nohup
export PET_SIGNALS_TO_HANDLE=$handled

exec torchrun --standalone --nproc_per_node "${PROCESSES:-8}" -m seqgpt.cli train "$@" --resume
