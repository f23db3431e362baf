{{- /* What the server is told: values.config with what the chart itself decides. */ -}}

{{- define "offshoot.tlsOn" -}}
{{- if or .Values.tls.enabled (.Values.config.tls).cert -}}true{{- end -}}
{{- end -}}

{{- define "offshoot.clientCaOn" -}}
{{- if or (include "offshoot.hasClientCa" .) (.Values.config.tls).client_ca -}}true{{- end -}}
{{- end -}}

{{- define "offshoot.hasClientCa" -}}
{{- with .Values.tls.clientCA -}}
{{- if or .existingSecret .existingConfigMap .content -}}true{{- end -}}
{{- end -}}
{{- end -}}

{{- define "offshoot.hasTenants" -}}
{{- if or .Values.tenants.existingSecret .Values.tenants.content -}}true{{- end -}}
{{- end -}}

{{- define "offshoot.tenantsOn" -}}
{{- if or (include "offshoot.hasTenants" .) (.Values.config.access).tenants -}}true{{- end -}}
{{- end -}}

{{- define "offshoot.httpOn" -}}
{{- if not (kindIs "invalid" (.Values.config.http).port) -}}true{{- end -}}
{{- end -}}

{{- define "offshoot.grpcPort" -}}
{{- include "offshoot.int" .Values.config.listen.port -}}
{{- end -}}

{{- define "offshoot.httpPort" -}}
{{- include "offshoot.int" .Values.config.http.port -}}
{{- end -}}

{{- define "offshoot.overlaps" -}}
{{- if gt (int .Values.rollout.overlapSeconds) 0 -}}true{{- end -}}
{{- end -}}

{{- define "offshoot.drainSeconds" -}}
{{- ceil (default 20.0 (.Values.config.drain).timeout_seconds) | int64 -}}
{{- end -}}

{{- define "offshoot.preStopSeconds" -}}
{{- if include "offshoot.overlaps" . -}}
{{- int64 .Values.rollout.overlapSeconds -}}
{{- else -}}
{{- int64 .Values.preStopSleepSeconds -}}
{{- end -}}
{{- end -}}

{{- /* The hook's sleep, the drain, and what closing the store and the connections takes after it. */ -}}
{{- define "offshoot.graceSeconds" -}}
{{- add (include "offshoot.preStopSeconds" .) (include "offshoot.drainSeconds" .) 15 -}}
{{- end -}}

{{- /* A tree as JSON: values.config, and over it what belongs to the chart's own volumes. */ -}}
{{- define "offshoot.settings" -}}
{{- $own := dict -}}
{{- if .Values.tls.enabled -}}
{{- $tls := dict "cert" (printf "/etc/offshoot-tls/%s" .Values.tls.certKey) "key" (printf "/etc/offshoot-tls/%s" .Values.tls.keyKey) -}}
{{- if include "offshoot.hasClientCa" . -}}
{{- $_ := set $tls "client_ca" (printf "/etc/offshoot-client-ca/%s" .Values.tls.clientCA.key) -}}
{{- end -}}
{{- $_ := set $own "tls" $tls -}}
{{- end -}}
{{- if include "offshoot.hasTenants" . -}}
{{- $_ := set $own "access" (dict "tenants" (printf "/etc/offshoot-tenants/%s" .Values.tenants.key)) -}}
{{- end -}}
{{- if include "offshoot.overlaps" . -}}
{{- /* For as long as the predecessor may hold the store. */ -}}
{{- $_ := set $own "store" (dict "wait_seconds" (int64 (include "offshoot.graceSeconds" .))) -}}
{{- end -}}
{{- mergeOverwrite (deepCopy .Values.config) $own | toJson -}}
{{- end -}}

{{- /* Helm reads every number as a float; the server wants integers where it counts things, and takes them everywhere. */ -}}
{{- define "offshoot.tomlValue" -}}
{{- if kindIs "string" . -}}
{{- toRawJson . -}}
{{- else if kindIs "bool" . -}}
{{- . -}}
{{- else if eq (float64 .) (floor .) -}}
{{- printf "%d" (int64 .) -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}

{{- define "offshoot.serverToml" -}}
# From the values below `config` of release {{ .Release.Name }}; the settings' meaning is in docs/server.toml.
{{- range $part, $settings := include "offshoot.settings" . | fromJson }}
{{- if $settings }}

[{{ $part }}]
{{- range $key, $value := $settings }}
{{- if not (kindIs "invalid" $value) }}
{{ $key }} = {{ include "offshoot.tomlValue" $value }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}
