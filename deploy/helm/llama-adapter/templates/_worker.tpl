{{/* The pods of a worker; of (root, follower): whether it computes for the group's leader, which alone is asked */}}
{{- define "llama-adapter.worker-pod" -}}
{{- $root := .root }}
{{- $part := $root.Values.worker }}
{{- $vllm := $part.vllm }}
{{- $several := gt (int $vllm.nodes) 1 }}
{{- $gpus := ternary (int $vllm.gpus) (ternary 1 0 $part.gpu.enabled) $vllm.enabled }}
{{- $storage := $root.Values.adapters.objectStorage }}
{{- $adapters := ternary "" (or $root.Values.adapters.claim $storage.source) .follower }}
{{- $target := ternary "worker-vllm" (ternary "worker-cuda" "worker" $part.gpu.enabled) $vllm.enabled }}
{{- $it := dict "root" $root "component" "worker" "target" $target "part" $part -}}
{{ include "llama-adapter.pod" $it }}
{{ include "llama-adapter.spread" $it }}
{{- if and $gpus $part.gpu.runtimeClassName }}
runtimeClassName: {{ $part.gpu.runtimeClassName }}
{{- end }}
# The drain, and some for the last bytes. No preStop: the gateway asks for readiness every second, and
# what it sends too late is refused before the first token and served by another worker.
terminationGracePeriodSeconds: {{ add $root.Values.drainSeconds 10 }}
{{- if and $adapters $storage.source }}
initContainers:
  - name: adapters
    image: {{ $storage.image }}
    {{- include "llama-adapter.container" $root | nindent 4 }}
    args: [copy, {{ $storage.source | quote }}, /adapters]
    env:
      - {name: HOME, value: /tmp}
      - {name: RCLONE_CONFIG, value: /tmp/rclone.conf}
    {{- with $storage.secret }}
    envFrom:
      - secretRef: {name: {{ . }}}
    {{- end }}
    resources:
      requests: {cpu: 100m, memory: 128Mi}
      limits: {cpu: "1", memory: 512Mi}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      - {name: adapters, mountPath: /adapters}
{{- end }}
containers:
  - name: worker
    image: {{ include "llama-adapter.image" $it }}
    {{- include "llama-adapter.container" $root | nindent 4 }}
    args:
      - worker
      {{- if $several }}
      - --node-rank=$(LWS_WORKER_INDEX)
      - --master-addr=$(LWS_LEADER_ADDRESS)
      {{- end }}
    env:
      {{- include "llama-adapter.environment" (dict "root" $root "settings" $part.settings) | nindent 6 }}
      - name: LLAMA_ADAPTER_DRAIN_SECONDS
        value: {{ $root.Values.drainSeconds | quote }}
      - name: LLAMA_ADAPTER_BASE
        value: {{ $part.base | quote }}
      - name: LLAMA_ADAPTER_NUM_THREADS
        value: {{ $part.threads | quote }}
      {{- if $vllm.enabled }}
      - name: LLAMA_ADAPTER_ENGINE
        value: vllm
      - name: LLAMA_ADAPTER_TENSOR_PARALLEL
        value: {{ mul (max 1 $vllm.gpus) $vllm.nodes | quote }} {{- /* without GPUs a pod counts as one */}}
      {{- else if $gpus }}
      - name: LLAMA_ADAPTER_DEVICE
        value: cuda:0
      {{- end }}
      {{- if $several }}
      - name: LLAMA_ADAPTER_NNODES
        value: {{ $vllm.nodes | quote }}
      - name: VLLM_HOST_IP # where the others of the group find this one
        valueFrom:
          fieldRef: {fieldPath: status.podIP}
      {{- end }}
      {{- if $part.state.size }}
      - name: LLAMA_ADAPTER_ADAPTER_STATE
        value: /state/adapters.json
      - name: NUMBA_CACHE_DIR # kernels compiled for the processor
        value: /state/kernels
      {{- end }}
      {{- if $adapters }}
      - name: LLAMA_ADAPTER_ADAPTER_DIR
        value: /adapters
      - name: LLAMA_ADAPTER_ADAPTER_ROOT
        value: /adapters
      {{- end }}
    {{- if not .follower }}
    ports:
      - {name: http, containerPort: 8001}
    {{- include "llama-adapter.probes" (dict "startupSeconds" $part.startupSeconds) | nindent 4 }}
    {{- end }}
    resources:
      requests: {{- toYaml $part.resources.requests | nindent 8 }}
        {{- if $gpus }}
        {{ $part.gpu.resource }}: {{ $gpus }}
        {{- end }}
      limits: {{- toYaml $part.resources.limits | nindent 8 }}
        {{- if $gpus }}
        {{ $part.gpu.resource }}: {{ $gpus }}
        {{- end }}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      {{- if $part.modelsClaim }}
      - {name: models, mountPath: /models, readOnly: true}
      {{- end }}
      {{- if $adapters }}
      - {name: adapters, mountPath: /adapters, readOnly: true}
      {{- end }}
      {{- if $part.state.size }}
      - {name: state, mountPath: /state}
      {{- end }}
      {{- if $vllm.enabled }}
      - {name: shm, mountPath: /dev/shm}
      {{- end }}
volumes:
  - name: tmp
    emptyDir: {sizeLimit: {{ ternary $vllm.tmpSize "1Gi" $vllm.enabled }}}
  {{- if $vllm.enabled }}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ $vllm.shmSize }}}
  {{- end }}
  {{- with $part.modelsClaim }}
  - name: models
    persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
  {{- end }}
  {{- if and $adapters $root.Values.adapters.claim }}
  - name: adapters
    persistentVolumeClaim: {claimName: {{ $adapters }}, readOnly: true}
  {{- else if $adapters }}
  - name: adapters
    emptyDir: {sizeLimit: {{ $storage.sizeLimit }}}
  {{- end }}
{{- end }}
