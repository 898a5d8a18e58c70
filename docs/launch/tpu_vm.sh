#!/usr/bin/env bash
# Trains on a Cloud TPU slice (v5litepod-16: 4 VMs of 4 chips) over ssh, and makes the slice anew when it is taken away.
#
#   NAME=bert-base ZONE=us-west4-a BUCKET=gs://mine REPOSITORY=https://... docs/launch/tpu_vm.sh
#
# Runs on any machine with gcloud that stays up (tmux), and starts one process a VM. TPU VM images come with Python 3.10,
# which is too old: uv brings 3.12 to every worker.
#
# Who restarts: this loop, MAX_RESTARTS times at most, after 75 (preempted and saved), 76 (a peer was lost), ends by
# signals, and when a worker says nothing because its VM is gone or could not install. 77 (diverged), 78 (config), 64,
# 65, 70 and 74 stop it.
# gcloud's own exit code says little of several workers; each prints its code as its last line, which is read here.
#
# Sources: https://cloud.google.com/tpu/docs/managing-tpus-tpu-vm   https://cloud.google.com/tpu/docs/preemptible
#   https://docs.astral.sh/uv/guides/install-python/
set -uo pipefail
: "${NAME:?of the slice and the run}" "${ZONE:?}" "${BUCKET:?gs://BUCKET}" "${REPOSITORY:?to clone on the workers}"
ACCELERATOR=${ACCELERATOR:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
REVISION=${REVISION:-main} # a branch (as it is at each start), a tag or a commit
MAX_RESTARTS=${MAX_RESTARTS:-100}
WAIT=${WAIT:-60}

REMOTE="
export PATH=\$HOME/.local/bin:\$PATH BERTGPT_JOB=$NAME
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -d bertgpt_jax ] || git clone -q $REPOSITORY bertgpt_jax
{ cd bertgpt_jax && git fetch -q --tags --force &&
  git checkout -q --detach \$(git rev-parse -q --verify origin/$REVISION || echo $REVISION) &&
  { [ -x .venv/bin/python ] || uv venv -q --python 3.12 .venv; } &&
  uv pip install -q --python .venv -e '.[tpu,gcs]'; } || exit 1
{ [ ! -f run.pid ] || { kill \$(cat run.pid) 2>/dev/null && sleep 30; } || true; }
.venv/bin/python tools/train.py configs/bert/base.py corpus.path=$BUCKET/wiki.corpus \
  execution.distributed.auto=true --platform tpu --workdir $BUCKET/$NAME &
echo \$! >run.pid
wait \$!
echo bertgpt ended with code \$?
"

tpu() { gcloud compute tpus tpu-vm "$@" --zone "$ZONE"; }

state() { tpu describe "$NAME" --format='value(state)' 2>/dev/null || echo ABSENT; }

# Returns when the slice is there and ready.
make_ready() {
  while true; do
    case $(state) in
      READY) return ;;
      CREATING | STARTING | RESTARTING | REPAIRING) sleep "$WAIT" ;;
      ABSENT)
        tpu create "$NAME" --accelerator-type "$ACCELERATOR" --version "$RUNTIME" --spot --quiet || sleep "$WAIT"
        ;;
      *) tpu delete "$NAME" --quiet || sleep "$WAIT" ;; # PREEMPTED, TERMINATED, STOPPED: it does not come back
    esac
  done
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
for ((starts = 0; starts <= MAX_RESTARTS; starts++)); do
  make_ready
  tpu ssh "$NAME" --worker=all --command "$REMOTE" 2>&1 | tee "$log"
  codes=$(sed -n 's/.*bertgpt ended with code \([0-9][0-9]*\).*/\1/p' "$log" | sort -nu | tr '\n' ' ')
  for code in 64 65 70 74 77 78; do
    if [[ " $codes" == *" $code "* ]]; then
      echo "exit code $code needs a person: stopped"
      exit "$code"
    fi
  done
  if [[ $codes == "0 " ]]; then
    echo "finished; the slice is still there: gcloud compute tpus tpu-vm delete $NAME --zone $ZONE"
    exit 0
  fi
  echo "exit codes ${codes:-none (the slice is gone, or nothing could be installed)}: restart $((starts + 1)) of $MAX_RESTARTS"
  sleep "$WAIT"
done
echo "given up after $MAX_RESTARTS restarts"
exit 76
