#!/usr/bin/env bash
# Ray's head, and `vllm serve` in the same container: vLLM places its workers on the GPUs of both
# machines, and waits up to half an hour until all of them have joined.
set -euo pipefail

# Workers on all machines leave their counts there; those of an earlier run are not ours.
rm -rf -- "$TOKENSELECT_METRICS_DIR"
mkdir -p -- "$TOKENSELECT_METRICS_DIR"

# KubeRay's own command, with everything that the RayCluster says about this pod, and the limit that
# it sets where it starts Ray itself.
ulimit -n 65536 || true
bash -c "$KUBERAY_GEN_RAY_START_CMD" &
ray=$!
until ray health-check --address 127.0.0.1:6379 >/dev/null 2>&1; do
    kill -0 "$ray" # ended: so does this script
    sleep 2
done
exec vllm serve --config /etc/tokenselect/vllm.yaml
