#!/usr/bin/env bash
# One run on a Ray cluster that lives as long as this Slurm job:
#   sbatch --nodes=2 --gpus-per-node=8 cluster/slurm.sh jobs/proxy_dpo.py CONFIG.toml run_dir=/shared/runs/NAME
# Submit from the repository's root. The same command again continues an interrupted run.
#SBATCH --job-name=rayrl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail

[ $# -gt 0 ] || { echo "usage: sbatch cluster/slurm.sh jobs/JOB.py CONFIG.toml [section.key=value ...]" >&2; exit 2; }
bin=${RAYRL_BIN:-$PWD/.venv/bin} # python and ray of an environment that every node sees
port=${RAYRL_PORT:-6379}
deadline_s=${RAYRL_DEADLINE_S:-600}
grace_s=${RAYRL_GRACE_S:-30}
poll_s=${RAYRL_POLL_S:-2}
num_nodes=$SLURM_JOB_NUM_NODES num_cpus=$SLURM_CPUS_ON_NODE
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]} # this script runs there
address="$(getent ahostsv4 "$head" | awk 'NR == 1 { print $1 }'):$port"

# Others on this network reach Ray's ports: without the token, which only you can read, they cannot use them.
secrets=$(mktemp -d "$HOME/.rayrl-slurm-$SLURM_JOB_ID.XXXXXX") # a home that every node sees
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$secrets/token
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")

steps=() run=
end() { # everything that was started, whatever the reason
  trap '' TERM INT
  [ -z "$run" ] || kill -TERM "$run" 2>/dev/null || true
  [ ${#steps[@]} -eq 0 ] || kill -TERM "${steps[@]}" 2>/dev/null || true
  local until=$((SECONDS + grace_s))
  while [ -n "$(jobs -pr)" ] && [ $SECONDS -lt $until ]; do sleep 0.2; done
  jobs -pr | xargs -r kill -KILL 2>/dev/null || true
  rm -rf "$secrets"
}
trap end EXIT
trap 'echo "slurm.sh: told to end; the same command continues the run" >&2; exit 143' TERM INT

start() { # NUMBER NODES RAY-ARGUMENTS: one Ray node on each, for as long as its step lives
  srun --nodes="$1" --ntasks="$1" --ntasks-per-node=1 --nodelist="$2" --cpus-per-task="$num_cpus" --overlap \
    "$bin/ray" start --block --disable-usage-stats --temp-dir="/tmp/ray-$SLURM_JOB_ID" --num-cpus="$num_cpus" \
    "${@:3}" &
  steps+=($!)
}

num_alive() { # Ray nodes that have joined; nothing while the head does not answer
  timeout 60 "$bin/python" - "$address" <<'PY' 2>"$secrets/errors" || true
import sys

import ray

ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(sum(node["Alive"] for node in ray.nodes()))
PY
}

await_nodes() { # NUMBER: until so many have joined, or the deadline
  local alive
  until alive=$(num_alive) && [ "${alive:-0}" -ge "$1" ]; do
    kill -0 "${steps[0]}" 2>/dev/null || { echo "slurm.sh: the head's step on $head has ended" >&2; exit 1; }
    if [ $SECONDS -ge "$deadline_s" ]; then
      echo "slurm.sh: waited $deadline_s s for $1 Ray nodes at $address, ${alive:-0} are there" >&2
      tail -n 3 "$secrets/errors" >&2 || true
      exit 1
    fi
    sleep "$poll_s"
  done
}

start 1 "$head" --head --node-ip-address="${address%:*}" --port="$port" --dashboard-host=127.0.0.1
await_nodes 1
if [ "$num_nodes" -gt 1 ]; then
  start $((num_nodes - 1)) "$(IFS=, && echo "${nodes[*]:1}")" --address="$address"
  await_nodes "$num_nodes"
fi

RAY_ADDRESS=$address "$bin/python" "$@" &
run=$!
wait "$run"
