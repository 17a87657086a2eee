#!/usr/bin/env bash
# Makes the Secrets that the manifests name. Values come from here and the environment, and are in no file of this repository.
#   kubectl apply -k k8s/base && k8s/secrets.sh
set -euo pipefail

# Who has this token may run any code on the cluster.
kubectl --namespace introspect create secret generic introspect-ray-token \
    --from-literal=auth_token="${RAY_AUTH_TOKEN:-$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')}"

# Optional: keys for the bucket and the model hub, where pods have no cloud identity.
arguments=()
for name in AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_DEFAULT_REGION AWS_ENDPOINT_URL HF_TOKEN; do
    if [[ -n ${!name:-} ]]; then
        arguments+=("--from-literal=$name=${!name}")
    fi
done
if [[ ${#arguments[@]} -gt 0 ]]; then
    kubectl --namespace introspect create secret generic introspect-credentials "${arguments[@]}"
fi
