{{- define "llama-adapter.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end -}}
{{- end }}

{{/* of (root, component) */}}
{{- define "llama-adapter.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "llama-adapter.labels" -}}
{{ include "llama-adapter.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end }}

{{/* of (root, target) */}}
{{- define "llama-adapter.image" -}}
{{- with .root.Values.image.registry }}{{ . }}/{{ end -}}
llama-adapter-{{ .target }}
{{- with index .root.Values.image.digests .target }}@{{ . }}{{ else }}:{{ $.root.Values.image.tag | default $.root.Chart.AppVersion }}{{ end -}}
{{- end }}

{{/* What every pod has: no rights, no token, spread over hosts; of (root, component, part) */}}
{{- define "llama-adapter.pod" -}}
serviceAccountName: {{ include "llama-adapter.name" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- with .part.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .part.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "llama-adapter.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "llama-adapter.selector" . | nindent 8 }}
{{- end }}

{{/* What every container has */}}
{{- define "llama-adapter.container" -}}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext: {{- include "llama-adapter.confined" . | nindent 2 }}
{{- end }}

{{- define "llama-adapter.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Environment of (root, settings): settings by their names, lists and tables as JSON */}}
{{- define "llama-adapter.environment" -}}
- name: LLAMA_ADAPTER_LOG_LEVEL
  value: {{ .root.Values.logLevel }}
{{- range $name, $value := .settings }}
- name: LLAMA_ADAPTER_{{ upper $name }}
  value: {{ ternary $value (toJson $value) (kindIs "string" $value) | quote }}
{{- end }}
{{- with .root.Values.tracing.endpoint }}
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- end }}

{{/*
Fails where settings hold what a value says already: a variable that is there twice is the last one's, or refused.
Of (part, settings, values: from the setting's name to the value's)
*/}}
{{- define "llama-adapter.check-settings" -}}
{{- range $name, $value := .values }}
{{- if hasKey $.settings $name }}
{{- fail (printf "leave out %s.settings.%s: %s says it" $.part $name $value) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Probes of (startupSeconds) at the port named http */}}
{{- define "llama-adapter.probes" -}}
startupProbe:
  httpGet: {path: /health/live, port: http}
  periodSeconds: 5
  failureThreshold: {{ div .startupSeconds 5 }}
readinessProbe:
  httpGet: {path: /health/ready, port: http}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /health/live, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
{{- end }}

{{/*
How many; where something else scales them (scaled), as many as there are: were the number taken away, Kubernetes
would first scale to one. Nothing at install. Of (root, apiVersion, kind, name, replicas, scaled)
*/}}
{{- define "llama-adapter.replicas" -}}
{{- if not .scaled -}}
replicas: {{ .replicas }}
{{- else if lookup .apiVersion .kind .root.Release.Namespace .name -}}
replicas: {{ (lookup .apiVersion .kind .root.Release.Namespace .name).spec.replicas }}
{{- end -}}
{{- end }}

{{- define "llama-adapter.prestop" -}}
lifecycle:
  preStop:
    exec: {command: [sleep, "{{ . }}"]}
{{- end }}

{{/* JSON list of all workers that there may be */}}
{{- define "llama-adapter.worker-urls" -}}
{{- $name := printf "%s-worker" (include "llama-adapter.name" .) -}}
{{- $scaling := .Values.worker.autoscaling -}}
{{- $count := ternary $scaling.max .Values.worker.replicas (ne $scaling.kind "") -}}
{{- $urls := list -}}
{{- range $i := until (int $count) -}}
{{- $urls = append $urls (printf "http://%s-%d.%s:8001" $name $i $name) -}}
{{- end -}}
{{- toJson $urls -}}
{{- end }}

{{- define "llama-adapter.expert-urls" -}}
{{- $urls := dict -}}
{{- range .Values.expert.names -}}
{{- $_ := set $urls . (printf "http://%s-expert:8002" (include "llama-adapter.name" $)) -}}
{{- end -}}
{{- toJson $urls -}}
{{- end }}

{{/* Where every pod may go */}}
{{- define "llama-adapter.egress" -}}
# names
- ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- with .Values.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end }}
