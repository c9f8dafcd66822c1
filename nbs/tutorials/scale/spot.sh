#!/usr/bin/env bash
# A cloud machine that may be taken away at any time (spot, preemptible): have it run this at each start, until the run
# is finished.
#
#   STATE=/mnt/disk/run bash spot.sh --data_path /mnt/disk/data [settings of seqgpt train]
#
# STATE      folder on a disk that outlives the machine: outputs, cache and train.log are kept there
# PROCESSES  how many GPUs; 1 if nothing is said
# NOTICE     command that succeeds once the machine is to be taken away; asked every POLL seconds (5). If nothing is
#            said, only SIGTERM counts. For example
#            AWS:
#              at=http://169.254.169.254/latest
#              token=$(curl -sf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' $at/api/token)
#              curl -sf -o /dev/null -H "X-aws-ec2-metadata-token: $token" $at/meta-data/spot/instance-action
#            Google:
#              at=http://metadata.google.internal/computeMetadata/v1/instance
#              curl -sf -H 'Metadata-Flavor: Google' $at/preempted | grep -q TRUE
#
# Told to stop (SIGTERM, SIGINT, SIGHUP, SIGUSR1 or NOTICE), it has the training save a checkpoint, and ends.
# If the training ends by itself, it is started again, but at most TRIES times (3) for failures.
# Exit code: 0 finished, or stopped and saved; 2 a mistake in the settings; 1 failed.
#
# Run by the tests (tests/test_scale.py): on a CPU, with real SIGTERMs, and with a file as NOTICE.
# NOT RUN when this was written: a machine in a cloud, the two commands for NOTICE, GPUs.
set -u

STATE=${STATE:?Name a folder on a disk that outlives this machine.}
log=$STATE/train.log
train=(python -m seqgpt.cli)
if [ "${PROCESSES:-1}" -gt 1 ]; then train=(torchrun --standalone --nproc_per_node "$PROCESSES" -m seqgpt.cli); fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}
mkdir -p "$STATE" && touch "$log" || exit 1

child='' asked='' failures=0
stop() { asked=yes; if [ "$child" ]; then kill -TERM "$child" 2> /dev/null; fi; }
trap stop TERM INT HUP USR1
printed() { tail -n +"$((before + 1))" "$log"; } # in this attempt

while [ ! "$asked" ]; do
    before=$(wc -l < "$log")
    "${train[@]}" train "$@" --output_dir "$STATE/outputs" --cache_dir "$STATE/cache" --resume >> "$log" 2>&1 &
    child=$!
    while kill -0 "$child" 2> /dev/null; do
        if [ ! "$asked" ] && eval "${NOTICE:-false}"; then stop; fi
        sleep "${POLL:-5}" & wait $! # a signal ends `wait` at once
    done
    wait "$child"; code=$?
    child=''
    if [ "$code" -eq 0 ] || printed | grep -q "the run is finished"; then echo "Finished: $STATE/outputs"; exit 0; fi
    if printed | grep -q "all is saved"; then echo "Stopped; all is saved in $STATE/outputs."; continue; fi
    printed | tail -n 3 >&2
    if [ "$asked" ]; then
        echo "Stopped before it had saved: the next start goes on from the checkpoint before." >&2
        exit 1
    fi
    if [ "$code" -eq 2 ]; then exit 2; fi
    failures=$((failures + 1))
    if [ "$failures" -ge "${TRIES:-3}" ]; then echo "Failed $failures times; see $log." >&2; exit 1; fi
done
