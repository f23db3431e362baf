{{- /* The pod of the StatefulSet, or of the Deployment when rollouts overlap. */ -}}

{{- define "offshoot.podTemplate" -}}
metadata:
  labels:
    {{- include "offshoot.selectorLabels" . | nindent 4 }}
    {{- with merge (dict) .Values.podLabels .Values.commonLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: offshoot
    # The server reads its settings once. Tenants and certificates it reads again by itself: they are not here.
    checksum/settings: {{ include "offshoot.serverToml" . | sha256sum }}
    {{- with merge (dict) .Values.podAnnotations .Values.commonAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "offshoot.serviceAccountName" . }}
  automountServiceAccountToken: false
  # Variables of other Services would begin with the server's own prefix.
  enableServiceLinks: false
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .Values.gpu.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with .Values.schedulerName }}
  schedulerName: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ include "offshoot.graceSeconds" . }}
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "offshoot.tolerations" . | fromYamlArray }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "offshoot.affinity" . | fromYaml }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- range . }}
    - {{ mergeOverwrite (dict "labelSelector" (dict "matchLabels" (include "offshoot.selectorLabels" $ | fromYaml))) . | toYaml | nindent 6 | trim }}
    {{- end }}
  {{- end }}
  {{- with .Values.resourceClaims }}
  resourceClaims:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if or .Values.model.download.enabled .Values.extraInitContainers }}
  initContainers:
    {{- if .Values.model.download.enabled }}
    {{- include "offshoot.downloadContainer" . | nindent 4 }}
    {{- end }}
    {{- with .Values.extraInitContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    {{- include "offshoot.serverContainer" . | nindent 4 }}
    {{- with .Values.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "offshoot.volumes" . | nindent 4 }}
{{- end -}}

{{- define "offshoot.tolerations" -}}
{{- $all := .Values.tolerations -}}
{{- if and .Values.gpu.enabled .Values.gpu.taintKey -}}
{{- $all = append $all (dict "key" .Values.gpu.taintKey "operator" "Exists" "effect" "NoSchedule") -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{- /* Two pods share a ReadWriteOnce store only on one node. */ -}}
{{- define "offshoot.affinity" -}}
{{- $affinity := deepCopy .Values.affinity -}}
{{- if and (include "offshoot.overlaps" .) .Values.rollout.sameNode -}}
{{- $labels := include "offshoot.selectorLabels" . | fromYaml -}}
{{- $term := dict "labelSelector" (dict "matchLabels" $labels) "topologyKey" "kubernetes.io/hostname" -}}
{{- $pods := $affinity.podAffinity | default dict -}}
{{- $terms := append ($pods.requiredDuringSchedulingIgnoredDuringExecution | default list) $term -}}
{{- $_ := set $affinity "podAffinity" (merge (dict "requiredDuringSchedulingIgnoredDuringExecution" $terms) $pods) -}}
{{- end -}}
{{- toYaml $affinity -}}
{{- end -}}

{{- define "offshoot.downloadContainer" -}}
- name: download-model
  image: {{ include "offshoot.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [{{ .Values.image.binary }}]
  # Does nothing when the cache has the whole model: a restart needs no hub, and stays with its version.
  args: [fetch, {{ .Values.config.model.name | quote }}, --log-format, {{ .Values.log.format }}]
  env:
    - name: HOME
      value: /tmp
    - name: HF_HOME
      value: /var/cache/offshoot
    {{- with .Values.model.download.endpoint }}
    - name: HF_ENDPOINT
      value: {{ . | quote }}
    {{- end }}
    {{- if .Values.model.download.tokenSecret.name }}
    - name: HF_TOKEN_PATH
      value: /etc/offshoot-hub/{{ .Values.model.download.tokenSecret.key }}
    {{- end }}
    {{- with .Values.model.download.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  securityContext:
    {{- toYaml .Values.securityContext | nindent 4 }}
  resources:
    {{- toYaml .Values.model.download.resources | nindent 4 }}
  volumeMounts:
    - name: model-cache
      mountPath: /var/cache/offshoot
    - name: tmp
      mountPath: /tmp
    {{- if .Values.model.download.tokenSecret.name }}
    - name: hub-token
      mountPath: /etc/offshoot-hub
      readOnly: true
    {{- end }}
{{- end -}}

{{- define "offshoot.serverContainer" -}}
- name: offshoot
  image: {{ include "offshoot.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [{{ .Values.image.binary }}]
  args: [serve, --config, /etc/offshoot/server.toml, --log, {{ .Values.log.filter | quote }}, --log-format, {{ .Values.log.format }}]
  env:
    {{- include "offshoot.env" . | nindent 4 }}
  {{- with .Values.extraEnvFrom }}
  envFrom:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  ports:
    - name: grpc
      containerPort: {{ include "offshoot.grpcPort" . }}
      protocol: TCP
    {{- if include "offshoot.httpOn" . }}
    - name: http
      containerPort: {{ include "offshoot.httpPort" . }}
      protocol: TCP
    {{- end }}
  {{- include "offshoot.probes" . | nindent 2 }}
  {{- $sleep := int (include "offshoot.preStopSeconds" .) }}
  {{- if $sleep }}
  lifecycle:
    # SIGTERM alone drains: open work ends, every session is saved. Until it comes, whoever balances the
    # load learns that this pod leaves; its clients go on training meanwhile.
    preStop:
      sleep:
        seconds: {{ $sleep }}
  {{- end }}
  securityContext:
    {{- toYaml .Values.securityContext | nindent 4 }}
  resources:
    {{- include "offshoot.resources" . | nindent 4 }}
  volumeMounts:
    {{- include "offshoot.mounts" . | nindent 4 }}
{{- end -}}

{{- define "offshoot.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if .Values.gpu.enabled -}}
{{- $limits := $resources.limits | default dict -}}
{{- $_ := set $limits .Values.gpu.resourceName 1 -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "offshoot.env" -}}
- name: HOME
  value: /tmp
{{- if .Values.model.download.enabled }}
- name: HF_HOME
  value: /var/cache/offshoot
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- $given := list }}
{{- range .Values.extraEnv }}{{ $given = append $given .name }}{{ end }}
{{- if and (.Values.config.telemetry).otlp_endpoint (not (has "OTEL_RESOURCE_ATTRIBUTES" $given)) }}
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: NODE_NAME
  valueFrom:
    fieldRef:
      fieldPath: spec.nodeName
- name: OTEL_RESOURCE_ATTRIBUTES
  value: service.instance.id=$(POD_NAME),k8s.pod.name=$(POD_NAME),k8s.node.name=$(NODE_NAME),k8s.namespace.name={{ .Release.Namespace }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}
