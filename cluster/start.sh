#!/usr/bin/env bash
# Ray on bare machines, with token authentication.
#
#   cluster/start.sh head [RAY START OPTIONS]            on one machine, without a GPU of its own
#   cluster/start.sh worker HEAD:6379 [RAY START OPTIONS]   on every other one
#
# Options go to `ray start` (--num-cpus, --num-gpus, --port, --temp-dir, --block, ...). The token is read from
# RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token; the head makes the last one if there is none. Copy
# it to the workers over ssh. The dashboard, through which jobs are submitted, listens on this machine alone unless
# DASHBOARD_HOST says otherwise: a token is not encrypted on its way, so reach it through `ssh -L 8265:localhost:8265 HEAD`.
set -euo pipefail

usage() {
    sed -n '2,11s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

[[ $# -ge 1 ]] || usage
role=$1
shift

export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
token_file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
command -v ray >/dev/null || { echo "error: there is no ray on PATH: activate the environment of introspect_ray" >&2; exit 2; }

case $role in
head)
    if [[ -z ${RAY_AUTH_TOKEN:-} && ! -s $token_file ]]; then
        (umask 077; mkdir -p "$(dirname "$token_file")"; python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$token_file")
        echo "wrote a new token to $token_file; copy it to every worker and to whoever submits jobs"
    fi
    # Drivers run here; without processors of its own the head takes no actors.
    exec ray start --head --num-cpus=0 --num-gpus=0 --dashboard-host="${DASHBOARD_HOST:-127.0.0.1}" "$@"
    ;;
worker)
    [[ $# -ge 1 && $1 == *:* ]] || usage
    address=$1
    shift
    if [[ -z ${RAY_AUTH_TOKEN:-} && ! -s $token_file ]]; then
        echo "error: no token in RAY_AUTH_TOKEN or $token_file: copy the head's ($token_file there)" >&2
        exit 2
    fi
    ray health-check --address "$address" >/dev/null || { echo "error: no Ray head that takes this token answers at $address" >&2; exit 2; }
    exec ray start --address="$address" "$@"
    ;;
*)
    usage
    ;;
esac
