{{/* What the schema cannot say: values that contradict one another. Each message names the way out. */}}
{{- define "vllm-spectral.checks" -}}
{{- $v := .Values -}}
{{- $ranks := include "vllm-spectral.ranks" . | int64 -}}
{{- if and (eq $v.model.source "persistentVolumeClaim") (not $v.model.persistentVolumeClaim) -}}
{{- fail "model.source is persistentVolumeClaim: name the claim in model.persistentVolumeClaim" -}}
{{- end -}}
{{- if and (ne $v.model.source "persistentVolumeClaim") $v.model.persistentVolumeClaim -}}
{{- fail "model.persistentVolumeClaim is set, and model.source is not persistentVolumeClaim" -}}
{{- end -}}
{{- if and (eq $v.model.source "hub") (or (eq $v.model.name "demo") (hasPrefix "/" $v.model.name)) -}}
{{- fail (printf "model.name %s is not on the hub: set model.source to image" $v.model.name) -}}
{{- end -}}
{{- if and (eq $v.profile.source "persistentVolumeClaim") (not $v.profile.persistentVolumeClaim) -}}
{{- fail "profile.source is persistentVolumeClaim: name the claim in profile.persistentVolumeClaim" -}}
{{- end -}}
{{- if and (eq $v.profile.source "configMap") (not $v.profile.configMap) -}}
{{- fail "profile.source is configMap: name it in profile.configMap" -}}
{{- end -}}
{{- if and (eq $v.profile.source "image") (not (hasPrefix "/" $v.profile.file)) -}}
{{- fail "profile.source is image: profile.file must be the profile's whole path in it" -}}
{{- end -}}
{{- if and (ne $v.profile.source "image") (contains "/" $v.profile.file) -}}
{{- fail "profile.file is a file name in its volume, without directories" -}}
{{- end -}}
{{- if and $v.auth.protectAll (not $v.auth.existingSecret) -}}
{{- fail "auth.protectAll: there is no key to ask for; name its secret in auth.existingSecret" -}}
{{- end -}}
{{- if and $v.autoscaling.enabled (not $v.autoscaling.prometheusAddress) -}}
{{- fail "autoscaling: name the Prometheus that knows the queue in autoscaling.prometheusAddress" -}}
{{- end -}}
{{- if gt ($v.autoscaling.minReplicas | int64) ($v.autoscaling.maxReplicas | int64) -}}
{{- fail "autoscaling.minReplicas is above autoscaling.maxReplicas" -}}
{{- end -}}
{{- if and (not $v.serviceAccount.create) (not $v.serviceAccount.name) -}}
{{- fail "serviceAccount.create is false: name an account in serviceAccount.name, or `default`" -}}
{{- end -}}
{{- $limit := include "vllm-spectral.mebibytes" $v.resources.limits.memory | int64 -}}
{{- $caches := mul $ranks (include "vllm-spectral.mebibytes" $v.kvCache.size | int64) -}}
{{- if and (gt $limit 0) (ge $caches $limit) -}}
{{- fail (printf "kvCache.size %s on %d ranks does not fit into resources.limits.memory %s, which must hold weights as well" $v.kvCache.size $ranks $v.resources.limits.memory) -}}
{{- end -}}
{{- range $v.extraArgs -}}
{{- $flag := . | splitList "=" | first | replace "_" "-" -}}
{{- $ours := dict "--profile" "profile" "--host" "service" "--port" "service.port" "--api-key" "auth.existingSecret" "--protect-all" "auth.protectAll" "--served-model-name" "model.servedName" "--kv-cache-memory-bytes" "kvCache.size" "--tensor-parallel-size" "parallelism.tensor" "-tp" "parallelism.tensor" "--data-parallel-size" "parallelism.data" "-dp" "parallelism.data" "--shutdown-timeout" "shutdown.drainSeconds" -}}
{{- if hasKey $ours $flag -}}
{{- fail (printf "extraArgs: %s is set by %s" $flag (get $ours $flag)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
