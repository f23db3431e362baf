{{- /*
How the kubelet asks. The gRPC health service has three names: "" and the trunk's service say whether clients
are taken (not while the server drains or its engine starts again), "live" only that the process answers.
*/ -}}

{{- define "offshoot.probeHandler" -}}
{{- if ne .Values.probes.handler "auto" -}}
{{- .Values.probes.handler -}}
{{- else if not (include "offshoot.tlsOn" .) -}}
grpc
{{- else if or (not (include "offshoot.clientCaOn" .)) .Values.probes.clientCertificateSecret -}}
exec
{{- else -}}
http
{{- end -}}
{{- end -}}

{{- /* Takes (list $ LIVENESS): true asks whether the process answers, false whether it takes clients. */ -}}
{{- define "offshoot.probeAction" -}}
{{- $ := index . 0 -}}
{{- $live := index . 1 -}}
{{- $handler := include "offshoot.probeHandler" $ -}}
{{- if eq $handler "grpc" -}}
grpc:
  port: {{ include "offshoot.grpcPort" $ }}
  {{- if $live }}
  service: live
  {{- end }}
{{- else if eq $handler "http" -}}
httpGet:
  port: http
  path: {{ ternary "/healthz" "/readyz" $live }}
  scheme: {{ ternary "HTTPS" "HTTP" (ne (include "offshoot.tlsOn" $) "") }}
{{- else -}}
exec:
  command:
    - {{ $.Values.image.binary }}
    - health
    - --config=/etc/offshoot/server.toml
    {{- if $live }}
    - --service=live
    {{- end }}
    {{- if $.Values.probes.clientCertificateSecret }}
    - --tls-cert=/etc/offshoot-probe/tls.crt
    - --tls-key=/etc/offshoot-probe/tls.key
    {{- end }}
{{- end -}}
{{- end -}}

{{- define "offshoot.probeTimes" -}}
periodSeconds: {{ int64 .periodSeconds }}
timeoutSeconds: {{ int64 .timeoutSeconds }}
failureThreshold: {{ int64 .failureThreshold }}
{{- end -}}

{{- define "offshoot.probes" -}}
{{- with .Values.probes -}}
# Loading the trunk takes as long as it takes; until this one has succeeded the others do not begin.
startupProbe:
  {{- include "offshoot.probeAction" (list $ false) | nindent 2 }}
  {{- include "offshoot.probeTimes" .startup | nindent 2 }}
readinessProbe:
  {{- include "offshoot.probeAction" (list $ false) | nindent 2 }}
  {{- include "offshoot.probeTimes" .readiness | nindent 2 }}
livenessProbe:
  {{- include "offshoot.probeAction" (list $ true) | nindent 2 }}
  {{- include "offshoot.probeTimes" .liveness | nindent 2 }}
{{- end }}
{{- end -}}
