#!/usr/bin/env bash
# Prepares a namespace for diffusion-runtime. Run it as often as you like; it asks nothing.
#
#   ./setup.sh --image quay.io/you/diffusion-runtime:0.1.0 --trial-store 200Gi --model tiny-cpu
#
#   --image NAME:TAG        the runtime's image, put into every object that runs it
#   --namespace NAME        where to (diffusion); made when it is not there
#   --model NAME            apply templates/NAME.yaml too; may be repeated
#   --cache SIZE            size of the cache volume (100Gi), 0 for none;  --cache-class CLASS its storage class
#   --cluster-runtime       define the runtime for all namespaces instead of this one
#   --template              offer the runtime in OpenShift AI's dashboard;  --dashboard-namespace NAME its namespace
#   --monitoring            alerts, a Grafana dashboard as a ConfigMap, and what scrapes the pods
#
# The object store that the models lie in:
#   --bucket NAME           bucket (my-storage);  --connection NAME  the data connection (aws-connection-my-storage)
#   --endpoint URL          the store;  --region NAME (us-east-1)
#   --access-key KEY        and --secret-key-file FILE; or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY beside an endpoint
#   --trial-store SIZE      a small store in the namespace, for trials, with keys of its own; not for production
#   --store-image NAME:TAG  its image
#
#   --platform NAME         openshift or kubernetes (what oc or kubectl says);  --cli PATH  oc, kubectl or a path
#   --dry-run               print every object as YAML, change nothing; secret values are not shown
#   --delete                take away what these flags would make; volumes and the namespace stay without --with-data,
#                           a connection or a namespace that was there before stays in any case
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
templates=$here/templates
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$here/runtime/__init__.py")
placeholder=registry.example.com/diffusion-runtime:$version

namespace=diffusion image=$placeholder cli='' platform='' mode=apply with_data=false
bucket=my-storage connection=aws-connection-my-storage endpoint='' region=${AWS_DEFAULT_REGION:-us-east-1}
access_key='' secret_key=''
trial_store='' store_image=docker.io/rclone/rclone:1.75.2
cache=100Gi cache_class='' monitoring=false template=false dashboard_namespace=redhat-ods-applications cluster_runtime=false
models=() api_keys=diffusion-api-keys api_key=''
owner=diffusion-runtime-setup # the label by which --delete knows what is not somebody else's

fail() {
    echo "setup.sh: $*" >&2
    exit 1
}
say() { echo "==> $*" >&2; }
usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$here/setup.sh"; }

while [ $# -gt 0 ]; do
    flag=$1
    case $flag in
    --dry-run) mode=print ;;
    --delete) mode=delete ;;
    --with-data) with_data=true ;;
    --monitoring) monitoring=true ;;
    --template) template=true ;;
    --cluster-runtime) cluster_runtime=true ;;
    -h | --help)
        usage
        exit 0
        ;;
    --image | --namespace | --model | --cache | --cache-class | --dashboard-namespace | --bucket | --connection | \
        --endpoint | --region | --access-key | --secret-key-file | --trial-store | --store-image | --platform | --cli)
        [ $# -ge 2 ] || fail "$flag needs a value"
        value=$2
        shift
        case $flag in
        --image) image=$value ;;
        --namespace) namespace=$value ;;
        --model) models+=("$value") ;;
        --cache) cache=$value ;;
        --cache-class) cache_class=$value ;;
        --dashboard-namespace) dashboard_namespace=$value ;;
        --bucket) bucket=$value ;;
        --connection) connection=$value ;;
        --endpoint) endpoint=$value ;;
        --region) region=$value ;;
        --access-key) access_key=$value ;;
        --secret-key-file) secret_key=$(cat "$value") || fail "$flag $value cannot be read" ;;
        --trial-store) trial_store=$value ;;
        --store-image) store_image=$value ;;
        --platform) platform=$value ;;
        --cli) cli=$value ;;
        esac
        ;;
    *) fail "$flag is not a flag; --help lists them" ;;
    esac
    shift
done

# Keys that lie in the environment are meant for the store that is named; without one they are for something else.
[ -n "$endpoint$trial_store" ] || endpoint=${AWS_S3_ENDPOINT:-}
if [ -n "$endpoint" ] && [ -z "$trial_store" ]; then
    access_key=${access_key:-${AWS_ACCESS_KEY_ID:-}} secret_key=${secret_key:-${AWS_SECRET_ACCESS_KEY:-}}
fi

# --- what was asked for, checked before anything is made

matches() { [[ $2 =~ $3 ]] || fail "$1 $2 does not look right"; }
name='^[a-z0-9]([-a-z0-9]*[a-z0-9])?$' quantity='^[0-9]+(Mi|Gi|Ti)$' plain='^[-A-Za-z0-9/+=_.:@~]+$'
matches --namespace "$namespace" "$name"
matches --dashboard-namespace "$dashboard_namespace" "$name"
matches --connection "$connection" "$name"
matches --bucket "$bucket" '^[a-z0-9][-a-z0-9.]{2,62}$'
matches --region "$region" "$plain"
[[ $image =~ :[^:/]+$ ]] || fail "--image $image needs a tag"
reference='^[A-Za-z0-9][-A-Za-z0-9._/:@]*:[A-Za-z0-9_][-A-Za-z0-9._]*$'
matches --image "$image" "$reference"
matches --store-image "$store_image" "$reference"
[[ $image != *:latest ]] || fail "--image $image: a moving tag makes pods of one service differ; name a version"
[ "$cache" = 0 ] || matches --cache "$cache" "$quantity"
[ -z "$cache_class" ] || matches --cache-class "$cache_class" "$name"
[ -z "$trial_store" ] || matches --trial-store "$trial_store" "$quantity"
[ -z "$endpoint" ] || matches --endpoint "$endpoint" '^https?://[-A-Za-z0-9.:/_]+$'
[ -z "$access_key" ] || matches --access-key "$access_key" "$plain"
[ -z "$secret_key" ] || [[ $secret_key =~ $plain ]] || fail "the secret key holds characters that no store gives out"
[ -z "$trial_store" ] || [ -z "$endpoint$access_key$secret_key" ] || fail "--trial-store makes its own keys and endpoint"
if [ -z "$trial_store" ] && [ -n "$endpoint$access_key$secret_key" ]; then
    [ -n "$endpoint" ] && [ -n "$access_key" ] && [ -n "$secret_key" ] ||
        fail "a store needs all of --endpoint, --access-key and --secret-key-file"
fi
wants_keys=false
for model in ${models[@]+"${models[@]}"}; do
    [ -f "$templates/$model.yaml" ] || fail "--model $model: there is no templates/$model.yaml"
    if grep -q "secretName: $api_keys" "$templates/$model.yaml"; then wants_keys=true; fi
    if [ -n "$trial_store" ] && grep -q -- --output_uri= "$templates/$model.yaml"; then
        fail "--model $model keeps jobs in the store, and the trial store has no conditional writes; name another store"
    fi
done

if [ -z "$cli" ]; then
    if command -v oc >/dev/null; then cli=oc; else cli=kubectl; fi
fi
if [ -z "$platform" ]; then
    if [ "$(basename "$cli")" = oc ]; then platform=openshift; else platform=kubernetes; fi
fi
[ "$platform" = openshift ] || [ "$platform" = kubernetes ] || fail "--platform is openshift or kubernetes"
if [ "$mode" != print ]; then
    command -v "$cli" >/dev/null || fail "$cli is not here; install it or name another with --cli"
fi
if [ "$image" = "$placeholder" ] && [ "$mode" != delete ]; then
    say "no --image: the objects name $placeholder, which no cluster can pull"
fi

# --- keys of the trial store and of callers: made once, kept afterwards

ours() { # KIND NAME: whether an apply made it
    [ "$("$cli" -n "$namespace" get "$1" "$2" -o 'jsonpath={.metadata.labels.app\.kubernetes\.io/managed-by}' 2>/dev/null)" = $owner ]
}
random() { LC_ALL=C tr -dc 'A-Za-z0-9' </dev/urandom 2>/dev/null | head -c "$1" || true; }
kept() { # KEY: its value in the connection's Secret, if the cluster has it
    "$cli" -n "$namespace" get secret "$connection" -o "jsonpath={.data.$1}" 2>/dev/null | base64 -d 2>/dev/null || true
}
if [ -n "$trial_store" ]; then
    endpoint=http://trial-store.$namespace.svc.cluster.local:9000
    if [ "$mode" = apply ]; then
        access_key=$(kept AWS_ACCESS_KEY_ID)
        secret_key=$(kept AWS_SECRET_ACCESS_KEY)
        [ -z "$access_key$secret_key" ] || ours secret "$connection" ||
            fail "the connection $connection is of another store; name one for the trial store with --connection"
        [ -n "$access_key" ] && [ -n "$secret_key" ] || { access_key=$(random 20) secret_key=$(random 40); }
    else
        access_key=generated secret_key=generated
    fi
fi
[ "$mode" = apply ] || [ -z "$secret_key" ] || secret_key=not-shown

if $wants_keys && [ "$mode" = print ]; then api_key=not-shown; fi
if $wants_keys && [ "$mode" = apply ]; then
    "$cli" -n "$namespace" get secret $api_keys -o 'jsonpath={.metadata.name}' >/dev/null 2>&1 || api_key=$(random 40)
fi

# --- the objects

from() { # FILE: a template with this image and namespace
    sed -e "s|$placeholder|$image|g" -e "s|namespace: diffusion$|namespace: $namespace|" "$templates/$1"
}

namespace_object() {
    cat <<YAML
apiVersion: v1
kind: Namespace
metadata:
  name: $namespace
  labels:
    opendatahub.io/dashboard: 'true' # OpenShift AI lists it among its projects
    app.kubernetes.io/managed-by: $owner
YAML
}

connection_objects() {
    if [ -z "$secret_key" ] || [ "$mode" = delete ]; then return 0; fi
    cat <<YAML
---
apiVersion: v1
kind: Secret
metadata:
  name: $connection
  labels:
    opendatahub.io/dashboard: 'true'
    opendatahub.io/managed: 'true'
    app.kubernetes.io/managed-by: $owner
  annotations:
    opendatahub.io/connection-type: s3 # read up to OpenShift AI 2.x
    opendatahub.io/connection-type-protocol: s3
    openshift.io/display-name: $connection
type: Opaque
stringData:
  AWS_ACCESS_KEY_ID: '$access_key'
  AWS_SECRET_ACCESS_KEY: '$secret_key'
  AWS_S3_ENDPOINT: '$endpoint'
  AWS_S3_BUCKET: '$bucket'
  AWS_DEFAULT_REGION: '$region'
YAML
    # OpenShift AI's controller makes it from the data connections. It may hold others' keys: no delete of the whole.
    if [ "$platform" = kubernetes ]; then
        cat <<YAML
---
apiVersion: v1
kind: Secret
metadata:
  name: storage-config
type: Opaque
stringData:
  $connection: >-
    {"type": "s3", "access_key_id": "$access_key", "secret_access_key": "$secret_key", "endpoint_url": "$endpoint",
    "bucket": "$bucket", "region": "$region"}
YAML
    fi
}

access_objects() { # who may call a service that asks for a token: whoever may read it
    cat <<YAML
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: diffusion-client
automountServiceAccountToken: false
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: diffusion-client
rules:
  - apiGroups: [serving.kserve.io]
    resources: [inferenceservices]
    verbs: [get]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: diffusion-client
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: diffusion-client}
subjects:
  - {kind: ServiceAccount, name: diffusion-client, namespace: $namespace}
YAML
}

store_objects() {
    [ -n "$trial_store" ] || return 0
    cat <<YAML
---
apiVersion: v1
kind: Service
metadata:
  name: trial-store
spec:
  selector: {app: trial-store}
  ports:
    - {name: s3, port: 9000, targetPort: 9000, protocol: TCP}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: trial-store
spec:
  replicas: 1
  strategy: {type: Recreate}
  selector:
    matchLabels: {app: trial-store}
  template:
    metadata:
      labels: {app: trial-store}
    spec:
      automountServiceAccountToken: false
      securityContext:
        runAsNonRoot: true
        seccompProfile: {type: RuntimeDefault}
$([ "$platform" = openshift ] || printf "        %s\n" "runAsUser: 1001 # no number on OpenShift, which gives one" "fsGroup: 1001")
      containers:
        - name: store
          image: $store_image
          command: [sh, -c] # a bucket is a folder of the volume
          args: ['mkdir -p "/data/\$BUCKET" && exec rclone serve s3 --addr :9000 --auth-key "\$KEY,\$SECRET" /data']
          env:
            - {name: HOME, value: /tmp}
            - {name: RCLONE_CONFIG, value: /tmp/rclone.conf}
            - {name: BUCKET, valueFrom: {secretKeyRef: {name: $connection, key: AWS_S3_BUCKET}}}
            - {name: KEY, valueFrom: {secretKeyRef: {name: $connection, key: AWS_ACCESS_KEY_ID}}}
            - {name: SECRET, valueFrom: {secretKeyRef: {name: $connection, key: AWS_SECRET_ACCESS_KEY}}}
          ports:
            - {name: s3, containerPort: 9000, protocol: TCP}
          readinessProbe:
            tcpSocket: {port: s3}
          resources: # an upload in parts is held in memory
            requests: {cpu: 100m, memory: 256Mi}
            limits: {cpu: '2', memory: 8Gi}
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities: {drop: [ALL]}
          volumeMounts:
            - {name: data, mountPath: /data}
            - {name: tmp, mountPath: /tmp}
      volumes:
        - name: data
          persistentVolumeClaim: {claimName: trial-store}
        - name: tmp
          emptyDir: {sizeLimit: 1Gi}
YAML
}

volume_objects() {
    if [ -n "$trial_store" ]; then
        cat <<YAML
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: trial-store
spec:
  accessModes: [ReadWriteOnce]
  resources:
    requests: {storage: $trial_store}
YAML
    fi
    if [ "$cache" != 0 ]; then
        echo ---
        from cache-pvc.yaml | sed "s/storage: 100Gi/storage: $cache/"
        [ -z "$cache_class" ] || echo "  storageClassName: $cache_class"
    fi
}

runtime_objects() {
    if $cluster_runtime; then return 0; fi
    echo ---
    from diffusers-serving-runtime.yaml
}

monitoring_objects() {
    if ! $monitoring; then return 0; fi
    echo ---
    from monitoring/prometheus-rule.yaml
    if [ "$platform" = kubernetes ]; then # OpenShift AI has a monitor of its own
        echo ---
        from monitoring/pod-monitor.yaml
    fi
    cat <<YAML
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: diffusion-runtime-dashboard
  labels:
    grafana_dashboard: '1' # the label that Grafana's sidecar looks for
data:
  diffusion-runtime.json: |
YAML
    sed 's/^/    /' "$templates/monitoring/grafana-dashboard.json"
}

keys_object() { # whoever sends one of its lines as X-API-Key may call
    [ -n "$api_key" ] || return 0
    cat <<YAML
---
apiVersion: v1
kind: Secret
metadata:
  name: $api_keys
  labels:
    app.kubernetes.io/managed-by: $owner
type: Opaque
stringData:
  keys: '$api_key'
YAML
}

model_objects() {
    for model in ${models[@]+"${models[@]}"}; do
        if [ "$model" = glm-image-keda ] && [ "$platform" = openshift ]; then
            echo ---
            from keda-openshift-auth.yaml
        fi
        echo ---
        from "$model.yaml" | sed "s/aws-connection-my-storage/$connection/g"
    done
}

objects() { # everything of the namespace but volumes, models last
    access_objects
    connection_objects
    store_objects
    runtime_objects
    monitoring_objects
    keys_object
    model_objects
}

on_cluster() { # NAMESPACE VERB...: the objects on stdin
    "$cli" -n "$1" "${@:2}" -f -
}

case $mode in
print)
    namespace_object
    volume_objects
    objects
    if $cluster_runtime; then echo --- && from diffusers-cluster-serving-runtime.yaml; fi
    if $template; then echo --- && from diffusers-template.yaml; fi
    ;;
apply)
    say "namespace $namespace"
    if "$cli" get namespace "$namespace" >/dev/null 2>&1; then
        "$cli" label --overwrite namespace "$namespace" opendatahub.io/dashboard=true >/dev/null 2>&1 ||
            say "it is there and not yours to label; that is fine where OpenShift AI lists it already"
    elif ! namespace_object | "$cli" apply -f - >&2; then
        # Who may not make namespaces may, on OpenShift, ask for a project.
        [ "$platform" = openshift ] || fail "the namespace could not be made"
        "$cli" new-project "$namespace" --skip-config-write >&2
    fi
    say "volumes"
    if [ "$cache$trial_store" != 0 ]; then volume_objects | on_cluster "$namespace" apply >&2; fi
    say "access, data connection, runtime, models"
    objects | on_cluster "$namespace" apply >&2
    if $cluster_runtime; then from diffusers-cluster-serving-runtime.yaml | "$cli" apply -f - >&2; fi
    if $template; then from diffusers-template.yaml | on_cluster "$dashboard_namespace" apply >&2; fi
    [ -n "$secret_key" ] || say "no store was named: no data connection was made (--endpoint … or --trial-store SIZE)"
    if $wants_keys; then say "callers' key: $cli -n $namespace get secret $api_keys -o 'jsonpath={.data.keys}' | base64 -d"; fi
    say "done; next: $cli -n $namespace apply -f templates/…, and $cli -n $namespace get inferenceservice"
    ;;
delete)
    objects | on_cluster "$namespace" delete --ignore-not-found >&2
    # The keys go even when the flags that made them are not repeated.
    if ours secret "$connection"; then
        "$cli" -n "$namespace" delete --ignore-not-found secret "$connection" >&2
        if [ "$platform" = kubernetes ]; then
            "$cli" -n "$namespace" patch secret storage-config --type=json \
                -p "[{\"op\": \"remove\", \"path\": \"/data/$connection\"}]" >/dev/null 2>&1 || true
        fi
    fi
    if ours secret $api_keys; then "$cli" -n "$namespace" delete --ignore-not-found secret $api_keys >&2; fi
    if $cluster_runtime; then from diffusers-cluster-serving-runtime.yaml | "$cli" delete --ignore-not-found -f - >&2; fi
    if $template; then from diffusers-template.yaml | on_cluster "$dashboard_namespace" delete --ignore-not-found >&2; fi
    if $with_data; then
        if [ "$cache$trial_store" != 0 ]; then volume_objects | on_cluster "$namespace" delete --ignore-not-found >&2; fi
        if ours namespace "$namespace"; then
            namespace_object | "$cli" delete --ignore-not-found -f - >&2
        else
            say "the namespace $namespace was not made here and stays"
        fi
    else
        say "volumes and the namespace were left; --with-data takes them too"
    fi
    ;;
esac
