{{- /* Names and labels. */ -}}

{{- define "offshoot.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- /* Short enough for what Kubernetes appends: a pod's number, a revision's hash, "-headless". */ -}}
{{- define "offshoot.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "offshoot.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "offshoot.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- /* What finds the server's pods, and never changes: a StatefulSet's selector cannot. */ -}}
{{- define "offshoot.selectorLabels" -}}
app.kubernetes.io/name: {{ include "offshoot.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end -}}

{{- /* For everything but pods. Takes (list $ COMPONENT). */ -}}
{{- define "offshoot.labelsOf" -}}
{{- $ := index . 0 -}}
helm.sh/chart: {{ printf "%s-%s" $.Chart.Name $.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ include "offshoot.name" $ }}
app.kubernetes.io/instance: {{ $.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: offshoot
app.kubernetes.io/managed-by: {{ $.Release.Service }}
{{- with $.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "offshoot.labels" -}}
{{- include "offshoot.labelsOf" (list . "server") -}}
{{- end -}}

{{- /* The lines `annotations:` of metadata, with those of all objects and those of one, if there are any. Takes (list $ OWN). */ -}}
{{- define "offshoot.annotations" -}}
{{- $ := index . 0 -}}
{{- with merge (dict) (index . 1 | default dict) $.Values.commonAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
{{- end }}
{{- end -}}

{{- define "offshoot.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "offshoot.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "offshoot.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- $usual := ternary (printf "%s-cuda" .Chart.AppVersion) .Chart.AppVersion .Values.gpu.enabled -}}
{{- printf "%s:%s" $image.repository (default $usual $image.tag) -}}
{{- end -}}
{{- end -}}

{{- /* The name by which the cluster's clients reach replica 0, or the only one. */ -}}
{{- define "offshoot.host" -}}
{{- printf "%s.%s.svc" (include "offshoot.fullname" .) .Release.Namespace -}}
{{- end -}}

{{- /* A name in the server's certificate, for those who connect inside the cluster. */ -}}
{{- define "offshoot.serverName" -}}
{{- default (include "offshoot.host" .) .Values.tls.serverName -}}
{{- end -}}

{{- /* A number as Kubernetes wants it: Helm reads all numbers as floats, and writes large ones as 1e+06. */ -}}
{{- define "offshoot.int" -}}
{{- printf "%d" (int64 .) -}}
{{- end -}}
