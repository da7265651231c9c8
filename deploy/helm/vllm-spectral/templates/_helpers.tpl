{{- define "vllm-spectral.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "vllm-spectral.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "vllm-spectral.name" . -}}
{{- (contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name)) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "vllm-spectral.selectorLabels" -}}
app.kubernetes.io/name: {{ include "vllm-spectral.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "vllm-spectral.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "vllm-spectral.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "vllm-spectral.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "vllm-spectral.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "vllm-spectral.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "vllm-spectral.ranks" -}}
{{- mul .Values.parallelism.tensor .Values.parallelism.data -}}
{{- end -}}

{{/* What the server is told to serve: a name, or a path below the claim's mount. */}}
{{- define "vllm-spectral.model" -}}
{{- if eq .Values.model.source "persistentVolumeClaim" -}}
/models/{{ .Values.model.name | trimPrefix "/" }}
{{- else -}}
{{- .Values.model.name -}}
{{- end -}}
{{- end -}}

{{- define "vllm-spectral.profile" -}}
{{- if eq .Values.profile.source "image" -}}{{ .Values.profile.file }}{{- else -}}/profile/{{ .Values.profile.file }}{{- end -}}
{{- end -}}

{{/* A quantity in Mi, rounded down; 0 for units that are not understood. */}}
{{- define "vllm-spectral.mebibytes" -}}
{{- $text := toString . -}}
{{- $number := regexFind "^[0-9]+" $text | int64 -}}
{{- if regexMatch "^[0-9]+Gi$" $text -}}{{ mul $number 1024 }}
{{- else if regexMatch "^[0-9]+Mi$" $text -}}{{ $number }}
{{- else if regexMatch "^[0-9]+Ti$" $text -}}{{ mul $number 1048576 }}
{{- else -}}0
{{- end -}}
{{- end -}}

{{/* Threads of one rank: what is asked for, else the whole cores of the limit, shared by the ranks. */}}
{{- define "vllm-spectral.threads" -}}
{{- if .Values.cpu.threadsPerRank -}}
{{- .Values.cpu.threadsPerRank -}}
{{- else -}}
{{- $limit := toString .Values.resources.limits.cpu -}}
{{- $cores := hasSuffix "m" $limit | ternary (div (trimSuffix "m" $limit | int64) 1000) ($limit | float64 | floor | int64) -}}
{{- max 1 (div $cores (include "vllm-spectral.ranks" . | int64)) -}}
{{- end -}}
{{- end -}}

{{- define "vllm-spectral.env" -}}
- name: VLLM_CPU_OMP_THREADS_BIND
  value: {{ .Values.cpu.bind | quote }}
- name: OMP_NUM_THREADS
  value: {{ include "vllm-spectral.threads" . | quote }}
{{- if ne .Values.model.source "hub" }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- else if .Values.model.hub.tokenSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .Values.model.hub.tokenSecret }}
      key: {{ .Values.model.hub.tokenKey }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "vllm-spectral.key" -}}
{{- if .Values.auth.existingSecret }}
- name: VLLM_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ .Values.auth.existingSecret }}
      key: {{ .Values.auth.key }}
{{- end }}
{{- end -}}

{{- define "vllm-spectral.mounts" -}}
- name: cache
  mountPath: /cache
- name: tmp
  mountPath: /tmp
- name: shm
  mountPath: /dev/shm
{{- if eq .Values.model.source "persistentVolumeClaim" }}
- name: models
  mountPath: /models
  readOnly: true
{{- end }}
{{- if ne .Values.profile.source "image" }}
- name: profile
  mountPath: /profile
{{- end }}
{{- end -}}

{{- define "vllm-spectral.volume" -}}
{{- if .claim }}
persistentVolumeClaim:
  claimName: {{ .claim }}
{{- if .readOnly }}
  readOnly: true
{{- end }}
{{- else }}
emptyDir:
  sizeLimit: {{ .limit }}
{{- end }}
{{- end -}}
