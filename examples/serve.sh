#!/usr/bin/env bash
# Serve a model with the settings of settings.json. What follows the model goes to `vllm serve`.
#
#     ./serve.sh MODEL [--port 8000 ...]
set -euo pipefail

settings=$(cat "$(dirname "$0")/settings.json")
exec vllm serve "$@" --attention-backend TOKENSELECT --additional-config "$settings"
