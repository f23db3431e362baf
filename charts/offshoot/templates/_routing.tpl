{{- /*
A session lives in the replica whose volume has it, and no other replica can answer for it. So nothing here
balances: each replica has its own Service and its own host name. The Service without a number is replica 0,
so that addresses stay when a release grows beyond one.
*/ -}}

{{- /* As JSON: [{name, replica}]; replica is absent where any pod will do. */ -}}
{{- define "offshoot.services" -}}
{{- $fullname := include "offshoot.fullname" . -}}
{{- $n := int .Values.replicas -}}
{{- $services := list -}}
{{- if gt $n 1 -}}
{{- $services = append $services (dict "name" $fullname "replica" 0) -}}
{{- range $i := until $n -}}
{{- $services = append $services (dict "name" (printf "%s-%d" $fullname $i) "replica" $i) -}}
{{- end -}}
{{- else -}}
{{- $services = append $services (dict "name" $fullname) -}}
{{- end -}}
{{- $services | toJson -}}
{{- end -}}

{{- /* As JSON: [{replica, service, hostname}] of what leads in from outside, one for each replica. Takes (list $ VALUES). */ -}}
{{- define "offshoot.routes" -}}
{{- $ := index . 0 -}}
{{- $hostname := (index . 1).hostname -}}
{{- $fullname := include "offshoot.fullname" $ -}}
{{- $n := int $.Values.replicas -}}
{{- $routes := list -}}
{{- range $i := until $n -}}
{{- $service := ternary (printf "%s-%d" $fullname $i) $fullname (gt $n 1) -}}
{{- $routes = append $routes (dict "replica" $i "service" $service "hostname" ($hostname | replace "{replica}" (toString $i))) -}}
{{- end -}}
{{- $routes | toJson -}}
{{- end -}}

{{- /* As JSON, the host names of one way in that is on. Takes (list $ VALUES). */ -}}
{{- define "offshoot.hostnames" -}}
{{- $names := list -}}
{{- if (index . 1).enabled -}}
{{- range include "offshoot.routes" . | fromJsonArray -}}
{{- $names = append $names .hostname -}}
{{- end -}}
{{- end -}}
{{- $names | toJson -}}
{{- end -}}

{{- define "offshoot.appProtocol" -}}
{{- default (ternary "https" "kubernetes.io/h2c" (ne (include "offshoot.tlsOn" .) "")) .Values.service.appProtocol -}}
{{- end -}}

{{- define "offshoot.httpServicePort" -}}
- name: http
  port: {{ include "offshoot.httpPort" . }}
  targetPort: http
  protocol: TCP
  appProtocol: {{ ternary "https" "http" (ne (include "offshoot.tlsOn" .) "") }}
{{- end -}}
