{{- /* Whole folders, never a subPath: the kubelet renews only those, and the server reads tenants and certificates again. */ -}}
{{- define "offshoot.mounts" -}}
- name: settings
  mountPath: /etc/offshoot
  readOnly: true
- name: store
  mountPath: /var/lib/offshoot
- name: tmp
  mountPath: /tmp
{{- if include "offshoot.hasTenants" . }}
- name: tenants
  mountPath: /etc/offshoot-tenants
  readOnly: true
{{- end }}
{{- if .Values.tls.enabled }}
- name: tls
  mountPath: /etc/offshoot-tls
  readOnly: true
{{- if include "offshoot.hasClientCa" . }}
- name: client-ca
  mountPath: /etc/offshoot-client-ca
  readOnly: true
{{- end }}
{{- if .Values.probes.clientCertificateSecret }}
- name: probe-certificate
  mountPath: /etc/offshoot-probe
  readOnly: true
{{- end }}
{{- end }}
{{- if or .Values.model.existingClaim.name .Values.model.image.reference }}
- name: model
  mountPath: /models
  {{- with .Values.model.existingClaim.subPath }}
  subPath: {{ . | quote }}
  {{- end }}
  readOnly: true
{{- end }}
{{- if .Values.model.download.enabled }}
- name: model-cache
  mountPath: /var/cache/offshoot
  readOnly: true
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "offshoot.volumes" -}}
- name: settings
  configMap:
    name: {{ include "offshoot.fullname" . }}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.tmpSizeLimit }}
{{- if include "offshoot.hasTenants" . }}
- name: tenants
  secret:
    secretName: {{ default (printf "%s-tenants" (include "offshoot.fullname" .)) .Values.tenants.existingSecret }}
    defaultMode: 288 # 0440
{{- end }}
{{- if .Values.tls.enabled }}
- name: tls
  secret:
    secretName: {{ include "offshoot.tlsSecret" . }}
    defaultMode: 288 # 0440
{{- if include "offshoot.hasClientCa" . }}
- name: client-ca
  {{- if .Values.tls.clientCA.existingSecret }}
  secret:
    secretName: {{ .Values.tls.clientCA.existingSecret }}
    defaultMode: 288 # 0440
    # Of a CA's own secret only the certificate: its key has no business here.
    items:
      - key: {{ .Values.tls.clientCA.key }}
        path: {{ .Values.tls.clientCA.key }}
  {{- else }}
  configMap:
    name: {{ default (printf "%s-client-ca" (include "offshoot.fullname" .)) .Values.tls.clientCA.existingConfigMap }}
  {{- end }}
{{- end }}
{{- with .Values.probes.clientCertificateSecret }}
- name: probe-certificate
  secret:
    secretName: {{ . }}
    defaultMode: 288 # 0440
{{- end }}
{{- end }}
{{- if .Values.model.existingClaim.name }}
- name: model
  persistentVolumeClaim:
    claimName: {{ .Values.model.existingClaim.name }}
    readOnly: true
{{- else if .Values.model.image.reference }}
- name: model
  image:
    reference: {{ .Values.model.image.reference }}
    pullPolicy: {{ .Values.model.image.pullPolicy }}
{{- end }}
{{- if .Values.model.download.enabled }}
{{- if .Values.model.download.tokenSecret.name }}
- name: hub-token
  secret:
    secretName: {{ .Values.model.download.tokenSecret.name }}
    defaultMode: 288 # 0440
{{- end }}
{{- if .Values.model.download.cache.existingClaim }}
- name: model-cache
  persistentVolumeClaim:
    claimName: {{ .Values.model.download.cache.existingClaim }}
{{- else if not .Values.model.download.cache.persistent }}
- name: model-cache
  emptyDir:
    sizeLimit: {{ .Values.model.download.cache.size }}
{{- else if include "offshoot.overlaps" . }}
- name: model-cache
  persistentVolumeClaim:
    claimName: {{ include "offshoot.fullname" . }}-model-cache
{{- end }}
{{- end }}
{{- if .Values.store.existingClaim }}
- name: store
  persistentVolumeClaim:
    claimName: {{ .Values.store.existingClaim }}
{{- else if not .Values.store.persistent }}
- name: store
  emptyDir:
    sizeLimit: {{ .Values.store.size }}
{{- else if include "offshoot.overlaps" . }}
- name: store
  persistentVolumeClaim:
    claimName: {{ include "offshoot.fullname" . }}-store
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "offshoot.tlsSecret" -}}
{{- default (printf "%s-tls" (include "offshoot.fullname" .)) .Values.tls.existingSecret -}}
{{- end -}}

{{- /* The claims that are the chart's own, by name, as JSON: of the store and of the model's cache. */ -}}
{{- define "offshoot.claims" -}}
{{- $claims := dict -}}
{{- if and .Values.store.persistent (not .Values.store.existingClaim) -}}
{{- $_ := set $claims "store" .Values.store -}}
{{- end -}}
{{- with .Values.model.download -}}
{{- if and .enabled .cache.persistent (not .cache.existingClaim) -}}
{{- $_ := set $claims "model-cache" .cache -}}
{{- end -}}
{{- end -}}
{{- $claims | toJson -}}
{{- end -}}

{{- define "offshoot.claimSpec" -}}
accessModes:
  {{- toYaml .accessModes | nindent 2 }}
{{- with .storageClassName }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests:
    storage: {{ .size }}
{{- end -}}
