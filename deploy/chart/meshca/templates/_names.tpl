{{/* Labels that select the pods of a component: (list . "ca"). */}}
{{- define "meshca.selector" -}}
app.kubernetes.io/name: meshca
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Labels of an object of a component. */}}
{{- define "meshca.labels" -}}
{{ include "meshca.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
{{- end }}

{{- define "meshca.agentName" -}}{{ .Release.Name }}-agent{{- end }}

{{/* Cluster-wide names hold the namespace: two releases of one name may stand in one cluster. */}}
{{- define "meshca.clusterName" -}}
{{- if eq .Release.Name .Release.Namespace }}{{ .Release.Name }}{{ else }}{{ .Release.Namespace }}-{{ .Release.Name }}{{ end -}}
{{- end }}

{{/* A container's image: (list . "meshca"). */}}
{{- define "meshca.image" -}}
{{- $image := (index . 0).Values.image -}}
{{ $image.registry }}/{{ index . 1 }}:{{ $image.tag | default (index . 0).Chart.AppVersion }}
{{- end }}

{{- define "meshca.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Has a daemon collect what it took before the container's memory limit, whatever that is set to. Kubernetes does no
arithmetic, so the limit's MiB are taken for as many million bytes, which is 95 % of it: the rest is for what the kernel
counts and the runtime does not. */}}
{{- define "meshca.memoryLimit" -}}
# What callers made it take is collected before the limit, not beyond it: at 95 %, the limit's MiB as millions of bytes.
env:
  - {name: MEMORY_MIB, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}
  - {name: GOMEMLIMIT, value: $(MEMORY_MIB)000000}
{{- end }}

{{/* What a container needs to call the API server as the pod's service account: for those alone that mount it. */}}
{{- define "meshca.apiAccess" -}}
- name: api
  projected:
    sources:
      - serviceAccountToken: {path: token, expirationSeconds: 3607}
      - configMap: {name: kube-root-ca.crt, items: [{key: ca.crt, path: ca.crt}]}
      - downwardAPI: {items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]}
{{- end }}

{{/* What ca.publish has the CA publish beside the agents' ConfigMap, by name: those alone that are there, as YAML. A key that
is null is not there, as in the CA's configuration. */}}
{{- define "meshca.published" -}}
{{- $publish := .Values.ca.publish | default dict }}
{{- $signer := (.Values.ca.signers | default dict).name | default "meshca.io/workload" }}
signer: {{ $signer }}
{{- if kindIs "map" $publish.clusterTrustBundle }}
clusterTrustBundle: "{{ replace "/" ":" $signer }}:{{ $publish.clusterTrustBundle.name | default "bundle" }}"
{{- end }}
{{- if kindIs "map" $publish.linkerd }}
linkerd: {namespace: {{ $publish.linkerd.namespace | default "linkerd" }}, name: {{ $publish.linkerd.name | default "linkerd-identity-trust-roots" }}}
{{- end }}
{{- if kindIs "map" $publish.istio }}
istio: {{ $publish.istio.name | default "istio-ca-root-cert" }}
{{- end }}
{{- end }}

{{- define "meshca.openshift" -}}
{{- if .Capabilities.APIVersions.Has "security.openshift.io/v1" }}true{{ end -}}
{{- end }}

{{/* Annotations of what is made when the chart is uninstalled, in the order of the weights, and goes with its work done. */}}
{{- define "meshca.uninstallHook" -}}
helm.sh/hook: post-delete
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}
