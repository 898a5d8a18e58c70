#!/usr/bin/env bash
# A workload on a GKE cluster that xpk made; the image is that of docs/launch/Dockerfile.
#
#   CLUSTER=mine IMAGE=REGION-docker.pkg.dev/... BUCKET=gs://mine docs/launch/xpk.sh
#
# Who restarts: the JobSet that xpk makes, up to --max-restarts: on exit codes 42 and 127-255 by itself, and on 75
# (preempted and saved) and 76 (a peer was lost), which are named here. 77 (diverged), 78 (config) and all others stop.
#
# Source: https://github.com/AI-Hypercomputer/xpk (xpk workload create --help)
set -euo pipefail
: "${CLUSTER:?the name of the cluster}" "${IMAGE:?the image}" "${BUCKET:?gs://BUCKET}"
NAME=${NAME:-bert-base}

xpk workload create \
  --cluster "$CLUSTER" --workload "$NAME" \
  --tpu-type "${TPU_TYPE:-v5litepod-16}" --num-slices "${SLICES:-1}" \
  --docker-image "$IMAGE" \
  --max-restarts 100 --restart-on-exit-codes 75,76 --termination-grace-period-seconds 120 \
  --env "BERTGPT_JOB=$NAME" \
  --command "python tools/train.py configs/bert/base.py corpus.path=$BUCKET/wiki.corpus \
execution.distributed.auto=true --platform tpu --workdir $BUCKET/$NAME"
