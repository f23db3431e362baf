{{- /*
How the kubelet asks, in the cheapest way that there is: it speaks gRPC, but not with TLS; over HTTPS it takes
any certificate; and `offshoot health` needs 0.3 s of a core each time, to load libtorch. The gRPC health service has three names: "" and the trunk's service say whether clients
are taken (not while the server drains or its engine starts again), "live" only that the process answers. /readyz and /healthz tell the same two things.
*/ -}}

{{- define "offshoot.probeHandler" -}}
{{- if ne .Values.probes.handler "auto" -}}
{{- .Values.probes.handler -}}
{{- else if not (include "offshoot.tlsOn" .) -}}
grpc
{{- else -}}
{{- ternary "http" "exec" (ne (include "offshoot.httpOn" .) "") -}}
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
    - --server={{ ternary "https" "http" (ne (include "offshoot.tlsOn" $) "") }}://127.0.0.1:{{ include "offshoot.grpcPort" $ }}
    {{- if $live }}
    - --service=live
    {{- end }}
    {{- if include "offshoot.tlsOn" $ }}
    {{- if and $.Values.tls.enabled $.Values.tls.caKey }}
    - --tls-ca=/etc/offshoot-tls/{{ $.Values.tls.caKey }}
    {{- end }}
    - --tls-name={{ include "offshoot.serverName" $ }}
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
