#!/usr/bin/env bash
# Makes the Secrets that the manifests name, those that are there already excepted. Values come from here and the
# environment, and are in no file of this repository.
#   kubectl apply -k k8s/base && k8s/secrets.sh
set -euo pipefail

random() { head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n'; }
missing() {
    if kubectl --namespace introspect get secret "$1" >/dev/null 2>&1; then
        echo "secret/$1 is there already"
        return 1
    fi
}

# Who has this token may run any code on the cluster.
if missing introspect-ray-token; then
    kubectl --namespace introspect create secret generic introspect-ray-token \
        --from-literal=auth_token="${RAY_AUTH_TOKEN:-$(random)}"
fi

# Who has this one may ask the HTTP API (overlays/serving), and nothing else.
if missing introspect-serving-token; then
    kubectl --namespace introspect create secret generic introspect-serving-token \
        --from-literal=token="${INTROSPECT_RAY_TOKEN:-$(random)}"
fi

# Between the head of a service and its control store; nobody needs to know it.
if missing introspect-redis; then
    kubectl --namespace introspect create secret generic introspect-redis --from-literal=password="$(random)"
fi

# Optional: keys for the bucket and the model hub, where pods have no cloud identity.
arguments=()
for name in AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_DEFAULT_REGION AWS_ENDPOINT_URL HF_TOKEN; do
    if [[ -n ${!name:-} ]]; then
        arguments+=("--from-literal=$name=${!name}")
    fi
done
if [[ ${#arguments[@]} -gt 0 ]] && missing introspect-credentials; then
    kubectl --namespace introspect create secret generic introspect-credentials "${arguments[@]}"
fi
