{{- /* What the schema cannot say: values that do not go together. All mistakes at once. */ -}}
{{- define "offshoot.validate" -}}
{{- $all := concat
    (include "offshoot.mistakesOfModel" . | fromJsonArray)
    (include "offshoot.mistakesOfAccess" . | fromJsonArray)
    (include "offshoot.mistakesOfRoutes" . | fromJsonArray)
    (include "offshoot.mistakesOfStore" . | fromJsonArray)
    (include "offshoot.mistakesOfWatching" . | fromJsonArray) -}}
{{- if $all -}}
{{- fail (printf "\n\n%d mistakes in the values of offshoot:\n\n- %s\n" (len $all) (join "\n- " $all)) -}}
{{- end -}}
{{- end -}}

{{- define "offshoot.mistakesOfModel" -}}
{{- $m := list -}}
{{- $model := .Values.config.model | default dict -}}
{{- $name := $model.name | default "" -}}
{{- if not .Values.image.repository -}}
{{- $m = append $m "image.repository is empty: expected the repository that you have pushed an image of docker/ to, such as registry.example.com/ml/offshoot" -}}
{{- end -}}
{{- if not $name -}}
{{- $m = append $m "config.model.name is empty: expected a folder or GGUF file below /models (with model.existingClaim or model.image), or a hub name such as Qwen/Qwen2-0.5B (with model.download.enabled=true)" -}}
{{- end -}}
{{- if le (int ($model.split_point_2 | default 0)) (int ($model.split_point_1 | default 0)) -}}
{{- $m = append $m (printf "config.model.split_point_2 is %d: expected a layer behind config.model.split_point_1 = %d; the server holds the layers between them" (int ($model.split_point_2 | default 0)) (int ($model.split_point_1 | default 0))) -}}
{{- end -}}
{{- $sources := list -}}
{{- if .Values.model.existingClaim.name }}{{ $sources = append $sources "model.existingClaim" }}{{ end -}}
{{- if .Values.model.image.reference }}{{ $sources = append $sources "model.image" }}{{ end -}}
{{- if .Values.model.download.enabled }}{{ $sources = append $sources "model.download" }}{{ end -}}
{{- if gt (len $sources) 1 -}}
{{- $m = append $m (printf "the model comes from %s: expected one of them" (join " and " $sources)) -}}
{{- end -}}
{{- $isPath := or (hasPrefix "/" $name) (hasSuffix ".gguf" $name) -}}
{{- if and $name $isPath .Values.model.download.enabled -}}
{{- $m = append $m (printf "model.download.enabled is true, but config.model.name is the path %q: expected a hub name such as Qwen/Qwen2-0.5B" $name) -}}
{{- end -}}
{{- if and $name (not $isPath) (not .Values.model.download.enabled) -}}
{{- $m = append $m (printf "config.model.name is the hub name %q, and nothing downloads it: set model.download.enabled=true, or name a folder below /models" $name) -}}
{{- end -}}
{{- if and (or .Values.model.existingClaim.name .Values.model.image.reference) $isPath (not (hasPrefix "/models" $name)) -}}
{{- $m = append $m (printf "config.model.name is %q, but the model's volume is at /models: expected a path in it, such as /models/my-model" $name) -}}
{{- end -}}
{{- if and .Values.model.image.reference (semverCompare "<1.33.0-0" .Capabilities.KubeVersion.Version) -}}
{{- $m = append $m (printf "model.image needs image volumes, which this cluster (%s) does not have: expected Kubernetes 1.33 with the feature gate ImageVolume, or 1.35; use model.existingClaim or model.download" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- $device := $model.device | default "cpu" -}}
{{- if and .Values.gpu.enabled (eq $device "cpu") -}}
{{- $m = append $m "gpu.enabled is true, but config.model.device is \"cpu\": set config.model.device=cuda, or the GPU would stand idle" -}}
{{- end -}}
{{- if and (hasPrefix "cuda" $device) (not .Values.gpu.enabled) (not .Values.resourceClaims) -}}
{{- $m = append $m (printf "config.model.device is %q, but the pod gets no GPU: set gpu.enabled=true (or give it one with resourceClaims and resources.claims)" $device) -}}
{{- end -}}
{{- $m | toJson -}}
{{- end -}}

{{- define "offshoot.mistakesOfAccess" -}}
{{- $m := list -}}
{{- $tls := .Values.tls -}}
{{- $listen := .Values.config.listen -}}
{{- $loopback := or (eq $listen.host "localhost") (hasPrefix "127." $listen.host) (eq $listen.host "::1") -}}
{{- if $loopback -}}
{{- $m = append $m (printf "config.listen.host is %q: expected an address that the Service and the kubelet's probes reach, such as 0.0.0.0, or :: with IPv6" $listen.host) -}}
{{- else if not $listen.allow_insecure_network -}}
{{- if not (include "offshoot.tenantsOn" .) -}}
{{- $m = append $m "nobody has to show a token: whoever reaches the server could train, export and delete everything. Give it tenants (tenants.existingSecret, or tenants.content by --set-file; `offshoot tenant add` writes the file), or set config.listen.allow_insecure_network=true in a network that keeps strangers out (networkPolicy.enabled=true)" -}}
{{- end -}}
{{- if not (include "offshoot.tlsOn" .) -}}
{{- $m = append $m "TLS is off: tokens could be read on their way. Turn it on (tls.enabled=true with tls.existingSecret, tls.certManager or tls.content), or set config.listen.allow_insecure_network=true in a network that nobody listens to, such as a mesh that encrypts" -}}
{{- end -}}
{{- end -}}
{{- if .Values.tls.enabled -}}
{{- $sources := list -}}
{{- if $tls.existingSecret }}{{ $sources = append $sources "tls.existingSecret" }}{{ end -}}
{{- if $tls.content.cert }}{{ $sources = append $sources "tls.content" }}{{ end -}}
{{- if $tls.certManager.enabled }}{{ $sources = append $sources "tls.certManager" }}{{ end -}}
{{- if and (not $sources) (not (or $tls.content.cert $tls.content.key)) -}}
{{- $m = append $m "tls.enabled is true, but there is no certificate: expected one of tls.existingSecret, tls.certManager.enabled=true, or tls.content.cert and tls.content.key by --set-file" -}}
{{- end -}}
{{- if and (gt (len $sources) 1) (has "tls.content" $sources) -}}
{{- $m = append $m (printf "the certificate comes from %s: expected one of them" (join " and " $sources)) -}}
{{- end -}}
{{- if ne (empty $tls.content.cert) (empty $tls.content.key) -}}
{{- $m = append $m "tls.content has a certificate without a key, or a key without a certificate: expected both, by --set-file tls.content.cert=FILE and --set-file tls.content.key=FILE" -}}
{{- end -}}
{{- if and $tls.certManager.enabled (not $tls.certManager.issuerRef.name) -}}
{{- $m = append $m "tls.certManager.enabled is true, but tls.certManager.issuerRef.name is empty: expected the name of an Issuer (or, with issuerRef.kind, a ClusterIssuer)" -}}
{{- end -}}
{{- if (.Values.config.tls).cert -}}
{{- $m = append $m "config.tls.cert is set and tls.enabled is true: expected one of them. With tls.enabled the chart mounts the certificate and names it itself" -}}
{{- end -}}
{{- else -}}
{{- if include "offshoot.hasClientCa" . -}}
{{- $m = append $m "tls.clientCA asks clients for certificates, but tls.enabled is false: expected TLS with it" -}}
{{- end -}}
{{- if or $tls.existingSecret $tls.content.cert $tls.certManager.enabled -}}
{{- $m = append $m "there is a certificate below tls, but tls.enabled is false: expected tls.enabled=true" -}}
{{- end -}}
{{- end -}}
{{- if and (include "offshoot.hasTenants" .) (.Values.config.access).tenants -}}
{{- $m = append $m "config.access.tenants is set beside tenants.existingSecret or tenants.content: expected one of them. The chart names the file that it mounts itself" -}}
{{- end -}}
{{- if and .Values.tenants.existingSecret .Values.tenants.content -}}
{{- $m = append $m "the tenants come from tenants.existingSecret and tenants.content: expected one of them" -}}
{{- end -}}
{{- $m | toJson -}}
{{- end -}}

{{- define "offshoot.mistakesOfRoutes" -}}
{{- $m := list -}}
{{- range $kind, $way := dict "gateway" .Values.gateway "ingress" .Values.ingress -}}
{{- if $way.enabled -}}
{{- if not $way.hostname -}}
{{- $m = append $m (printf "%s.hostname is empty: expected the name that clients connect to, such as trunk.example.com" $kind) -}}
{{- else if and (gt (int $.Values.replicas) 1) (not (contains "{replica}" $way.hostname)) -}}
{{- $m = append $m (printf "%s.hostname is %q with %d replicas: expected {replica} in it, such as trunk-{replica}.example.com. A session lives in one replica, so that each needs a name of its own" $kind $way.hostname (int $.Values.replicas)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (gt (int .Values.replicas) 1) .Values.service.nodePort -}}
{{- $m = append $m (printf "service.nodePort is %d with %d replicas: expected 0, since each replica has a Service of its own" (int .Values.service.nodePort) (int .Values.replicas)) -}}
{{- end -}}
{{- $tls := include "offshoot.tlsOn" . -}}
{{- with .Values.gateway -}}
{{- if .enabled -}}
{{- if not .parentRefs -}}
{{- $m = append $m "gateway.parentRefs is empty: expected the Gateway that the route is attached to, such as [{name: public, namespace: gateways, sectionName: grpc}]" -}}
{{- end -}}
{{- if and (eq .mode "passthrough") (not $tls) -}}
{{- $m = append $m "gateway.mode is \"passthrough\", but the server has no TLS to pass on to: set tls.enabled=true, or gateway.mode=terminate" -}}
{{- end -}}
{{- if and (eq .mode "terminate") (include "offshoot.clientCaOn" $) -}}
{{- $m = append $m "gateway.mode is \"terminate\", but the server asks for clients' certificates, which a gateway that ends TLS cannot show: set gateway.mode=passthrough" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with .Values.ingress -}}
{{- if .enabled -}}
{{- if and .passthrough (not $tls) -}}
{{- $m = append $m "ingress.passthrough is true, but the server has no TLS to pass on to: set tls.enabled=true" -}}
{{- end -}}
{{- if and (not .passthrough) (include "offshoot.clientCaOn" $) -}}
{{- $m = append $m "the ingress ends TLS, but the server asks for clients' certificates, which the ingress cannot show: set ingress.passthrough=true" -}}
{{- end -}}
{{- if and (not .passthrough) (not .tlsSecret) -}}
{{- $m = append $m "ingress.tlsSecret is empty: expected the secret with the certificate of ingress.hostname; clients' tokens never travel without TLS" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $m | toJson -}}
{{- end -}}

{{- define "offshoot.mistakesOfStore" -}}
{{- $m := list -}}
{{- $dir := (.Values.config.store).dir | default "" -}}
{{- if not (hasPrefix "/var/lib/offshoot/" $dir) -}}
{{- $m = append $m (printf "config.store.dir is %q: expected a folder below /var/lib/offshoot/, where the store's volume is; anything else is gone with the pod" $dir) -}}
{{- end -}}
{{- range $key, $path := dict "access.audit_log" ((.Values.config.access).audit_log | default "") "telemetry.metering_log" ((.Values.config.telemetry).metering_log | default "") -}}
{{- if and $path (not (hasPrefix "/" $path)) -}}
{{- $m = append $m (printf "config.%s is %q: expected a whole path in a volume that can be written, such as /var/lib/offshoot/%s" $key $path $path) -}}
{{- end -}}
{{- end -}}
{{- if and (gt (int .Values.replicas) 1) .Values.store.existingClaim -}}
{{- $m = append $m (printf "store.existingClaim is set with %d replicas: expected one replica, since a store has one server. Without it each replica gets a volume of its own" (int .Values.replicas)) -}}
{{- end -}}
{{- if include "offshoot.overlaps" . -}}
{{- if gt (int .Values.replicas) 1 -}}
{{- $m = append $m (printf "rollout.overlapSeconds is set with %d replicas: expected one. Install one release for each trunk" (int .Values.replicas)) -}}
{{- end -}}
{{- if and (not .Values.store.persistent) (not .Values.store.existingClaim) -}}
{{- $m = append $m "rollout.overlapSeconds is set with store.persistent=false: expected a store that the successor finds" -}}
{{- end -}}
{{- if and (not .Values.rollout.sameNode) (not .Values.store.existingClaim) (not (has "ReadWriteMany" .Values.store.accessModes)) -}}
{{- $m = append $m "rollout.sameNode is false, but store.accessModes have no ReadWriteMany: two nodes cannot have the volume at a time. Expected rollout.sameNode=true, or a ReadWriteMany volume whose file locks work between nodes" -}}
{{- end -}}
{{- if has "ReadWriteOncePod" .Values.store.accessModes -}}
{{- $m = append $m "rollout.overlapSeconds is set with the access mode ReadWriteOncePod: expected ReadWriteOnce, since two pods have the volume for a while" -}}
{{- end -}}
{{- end -}}
{{- $startup := .Values.probes.startup -}}
{{- $longest := mul (int64 $startup.periodSeconds) (int64 $startup.failureThreshold) -}}
{{- if and (include "offshoot.overlaps" .) (lt $longest (int64 (include "offshoot.graceSeconds" .))) -}}
{{- $m = append $m (printf "the startup probe gives up after %d seconds, but the successor may wait %s for its predecessor: raise probes.startup.failureThreshold" $longest (include "offshoot.graceSeconds" .)) -}}
{{- end -}}
{{- $handler := include "offshoot.probeHandler" . -}}
{{- if and (eq $handler "grpc") (include "offshoot.tlsOn" .) -}}
{{- $m = append $m "probes.handler is \"grpc\", but the server speaks TLS and Kubernetes' gRPC probes do not: expected auto, exec or http" -}}
{{- end -}}
{{- if and (eq $handler "http") (not (include "offshoot.httpOn" .)) -}}
{{- $m = append $m "probes.handler is \"http\", but config.http.port is null: expected a port such as 9464, or another handler" -}}
{{- end -}}
{{- if and (eq $handler "exec") (include "offshoot.clientCaOn" .) (not .Values.probes.clientCertificateSecret) -}}
{{- $m = append $m "the probes run `offshoot health` and the server asks for clients' certificates: expected probes.clientCertificateSecret, or a config.http.port with probes.handler auto or http" -}}
{{- end -}}
{{- $m | toJson -}}
{{- end -}}

{{- define "offshoot.mistakesOfWatching" -}}
{{- $m := list -}}
{{- $monitor := .Values.metrics.serviceMonitor -}}
{{- if $monitor.enabled -}}
{{- if not (include "offshoot.httpOn" .) -}}
{{- $m = append $m "metrics.serviceMonitor.enabled is true, but config.http.port is null: expected a port such as 9464" -}}
{{- end -}}
{{- if and (include "offshoot.tenantsOn" .) (not (.Values.config.http).open_metrics) (not $monitor.tokenSecret.name) -}}
{{- $m = append $m "metrics.serviceMonitor.enabled is true, but /metrics wants an operator's token: expected metrics.serviceMonitor.tokenSecret.name (`offshoot tenant add prometheus --operator`), or config.http.open_metrics=true with a networkPolicy around it" -}}
{{- end -}}
{{- end -}}
{{- $m | toJson -}}
{{- end -}}
